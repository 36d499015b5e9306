//! Ways in which a client reaches a device.
//!
//! A transport knows the [`Device`](crate::Device) and its claims, and neither
//! the engine nor a layer behind it.

#[cfg(all(feature = "fuse", target_os = "linux"))]
pub mod fuse;
#[cfg(all(feature = "kernel-nbd", target_os = "linux"))]
pub mod kernel_nbd;
#[cfg(feature = "nbd")]
pub mod nbd;
#[cfg(all(any(feature = "ublk", feature = "kernel-nbd"), target_os = "linux"))]
pub(crate) mod node;
#[cfg(all(feature = "ublk", target_os = "linux"))]
pub mod ublk;
