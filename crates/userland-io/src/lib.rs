//! Like FUSE, but for the block layer: write a storage engine, get a disk.
//!
//! An [`Engine`] of two methods is a read-only disk, one of four a writable one. Open it as a
//! [`Device`], and any transport serves it:
//!
//! ```no_run
//! use std::sync::RwLock;
//! use userland_io::{CrashLevel, Device, Engine, Geometry, ReadBuf, Result, WriteBuf, WriteFlags};
//! # #[cfg(feature = "nbd")]
//! use userland_io::transports::nbd;
//!
//! struct Ramdisk(RwLock<Vec<u8>>);
//!
//! impl Engine for Ramdisk {
//!     fn geometry(&self) -> Geometry {
//!         Geometry::writable(self.0.read().unwrap().len() as u64, CrashLevel::None)
//!     }
//!     async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
//!         buf.copy_from(&self.0.read().unwrap()[offset as usize..][..buf.len()]);
//!         Ok(())
//!     }
//!     async fn write(&self, buf: &WriteBuf<'_>, offset: u64, _: WriteFlags) -> Result {
//!         buf.copy_to(&mut self.0.write().unwrap()[offset as usize..][..buf.len()]);
//!         Ok(())
//!     }
//! }
//!
//! # #[cfg(feature = "nbd")]
//! #[tokio::main]
//! async fn main() -> Result {
//!     let disk = Device::open(Ramdisk(RwLock::new(vec![0; 64 << 20]))).await?;
//!     nbd::Server::new().export("ram", disk).serve("127.0.0.1:10809").await
//! }
//! # #[cfg(not(feature = "nbd"))]
//! # fn main() {}
//! ```
//!
//! Nothing in it checks a range, splits a request or emulates a flag: the device's edge
//! ([`Checked`]) lets only requests through that make sense. Besides this crate it needs `tokio` with the features
//! `rt-multi-thread` and `macros`. Served like this a disk is not closed on Ctrl-C; at [`transports::nbd`]'s `Server` is
//! an example that does.
//!
//! # Where to look
//!
//! | to | see |
//! |---|---|
//! | write an engine | [`Engine`], and [`BlockingEngine`] for one that blocks |
//! | say what it can do and what it promises | [`Geometry`], [`CrashLevel`], [`Discard`], [`Features`] |
//! | write a layer over another engine | [`Filter`], [`Layer`], [`Checked`] |
//! | use what is there | [`engines`], [`layers`], and [`stack`] to compose them from words at run time |
//! | serve it | [`Device`], [`transports`] |
//! | copy one disk onto another | [`copy`](mod@copy) |
//! | do without a program of your own | the command `ulio` of the source tree |
//! | test that an engine keeps its promises | the crate `userland-io-testing` |
//!
//! The guides `docs/writing-an-engine.md` and `docs/writing-a-layer.md` go through all of it step by step.
//!
//! # The contract
//!
//! What engines promise and callers guarantee is stated on [`Engine`] in short, and in full in
//! `docs/semantics.md` of the source tree. Every feature that a transport advertises is derived from an
//! engine's claims, and an engine that claims durability without having a `flush` does not open.
//!
//! # Cargo features
//!
//! * `nbd` (default): the NBD server and client, [`transports::nbd`].
//! * `attach` (Linux): block devices under `/dev`, the module `attach`. It takes `ublk`, `kernel-nbd` and `fuse` with it, the
//!   ways to make them.
//! * `kernel-nbd` (Linux): kernel block devices by the kernel's NBD client, `transports::kernel_nbd`. It takes `nbd` with it.
//! * `ublk` (Linux): kernel block devices by the ublk driver, `transports::ublk`.
//! * `fuse` (Linux): a disk as a file, `transports::fuse`.

#[cfg(all(feature = "attach", target_os = "linux"))]
pub mod attach;

mod any;
#[cfg(target_os = "linux")]
mod bell;
mod blocking;
mod buf;
mod checked;
mod device;
mod engine;
mod error;
mod extents;
mod filter;
mod geometry;
mod give_way;
mod slots;
mod threads;
#[cfg(all(target_os = "linux", feature = "ublk"))]
mod uring;
#[cfg(all(any(feature = "ublk", feature = "nbd"), target_os = "linux"))]
mod wake;

pub mod copy;
pub mod engines;
pub mod layers;
pub mod queue;
pub mod stack;
pub mod transports;

pub use any::AnyEngine;
#[cfg(all(feature = "attach", target_os = "linux"))]
pub use attach::attach;
pub use blocking::{Blocking, BlockingEngine};
pub use buf::{AlignedBuf, ReadBuf, Segment, WriteBuf};
pub use checked::Checked;
pub use device::{Device, Histogram, Op, OpStats, OpenError, Stats};
pub use engine::Engine;
pub use error::{Error, ErrorKind, Result, errno};
pub use extents::{Extent, ExtentKind, Extents};
pub use filter::{EngineExt, Filter, Layer};
pub use geometry::{
    CrashLevel, Discard, Features, Geometry, InvalidGeometry, WriteFlags, changed_through,
};
pub use slots::Slots;

/// The README's program compiles.
#[cfg(all(doctest, feature = "nbd"))]
#[doc = include_str!("../../../README.md")]
struct Readme;

/// The code in the guides is compiled and run, so that it cannot rot.
#[cfg(doctest)]
mod guides {
    #[doc = include_str!("../../../docs/writing-an-engine.md")]
    struct WritingAnEngine;
    #[doc = include_str!("../../../docs/writing-a-layer.md")]
    struct WritingALayer;
}
