//! The server: what is offered, where, and for how long.
//!
//! One task accepts, and spawns a task for each connection on the caller's
//! runtime: the handshake, then the transmission phase of the export that the
//! client chose.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::sync::watch;
use tokio::task::{JoinError, JoinHandle, JoinSet};

use super::export::{Export, Exports};
use super::limits::{Budget, Chairs, Environment, Limits, Shutdown};
use super::listen::{self, Listener, Peer};
use super::negotiate::{self, Outcome};
use super::own_thread::{self, Threads};
use super::socket::Stream;
use super::uri::{Address, Uri};
use crate::{Device, Engine, Error, ErrorKind, Result};

/// After a failed accept (no descriptors left, say), the next one waits this long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// An NBD server: exports, then addresses.
///
/// ```no_run
/// use userland_io::{Device, Engine, Result, transports::nbd};
///
/// async fn example<E: Engine>(disk: Device<E>) -> Result<()> {
///     let server = nbd::Server::new()
///         .export("disk", disk.clone())
///         .description("the one that matters")
///         .export("look", disk.read_only())
///         .bind(["nbd://", "unix:/run/disk.sock"])
///         .await?;
///     println!("{}", server.uri("disk"));
///     tokio::signal::ctrl_c().await?;
///     server.shutdown().await?;
///     disk.close().await
/// }
/// ```
#[must_use = "a server that is not bound serves nobody"]
#[derive(Debug)]
pub struct Server {
    exports: Vec<Export>,
    default: Option<String>,
    limits: Limits,
    socket_mode: u32,
}

impl Default for Server {
    fn default() -> Self {
        Server {
            exports: Vec::new(),
            default: None,
            limits: Limits::default(),
            socket_mode: 0o600,
        }
    }
}

impl Server {
    /// A server without exports.
    pub fn new() -> Self {
        Server::default()
    }

    /// Offers `device` under `name`: free text of up to 4096 bytes, unique in this server.
    /// A single export is also the default one.
    pub fn export<E: Engine>(mut self, name: impl Into<String>, device: Device<E>) -> Self {
        self.exports.push(Export::new(name.into(), device));
        self
    }

    /// Describes the export added last to whoever lists them.
    pub fn description(mut self, text: impl Into<String>) -> Self {
        if let Some(export) = self.exports.last_mut() {
            export.description = text.into();
        }
        self
    }

    /// The export that clients get who name none. If left out: the one named `""`, or a single one.
    pub fn default_export(mut self, name: impl Into<String>) -> Self {
        self.default = Some(name.into());
        self
    }

    /// How much clients may take. If left out: [`Limits::default`].
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// The permissions of Unix sockets. If left out: `0o600`, the owner alone.
    pub fn socket_mode(mut self, mode: u32) -> Self {
        self.socket_mode = mode & 0o777;
        self
    }

    /// Begins to serve at `addresses`, on the caller's tokio runtime (with I/O and time). Each is one of
    ///
    /// * `nbd://host:port`, `host:port`, `[v6]:port`: TCP; port 0 is any free one, a missing host
    ///   (`nbd://`, `nbd://:10810`), like `localhost`, both loopback addresses, a missing port 10809;
    /// * `nbd+unix:///?socket=/path`, `unix:/path`: a Unix socket; one that a dead server left there is replaced;
    /// * `systemd:` or `systemd:name`: the sockets that a service manager has passed to this process.
    ///
    /// # Errors
    /// If a name is bad or there twice, there is no export or no address, or a socket cannot be opened: then
    /// none is.
    pub async fn bind<A: AsRef<str>>(
        self,
        addresses: impl IntoIterator<Item = A>,
    ) -> Result<ServerHandle> {
        let invalid = |why: String| Error::new(ErrorKind::Invalid, why);
        let exports = Exports::new(self.exports, self.default.as_deref()).map_err(invalid)?;
        let mut listeners = Vec::new();
        for address in addresses {
            let opened = listen::bind(address.as_ref(), self.socket_mode).await;
            listeners.extend(opened.map_err(invalid)?);
        }
        if listeners.is_empty() {
            let why =
                "an NBD server without an address serves nobody: nbd:// is this machine alone";
            return Err(invalid(why.into()));
        }
        let limits = self.limits.sane();
        let (stop, shutdown) = Shutdown::channel();
        let addresses = listeners.iter().map(|l| l.address.clone()).collect();
        let names = exports.iter().map(|export| export.name.clone()).collect();
        let accepting = Accepting {
            exports: Arc::new(exports),
            listeners,
            environment: Environment {
                budget: Budget::new(limits.max_server_bytes),
                chairs: Chairs::default(),
                limits: Arc::new(limits),
                shutdown,
            },
            threads: Threads::default(),
            connections: JoinSet::new(),
            next: 0,
        };
        Ok(ServerHandle {
            addresses,
            names,
            stop,
            task: Some(tokio::spawn(accepting.run())),
        })
    }

