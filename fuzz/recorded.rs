//! A connection whose client has already sent all that it will ever send.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use userland_io::transports::nbd::socket::Socket;

/// Gives out its input in pieces, then ends; takes output in pieces, too.
pub struct Recorded {
    input: Vec<u8>,
    given: AtomicUsize,
    piece: usize,
    output: Output,
}

/// What was sent to the client.
#[derive(Clone, Default)]
pub struct Output(Arc<Mutex<Vec<u8>>>);

impl Output {
    pub fn take(&self) -> Vec<u8> {
        std::mem::take(&mut self.0.lock().expect("nothing panics with it"))
    }
}

impl Recorded {
    pub fn new(input: Vec<u8>, piece: usize) -> (Self, Output) {
        let output = Output::default();
        let recorded = Recorded {
            input,
            given: AtomicUsize::new(0),
            piece,
            output: output.clone(),
        };
        (recorded, output)
    }
}

impl Recorded {
    fn left(&self) -> &[u8] {
        &self.input[self.given.load(Relaxed)..]
    }

    /// Gives the next piece, as much of it as there is room for.
    fn give(&self, to: &mut [u8]) -> usize {
        let length = self.left().len().min(self.piece).min(to.len());
        to[..length].copy_from_slice(&self.left()[..length]);
        self.given.fetch_add(length, Relaxed);
        length
    }
}

impl Socket for Recorded {
    fn receive_now(&self, to: &mut [u8]) -> Option<usize> {
        Some(self.give(to))
    }
    fn at_hand(&self) -> Option<u64> {
        Some(self.left().len() as u64)
    }
}

impl AsyncRead for Recorded {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let length = self.give(buf.initialize_unfilled());
        buf.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Recorded {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let length = bytes.len().min(self.piece);
        let mut output = self.output.0.lock().expect("nothing panics with it");
        output.extend_from_slice(&bytes[..length]);
        Poll::Ready(Ok(length))
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
