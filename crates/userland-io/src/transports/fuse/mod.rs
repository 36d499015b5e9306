//! A disk as a file, over FUSE. Linux only; as root, or where `fusermount3` is installed.
//!
//! ```no_run
//! # async fn example() -> userland_io::Result<()> {
//! use userland_io::{Device, engines::Memory, transports::fuse};
//!
//! let disk = Device::open(Memory::new(1 << 30)).await?;
//! let mounted = fuse::File::new(disk).mount("/run/disk").await?;
//! tokio::signal::ctrl_c().await?;
//! mounted.unmount().await?;
//! # Ok(()) }
//! ```
//!
//! The file is the mount: nothing but its own path is covered (`mount`, and `kernel` for the system calls). `file` is
//! the file system as the kernel asks for it, over the crate fuser; `requests` runs what takes the engine, `serve` is one such request,
//! and `session` is the life of all that serves a mount.
//!
//! Bytes bypass the page cache, many requests are in flight at once, and a flush is `fsync`. The crate's `attach` puts
//! a loop device over such a file, without mounting it anywhere.

mod error;
mod file;
mod kernel;
mod mount;
mod requests;
mod serve;
mod session;

pub use error::Error;
pub use mount::{File, Mounted};
#[cfg(feature = "attach")]
pub(crate) use {
    kernel::{DEVICE, open_in},
    mount::Unseen,
    session::Session,
};
