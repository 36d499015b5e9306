//! A server for tests of where it listens and how it ends, and whether it is there.
#![allow(dead_code)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use userland_io::transports::nbd::{Address, Server, ServerHandle};
use userland_io::{CrashLevel, Device, Engine, Geometry, ReadBuf, Result, WriteBuf, WriteFlags};

/// A writable disk that counts how often it is flushed and closed.
#[derive(Clone, Default)]
pub(crate) struct Counting(pub(crate) Arc<[AtomicUsize; 2]>);

impl Counting {
    pub(crate) fn flushes(&self) -> usize {
        self.0[0].load(Ordering::SeqCst)
    }
    pub(crate) fn closes(&self) -> usize {
        self.0[1].load(Ordering::SeqCst)
    }
}

impl Engine for Counting {
    fn geometry(&self) -> Geometry {
        Geometry::writable(1 << 20, CrashLevel::Flush)
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, _: u64) -> Result {
        buf.fill(0);
        Ok(())
    }
    async fn write(&self, _: &WriteBuf<'_>, _: u64, _: WriteFlags) -> Result {
        Ok(())
    }
    async fn flush(&self) -> Result {
        self.0[0].fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    async fn close(&self) -> Result {
        self.0[1].fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

pub(crate) async fn server() -> Server {
    let disk = Device::open(Counting::default()).await.unwrap();
    Server::new().export("disk", disk)
}

pub(crate) async fn bind(address: &str) -> Result<ServerHandle> {
    server().await.bind([address]).await
}

pub(crate) async fn refusal(address: &str) -> String {
    bind(address).await.expect_err(address).to_string()
}

pub(crate) fn unix(path: &Path) -> String {
    format!("unix:{}", path.display())
}

/// True if a server greets here, and not only accepts.
pub(crate) async fn greets(stream: &mut (impl AsyncRead + Unpin)) -> bool {
    let mut greeting = [0; 18];
    let read = tokio::time::timeout(Duration::from_secs(10), stream.read_exact(&mut greeting));
    matches!(read.await, Ok(Ok(_))) && &greeting[..16] == b"NBDMAGICIHAVEOPT"
}

pub(crate) async fn serves(address: &Address) -> bool {
    match address {
        Address::Tcp { host, port } => {
            let stream = TcpStream::connect((host.as_str(), *port)).await;
            match stream {
                Ok(mut stream) => greets(&mut stream).await,
                Err(_) => false,
            }
        }
        Address::Unix(path) => match UnixStream::connect(path).await {
            Ok(mut stream) => greets(&mut stream).await,
            Err(_) => false,
        },
        _ => false,
    }
}

pub(crate) async fn until_closed(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut bytes));
    let _ = read.await.expect("the connection should have been closed");
}

/// What is dropped ends soon, but on a task of its own.
pub(crate) async fn gone(path: &Path) {
    let waiting = async {
        while path.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(10), waiting).await;
    assert!(waited.is_ok(), "{} is still there", path.display());
}
