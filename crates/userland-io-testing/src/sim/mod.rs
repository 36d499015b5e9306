//! The simulated world: time, chance, and disks that can crash.
//!
//! Everything that happens is drawn from one seeded generator and runs on one
//! thread, so a run repeats exactly from its seed. [`World`] is the handle that
//! disks and tests share, [`Executor`] polls the tasks of a run in random order,
//! and [`SimDisk`] is the engine at the bottom whose bytes a crash can take.

mod disk;
mod executor;
mod store;
mod world;

pub use disk::{AfterFailedFlush, DiskConfig, SimDisk};
pub use executor::{Executor, Step};
pub use store::{Keep, Tail};
pub use world::World;

#[cfg(test)]
mod tests;
