//! TCP sockets. On loopback unless asked otherwise: NBD without TLS neither
//! encrypts nor asks who is there.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream};

use super::{BACKLOG, Kind, Listener, explain};
use crate::transports::nbd::uri::Address;

/// A connection that has died without a word is noticed after some two minutes.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(60);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(15);

/// All addresses of `host`, or both loopbacks if it is empty.
pub(super) async fn bind(host: &str, port: u16) -> Result<Vec<Listener>, String> {
    // What a resolver makes of "localhost" differs; what is meant does not.
    if host.is_empty() || host.eq_ignore_ascii_case("localhost") {
        return loopback(port);
    }
    let shown = Address::Tcp {
        host: host.to_owned(),
        port,
    };
    let found = tokio::net::lookup_host((host, port))
        .await
        .map_err(|error| format!("cannot listen on {shown}: {error}"))?;
    let mut addresses: Vec<SocketAddr> = Vec::new();
    for address in found {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    if addresses.is_empty() {
        return Err(format!("cannot listen on {shown}: the name has no address"));
    }
    let mut listeners = Vec::new();
    let several = addresses.len() > 1;
    let mut absent = String::new();
    for address in addresses {
        match listen(address) {
            Ok(listener) => listeners.push(listener),
            // A name may stand for addresses of a family that this machine does without.
            Err(error) if several && is_absent(address.ip(), &error) => {
                absent = explain(&address, &error);
            }
            Err(error) => return Err(explain(&address, &error)),
        }
    }
    match listeners.is_empty() {
        true => Err(absent),
        false => Ok(listeners),
    }
}

/// Both loopback addresses on one port; one of them where the machine has no other.
fn loopback(port: u16) -> Result<Vec<Listener>, String> {
    let [v4, v6] = [
        IpAddr::from(Ipv4Addr::LOCALHOST),
        IpAddr::from(Ipv6Addr::LOCALHOST),
    ];
    // With port 0, what is free for one may be taken for the other: then both are chosen anew.
    let mut attempts = if port == 0 { 16 } else { 1 };
    loop {
        attempts -= 1;
        let mut listeners = Vec::new();
        let mut port = port;
        let mut failed = None;
        for ip in [v4, v6] {
            let address = SocketAddr::new(ip, port);
            match listen(address) {
                Ok(listener) => {
                    if let Address::Tcp { port: bound, .. } = listener.address {
                        port = bound;
                    }
                    listeners.push(listener);
                }
                Err(error) if is_absent(ip, &error) => {
                    tracing::debug!(%address, %error, "this loopback address is left out");
                    failed.get_or_insert(explain(&address, &error));
                }
                Err(_) if attempts > 0 => {
                    listeners.clear();
                    break;
                }
                Err(error) => return Err(explain(&address, &error)),
            }
        }
        match (listeners.is_empty(), failed) {
            (false, _) => return Ok(listeners),
            (true, Some(failed)) => return Err(failed),
            // Only a conflict leaves nothing and says nothing.
            (true, None) => {}
        }
    }
}

/// True if this machine does not have the address, or its whole family.
fn is_absent(ip: IpAddr, error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable
        || Socket::new(
            Domain::for_address(SocketAddr::new(ip, 0)),
            Type::STREAM,
            None,
        )
        .is_err()
}

fn listen(address: SocketAddr) -> io::Result<Listener> {
    let domain = Domain::for_address(address);
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    // A restarted server gets its port back. (On Windows this option means something else.)
    #[cfg(unix)]
    socket.set_reuse_address(true)?;
    if address.ip() == IpAddr::from(Ipv6Addr::UNSPECIFIED) {
        // "[::]" is every address, on systems that think otherwise too.
        let _ = socket.set_only_v6(false);
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    from_socket(socket)
}

/// Takes a socket that listens already.
pub(super) fn from_socket(socket: Socket) -> io::Result<Listener> {
    socket.set_nonblocking(true)?;
    let listener = TcpListener::from_std(socket.into())?;
    let address = listener.local_addr()?;
    if !address.ip().to_canonical().is_loopback() {
        tracing::warn!(
            %address,
            "the server can be reached from other machines, and NBD has neither encryption nor authentication: \
             anyone who can connect can read and write"
        );
    }
    Ok(Listener {
        kind: Kind::Tcp(listener),
        address: Address::Tcp {
            host: address.ip().to_string(),
            port: address.port(),
        },
    })
}

/// Replies go out at once, and dead peers are found. A connection works without either.
pub(super) fn tune(stream: &TcpStream) {
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_AFTER)
        .with_interval(KEEPALIVE_EVERY);
    let tuned = stream
        .set_nodelay(true)
        .and_then(|()| SockRef::from(stream).set_tcp_keepalive(&keepalive));
    if let Err(error) = tuned {
        tracing::debug!(%error, "socket options were refused");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transports::nbd::socket::Stream;

    #[tokio::test]
    async fn connections_answer_at_once_and_notice_dead_peers() {
        let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let Address::Tcp { port, .. } = listener.address else {
            panic!("not TCP");
        };
        let _client = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let accepted = std::future::poll_fn(|cx| listener.poll_accept(cx)).await;
        let Ok((Stream::Tcp(stream), _)) = accepted else {
            panic!("not TCP");
        };
        assert!(stream.nodelay().unwrap());
        assert!(SockRef::from(&stream).keepalive().unwrap());
    }

    #[tokio::test]
    async fn localhost_is_both_loopbacks() {
        let hosts = |listeners: Vec<Listener>| -> Vec<String> {
            let addresses = listeners.into_iter().map(|listener| listener.address);
            addresses
                .map(|address| match address {
                    Address::Tcp { host, .. } => host,
                    Address::Unix(_) => panic!("not TCP"),
                })
                .collect()
        };
        let named = hosts(bind("LocalHost", 0).await.unwrap());
        assert_eq!(named, hosts(bind("", 0).await.unwrap()));
        assert_eq!(named[0], "127.0.0.1");
    }
}