    /// Serves at `address` (see [`bind`](Self::bind)) until the process ends or the future is dropped.
    ///
    /// Ctrl-C is not looked at: it kills the process, without a flush, and leaves a Unix socket's file behind. To
    /// flush and close first, use `bind` and [`shutdown`](ServerHandle::shutdown), as the example at [`Server`] does.
    ///
    /// # Errors
    /// As `bind`.
    pub async fn serve(self, address: &str) -> Result {
        let mut handle = self.bind([address]).await?;
        tracing::info!(uris = ?handle.uris().iter().map(Uri::to_string).collect::<Vec<_>>(), "serving");
        match &mut handle.task {
            Some(task) => match task.await {
                // Nobody has asked it to end.
                Ok(_) => Ok(()),
                Err(error) => Err(Error::new(ErrorKind::Io, error)),
            },
            None => Ok(()),
        }
    }
}

/// A server that is running.
///
/// End it with [`shutdown`](Self::shutdown). Dropped without, it cuts all connections, and says so in the log.
#[must_use = "a server ends when its handle is dropped"]
#[derive(Debug)]
pub struct ServerHandle {
    addresses: Vec<Address>,
    names: Vec<String>,
    stop: watch::Sender<bool>,
    task: Option<JoinHandle<Arc<Exports>>>,
}

impl ServerHandle {
    /// Where clients find the export `name`: at the first address.
    pub fn uri(&self, name: &str) -> Uri {
        let address = match self.addresses.first() {
            Some(address) => address.clone(),
            None => Address::Tcp {
                host: String::new(),
                port: super::wire::PORT,
            },
        };
        Uri::new(address, name)
    }

    /// Where clients find each export, at each address; the addresses of one export side by side.
    pub fn uris(&self) -> Vec<Uri> {
        let uris = self.names.iter().flat_map(|name| {
            let here = |address: &Address| Uri::new(address.clone(), name.clone());
            self.addresses.iter().map(here)
        });
        uris.collect()
    }

    /// The sockets that the server listens on.
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// Stops accepting, lets requests in flight finish (for
    /// [`shutdown_grace`](Limits::shutdown_grace), then cuts the connections), flushes, and gives
    /// the device handles back. An engine is closed if the server held its last handle.
    ///
    /// # Errors
    /// The first flush or close that failed; the other devices are flushed and given back all the same.
    pub async fn shutdown(mut self) -> Result {
        // The sender is known to have a receiver while the task runs; without one there is nobody to tell.
        let _ = self.stop.send(true);
        let ended = match &mut self.task {
            Some(task) => task.await,
            None => return Ok(()),
        };
        self.task = None;
        let exports = ended.map_err(|error| Error::new(ErrorKind::Io, error))?;
        let mut first = Ok(());
        let mut keep = |export: &str, result: Result| {
            if let Err(error) = result {
                tracing::error!(export, %error, "the disk could not be flushed or closed");
                if first.is_ok() {
                    first = Err(error);
                }
            }
        };
        for export in exports.iter() {
            keep(&export.name, export.flush().await);
        }
        // No connection is left to hold it.
        if let Some(exports) = Arc::into_inner(exports) {
            for export in exports.into_list() {
                let name = export.name.clone();
                keep(&name, export.close().await);
            }
        }
        first
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        if let Some(task) = self.task.take().filter(|task| !task.is_finished()) {
            tracing::warn!(
                addresses = ?self.addresses,
                "an NBD server was dropped without shutdown(): its connections are cut, and nothing is flushed"
            );
            task.abort();
        }
    }
}

/// The task that accepts, and all connections.
struct Accepting {
    exports: Arc<Exports>,
    listeners: Vec<Listener>,
    environment: Environment,
    threads: Threads,
    /// Dropped with this: then all of them end.
    connections: JoinSet<()>,
    /// Where the next look at the listeners begins, so that a busy one does not hide the others.
    next: usize,
}

