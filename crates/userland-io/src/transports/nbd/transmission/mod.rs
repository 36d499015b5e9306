//! The transmission phase: requests in, replies out, until the client leaves.

#[allow(dead_code)] // until the loop stands
mod budget;

pub use budget::Budget;

use std::io;

use super::limits::Environment;
use super::session::Session;
use super::socket::Socket;
use crate::{Device, Engine};

/// Serves `device` to the client at the other end of `stream` until either leaves, with what
/// `session` has agreed on. `input` holds bytes that were received behind the handshake.
///
/// # Errors
/// If the stream fails, or the client breaks the protocol beyond repair.
pub async fn run<S: Socket, E: Engine>(
    stream: S,
    input: Vec<u8>,
    session: Session,
    device: Device<E>,
    environment: Environment,
) -> io::Result<()> {
    let _ = (stream, input, session, device, environment);
    Err(io::ErrorKind::Unsupported.into())
}
