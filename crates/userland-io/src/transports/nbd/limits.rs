//! How much a server lets its clients take, and what all its connections share.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::wire;

pub use super::transmission::{Budget, Chairs};

/// How much a server lets its clients take. Every limit has a default that real clients never
/// meet. There is no idle time-out: a disk that nobody reads for a week is no fault.
#[non_exhaustive]
#[derive(Clone, Debug)]
pub struct Limits {
    /// The whole handshake has to be done by then. Default: 10 s.
    pub handshake_timeout: Duration,
    /// The longest option data, in bytes; longer ones are answered `ERR_TOO_BIG`. While it shakes
    /// hands, a connection holds no more than twice this, and the replies to one option. Default: 64 KiB.
    pub max_option_data: usize,
    /// How many bytes of refused option data are read past, so that the session can go on; beyond it
    /// the connection is closed. Default: 1 MiB.
    pub max_option_drain: usize,
    /// The most options in one handshake; then the connection is closed. Default: 1024.
    pub max_options: usize,
    /// The most connections at once; further ones are closed when they come. Default: 4096.
    pub max_connections: usize,
    /// The longest payload of a read or write, in bytes, advertised to clients that ask; from
    /// 32 MiB, which every client may count on, to 4 GiB - 1. Default: 64 MiB.
    pub max_request: u32,
    /// How many bytes of a refused write are read past, so that the connection survives; beyond it
    /// the connection is closed. Default: 256 MiB.
    pub max_payload_drain: u64,
    /// The most requests in flight on one connection; the client waits for a place. Default: 256.
    pub max_in_flight: usize,
    /// The most bytes of payload in memory for one connection; the client waits. At least
    /// `max_request`. Beside them a connection needs up to 13 MiB for requests as they were received, short
    /// replies and buffers kept for reuse, while it works; at rest some KiB, and connections to one export together
    /// up to 32 MiB that they lend each other. Default: 128 MiB.
    pub max_connection_bytes: usize,
    /// The most bytes of payload in memory for all connections; clients wait. At least `max_request`.
    /// Each connection has 1 MiB beside it that nobody can take, so that it gets on whatever the others
    /// do; who holds on to more while others wait, and for ten seconds moves less than 64 KiB a second, is
    /// closed. The whole server's bound: this, and 14 MiB a connection. Default: 1 GiB.
    pub max_server_bytes: usize,
    /// At shutdown, how long requests in flight may take to finish. Default: 10 s.
    pub shutdown_grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            handshake_timeout: Duration::from_secs(10),
            max_option_data: 64 << 10,
            max_option_drain: 1 << 20,
            max_options: 1024,
            max_connections: 4096,
            max_request: 64 << 20,
            max_payload_drain: 256 << 20,
            max_in_flight: 256,
            max_connection_bytes: 128 << 20,
            max_server_bytes: 1 << 30,
            shutdown_grace: Duration::from_secs(10),
        }
    }
}

impl Limits {
    /// The same limits, with those raised that would leave a well-behaved client stuck.
    pub(crate) fn sane(mut self) -> Self {
        self.max_request = self.max_request.max(wire::DEFAULT_MAX_PAYLOAD);
        let request = self.max_request as usize;
        self.max_connection_bytes = self.max_connection_bytes.max(request);
        self.max_server_bytes = self.max_server_bytes.max(request);
        self.max_in_flight = self.max_in_flight.max(1);
        self.max_options = self.max_options.max(1);
        // Names and queries are strings of up to 4 KiB.
        self.max_option_data = self.max_option_data.max(2 * wire::MAX_STRING);
        self
    }
}

/// What the connections of one server share.
#[derive(Clone, Debug)]
pub struct Environment {
    /// The server's limits.
    pub limits: Arc<Limits>,
    /// The memory of all its connections.
    pub budget: Budget,
    /// Who of them may stay awake for the next request.
    pub chairs: Chairs,
    /// Set when the server shuts down.
    pub shutdown: Shutdown,
}

/// Tells a connection that the server is shutting down: take no more requests, finish those in
/// flight, send their replies, and end.
#[derive(Clone, Debug)]
pub struct Shutdown(watch::Receiver<bool>);

impl Shutdown {
    /// The signal, and the sender that sets it: `send(true)`.
    pub fn channel() -> (watch::Sender<bool>, Shutdown) {
        let (sender, receiver) = watch::channel(false);
        (sender, Shutdown(receiver))
    }

    /// True once shutdown began. Cheap.
    pub fn is_set(&self) -> bool {
        *self.0.borrow()
    }

    /// Resolves when shutdown begins, or at once if it has. A server that is gone counts.
    pub async fn wait(&mut self) {
        let _ = self.0.wait_for(|set| *set).await;
    }
}
