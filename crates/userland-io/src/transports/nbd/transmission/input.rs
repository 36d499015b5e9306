//! What was received and not yet understood: one buffer that one receive fills with many requests.
//!
//! What a short write brings may stay where it was received until the write is done ([`Received`]). As long as one
//! is not, what comes next is received into another buffer; there are two, and parts of one at a time are held.

use std::io;
use std::ops::Deref;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, ReadBuf};

/// The most bytes that one receive brings: dozens of small writes, thousands of reads.
pub(super) const CAPACITY: usize = 256 << 10;

/// What is received into.
#[derive(Debug)]
pub(super) struct Memory {
    now: Arc<Box<[u8]>>,
    /// The buffer before this one, of which requests may hold parts.
    before: Option<Arc<Box<[u8]>>>,
}

impl Memory {
    /// Not touched before it is needed.
    pub(super) fn new() -> Self {
        Memory {
            now: Arc::new(vec![0; CAPACITY].into()),
            before: None,
        }
    }

    /// Puts another buffer in the place of the one that requests hold parts of.
    fn turn(&mut self) {
        let free = self.before.take().filter(|b| Arc::strong_count(b) == 1);
        let next = free.unwrap_or_else(|| Memory::new().now);
        self.before = Some(std::mem::replace(&mut self.now, next));
    }

    /// False for what came with the handshake.
    fn is_whole(&self) -> bool {
        self.now.len() == CAPACITY
    }

    /// True if requests hold parts of the buffer before this one.
    fn is_held(&self) -> bool {
        let before = self.before.as_ref();
        before.is_some_and(|before| Arc::strong_count(before) > 1)
    }
}

/// A part of what was received, there for as long as this is.
#[derive(Debug)]
pub(super) struct Received {
    memory: Arc<Box<[u8]>>,
    start: usize,
    len: usize,
}

impl Deref for Received {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

/// Received bytes, `start..end` of which are not yet consumed.
#[derive(Debug)]
pub(super) struct Input {
    memory: Option<Memory>,
    start: usize,
    end: usize,
}

impl Input {
    /// An input that has received `first`, and has no room for more before it is [lent](Self::lend) some.
    pub(super) fn new(first: Vec<u8>) -> Self {
        let end = first.len();
        Input {
            memory: Some(Memory {
                now: Arc::new(first.into()),
                before: None,
            }),
            start: 0,
            end,
        }
    }

    /// Gives it memory to receive into.
    pub(super) fn lend(&mut self, mut memory: Memory) {
        let here = self.bytes();
        // What was received behind a handshake, as a rule nothing. Were it longer, it would be room enough.
        if let Some(start) = Arc::make_mut(&mut memory.now).get_mut(..here.len()) {
            start.copy_from_slice(here);
            (self.start, self.end) = (0, here.len());
            self.memory = Some(memory);
        }
    }

    /// Takes its memory away, if nothing is at hand.
    pub(super) fn take_memory(&mut self) -> Option<Memory> {
        let is_idle = self.bytes().is_empty();
        self.memory.take_if(|memory| is_idle && memory.is_whole())
    }

    fn memory(&self) -> &[u8] {
        self.memory.as_ref().map_or(&[], |memory| &memory.now)
    }

    /// The bytes at hand.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.memory()[self.start..self.end]
    }

    /// Takes the first `len` bytes at hand without moving them, if they are there and the memory can be spared.
    pub(super) fn share(&mut self, len: usize) -> Option<Received> {
        let memory = self.memory.as_ref()?;
        if self.end - self.start < len || memory.is_held() || !memory.is_whole() {
            return None;
        }
        let received = Received {
            memory: memory.now.clone(),
            start: self.start,
            len,
        };
        self.consume(len);
        Some(received)
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
        self.end - self.start == self.memory().len()
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
        let here = self.start..self.end;
        let all = self.memory.get_or_insert_with(Memory::new);
        let memory = if Arc::get_mut(&mut all.now).is_some() {
            let memory = Arc::make_mut(&mut all.now);
            // As a rule less than a request header is at hand, so moving it costs nothing.
            if here.start > 0 {
                memory.copy_within(here.clone(), 0);
            }
            memory
        } else {
            all.turn();
            let memory = Arc::make_mut(&mut all.now);
            if let Some(before) = &all.before {
                memory[..here.len()].copy_from_slice(&before[here.clone()]);
            }
            memory
        };
        (self.start, self.end) = (0, here.len());
        let end = memory.len().min(self.end.saturating_add(most));
        &mut memory[self.end..end]
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
        input.lend(Memory::new());
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
        assert!(input.take_memory().is_some());
    }

    #[test]
    fn what_is_held_stays_as_it_was_received() {
        let sent: Vec<u8> = (0..=255).cycle().take(2 * CAPACITY).collect();
        let (mut stream, mut input) = (&sent[..], Input::new(Vec::new()));
        input.lend(Memory::new());
        let mut cx = Context::from_waker(Waker::noop());
        let mut receive = |input: &mut Input| {
            let received = input.poll_receive(&mut cx, &mut stream, 10_000);
            assert!(matches!(received, Poll::Ready(Ok(10_000))));
        };
        receive(&mut input);
        assert!(input.share(10_001).is_none(), "more than there is");
        let first = input.share(3000).unwrap();
        let second = input.share(6000).unwrap();
        // What is at hand moves to another buffer, of which nothing is held beside the first one.
        receive(&mut input);
        assert_eq!(input.bytes(), &sent[9000..20_000]);
        assert!(input.share(1).is_none());
        receive(&mut input);
        assert!(first[..] == sent[..3000] && second[..] == sent[3000..9000]);
        drop((first, second));
        let third = input.share(21_000).unwrap();
        let before = |input: &Input| {
            input
                .memory
                .as_ref()
                .and_then(|m| m.before.as_ref().map(Arc::as_ptr))
        };
        let now = |input: &Input| input.memory.as_ref().map(|m| Arc::as_ptr(&m.now));
        let free = before(&input);
        receive(&mut input);
        assert!(third[..] == sent[9000..30_000] && input.bytes() == &sent[30_000..40_000]);
        // The first buffer is received into again.
        assert_eq!(now(&input), free);
    }

    #[test]
    fn what_came_with_the_handshake_is_kept() {
        let mut input = Input::new(vec![1, 2, 3]);
        assert!(input.take_memory().is_none() && input.is_full());
        input.consume(1);
        input.lend(Memory::new());
        assert_eq!(input.bytes(), [2, 3]);
        assert!(input.take_memory().is_none());
    }
}
