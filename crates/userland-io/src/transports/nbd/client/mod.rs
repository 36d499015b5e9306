//! The client: an export of some NBD server as an [`Engine`](crate::Engine).
//!
//! `handshake` and `dial` make a connection, `connection` sends and `replies` receives on it, each in a task of its
//! own that lasts as long as the connection; `op` is one request, `shared` decides where it goes, `journal` keeps
//! what a lost server may have lost, `doubts` what failed and may have acted, and `supervisor` brings connections back. `export` turns what a server says
//! into claims, and `engine` the library's operations into the protocol's.

mod connection;
mod dial;
mod doubts;
mod engine;
mod error;
mod export;
mod handshake;
mod journal;
mod op;
mod replies;
mod shared;
mod supervisor;

use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinHandle;

pub use error::ConnectError;
pub use handshake::ListedExport;

use super::Uri;
use super::wire::TransmissionFlags;
use shared::Shared;
use supervisor::{Plan, Session};

/// An export of an NBD server, as an engine.
///
/// ```no_run
/// use userland_io::{Device, transports::nbd::Client};
///
/// # async fn f() -> Result<(), Box<dyn std::error::Error>> {
/// let disk = Device::open(Client::connect("nbd://storage.example/disk").await?).await?;
/// # Ok(()) }
/// ```
///
/// It lives on the tokio runtime on which it was connected, whose I/O and time must be enabled.
///
/// Its claims come from what the server says. Writes are durable after a flush if the server has `FLUSH`; if it has `FUA`
/// alone, each write carries it; if it has neither, nothing is claimed to survive.
///
/// `SURVIVES_KILL` is not claimed, except for a read-only export. Every completed mutation is at the server and outlives
/// this process; but one that was on its way when the process ended may be there too, and the server may carry it out
/// later, even over what a new client has written by then.
///
/// # A lost connection
///
/// It is made anew, with growing pauses, and requests wait meanwhile, up to [`ClientBuilder::reconnect`](Builder::reconnect).
/// After that they fail with `Io` until the server is back.
///
/// *What completed* and is not covered by a flush may be lost with a server. It is kept in a journal in memory and written
/// again before anything else is sent, so that readers never see time go backwards and a flush never covers less than it
/// says. The journal is bounded ([`ClientBuilder::journal`](Builder::journal)): when half of it is used the client flushes
/// on its own, and when it is full a mutation waits. Only the newest bytes of a range are kept, so a replay never puts old
/// bytes over what a flush or `FUA` has made durable. A server whose flush fails is treated alike: it is connected to anew,
/// and told again. Where there is no journal to rely on (a size of 0; or a server with neither flush nor `FUA`, once the
/// journal is full), the loss of a server with unflushed mutations ends the client: every request fails until it is opened anew.
///
/// *What was on its way* is sent again. It cannot pass anything newer: mutations that overlap are never in flight together,
/// so nothing newer there has completed, or even started. A request under which five connections were lost fails.
///
/// *What failed* may have acted all the same: a write that the server answered with an error, or one that was on its way
/// when the client gave up on it. Nobody can tell old from new but by a read, and what a read has shown stays: if one has
/// shown some of it, and the server is lost before a flush has settled it (the client sends one at once) or something newer
/// was written there, then every request fails until the export is opened anew. Without such a read it goes on.
///
/// *What the old connection may still do* cannot be known from this end. This client relies on the specification
/// ("Terminating the transmission phase"): a server that closes a connection is done with the requests on it. That holds for
/// a process that was killed (its sockets close after its system calls have ended) and for a machine that stopped. It does
/// not hold for a middlebox that resets a connection between two living ends. Where it was not the other side
/// that ended the connection (no answer for too long, or we hung up because of a breach of the protocol) nobody can say
/// when, or if, mutations on their way will be carried out: if there were any, every request fails until the export is opened
/// anew; if there were none, nothing is in doubt and the connection is made anew.
///
/// A server that comes back with another size, other flags, block sizes or contexts is another disk: every request fails.
/// Whether it is the same image otherwise cannot be told.
///
/// # Several writers
///
/// All this takes the client for the only one that writes. What it tells a server again would undo what another client
/// has written to the same bytes since, and what others wrote and a server lost it does not even know. Where others write to the
/// export, say [`ClientBuilder::shared`](Builder::shared): then nothing is told twice, and the loss of a connection, or a flush
/// that fails, ends the client.
#[derive(Debug)]
pub struct Client {
    shared: Arc<Shared>,
    supervisor: Mutex<Option<JoinHandle<()>>>,
}

impl Client {
    /// Connects to an export, with the defaults of [`ClientBuilder`](super::ClientBuilder).
    ///
    /// # Errors
    /// If `uri` is none, nobody answers there, or what answers is no NBD server, has no such export, requires TLS, or takes
    /// longer than 10 s.
    pub async fn connect(uri: &str) -> Result<Self, ConnectError> {
        Self::builder(uri).connect().await
    }

