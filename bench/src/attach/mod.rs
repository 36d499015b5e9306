//! Block devices to be measured, ours and those of others: how they come about, and what loads them.
//!
//! [`devices`] starts them, [`load`] runs fio on them, and [`ready`] sees how long the library takes to make one.

pub mod devices;
pub mod load;
pub mod ready;

pub use devices::{Device, Ended};
pub use load::{Load, Outcome};
