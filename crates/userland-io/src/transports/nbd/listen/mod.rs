//! Where a server listens: TCP ports, Unix sockets, and sockets that a service
//! manager has opened.
//!
//! An address is text (see [`Server::bind`](super::Server::bind)). One may
//! stand for several sockets: a host name has many addresses.

#[cfg(unix)]
mod activation;
mod tcp;
#[cfg(unix)]
mod unix;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::task::{Context, Poll};

use tokio::net::TcpListener;
#[cfg(unix)]
use tokio::net::UnixListener;

use super::socket::Stream;
use super::uri::{Address, Uri};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;

/// A socket that accepts connections.
#[derive(Debug)]
pub(crate) struct Listener {
    kind: Kind,
    /// Where clients find it.
    pub(crate) address: Address,
}

#[derive(Debug)]
enum Kind {
    Tcp(TcpListener),
    #[cfg(unix)]
    Unix {
        listener: UnixListener,
        /// Removes the path in the end, if it is ours to remove.
        _path: Option<unix::Unlink>,
    },
}

/// Who has connected, for messages.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Peer {
    Tcp(SocketAddr),
    #[cfg(unix)]
    Unix,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Tcp(address) => address.fmt(f),
            #[cfg(unix)]
            Peer::Unix => f.write_str("a local client"),
        }
    }
}

impl Listener {
    /// The next connection.
    pub(crate) fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(Stream, Peer)>> {
        match &self.kind {
            Kind::Tcp(listener) => listener.poll_accept(cx).map_ok(|(stream, peer)| {
                tcp::tune(&stream);
                (Stream::Tcp(stream), Peer::Tcp(peer))
            }),
            #[cfg(unix)]
            Kind::Unix { listener, .. } => listener
                .poll_accept(cx)
                .map_ok(|(stream, _)| (stream.into(), Peer::Unix)),
        }
    }
}

/// Opens every socket that `text` stands for. `mode` is for Unix sockets. What is wrong is said in the error.
pub(crate) async fn bind(text: &str, mode: u32) -> Result<Vec<Listener>, String> {
    if let Some(name) = text.strip_prefix("systemd:") {
        #[cfg(unix)]
        return activation::take(name);
        #[cfg(not(unix))]
        return Err(format!(
            "systemd:{name}: this platform has no socket activation"
        ));
    }
    let uri: Uri = text
        .parse()
        .map_err(|error: super::UriError| error.to_string())?;
    if !uri.export().is_empty() {
        return Err(format!(
            "{text:?} names an export, and an address to listen on serves all of them: write {}",
            Uri::new(uri.address().clone(), "")
        ));
    }
    match uri.address() {
        Address::Tcp { host, port } => tcp::bind(host, *port).await,
        #[cfg(unix)]
        Address::Unix(path) => Ok(vec![unix::bind(path, mode).await?]),
        #[cfg(not(unix))]
        Address::Unix(_) => {
            let _ = mode;
            Err(format!(
                "{text:?}: Unix sockets are not supported on this platform; use nbd://127.0.0.1"
            ))
        }
    }
}

/// What stands between a server and its address.
fn explain(address: &dyn fmt::Display, error: &io::Error) -> String {
    let hint = match error.kind() {
        io::ErrorKind::AddrInUse => {
            "another program uses it: choose another address, or stop that program"
        }
        io::ErrorKind::AddrNotAvailable => "no interface of this machine has this address",
        io::ErrorKind::PermissionDenied => {
            "this user may not: choose a port from 1024 up, or a directory of your own"
        }
        io::ErrorKind::NotFound => "the directory does not exist",
        _ => return format!("cannot listen on {address}: {error}"),
    };
    format!("cannot listen on {address}: {hint}")
}
