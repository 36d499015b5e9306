//! Which blocks are being mutated: a queue of ranges.
//!
//! An aligned mutation queues as shared, a read-modify-write as exclusive. Each
//! waits for what stands before it, overlaps it, and is not shared with it; so
//! the order is that of arrival, and nobody starves.
//!
//! A place in the queue belongs to the operation, not to its future: dropped
//! half-way, the operation may still act below until a flush has answered, and
//! its place stays, as an *orphan*, until [`RangeLocks::settled`] names it.
//! Whoever waits behind an orphan is told to flush.
//!
//! Who may touch what: everything is behind the one mutex, which is never held
//! over an await or a wake.

use std::future::poll_fn;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

/// After so many mutations dropped half-way, the next one flushes first.
const MOST_ORPHANS: usize = 64;

/// The queue of one edge.
#[derive(Debug, Default)]
pub(super) struct RangeLocks(Mutex<Queue>);

#[derive(Debug, Default)]
struct Queue {
    next: u64,
    places: Vec<Place>,
    /// How many of the places are orphans.
    orphans: usize,
}

#[derive(Debug)]
struct Place {
    /// Ascending in order of arrival.
    id: u64,
    range: Range<u64>,
    exclusive: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    Waiting(Option<Waker>),
    Active,
    Orphan,
}

/// There is an orphan ahead: flush, then wait again.
#[derive(Debug)]
pub(super) struct OrphanAhead;

/// A place in the queue. [`finish`](Self::finish) gives it back when the operation has
/// answered; dropped before that, an active one becomes an orphan.
#[derive(Debug)]
pub(super) struct Guard<'a> {
    locks: Option<&'a RangeLocks>,
    id: u64,
}

impl RangeLocks {
    fn queue_mut(&self) -> MutexGuard<'_, Queue> {
        // Nothing panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place at the end.
    pub(super) fn queue(&self, range: Range<u64>, exclusive: bool) -> Guard<'_> {
        let mut queue = self.queue_mut();
        let id = queue.next;
        queue.next += 1;
        queue.places.push(Place {
            id,
            range,
            exclusive,
            state: State::Waiting(None),
        });
        Guard {
            locks: Some(self),
            id,
        }
    }

    /// A place for an aligned mutation that does not wait, if it need not: nor for the flush that many orphans ask for.
    pub(super) fn enter_now(&self, range: Range<u64>) -> Option<Guard<'_>> {
        let mut queue = self.queue_mut();
        let own = Place {
            id: queue.next,
            range,
            exclusive: false,
            state: State::Active,
        };
        if queue.orphans >= MOST_ORPHANS || queue.places.iter().any(|ahead| ahead.blocks(&own)) {
            return None;
        }
        let id = own.id;
        queue.next += 1;
        queue.places.push(own);
        Some(Guard {
            locks: Some(self),
            id,
        })
    }

    /// The operations that were dropped half-way and may still act.
    pub(super) fn orphans(&self) -> Vec<u64> {
        let queue = self.queue_mut();
        let orphans = queue.places.iter().filter(|p| p.is_orphan());
        orphans.map(|p| p.id).collect()
    }

    /// True if so many orphans stand in the queue that looking through them costs more than a flush.
    pub(super) fn is_crowded(&self) -> bool {
        self.queue_mut().orphans >= MOST_ORPHANS
    }

    /// These orphans can no longer act.
    pub(super) fn settled(&self, orphans: &[u64]) {
        if !orphans.is_empty() {
            self.leave(|place| orphans.contains(&place.id));
        }
    }

    /// Takes places out of the queue and wakes whoever waits for a change.
    fn leave(&self, leaves: impl Fn(&Place) -> bool) {
        let mut queue = self.queue_mut();
        queue.places.retain(|place| !leaves(place));
        queue.orphans = queue.places.iter().filter(|p| p.is_orphan()).count();
        let waiting = queue.take_wakers();
        drop(queue);
        waiting.into_iter().for_each(Waker::wake);
    }
}

impl Queue {
    // Does not allocate where nobody waits, which is the rule.
    fn take_wakers(&mut self) -> Vec<Waker> {
        let wakers = self.places.iter_mut().filter_map(|p| match &mut p.state {
            State::Waiting(waker) => waker.take(),
            _ => None,
        });
        wakers.collect()
    }
}

impl Place {
    fn is_orphan(&self) -> bool {
        matches!(self.state, State::Orphan)
    }

    fn blocks(&self, other: &Place) -> bool {
        self.id < other.id
            && (self.exclusive || other.exclusive)
            && self.range.start < other.range.end
            && other.range.start < self.range.end
    }
}

impl Guard<'_> {
    /// A place in no queue, for what nothing can stand in the way of.
    pub(super) fn none() -> Self {
        Guard { locks: None, id: 0 }
    }

    /// Waits until nothing before this place stands in its way.
    pub(super) async fn wait(&self) -> Result<(), OrphanAhead> {
        let Some(locks) = self.locks else {
            return Ok(());
        };
        poll_fn(|cx| {
            let mut queue = locks.queue_mut();
            let places = &mut queue.places;
            // Ids ascend, and a place stays until its guard is gone.
            let Ok(own) = places.binary_search_by_key(&self.id, |p| p.id) else {
                return Poll::Ready(Ok(()));
            };
            let (ahead, rest) = places.split_at_mut(own);
            let own = &mut rest[0];
            let mut blockers = ahead.iter().filter(|p| p.blocks(own)).peekable();
            if blockers.peek().is_none() {
                own.state = State::Active;
                return Poll::Ready(Ok(()));
            }
            if blockers.any(Place::is_orphan) {
                return Poll::Ready(Err(OrphanAhead));
            }
            own.state = State::Waiting(Some(cx.waker().clone()));
            Poll::Pending
        })
        .await
    }

    /// The operation has answered: the place is given back.
    pub(super) fn finish(mut self) {
        if let Some(locks) = self.locks.take() {
            locks.leave(|place| place.id == self.id);
        }
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        let Some(locks) = self.locks else {
            return;
        };
        let mut queue = locks.queue_mut();
        let Ok(own) = queue.places.binary_search_by_key(&self.id, |p| p.id) else {
            return;
        };
        match queue.places[own].state {
            State::Active => {
                queue.places[own].state = State::Orphan;
                queue.orphans += 1;
            }
            _ => drop(queue.places.remove(own)),
        }
        let waiting = queue.take_wakers();
        drop(queue);
        waiting.into_iter().for_each(Waker::wake);
    }
}
