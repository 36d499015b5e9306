//! Flushes that come while another is under way share the next `fdatasync`.
//!
//! A flush may be answered by a sync that has not begun when it comes, never by one that has: what was
//! written in between may have missed that one. So one sync runs at a time, on a thread of the pool,
//! and all that come meanwhile wait for the one after it.

use std::any::Any;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::PoisonError;
#[cfg(not(userland_io_loom))]
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Poll, Waker};

#[cfg(userland_io_loom)]
use loom::sync::{Arc, Mutex, MutexGuard};

use crate::threads::{Mark, Pool};
use crate::{Error, ErrorKind, Result};

#[derive(Debug, Default)]
pub(super) struct Flushes {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    /// A thread is at it, and looks for `next` when it is through.
    is_running: bool,
    /// The sync that has not begun, if anyone wants one.
    next: Option<Arc<Shared>>,
}

/// What those who wait for one sync share.
#[derive(Debug, Default)]
struct Shared(Mutex<(Outcome, Vec<Waker>)>);

#[derive(Debug, Default)]
enum Outcome {
    #[default]
    Pending,
    /// With the moment when it had ended.
    Done(Mark),
    Failed(i32),
    /// Raised again in the first who asks; the others hear of an error.
    Panicked(Option<Box<dyn Any + Send>>),
}

impl Flushes {
    /// Resolves when a call of `sync` that began after this one has ended. `pool` makes it whether that is awaited or not.
    pub(super) async fn flush(
        &self,
        pool: &Pool,
        sync: impl FnMut() -> Result<Mark> + Send + 'static,
    ) -> Result<Mark> {
        let (mine, is_first) = self.join();
        if is_first {
            let state = self.state.clone();
            pool.spawn(move || run(&state, sync));
        }
        mine.outcome().await
    }

    /// The next sync, and whether the caller is the first to want one: then it has to see to it that they are made.
    fn join(&self) -> (Arc<Shared>, bool) {
        let mut state = lock(&self.state);
        let mine = state.next.get_or_insert_default().clone();
        (mine, !std::mem::replace(&mut state.is_running, true))
    }
}

/// Makes one sync after the other while there are flushes to wait for them.
fn run(state: &Mutex<State>, mut sync: impl FnMut() -> Result<Mark>) {
    loop {
        let batch = {
            let mut state = lock(state);
            match state.next.take() {
                Some(batch) => batch,
                None => {
                    state.is_running = false;
                    return;
                }
            }
        };
        batch.end(match catch_unwind(AssertUnwindSafe(&mut sync)) {
            Ok(Ok(ended)) => Outcome::Done(ended),
            Ok(Err(error)) => Outcome::Failed(error.errno()),
            Err(panic) => Outcome::Panicked(Some(panic)),
        });
    }
}

impl Shared {
    fn end(&self, outcome: Outcome) {
        let wakers = {
            let mut shared = lock(&self.0);
            shared.0 = outcome;
            std::mem::take(&mut shared.1)
        };
        for waker in wakers {
            // Foreign code, which must not take the thread along.
            drop(catch_unwind(AssertUnwindSafe(|| waker.wake())));
        }
    }

    async fn outcome(&self) -> Result<Mark> {
        let outcome = poll_fn(|cx| {
            let mut shared = lock(&self.0);
            Poll::Ready(match &mut shared.0 {
                Outcome::Pending => {
                    if !shared.1.iter().any(|known| known.will_wake(cx.waker())) {
                        shared.1.push(cx.waker().clone());
                    }
                    return Poll::Pending;
                }
                Outcome::Done(ended) => Ok(Ok(*ended)),
                Outcome::Failed(errno) => Ok(Err(Error::from_errno(*errno))),
                Outcome::Panicked(panic) => match panic.take() {
                    Some(panic) => Err(panic),
                    None => Ok(Err(Error::new(ErrorKind::Io, "the shared sync panicked"))),
                },
            })
        });
        match outcome.await {
            Ok(result) => result,
            Err(panic) => resume_unwind(panic),
        }
    }
}

/// No code of others runs under these locks, so a poisoned one is in order.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Every interleaving of those who flush and the thread that syncs, under a model checker.
#[cfg(all(test, userland_io_loom))]
mod interleavings {
    use loom::future::block_on;
    use loom::sync::atomic::{AtomicUsize, Ordering};
    use loom::thread;

    use super::*;
    use crate::threads::Epochs;

    /// Counts writes, and those that a sync has made durable.
    #[derive(Default)]
    struct Disk {
        flushes: Flushes,
        written: AtomicUsize,
        durable: AtomicUsize,
    }

    fn write_and_flush(disk: &Arc<Disk>) {
        let mine = disk.written.fetch_add(1, Ordering::SeqCst) + 1;
        let (shared, is_first) = disk.flushes.join();
        if is_first {
            let disk = disk.clone();
            thread::spawn(move || {
                run(&disk.flushes.state, || {
                    // What is written from here on may be missed.
                    let written = disk.written.load(Ordering::SeqCst);
                    disk.durable.fetch_max(written, Ordering::SeqCst);
                    Ok(Epochs::new().mark())
                });
            });
        }
        block_on(shared.outcome()).unwrap();
        assert!(disk.durable.load(Ordering::SeqCst) >= mine, "not durable");
    }

    #[test]
    fn no_flush_is_answered_by_a_sync_that_had_begun() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let disk = Arc::new(Disk::default());
            let other = disk.clone();
            let other = thread::spawn(move || write_and_flush(&other));
            // A flush that nobody answers leaves this waiting for ever, which the checker reports.
            write_and_flush(&disk);
            other.join().unwrap();
        });
    }
}
