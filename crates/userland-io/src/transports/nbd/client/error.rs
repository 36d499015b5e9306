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
    #[error("{}", unknown(.name, .said))]
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

/// Most servers say the same again, with the name: once is enough.
fn unknown(name: &str, said: &str) -> String {
    let (what, repeats) = match name {
        "" => ("default export".to_owned(), said.contains("default export")),
        name => (format!("export {name:?}"), said.contains(name)),
    };
    let said = if repeats { "" } else { said };
    format!("the server has no {what}{said}")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_server_says_of_an_unknown_export_is_told_unless_it_is_the_same_again() {
        let told = |name: &str, said: &str| {
            let (name, said) = (name.to_owned(), said.to_owned());
            ConnectError::UnknownExport { name, said }.to_string()
        };
        assert_eq!(
            told("a", ": no \"a\" here"),
            "the server has no export \"a\""
        );
        assert_eq!(
            told("a", ": try b"),
            "the server has no export \"a\": try b"
        );
        assert_eq!(
            told("", ": try b"),
            "the server has no default export: try b"
        );
        assert_eq!(
            told("", ": there is no default export"),
            "the server has no default export"
        );
    }
}
