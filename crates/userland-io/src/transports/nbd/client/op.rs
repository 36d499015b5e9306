//! One request, from the call that makes it to the reply that ends it.
//!
//! An [`Op`] owns all that sending it again takes, the bytes of a write
//! included, and is shared by whoever waits for it ([`Wait`]) and the
//! connection that carries it. So a waiting future may be dropped or forgotten
//! at any time: nothing here points into the caller's memory, and bytes that
//! were read reach the caller's buffer under its own poll.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio::sync::Notify;

use crate::transports::nbd::wire::{CommandFlags, cmd};
use crate::{Error, ErrorKind, Result};

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    WriteZeroes,
    Discard,
    Flush,
    Cache,
    /// At most `room` runs of the context with this index among the export's.
    Status {
        context: usize,
        room: usize,
    },
}

impl Kind {
    pub(super) fn command(self) -> u16 {
        match self {
            Kind::Read => cmd::READ,
            Kind::Write => cmd::WRITE,
            Kind::WriteZeroes => cmd::WRITE_ZEROES,
            Kind::Discard => cmd::TRIM,
            Kind::Flush => cmd::FLUSH,
            Kind::Cache => cmd::CACHE,
            Kind::Status { .. } => cmd::BLOCK_STATUS,
        }
    }

    pub(super) fn is_mutation(self) -> bool {
        matches!(self, Kind::Write | Kind::WriteZeroes | Kind::Discard)
    }
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// A caller of the engine.
    Caller,
    /// The journal, restoring what a lost server may have lost.
    Replay,
    /// The client itself: a flush that makes room in the journal.
    Upkeep,
}

/// What a request brought back.
#[derive(Debug)]
pub(super) enum Answer {
    Done,
    /// The bytes of a read.
    Data(Vec<u8>),
    /// Lengths and status words.
    Status(Vec<(u64, u64)>),
}

/// A request.
#[derive(Debug)]
pub(super) struct Op {
    pub(super) kind: Kind,
    pub(super) flags: CommandFlags,
    pub(super) range: Range<u64>,
    /// What a mutation carries; its memory charge even if that is no bytes.
    pub(super) data: Option<Data>,
    pub(super) origin: Origin,
    /// A mutation: its place among them. A flush: it covers what the journal stamped up to here.
    pub(super) number: u64,
    tries: AtomicU32,
    sent: AtomicBool,
    reply: Mutex<Reply>,
}

#[derive(Debug)]
enum Reply {
    Awaited(Option<Waker>),
    Here(Result<Answer>),
    /// Nobody waits any more.
    Unwanted,
}

impl Op {
    pub(super) fn new(kind: Kind, range: Range<u64>) -> Self {
        Op {
            kind,
            flags: CommandFlags::empty(),
            range,
            data: None,
            origin: Origin::Caller,
            number: 0,
            tries: AtomicU32::new(0),
            sent: AtomicBool::new(false),
            reply: Mutex::new(Reply::Awaited(None)),
        }
    }

    pub(super) fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// The bytes that follow the request on the wire.
    pub(super) fn payload(&self) -> &[u8] {
        match (&self.data, self.kind) {
            (Some(data), Kind::Write) => data.bytes(),
            _ => &[],
        }
    }

