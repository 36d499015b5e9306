//! A kernel block device, `/dev/ublkbN`, by Linux's ublk driver (Linux 6.5 and later, as root).
//!
//! ```no_run
//! # async fn example() -> userland_io::Result<()> {
//! use userland_io::{Device, engines::Memory, transports::ublk};
//!
//! let disk = Device::open(Memory::new(1 << 30)).await?;
//! let block = ublk::Target::new(disk).add().await?;
//! println!("{}", block.path().display());
//! tokio::signal::ctrl_c().await?;
//! block.shutdown().await?;
//! # Ok(()) }
//! ```
//!
//! Each hardware queue has a thread with a ring of its own (`queue`), and each of its tags a
//! task, made once (`serve`). A device's life is run by a thread as well (`life`), since commands
//! to the driver block (`control`); the threads are inside a tokio runtime of the transport's own, so an engine can
//! use timers and sockets, and a caller may block on its own block device whatever runtime it is in.
//!
//! What the kernel is told of the disk is derived from the engine's claims alone (`params`). Bytes are copied once,
//! by the kernel, between a request's pages and the tag's buffer (`memory`).

mod abi;
mod control;
mod error;
mod life;
mod memory;
mod params;
mod places;
mod queues;
mod recover;
mod serve;
mod target;

pub use error::Error;
pub use life::BlockDevice;
#[cfg(feature = "attach")]
pub(crate) use places::identity;
pub use target::{Info, State, Target, devices, remove};
#[cfg(feature = "attach")]
pub(crate) use target::{available, remove_unused, tagged};
