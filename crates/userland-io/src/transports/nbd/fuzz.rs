//! Entrances for fuzz targets: bytes in, no sockets, no runtime.

use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::export::{Export, Exports};
use super::limits::{Limits, Shutdown};
use super::negotiate::{self, Outcome};
use crate::{Device, Engine, Extents, Geometry, Result};

/// What a handshake led to.
#[derive(Debug, PartialEq, Eq)]
pub struct Handshake {
    /// All that the server has sent.
    pub output: Vec<u8>,
    /// The session that was agreed on, and the input behind the handshake.
    pub session: Option<(super::session::Session, Vec<u8>)>,
}

/// Shakes hands with a client that sends `input` and then ends. The server offers two exports,
/// `a` (the default one, with a context of its own) and `b`.
pub fn handshake(input: &[u8]) -> Handshake {
    let mut stream = Recorded {
        input,
        output: Vec::new(),
    };
    let work = async {
        let mut a = Export::new("a".into(), Device::open(Nothing).await?);
        a.description = "the first".into();
        let b = Export::new("b".into(), Device::open(Nothing).await?);
        let exports = Exports::new(vec![a, b], Some("a"))
            .map_err(|why| crate::Error::new(crate::ErrorKind::Invalid, why))?;
        let (_stop, mut shutdown) = Shutdown::channel();
        let limits = Limits::default();
        let outcome = negotiate::run(&mut stream, &exports, &limits, &mut shutdown).await?;
        Ok::<_, crate::Error>(outcome)
    };
    // Nothing in it ever waits.
    let outcome = match pin!(work).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(outcome) => outcome,
        Poll::Pending => unreachable!("a handshake in memory waits for nobody"),
    };
    let session = match outcome {
        Ok(Outcome::Start { session, input, .. }) => Some((session, input)),
        Ok(Outcome::Close(_)) | Err(_) => None,
    };
    Handshake {
        output: stream.output,
        session,
    }
}

/// A disk of which a handshake needs no more than this.
struct Nothing;

impl Engine for Nothing {
    fn geometry(&self) -> Geometry {
        let mut geometry = Geometry::read_only(1 << 20);
        geometry.logical_block_size = 512;
        geometry
    }
    async fn read(&self, buf: &mut crate::ReadBuf<'_>, _: u64) -> Result {
        buf.fill(0);
        Ok(())
    }
    fn contexts(&self) -> Vec<String> {
        vec!["x-fuzz:one".into()]
    }
    async fn status(&self, _: &str, range: std::ops::Range<u64>, out: &mut Extents<u64>) -> Result {
        out.push(range.end - range.start, 1);
        Ok(())
    }
}

/// A stream whose input is known in advance.
struct Recorded<'a> {
    input: &'a [u8],
    output: Vec<u8>,
}

impl AsyncRead for Recorded<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let length = self.input.len().min(buf.remaining());
        let (head, rest) = self.input.split_at(length);
        buf.put_slice(head);
        self.input = rest;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Recorded<'_> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.output.extend_from_slice(buf);
        Poll::Ready(Ok(buf.len()))
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
