//! Why a client could not be made: each says what was asked, what came back, and whom to ask.

use std::io;
use std::time::Duration;

use crate::{Error, ErrorKind, InvalidGeometry};

/// Why connecting to an export, or listing a server's exports, failed.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The URI is not one, or asks for what this client cannot do.
    #[error("{0}")]
    Uri(String),
    /// An option of the client has a value that makes no sense.
    #[error("{0}")]
    Option(String),
    /// Nobody answers at this address.
    #[error("cannot connect to {address}: {source}")]
    Unreachable {
        /// Host and port, or the path of the socket.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// The server took the connection and did not finish the handshake in time.
    #[error("{address} did not finish the NBD handshake within {} s", .limit.as_secs_f32())]
    Timeout {
        /// Host and port, or the path of the socket.
        address: String,
        /// How long it was given.
        limit: Duration,
    },
    /// Something else than an NBD server, or one of before 2011, answers there.
    #[error("not an NBD server that this client can talk to: {0}")]
    NotNbd(String),
    /// The server has no export of this name.
    #[error("the server has no export {name:?}{said}")]
    UnknownExport {
        /// The name asked for; the empty one asks for the default export.
        name: String,
        /// What the server added, if anything, after a colon.
        said: String,
    },
    /// The server talks only through TLS.
    #[error("the server requires TLS, which this client does not speak")]
    TlsRequired,
    /// The server refused, for a reason of its own.
    #[error("the server refused {option}: {why}")]
    Refused {
        /// The option of the handshake.
        option: &'static str,
        /// The kind of refusal, and the server's own words.
        why: String,
    },
    /// The connection broke in the middle of the handshake.
    #[error("the connection ended during the handshake ({during}): {source}")]
    Lost {
        /// What was going on.
        during: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The server said something that the protocol does not allow.
    #[error("the server broke the NBD protocol in the handshake: {0}")]
    Protocol(String),
    /// What the server says about its export contradicts itself.
    #[error("the export's {0}")]
    Geometry(#[from] InvalidGeometry),
}

impl From<ConnectError> for Error {
    fn from(error: ConnectError) -> Self {
        let kind = match &error {
            ConnectError::Unreachable { .. }
            | ConnectError::Timeout { .. }
            | ConnectError::Lost { .. } => ErrorKind::Io,
            ConnectError::TlsRequired => ErrorKind::Unsupported,
            _ => ErrorKind::Invalid,
        };
        Error::new(kind, error)
    }
}