    /// Ends the request. The first result counts.
    pub(super) fn finish(&self, result: Result<Answer>) {
        let waker = {
            let mut reply = self.reply();
            match &mut *reply {
                Reply::Awaited(waker) => {
                    let waker = waker.take();
                    *reply = Reply::Here(result);
                    waker
                }
                Reply::Here(_) | Reply::Unwanted => None,
            }
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// True if nobody waits for the answer any more.
    pub(super) fn is_unwanted(&self) -> bool {
        matches!(&*self.reply(), Reply::Unwanted)
    }

    /// Counts a connection that was lost under this request, and gives the sum.
    pub(super) fn count_try(&self) -> u32 {
        self.tries.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// It goes to a connection.
    pub(super) fn mark_sent(&self) {
        self.sent.store(true, Ordering::Relaxed);
    }

    /// True if it may have acted, should it fail: a fast zero that was refused, too, since pieces before the refused one may
    /// be zeroes.
    pub(super) fn may_have_acted(&self) -> bool {
        self.sent.load(Ordering::Relaxed)
    }

    fn reply(&self) -> MutexGuard<'_, Reply> {
        self.reply.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Resolves when the request has ended.
#[derive(Debug)]
pub(super) struct Wait(pub(super) Arc<Op>);

impl Future for Wait {
    type Output = Result<Answer>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut reply = self.0.reply();
        match std::mem::replace(&mut *reply, Reply::Unwanted) {
            Reply::Here(result) => Poll::Ready(result),
            Reply::Awaited(waker) => {
                *reply = Reply::Awaited(Some(match waker {
                    Some(waker) if waker.will_wake(cx.waker()) => waker,
                    _ => cx.waker().clone(),
                }));
                Poll::Pending
            }
            Reply::Unwanted => Poll::Ready(Err(Error::from(ErrorKind::Invalid))),
        }
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        *self.0.reply() = Reply::Unwanted;
    }
}

/// A part of a payload.
#[derive(Clone, Debug)]
pub(super) struct Data {
    payload: Arc<Payload>,
    start: usize,
    len: usize,
}

impl Data {
    /// All of `bytes`, which were charged to a budget.
    pub(super) fn new(bytes: Vec<u8>, charge: Charge) -> Self {
        Data {
            start: 0,
            len: bytes.len(),
            payload: Arc::new(Payload {
                bytes,
                _charge: charge,
            }),
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.payload.bytes[self.start..self.start + self.len]
    }

    /// The same without its first `by` bytes. What carries no bytes stays as it is.
    pub(super) fn skip(&self, by: u64) -> Self {
        let by = usize::try_from(by).unwrap_or(usize::MAX).min(self.len);
        Data {
            payload: self.payload.clone(),
            start: self.start + by,
            len: self.len - by,
        }
    }

    /// The first `len` bytes of it.
    pub(super) fn truncate(&mut self, len: u64) {
        self.len = usize::try_from(len).unwrap_or(usize::MAX).min(self.len);
    }
}

#[derive(Debug)]
struct Payload {
    bytes: Vec<u8>,
    _charge: Charge,
}

/// How much memory mutations hold, in flight and in the journal together.
#[derive(Debug)]
pub(super) struct Budget {
    cap: u64,
    used: AtomicU64,
    /// Told when some of it is given back.
    pub(super) freed: Notify,
}

/// A part of a [`Budget`], given back when dropped.
#[derive(Debug)]
pub(super) struct Charge {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Budget {
    pub(super) fn new(cap: u64) -> Arc<Self> {
        Arc::new(Budget {
            cap,
            used: AtomicU64::new(0),
            freed: Notify::new(),
        })
    }

    pub(super) fn cap(&self) -> u64 {
        self.cap
    }

    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Acquire)
    }

    /// `bytes` of it, if they fit. One alone always fits, however large.
    pub(super) fn try_take(self: &Arc<Self>, bytes: u64) -> Option<Charge> {
        self.used
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| {
                let sum = used.saturating_add(bytes);
                (used == 0 || sum <= self.cap).then_some(sum)
            })
            .ok()?;
        Some(Charge {
            budget: self.clone(),
            bytes,
        })
    }

    /// `bytes` of it, whether they fit or not.
    pub(super) fn take(self: &Arc<Self>, bytes: u64) -> Charge {
        self.used.fetch_add(bytes, Ordering::AcqRel);
        Charge {
            budget: self.clone(),
            bytes,
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::AcqRel);
        self.budget.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_takes_one_however_large_and_the_rest_only_if_they_fit() {
        let budget = Budget::new(100);
        let large = budget.try_take(1000).unwrap();
        assert!(budget.try_take(1).is_none());
        drop(large);
        let half = budget.try_take(60).unwrap();
        assert!(budget.try_take(41).is_none());
        let rest = budget.try_take(40).unwrap();
        drop((half, rest));
        assert_eq!(budget.used(), 0);
    }

    #[tokio::test]
    async fn a_dropped_wait_leaves_an_op_that_ends_quietly() {
        let op = Arc::new(Op::new(Kind::Read, 0..1));
        drop(Wait(op.clone()));
        assert!(op.is_unwanted());
        op.finish(Ok(Answer::Done));
        let op = Arc::new(Op::new(Kind::Read, 0..1));
        op.finish(Ok(Answer::Done));
        assert!(matches!(Wait(op).await, Ok(Answer::Done)));
    }
}
