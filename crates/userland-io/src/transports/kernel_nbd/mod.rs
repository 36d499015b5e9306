//! A kernel block device, `/dev/nbdN`, by Linux's NBD client and a server in this process (Linux 4.19 and later, as root).
//!
//! ```no_run
//! # async fn example() -> userland_io::Result<()> {
//! use userland_io::{Device, engines::Memory, transports::kernel_nbd};
//!
//! let disk = Device::open(Memory::new(1 << 30)).await?;
//! let block = kernel_nbd::Target::new(disk.clone()).connect().await?;
//! println!("{}", block.path().display());
//! tokio::signal::ctrl_c().await?;
//! block.shutdown().await?;
//! disk.close().await
//! # }
//! ```
//!
//! The driver is told what to do by generic netlink (`netlink`, `control`), and gets the far ends of socket pairs. At the near
//! ends is the NBD server's transmission phase, on a thread for each connection (`connections`). A further thread
//! looks after the device from its making to its end (`life`), since the driver's commands block.
//!
//! Somebody else's server can be at the other end as well (`remote`): then this process moves no bytes.

mod connections;
mod control;
mod error;
mod life;
mod netlink;
mod remote;
mod served;
mod target;

pub use control::Identity;
pub use error::Error;
pub use life::BlockDevice;
pub use remote::Remote;
#[cfg(feature = "attach")]
pub(crate) use target::remove_unused;
pub use target::{Target, available, remove};
