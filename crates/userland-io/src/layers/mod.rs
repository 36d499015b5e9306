//! The layers that come with the library. Each holds the engine below behind its
//! edge and knows the contract only.
//!
//! A layer is put over an engine by a value with its settings:
//!
//! ```
//! use std::time::Duration;
//! use userland_io::layers::{Delay, Stats};
//! use userland_io::{EngineExt, engines::Memory};
//!
//! # fn main() -> userland_io::Result {
//! let stats = Stats::new();
//! let disk = Memory::new(1 << 30)
//!     .layer(Delay::new().read(Duration::from_millis(5)))?
//!     .layer(stats.clone())?;
//! # let _ = disk;
//! # Ok(())
//! # }
//! ```

mod delay;
mod fault;
mod offset;
mod operation;
mod partition;
mod readonly;
mod stats;

pub use delay::{Delay, DelayEngine};
pub use fault::{Fault, FaultEngine, FaultHandle};
pub use offset::{Offset, OffsetEngine};
pub use operation::Operation;
pub use partition::{Partition, PartitionTable, TableKind};
pub use readonly::{ReadOnly, ReadOnlyEngine};
pub use stats::{Count, Stats, StatsEngine};
