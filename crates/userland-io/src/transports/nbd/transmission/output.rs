//! Replies on their way out: gathered, so that one system call sends many.
//!
//! Headers and small payloads lie back to back in one block of memory; a large
//! payload stays in the buffer that the engine filled, and is sent from there.
//! The pieces are sent in the order in which they were added.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::AsyncWrite;

use super::super::socket::Socket;
use super::pool::Buffer;

/// Payloads up to this length are copied beside their headers: cheaper than a piece of their own.
pub(super) const COPIED: usize = 4096;
/// The memory that is kept for gathering while the connection rests.
const KEPT: usize = 512 << 10;
/// How many pieces one system call takes.
const SLICES: usize = 128;

/// Replies that wait to be sent.
#[derive(Debug)]
pub(super) struct Output {
    bytes: Vec<u8>,
    /// How much of `bytes` has been sent.
    sent: usize,
    pieces: VecDeque<Piece>,
    pending: usize,
}

#[derive(Debug)]
enum Piece {
    /// The next so many of `bytes`.
    Bytes(usize),
    /// `from..to` of a payload.
    Payload {
        source: Source,
        from: usize,
        to: usize,
    },
}

#[derive(Debug)]
enum Source {
    Own(Buffer),
    /// Several pieces of one buffer; the last to be sent gives it back.
    Shared(Arc<Buffer>),
}

impl Source {
    fn memory(&self) -> &[u8] {
        match self {
            Source::Own(buffer) => buffer,
            Source::Shared(buffer) => buffer,
        }
    }
    fn into_buffer(self) -> Option<Buffer> {
        match self {
            Source::Own(buffer) => Some(buffer),
            Source::Shared(buffer) => Arc::into_inner(buffer),
        }
    }
}

/// A buffer that is sent in parts.
#[derive(Debug)]
pub(super) struct Parts(Arc<Buffer>);

impl Parts {
    /// Parts of `buffer`.
    pub(super) fn new(buffer: Buffer) -> Self {
        Parts(Arc::new(buffer))
    }
    /// No more parts follow. The buffer comes back at once if none of them has to stay.
    pub(super) fn finish(self) -> Option<Buffer> {
        Arc::into_inner(self.0)
    }
}

impl Output {
    /// Nothing to send.
    pub(super) fn new() -> Self {
        Output {
            bytes: Vec::new(),
            sent: 0,
            pieces: VecDeque::new(),
            pending: 0,
        }
    }

    /// The bytes that wait.
    pub(super) fn pending(&self) -> usize {
        self.pending
    }

    /// True if [`trim`](Self::trim) would free nothing.
    pub(super) fn is_trimmed(&self) -> bool {
        self.bytes.capacity() <= KEPT
    }

    /// Frees what a connection at rest has no use for.
    pub(super) fn trim(&mut self) {
        self.bytes.shrink_to(KEPT);
    }

