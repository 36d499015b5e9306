//! Like FUSE, but for the block layer.
#![warn(clippy::undocumented_unsafe_blocks)]

mod any;
mod blocking;
mod buf;
mod checked;
mod device;
mod engine;
mod error;
mod extents;
mod filter;
mod geometry;
mod slots;
mod threads;

pub mod copy;
pub mod engines;
pub mod layers;
pub mod stack;
pub mod transports;

pub use any::AnyEngine;
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