    /// Says how to connect to `uri`: `nbd://host:port/export`, or `nbd+unix:///export?socket=/path`.
    pub fn builder(uri: &str) -> Builder {
        Builder {
            uri: uri.to_owned(),
            connections: 1,
            all_contexts: false,
            timeout: Duration::from_secs(10),
            reconnect: Duration::from_secs(30),
            journal: 64 << 20,
            shared: false,
        }
    }

    /// The exports that a server lists; the export that `uri` names plays no part. At most 10,000, with
    /// 16 MiB of names and descriptions.
    ///
    /// # Errors
    /// As for [`connect`](Self::connect), and if the server does not give its list away.
    pub async fn list(uri: &str) -> Result<Vec<ListedExport>, ConnectError> {
        let builder = Self::builder(uri);
        dial::list(parse(uri)?.address(), builder.timeout).await
    }

    /// How many connections there are: one, unless more were asked for and the server has `CAN_MULTI_CONN`.
    pub fn connections(&self) -> usize {
        self.shared.connections()
    }

    /// True if the server says that a flush on one connection covers what came by all others (`CAN_MULTI_CONN`).
    pub fn can_multi_conn(&self) -> bool {
        self.shared.export.has(TransmissionFlags::CAN_MULTI_CONN)
    }

    /// Says goodbye to the server once nothing is on its way any more.
    async fn hang_up(&self) {
        self.shared.close();
        let supervisor = self
            .supervisor
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(supervisor) = supervisor {
            let _ = supervisor.await;
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.shared.close();
    }
}

/// How to connect to an export. Made by [`Client::builder`].
#[derive(Clone, Debug)]
pub struct Builder {
    uri: String,
    connections: usize,
    all_contexts: bool,
    timeout: Duration,
    reconnect: Duration,
    journal: u64,
    shared: bool,
}

impl Builder {
    /// The keys that [`set`](Self::set) knows, and what each means.
    pub const KEYS: &[(&str, &str)] = &[
        (
            "connections",
            "connections to spread requests over, where the server can (1 to 64; default 1)",
        ),
        (
            "contexts",
            "offer every metadata context of the server, not just what is allocated (true or false; default false)",
        ),
        (
            "timeout",
            "seconds for connecting and the handshake (default 10)",
        ),
        (
            "reconnect",
            "seconds that requests wait for a lost server before they fail (default 30)",
        ),
        (
            "journal",
            "bytes of unflushed mutations kept to tell them again to a server that was lost (default 64M; 0: none)",
        ),
        (
            "shared",
            "others write to the export, too: tell nothing twice, and end with a lost server or failed flush (true or false; default false)",
        ),
    ];

    /// Spreads requests over `n` connections (1 to 64) if the server has `CAN_MULTI_CONN`; without it there is one. Default 1.
    pub fn connections(mut self, n: usize) -> Self {
        self.connections = n;
        self
    }

    /// Negotiates every metadata context that the server lists, for [`Engine::contexts`](crate::Engine::contexts).
    /// Each makes every answer about extents longer. Default: `base:allocation` alone.
    pub fn all_contexts(mut self, all: bool) -> Self {
        self.all_contexts = all;
        self
    }

    /// How long connecting and the handshake may take, on each attempt. Default 10 s.
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.timeout = limit;
        self
    }

    /// How long requests wait for a lost server before they fail. Default 30 s. Attempts go on after that, at most 2 s apart.
    pub fn reconnect(mut self, limit: Duration) -> Self {
        self.reconnect = limit;
        self
    }

    /// The bytes of mutations, in flight and unflushed, that are kept to tell them again. Default 64 MiB. With 0 none are, and
    /// the loss of a server with unflushed mutations ends the client. No request is longer than a quarter of them, so that a
    /// large write finds room beside small ones.
    pub fn journal(mut self, bytes: u64) -> Self {
        self.journal = bytes;
        self
    }

    /// Other clients write to the export, too. Then there is no journal, nothing is told twice, and once a connection is lost
    /// or a flush has failed every request fails until the export is opened anew, since nobody can tell what is left of all that was
    /// written. Default: false, which means that this client is the only writer.
    pub fn shared(mut self, shared: bool) -> Self {
        self.shared = shared;
        self
    }

