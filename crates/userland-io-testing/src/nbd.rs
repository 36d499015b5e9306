//! The way through a real socket: the library's server over an engine, and its client as the engine again.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use userland_io::transports::nbd::{Client, Server, ServerHandle};
use userland_io::{
    AnyEngine, Checked, Device, Engine, EngineExt, Error, ErrorKind, Features, Filter, Geometry,
    Result,
};

/// Who connects to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clients {
    /// How many clients. More than one share the export: what is written, others have written, too, so that each of them
    /// tells the server nothing twice (see `ClientBuilder::shared`). One alone keeps a journal.
    pub count: usize,
    /// How many connections each of them has.
    pub connections: usize,
}

/// Serves `engine` as a device on a socket (Unix where there is one, else of this machine alone) and connects to it. What survives
/// is what `engine` claims, not the little that a client can know of that. Wants a tokio runtime with I/O and time. The server
/// ends, and the engine is closed, when the last client is.
///
/// # Errors
/// If the device cannot be opened, the socket not be bound, or the clients not connect.
pub async fn through_nbd(engine: AnyEngine, clients: Clients) -> Result<Vec<AnyEngine>> {
    let device = Device::open(engine).await?;
    let served = device.geometry();
    let (address, socket) = address();
    let server = Server::new().export("", device).bind([&address]).await?;
    let uri = server.uri("").to_string();
    let guard = Arc::new(Guard {
        server: Mutex::new(Some(server)),
        socket,
    });
    let mut fronts = Vec::new();
    for client in clients.connect(&uri).await? {
        let front = Front {
            client: Checked::new(client)?,
            served,
            guard: Mutex::new(Some(guard.clone())),
        };
        fronts.push(front.erase());
    }
    Ok(fronts)
}

/// Connects to somebody's server as [`through_nbd`] does to its own. A server that does not say that several connections
/// are one disk gets one.
///
/// # Errors
/// If it cannot be connected to.
pub async fn connect(uri: &str, clients: Clients) -> Result<Vec<AnyEngine>> {
    let clients = clients.connect(uri).await?;
    Ok(clients.into_iter().map(EngineExt::erase).collect())
}

impl Clients {
    async fn connect(self, uri: &str) -> Result<Vec<Client>> {
        let mut clients = Vec::new();
        for _ in 0..self.count.max(1) {
            let builder = Client::builder(uri).connections(self.connections);
            let client = builder.shared(self.count > 1).connect().await;
            let client = client.map_err(|error| Error::new(ErrorKind::Io, error))?;
            let alone = !client.can_multi_conn();
            clients.push(client);
            if alone {
                break;
            }
        }
        Ok(clients)
    }
}

fn address() -> (String, Option<std::path::PathBuf>) {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    if cfg!(unix) {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("ulio-test-{}-{number}.sock", std::process::id());
        let path = std::env::temp_dir().join(name);
        (format!("unix:{}", path.display()), Some(path))
    } else {
        ("127.0.0.1:0".to_owned(), None)
    }
}

/// The server, as long as anybody is connected.
struct Guard {
    server: Mutex<Option<ServerHandle>>,
    socket: Option<std::path::PathBuf>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(socket) = &self.socket {
            // The server takes it away itself when it ends in order.
            let _ = std::fs::remove_file(socket);
        }
    }
}

/// A client that holds the server.
struct Front {
    client: Checked<Client>,
    served: Geometry,
    guard: Mutex<Option<Arc<Guard>>>,
}

impl Filter for Front {
    type Lower = Client;

    fn lower(&self) -> &Checked<Client> {
        &self.client
    }

    fn geometry(&self) -> Geometry {
        let mut geometry = self.client.geometry();
        geometry.crash = self.served.crash;
        for feature in [Features::SURVIVES_KILL, Features::VOLATILE_CACHE] {
            let served = self.served.features.contains(feature);
            geometry.features.set(feature, served);
        }
        geometry
    }

    async fn close(&self) -> Result {
        let closed = self.client.close().await;
        let guard = {
            let mut guard = self.guard.lock().unwrap_or_else(PoisonError::into_inner);
            guard.take()
        };
        let last = guard.and_then(Arc::into_inner);
        let server = last.and_then(|last| {
            let mut server = last.server.lock().unwrap_or_else(PoisonError::into_inner);
            server.take()
        });
        match server {
            Some(server) => closed.and(server.shutdown().await),
            None => closed,
        }
    }
}
