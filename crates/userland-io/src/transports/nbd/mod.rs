//! NBD: disks over TCP and Unix sockets, for clients that exist already.
//!
//! A [`Server`] offers devices under names; qemu, libnbd, the Linux kernel and
//! others are its clients. The protocol is that of the NetworkBlockDevice
//! project, fixed newstyle, whole but for TLS.
//!
//! A connection's way: `listen` accepts it, `negotiate` agrees with the client
//! on an export and a [`Session`](session::Session), `export` crosses over to
//! the device's own type, and `transmission` answers requests until the client
//! leaves. `wire` is the protocol in bytes, for both ends; `client` is the other.

mod client;
pub(crate) mod export;
#[doc(hidden)]
pub mod fuzz;
#[doc(hidden)]
pub mod limits;
mod listen;
mod negotiate;
#[cfg_attr(not(target_os = "linux"), path = "no_own_thread.rs")]
mod own_thread;
#[cfg(target_os = "linux")]
pub(crate) mod parker;
mod server;
#[doc(hidden)]
pub mod session;
#[doc(hidden)]
pub mod socket;
#[doc(hidden)]
pub mod transmission;
mod uri;
#[doc(hidden)]
pub mod wire;

pub use client::{Builder as ClientBuilder, Client, ConnectError, ListedExport};
pub use limits::Limits;
pub use server::{Server, ServerHandle};
pub use uri::{Address, Uri, UriError};