    /// Sets an option by its name: one of [`KEYS`](Self::KEYS). Sizes take K, M, G.
    ///
    /// # Errors
    /// If there is no such key, or the value makes no sense for it.
    pub fn set(self, key: &str, value: &str) -> Result<Self, ConnectError> {
        fn parsed<T: FromStr>(key: &str, value: &str, wanted: &str) -> Result<T, ConnectError> {
            value
                .parse()
                .map_err(|_| ConnectError::Option(format!("{key}={value}: write {wanted}")))
        }
        let seconds = || {
            parsed(key, value, "seconds, such as 2.5")
                .ok()
                .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
                .ok_or_else(|| {
                    ConnectError::Option(format!("{key}={value}: write seconds, such as 2.5"))
                })
        };
        Ok(match key {
            "connections" => self.connections(parsed(key, value, "a number from 1 to 64")?),
            "contexts" => self.all_contexts(parsed(key, value, "true or false")?),
            "shared" => self.shared(parsed(key, value, "true or false")?),
            "timeout" => self.timeout(seconds()?),
            "reconnect" => self.reconnect(seconds()?),
            "journal" => {
                let (digits, shift) = match value.as_bytes().last() {
                    Some(b'K' | b'k') => (&value[..value.len() - 1], 10),
                    Some(b'M' | b'm') => (&value[..value.len() - 1], 20),
                    Some(b'G' | b'g') => (&value[..value.len() - 1], 30),
                    _ => (value, 0),
                };
                let wanted = "bytes, such as 64M";
                let number: u64 = parsed(key, digits, wanted)?;
                self.journal(number.checked_mul(1 << shift).ok_or_else(|| {
                    ConnectError::Option(format!("{key}={value}: write {wanted}"))
                })?)
            }
            _ => {
                let keys: Vec<&str> = Self::KEYS.iter().map(|known| known.0).collect();
                return Err(ConnectError::Option(format!(
                    "{key}: no such option; there are {}",
                    keys.join(", ")
                )));
            }
        })
    }

    /// Connects.
    ///
    /// # Errors
    /// As for [`Client::connect`], and if an option makes no sense.
    pub async fn connect(self) -> Result<Client, ConnectError> {
        let shared = self.shared;
        let plan = self.plan()?;
        let (export, streams) = plan.connect().await?;
        let shared = Arc::new(Shared::new(
            plan.uri.to_string(),
            export,
            plan.journal,
            shared,
        ));
        let session = Session::start(&shared, streams);
        shared.up(session.conns());
        let supervisor = tokio::spawn(supervisor::supervise(shared.clone(), plan, session));
        Ok(Client {
            shared,
            supervisor: Mutex::new(Some(supervisor)),
        })
    }

    /// Connects for somebody else, who sends requests himself and takes simple replies.
    #[cfg(all(feature = "kernel-nbd", target_os = "linux"))]
    pub(crate) async fn connect_simple(self) -> Result<Simple, ConnectError> {
        let plan = Plan {
            simple: true,
            // Nothing is kept, and so nothing bounds the longest request but the server.
            journal: 0,
            ..self.plan()?
        };
        let (export, streams) = plan.connect().await?;
        Ok(Simple {
            geometry: export.geometry,
            flags: export.flags,
            streams: streams.into_iter().map(|(stream, _)| stream).collect(),
        })
    }

    fn plan(self) -> Result<Plan, ConnectError> {
        if !(1..=64).contains(&self.connections) {
            return Err(ConnectError::Option(format!(
                "connections={}: write a number from 1 to 64",
                self.connections
            )));
        }
        Ok(Plan {
            uri: parse(&self.uri)?,
            all_contexts: self.all_contexts,
            simple: false,
            connections: self.connections,
            timeout: self.timeout,
            reconnect: self.reconnect,
            journal: match self.shared {
                true => 0,
                false => self.journal,
            },
        })
    }
}

/// An export, and connections to it on which the transmission phase has begun.
#[cfg(all(feature = "kernel-nbd", target_os = "linux"))]
pub(crate) struct Simple {
    pub(crate) geometry: crate::Geometry,
    pub(crate) flags: super::wire::TransmissionFlags,
    pub(crate) streams: Vec<super::socket::Stream>,
}

fn parse(uri: &str) -> Result<Uri, ConnectError> {
    uri.parse()
        .map_err(|error: super::UriError| ConnectError::Uri(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_set_by_name_and_bad_ones_say_what_would_be_right() {
        let builder = Client::builder("nbd://localhost")
            .set("connections", "4")
            .and_then(|b| b.set("reconnect", "0.5"))
            .and_then(|b| b.set("journal", "2M"))
            .and_then(|b| b.set("contexts", "true"))
            .unwrap();
        assert_eq!(
            (
                builder.connections,
                builder.reconnect,
                builder.journal,
                builder.all_contexts
            ),
            (4, Duration::from_millis(500), 2 << 20, true)
        );
        for (key, value, hint) in [
            ("connections", "many", "a number from 1 to 64"),
            ("timeout", "-1", "seconds"),
            ("timeout", "soon", "seconds"),
            ("shared", "yes", "true or false"),
            ("journal", "1X", "bytes, such as 64M"),
            ("journal", "99999999999999G", "bytes, such as 64M"),
            ("journal", "", "bytes, such as 64M"),
            (
                "conections",
                "4",
                "connections, contexts, timeout, reconnect, journal, shared",
            ),
        ] {
            let error = builder.clone().set(key, value).unwrap_err().to_string();
            assert!(error.contains(hint), "{error}");
        }
    }
}
