//! The engines that come with the library. Each knows the contract only.

mod memory;

pub use memory::Memory;
