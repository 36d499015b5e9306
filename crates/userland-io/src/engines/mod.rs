//! The engines that come with the library. Each knows the contract only.

mod file;
mod memory;
mod null;
mod pattern;

pub use file::{Aio, File, OpenFile};
pub use memory::Memory;
pub use null::Null;
pub use pattern::Pattern;
