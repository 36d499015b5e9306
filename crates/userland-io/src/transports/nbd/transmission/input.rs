//! What was received and not yet understood: one buffer that one receive fills with many requests.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, ReadBuf};

/// The most bytes that one receive brings: dozens of small writes, thousands of reads.
pub(super) const CAPACITY: usize = 256 << 10;

/// Received bytes, `start..end` of which are not yet consumed.
#[derive(Debug)]
pub(super) struct Input {
    memory: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Input {
    /// An input that has received `first`, and has no room for more before it is [lent](Self::lend) some.
    pub(super) fn new(first: Vec<u8>) -> Self {
        let end = first.len();
        Input {
            memory: first.into(),
            start: 0,
            end,
        }
    }

    /// Gives it memory to receive into.
    pub(super) fn lend(&mut self, mut memory: Box<[u8]>) {
        let here = self.bytes();
        // What was received behind a handshake, as a rule nothing. Were it longer, it would be room enough.
        if let Some(start) = memory.get_mut(..here.len()) {
            start.copy_from_slice(here);
            (self.start, self.end) = (0, here.len());
            self.memory = memory;
        }
    }

    /// Takes its memory away, if nothing is at hand.
    pub(super) fn take_memory(&mut self) -> Option<Box<[u8]>> {
        let is_lent = self.bytes().is_empty() && self.memory.len() == CAPACITY;
        is_lent.then(|| std::mem::take(&mut self.memory))
    }

    /// The bytes at hand.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.end]
    }

    /// Drops the first `len` bytes at hand, or all of them if there are fewer.
    pub(super) fn consume(&mut self, len: usize) {
        self.start = self.end.min(self.start.saturating_add(len));
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Moves bytes at hand to the front of `to`; answers how many.
    pub(super) fn take(&mut self, to: &mut [u8]) -> usize {
        let len = to.len().min(self.end - self.start);
        to[..len].copy_from_slice(&self.bytes()[..len]);
        self.consume(len);
        len
    }

    /// True if nothing more can be received before something is consumed.
    pub(super) fn is_full(&self) -> bool {
        self.end - self.start == self.memory.len()
    }

    /// Receives up to `most` bytes. Answers how many came; 0 at the end of the stream.
    pub(super) fn poll_receive<S: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut S,
        most: usize,
    ) -> Poll<io::Result<usize>> {
        let came = ready!(poll_receive(cx, stream, self.room(most)))?;
        self.end += came;
        Poll::Ready(Ok(came))
    }

    /// Receives up to `most` bytes with `receive`, which answers how many it has put into the memory it is given.
    pub(super) fn receive_with(
        &mut self,
        most: usize,
        receive: impl FnOnce(&mut [u8]) -> Option<usize>,
    ) -> Option<usize> {
        let came = receive(self.room(most))?;
        self.end += came;
        Some(came)
    }

    /// Where the next bytes go, up to `most` of them.
    fn room(&mut self, most: usize) -> &mut [u8] {
        // As a rule less than a request header is at hand, so moving it costs nothing.
        if self.start > 0 {
            self.memory.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let end = self.memory.len().min(self.end.saturating_add(most));
        &mut self.memory[self.end..end]
    }
}

/// Receives into `to`, which must not be empty. Answers how many bytes came; 0 at the end of the stream.
pub(super) fn poll_receive<S: AsyncRead + Unpin>(
    cx: &mut Context<'_>,
    stream: &mut S,
    to: &mut [u8],
) -> Poll<io::Result<usize>> {
    let mut to = ReadBuf::new(to);
    ready!(Pin::new(stream).poll_read(cx, &mut to))?;
    Poll::Ready(Ok(to.filled().len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Waker;

    #[test]
    fn bytes_come_in_order_through_a_moving_window() {
        let sent: Vec<u8> = (0..=255).cycle().take(3 * CAPACITY).collect();
        let (mut stream, mut input) = (&sent[..], Input::new(vec![7; 5]));
        assert_eq!(input.take(&mut [0; 5]), 5);
        input.lend(vec![0; CAPACITY].into());
        let mut got = Vec::new();
        let mut cx = Context::from_waker(Waker::noop());
        loop {
            match input.poll_receive(&mut cx, &mut stream, 100_000) {
                Poll::Ready(Ok(0)) => break,
                Poll::Ready(Ok(came)) => assert!(came <= 100_000),
                other => panic!("{other:?}"),
            }
            // All but a few bytes, so that the window moves.
            while input.bytes().len() > 7 {
                let mut piece = [0; 1000];
                let room = piece.len().min(input.bytes().len() - 7);
                let len = input.take(&mut piece[..room]);
                got.extend_from_slice(&piece[..len]);
            }
        }
        got.extend_from_slice(input.bytes());
        assert!(got == sent);
        input.consume(8);
        assert!(input.bytes().is_empty());
        assert_eq!(input.take_memory().unwrap().len(), CAPACITY);
    }

    #[test]
    fn what_came_with_the_handshake_is_kept() {
        let mut input = Input::new(vec![1, 2, 3]);
        assert!(input.take_memory().is_none() && input.is_full());
        input.consume(1);
        input.lend(vec![0; CAPACITY].into());
        assert_eq!(input.bytes(), [2, 3]);
        assert!(input.take_memory().is_none());
    }
}