    /// Adds `bytes`.
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        // What has been sent makes room before more memory is asked for.
        if self.bytes.len() + bytes.len() > self.bytes.capacity() && self.sent > 0 {
            self.bytes.drain(..self.sent);
            self.sent = 0;
        }
        self.bytes.extend_from_slice(bytes);
        self.pending += bytes.len();
        match self.pieces.back_mut() {
            Some(Piece::Bytes(len)) => *len += bytes.len(),
            _ => self.pieces.push_back(Piece::Bytes(bytes.len())),
        }
    }

    /// Adds all of `buffer`. Comes back at once if it was short enough to be copied.
    pub(super) fn payload(&mut self, buffer: Buffer) -> Option<Buffer> {
        if buffer.len() <= COPIED {
            self.bytes(&buffer);
            return Some(buffer);
        }
        let to = buffer.len();
        self.piece(Source::Own(buffer), 0..to);
        None
    }

    /// Adds `range` of a buffer.
    pub(super) fn part(&mut self, parts: &Parts, range: Range<usize>) {
        match range.len() <= COPIED {
            true => self.bytes(&parts.0[range]),
            false => self.piece(Source::Shared(parts.0.clone()), range),
        }
    }

    fn piece(&mut self, source: Source, range: Range<usize>) {
        self.pending += range.len();
        self.pieces.push_back(Piece::Payload {
            source,
            from: range.start,
            to: range.end,
        });
    }

    /// Sends what it can. Ready when nothing is left; buffers that are done with go to `done`.
    pub(super) fn poll_send<S: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut S,
        mut done: impl FnMut(Buffer),
    ) -> Poll<io::Result<()>> {
        while self.pending > 0 {
            let stream = Pin::new(&mut *stream);
            let sent = match self.pieces.front() {
                Some(Piece::Bytes(len)) if self.pieces.len() == 1 => {
                    ready!(stream.poll_write(cx, &self.bytes[self.sent..self.sent + len]))?
                }
                _ => {
                    let mut slices = [IoSlice::new(&[]); SLICES];
                    let count = self.slices(&mut slices);
                    ready!(stream.poll_write_vectored(cx, &slices[..count]))?
                }
            };
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.advance(sent, &mut done);
        }
        Poll::Ready(Ok(()))
    }

    /// Sends what waits, and as much of `bytes` behind it as `socket` takes at once. Answers how much of `bytes` that was:
    /// nothing if payloads wait.
    pub(super) fn send_now<S: Socket>(&mut self, socket: &S, bytes: &[u8]) -> usize {
        if self.pieces.len() > 1 {
            return 0;
        }
        let before = &self.bytes[self.sent..];
        if before.len() != self.pending {
            return 0;
        }
        let slices = [IoSlice::new(before), IoSlice::new(bytes)];
        let sent = socket.send_now(&slices).unwrap_or(0);
        let of_before = sent.min(before.len());
        self.advance(of_before, &mut drop);
        sent - of_before
    }

    /// Forgets everything; buffers go to `done`.
    pub(super) fn clear(&mut self, mut done: impl FnMut(Buffer)) {
        for piece in self.pieces.drain(..) {
            if let Piece::Payload { source, .. } = piece {
                source.into_buffer().into_iter().for_each(&mut done);
            }
        }
        self.bytes.clear();
        (self.sent, self.pending) = (0, 0);
    }

    fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>; SLICES]) -> usize {
        let mut at = self.sent;
        let mut count = 0;
        for (slice, piece) in slices.iter_mut().zip(&self.pieces) {
            *slice = match piece {
                Piece::Bytes(len) => {
                    at += len;
                    IoSlice::new(&self.bytes[at - len..at])
                }
                Piece::Payload { source, from, to } => IoSlice::new(&source.memory()[*from..*to]),
            };
            count += 1;
        }
        count
    }

    fn advance(&mut self, mut sent: usize, done: &mut impl FnMut(Buffer)) {
        self.pending = self.pending.saturating_sub(sent);
        while sent > 0 {
            let finished = match self.pieces.front_mut() {
                None => break,
                Some(Piece::Bytes(len)) => {
                    let part = sent.min(*len);
                    *len -= part;
                    sent -= part;
                    self.sent += part;
                    *len == 0
                }
                Some(Piece::Payload { from, to, .. }) => {
                    let part = sent.min(*to - *from);
                    *from += part;
                    sent -= part;
                    from == to
                }
            };
            if finished && let Some(Piece::Payload { source, .. }) = self.pieces.pop_front() {
                source.into_buffer().into_iter().for_each(&mut *done);
            }
        }
        if self.sent == self.bytes.len() {
            self.bytes.clear();
            self.sent = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::pool::Pool;
    use super::*;
    use std::task::Waker;

    /// Takes at most `most` bytes of each write.
    struct Narrow {
        got: Vec<u8>,
        most: usize,
    }

    impl AsyncWrite for Narrow {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            let len = buf.len().min(self.most);
            self.got.extend_from_slice(&buf[..len]);
            Poll::Ready(Ok(len))
        }
        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bufs: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            let mut left = self.most;
            for buf in bufs {
                let len = buf.len().min(left);
                self.got.extend_from_slice(&buf[..len]);
                left -= len;
            }
            Poll::Ready(Ok(self.most - left))
        }
        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn pieces_arrive_in_order_however_they_are_cut() {
        for most in [1, 7, 4096, 10_000, 1 << 20] {
            let (mut pool, mut output, mut expected) = (Pool::new(), Output::new(), Vec::new());
            let mut stream = Narrow {
                got: Vec::new(),
                most,
            };
            let mut cx = Context::from_waker(Waker::noop());
            let (mut large, mut back) = (0, 0);
            for round in 0..40_u8 {
                output.bytes(&[round; 16]);
                expected.extend_from_slice(&[round; 16]);
                let len = [1, COPIED, COPIED + 1, 9000][usize::from(round % 4)];
                let mut buffer = pool.take(len);
                buffer.fill(round);
                expected.extend_from_slice(&buffer);
                large += usize::from(output.payload(buffer).is_none());
                if round % 16 == 15 {
                    let sent = output.poll_send(&mut cx, &mut stream, |_| back += 1);
                    assert!(matches!(sent, Poll::Ready(Ok(()))));
                }
            }
            assert_eq!(output.pending(), expected.len() - stream.got.len());
            let sent = output.poll_send(&mut cx, &mut stream, |_| back += 1);
            assert!(matches!(sent, Poll::Ready(Ok(()))));
            assert!(stream.got == expected, "{most} bytes a time");
            assert_eq!((output.pending(), large, back), (0, 20, 20));
        }
    }

    #[test]
    fn parts_of_one_buffer_give_it_back_once() {
        let (mut pool, mut output) = (Pool::new(), Output::new());
        let mut stream = Narrow {
            got: Vec::new(),
            most: 1000,
        };
        const PART: usize = 2 * COPIED;
        let mut buffer = pool.take(3 * PART);
        (0..3).for_each(|i| buffer[i * PART..][..PART].fill(i as u8));
        let parts = Parts::new(buffer);
        output.part(&parts, 0..PART);
        output.part(&parts, PART..PART + 4);
        output.part(&parts, 2 * PART..3 * PART);
        assert!(parts.finish().is_none());
        let mut back = 0;
        let mut cx = Context::from_waker(Waker::noop());
        let sent = output.poll_send(&mut cx, &mut stream, |_| back += 1);
        assert!(matches!(sent, Poll::Ready(Ok(()))));
        assert_eq!(
            stream.got,
            [vec![0; PART], vec![1; 4], vec![2; PART]].concat()
        );
        assert_eq!(back, 1);
    }

    #[test]
    fn clearing_gives_the_buffers_back() {
        let (mut pool, mut output) = (Pool::new(), Output::new());
        output.bytes(&[1; 16]);
        assert!(output.payload(pool.take(COPIED + 1)).is_none());
        let mut back = 0;
        output.clear(|_| back += 1);
        assert_eq!((output.pending(), back), (0, 1));
    }
}
