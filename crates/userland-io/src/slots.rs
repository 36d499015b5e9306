//! Requests run to completion in a fixed number of slots.
//!
//! A transport's task owns its [`Slots`]: it starts each request's future in a
//! free slot, where it is polled once at once, and polls the ones that were woken.
//! Nothing is spawned, and nothing allocated per request: a slot's memory and
//! waker are made when it is first used, and kept.
//!
//! Who may touch what: `slots` and `free` belong to the one task that polls.
//! `Ready` is shared with the wakers, which any thread may call: they set a bit,
//! then wake the task; the task registers itself, then takes the bits. In that
//! order on each side no wake is lost.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use atomic_waker::AtomicWaker;

/// A fixed number of slots in which futures run to completion.
pub struct Slots<F> {
    slots: Vec<Slot<F>>,
    free: Vec<usize>,
    capacity: usize,
    ready: Arc<Ready>,
}

struct Slot<F> {
    // Allocated once; `Pin::set` puts the next future in its place.
    future: Pin<Box<Option<F>>>,
    waker: Waker,
}

/// Which slots were woken, and the task to tell.
struct Ready {
    woken: Box<[AtomicU64]>,
    task: AtomicWaker,
}

struct SlotWaker {
    ready: Arc<Ready>,
    index: usize,
}

impl Wake for SlotWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }
    fn wake_by_ref(self: &Arc<Self>) {
        let (word, bit) = (self.index / 64, 1 << (self.index % 64));
        // Release: what the waking thread wrote is seen by the poll. A set bit means someone has told the task.
        if self.ready.woken[word].fetch_or(bit, Ordering::AcqRel) & bit == 0 {
            self.ready.task.wake();
        }
    }
}

impl<F: Future> Slots<F> {
    /// `capacity` slots, none of them allocated yet.
    pub fn new(capacity: usize) -> Self {
        Slots {
            slots: Vec::new(),
            free: Vec::new(),
            capacity,
            ready: Arc::new(Ready {
                woken: (0..capacity.div_ceil(64))
                    .map(|_| AtomicU64::new(0))
                    .collect(),
                task: AtomicWaker::new(),
            }),
        }
    }

    /// How many futures are running.
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// True if [`start`](Self::start) has no room.
    pub fn is_full(&self) -> bool {
        self.free.is_empty() && self.slots.len() == self.capacity
    }

    /// Puts `future` into a free slot and polls it once. `Ready` if that was enough; else
    /// [`poll`](Self::poll) gives the output later.
    ///
    /// # Panics
    /// If no slot is free: ask [`is_full`](Self::is_full) first.
    pub fn start(&mut self, future: F) -> Poll<F::Output> {
        let index = match self.free.pop() {
            Some(index) => index,
            None => self.add_slot(),
        };
        self.slots[index].future.set(Some(future));
        let polled = self.poll_slot(index);
        if polled.is_ready() {
            self.free.push(index);
        }
        polled
    }

    /// The output of a future that has ended: `Ready(None)` when none is running. Call again until `Pending`.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<F::Output>> {
        if self.in_flight() == 0 {
            return Poll::Ready(None);
        }
        self.ready.task.register(cx.waker());
        for word in 0..self.ready.woken.len() {
            loop {
                let bits = self.ready.woken[word].load(Ordering::Acquire);
                if bits == 0 {
                    break;
                }
                let bit = bits & bits.wrapping_neg();
                self.ready.woken[word].fetch_and(!bit, Ordering::AcqRel);
                let index = word * 64 + bit.trailing_zeros() as usize;
                // A wake may come late, for a future that has ended since.
                if self.slots[index].future.is_none() {
                    continue;
                }
                if let Poll::Ready(output) = self.poll_slot(index) {
                    self.free.push(index);
                    return Poll::Ready(Some(output));
                }
            }
        }
        Poll::Pending
    }

    fn add_slot(&mut self) -> usize {
        let index = self.slots.len();
        assert!(
            index < self.capacity,
            "all {} slots are taken",
            self.capacity
        );
        self.slots.push(Slot {
            future: Box::pin(None),
            waker: Waker::from(Arc::new(SlotWaker {
                ready: self.ready.clone(),
                index,
            })),
        });
        index
    }

    fn poll_slot(&mut self, index: usize) -> Poll<F::Output> {
        let slot = &mut self.slots[index];
        let Some(future) = slot.future.as_mut().as_pin_mut() else {
            return Poll::Pending;
        };
        let polled = future.poll(&mut Context::from_waker(&slot.waker));
        if polled.is_ready() {
            slot.future.set(None);
        }
        polled
    }
}

impl<F> std::fmt::Debug for Slots<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Slots({} of {} taken)",
            self.slots.len() - self.free.len(),
            self.capacity
        )
    }
}
