//! One request on its way through a device: counted, timed, and kept from
//! taking the server down if the engine panics.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use super::stats::{Counters, Op, is_next_sampled, is_sampled};
use crate::{Error, ErrorKind, Result};

/// What all requests to a device share.
#[derive(Debug, Default)]
pub(super) struct Monitor {
    pub(super) counters: Counters,
    /// Set by a panic in a mutation or a flush: nobody knows what it left half-way, so
    /// nothing more is written or vouched for.
    poisoned: AtomicBool,
}

impl Monitor {
    /// Runs `future`, a request for `op` on `len` bytes from `offset`.
    pub(super) fn run<F>(&self, op: Op, offset: u64, len: u64, future: F) -> Request<'_, F> {
        Request {
            monitor: self,
            op,
            offset,
            len,
            state: State::New,
            future,
        }
    }

    /// Counts a read of `len` bytes from `offset`, if `call` shows them to `to`, and answers whether it did.
    pub(super) fn lend(
        &self,
        offset: u64,
        len: u64,
        to: &mut dyn FnMut(&[u8]),
        call: impl FnOnce(&mut dyn FnMut(&[u8])),
    ) -> bool {
        let start = is_next_sampled().then(Instant::now);
        let (mut begun, mut ended) = (false, false);
        let called = catch_unwind(AssertUnwindSafe(|| {
            call(&mut |bytes| {
                begun = true;
                to(bytes);
                ended = true;
            });
        }));
        match called {
            // Not the engine's panic, but the caller's own.
            Err(panic) if begun && !ended => resume_unwind(panic),
            // After one before it has lent anything, the read that follows will tell of it. One after that comes too late:
            // the bytes are where they were to go, and must not go there again.
            _ => {}
        }
        if ended {
            is_sampled();
            let took = start.map(|start| start.elapsed());
            self.counters.count(Op::Read, Some(len), took, false);
            report(Op::Read, offset, len, &Ok(()), took);
        }
        ended
    }

    /// As [`run`](Self::run), for what is done by `call`, unless that answers `None`.
    pub(super) fn now(
        &self,
        op: Op,
        offset: u64,
        len: u64,
        call: impl FnOnce() -> Option<Result>,
    ) -> Option<Result> {
        // Whoever then asks by a future is told why not.
        self.healthy().ok()?;
        let start = is_next_sampled().then(Instant::now);
        let result = self
            .guard(op, call)
            .unwrap_or_else(|error| Some(Err(error)))?;
        is_sampled();
        let took = start.map(|start| start.elapsed());
        let done = result.is_ok().then_some(len);
        self.counters.count(op, done, took, false);
        report(op, offset, len, &result, took);
        Some(result)
    }

    /// Fails once a mutation or a flush has panicked.
    pub(super) fn healthy(&self) -> Result {
        match self.poisoned.load(Ordering::Acquire) {
            false => Ok(()),
            true => Err(Error::new(
                ErrorKind::Io,
                "the engine panicked in an earlier mutation or flush: reopen the disk",
            )),
        }
    }

    /// Calls, turning a panic into an error and remembering it if it may have left something half-way.
    fn guard<T>(&self, op: Op, call: impl FnOnce() -> T) -> Result<T> {
        catch_unwind(AssertUnwindSafe(call)).map_err(|panic| {
            if op.is_mutation_or_flush() {
                self.poisoned.store(true, Ordering::Release);
            }
            let text = match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
                (Some(text), _) => text,
                (_, Some(text)) => text.as_str(),
                _ => "no message",
            };
            let text = format!("the engine panicked: {text}");
            Error::new(ErrorKind::Io, text)
        })
    }

    /// As [`guard`](Self::guard), for a poll.
    fn poll(&self, op: Op, poll: impl FnOnce() -> Poll<Result>) -> Poll<Result> {
        self.guard(op, poll)
            .unwrap_or_else(|error| Poll::Ready(Err(error)))
    }
}

pin_project_lite::pin_project! {
    /// A request that is being run.
    pub(super) struct Request<'a, F> {
        monitor: &'a Monitor,
        op: Op,
        offset: u64,
        len: u64,
        state: State,
        #[pin]
        future: F,
    }
}

enum State {
    New,
    /// Waiting since then.
    Waiting(Instant),
}

impl<F: Future<Output = Result>> Future for Request<'_, F> {
    type Output = Result;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result> {
        let this = self.project();
        let (op, future) = (*this.op, this.future);
        let (result, took, waited) = match *this.state {
            State::New => {
                if op.is_mutation_or_flush() {
                    this.monitor.healthy()?;
                }
                let start = is_sampled().then(Instant::now);
                match this.monitor.poll(op, || future.poll(cx)) {
                    Poll::Ready(result) => (result, start.map(|start| start.elapsed()), false),
                    Poll::Pending => {
                        *this.state = State::Waiting(start.unwrap_or_else(Instant::now));
                        return Poll::Pending;
                    }
                }
            }
            State::Waiting(start) => {
                let result = ready!(this.monitor.poll(op, || future.poll(cx)));
                (result, Some(start.elapsed()), true)
            }
        };
        let done = result.is_ok().then_some(*this.len);
        this.monitor.counters.count(op, done, took, waited);
        report(op, *this.offset, *this.len, &result, took);
        Poll::Ready(result)
    }
}

/// Says what happened: a failure of the storage once, here, where its place is known; transports only translate.
fn report(op: Op, offset: u64, len: u64, result: &Result, took: Option<Duration>) {
    let op = op.name();
    match result {
        Err(error) if matches!(error.kind(), ErrorKind::Io | ErrorKind::Protection) => {
            tracing::warn!(target: "userland_io::io", op, offset, len, %error, "request failed");
        }
        Err(error) => {
            tracing::debug!(target: "userland_io::io", op, offset, len, %error, "request refused");
        }
        Ok(()) => {
            tracing::trace!(target: "userland_io::io", op, offset, len, ?took, "request done")
        }
    }
}
