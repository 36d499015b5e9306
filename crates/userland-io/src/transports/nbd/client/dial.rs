//! From an address to a connection on which the handshake is done.

use std::future::Future;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use tokio::net::TcpStream;
#[cfg(unix)]
use tokio::net::UnixStream;

use super::ConnectError;
use super::handshake::{self, ListedExport, Negotiated, Wanted};
use crate::transports::nbd::Address;
use crate::transports::nbd::socket::Stream;

/// A peer that answers nothing at all is given up after this long without traffic, and some probes.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// Connects, and haggles for an export, within `limit`.
pub(super) async fn dial(
    address: &Address,
    wanted: Wanted<'_>,
    limit: Duration,
) -> Result<(Stream, Negotiated), ConnectError> {
    within(address, limit, async {
        let mut stream = connect(address).await?;
        let negotiated = handshake::negotiate(&mut stream, wanted).await?;
        Ok((stream, negotiated))
    })
    .await
}

/// Connects, and asks for the list of exports, within `limit`.
pub(super) async fn list(
    address: &Address,
    limit: Duration,
) -> Result<Vec<ListedExport>, ConnectError> {
    within(address, limit, async {
        handshake::list(&mut connect(address).await?).await
    })
    .await
}

async fn within<T>(
    address: &Address,
    limit: Duration,
    work: impl Future<Output = Result<T, ConnectError>>,
) -> Result<T, ConnectError> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(ConnectError::Timeout {
            address: address.to_string(),
            limit,
        }),
    }
}

async fn connect(address: &Address) -> Result<Stream, ConnectError> {
    let stream = match address {
        Address::Tcp { host, port } => tcp(host, *port).await.and_then(|stream| {
            stream.set_nodelay(true)?;
            let keepalive = socket2::TcpKeepalive::new()
                .with_time(KEEPALIVE)
                .with_interval(KEEPALIVE / 6);
            socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
            Ok(Stream::Tcp(stream))
        }),
        #[cfg(unix)]
        Address::Unix(path) => UnixStream::connect(path).await.map(Stream::from),
        #[cfg(not(unix))]
        Address::Unix(_) => Err(std::io::Error::new(
            std::io::ErrorKind::Unsupported,
            "this system has no Unix sockets; use nbd://host:port",
        )),
    };
    stream.map_err(|source| ConnectError::Unreachable {
        address: address.to_string(),
        source,
    })
}

async fn tcp(host: &str, port: u16) -> std::io::Result<TcpStream> {
    match host {
        "" => match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
            Ok(stream) => Ok(stream),
            Err(first) => TcpStream::connect((Ipv6Addr::LOCALHOST, port))
                .await
                .map_err(|_| first),
        },
        host => TcpStream::connect((host, port)).await,
    }
}
