//! NBD: disks over TCP and Unix sockets, for clients that exist already.

mod client;
#[doc(hidden)]
pub mod limits;
#[doc(hidden)]
pub mod session;
#[doc(hidden)]
pub mod socket;
#[doc(hidden)]
pub mod transmission;
mod uri;
#[doc(hidden)]
pub mod wire;

pub use limits::Limits;
pub use uri::{Address, Uri, UriError};
