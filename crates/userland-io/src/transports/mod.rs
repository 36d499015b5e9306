//! Ways in which a client reaches a device.
//!
//! A transport knows the [`Device`](crate::Device) and its claims, and neither
//! the engine nor a layer behind it.

#[cfg(feature = "nbd")]
pub mod nbd;
