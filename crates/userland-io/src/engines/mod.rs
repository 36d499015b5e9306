//! The engines that come with the library. Each knows the contract only.

mod memory;
mod null;

pub use memory::Memory;
pub use null::Null;