impl Accepting {
    async fn run(mut self) -> Arc<Exports> {
        let mut shutdown = self.environment.shutdown.clone();
        // Said once, not for each connection.
        let (mut full, mut failing) = (false, false);
        loop {
            tokio::select! {
                biased;
                () = shutdown.wait() => break,
                Some(ended) = self.connections.join_next() => complain(ended),
                accepted = poll_fn(|cx| poll_accept(&self.listeners, &mut self.next, cx)) => match accepted {
                    Ok((stream, peer)) => {
                        failing = false;
                        let most = self.environment.limits.max_connections;
                        if self.connections.len() >= most {
                            if !full {
                                tracing::warn!(%peer, most, "too many connections: closing the ones that come");
                            }
                            full = true;
                            continue;
                        }
                        full = false;
                        let exports = self.exports.clone();
                        let environment = self.environment.clone();
                        self.connections.spawn(connection(stream, peer, exports, environment, self.threads.clone()));
                    }
                    Err(error) if is_of_one_connection(&error) => {}
                    Err(error) => {
                        if !failing {
                            tracing::warn!(%error, "cannot accept connections for the moment");
                        }
                        failing = true;
                        tokio::select! {
                            () = shutdown.wait() => break,
                            () = tokio::time::sleep(ACCEPT_PAUSE) => {}
                        }
                    }
                },
            }
        }
        // Closed, and Unix sockets unlinked, before anything else ends.
        self.listeners.clear();
        let grace = self.environment.limits.shutdown_grace;
        let drained = tokio::time::timeout(grace, async {
            while let Some(ended) = self.connections.join_next().await {
                complain(ended);
            }
        });
        if drained.await.is_err() {
            tracing::warn!(
                connections = self.connections.len(),
                ?grace,
                "requests are still running: cutting their connections"
            );
            self.connections.shutdown().await;
        }
        self.exports
    }
}

fn poll_accept(
    listeners: &[Listener],
    next: &mut usize,
    cx: &mut std::task::Context<'_>,
) -> Poll<std::io::Result<(Stream, Peer)>> {
    for _ in 0..listeners.len() {
        *next = (*next + 1) % listeners.len();
        let polled = listeners[*next].poll_accept(cx);
        if polled.is_ready() {
            return polled;
        }
    }
    Poll::Pending
}

/// True if accepting failed for a reason that the next connection does not share.
fn is_of_one_connection(error: &std::io::Error) -> bool {
    use std::io::ErrorKind;
    matches!(
        error.kind(),
        ErrorKind::ConnectionAborted
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionRefused
            | ErrorKind::Interrupted
    )
}

fn complain(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a connection ended by a panic");
    }
}

/// A connection's life.
async fn connection(
    mut stream: Stream,
    peer: Peer,
    exports: Arc<Exports>,
    environment: Environment,
    threads: Threads,
) {
    let limits = environment.limits.clone();
    let mut shutdown = environment.shutdown.clone();
    let handshake = negotiate::run(&mut stream, &exports, &limits, &mut shutdown);
    let outcome = match tokio::time::timeout(limits.handshake_timeout, handshake).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(error)) => {
            tracing::debug!(%peer, %error, "handshake broken off");
            return;
        }
        Err(_) => {
            tracing::debug!(%peer, after = ?limits.handshake_timeout, "handshake took too long");
            return;
        }
    };
    match outcome {
        Outcome::Close(reason) => {
            tracing::debug!(%peer, reason, "handshake ended");
            // What was answered last is to arrive.
            let _ = stream.shutdown().await;
        }
        Outcome::Start {
            export,
            session,
            input,
        } => {
            let index = export;
            let Some(export) = exports.get(index) else {
                return;
            };
            let name = &export.name;
            tracing::debug!(%peer, export = name, replies = ?session.replies, "client connected");
            let serving = exports.clone();
            let serve = async move |stream| match serving.get(index) {
                Some(export) => export.serve(stream, input, session, environment).await,
                None => Ok(()),
            };
            match own_thread::run(stream, threads, serve).await {
                Ok(()) => tracing::debug!(%peer, export = name, "client left"),
                Err(error) => tracing::debug!(%peer, export = name, %error, "connection lost"),
            }
        }
    }
}
