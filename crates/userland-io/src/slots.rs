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
use std::task::{Context, Poll, Wake, Waker};

#[cfg(not(userland_io_loom))]
use atomic_waker::AtomicWaker;
#[cfg(userland_io_loom)]
use loom::future::AtomicWaker;
#[cfg(userland_io_loom)]
use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(userland_io_loom))]
use std::sync::atomic::{AtomicU64, Ordering};

/// A fixed number of slots in which futures run to completion.
pub struct Slots<F> {
    slots: Vec<Slot<F>>,
    free: Vec<usize>,
    capacity: usize,
    ready: Arc<Ready>,
    /// Bits taken from `ready` whose slots are yet to be polled.
    taken: Box<[u64]>,
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

impl Ready {
    fn register(&self, cx: &Context<'_>) {
        #[cfg(not(userland_io_loom))]
        self.task.register(cx.waker());
        #[cfg(userland_io_loom)]
        self.task.register_by_ref(cx.waker());
    }
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
        let words = capacity.div_ceil(64);
        Slots {
            slots: Vec::new(),
            free: Vec::new(),
            capacity,
            ready: Arc::new(Ready {
                woken: (0..words).map(|_| AtomicU64::new(0)).collect(),
                task: AtomicWaker::new(),
            }),
            taken: vec![0; words].into(),
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
    ///
    /// A future that wakes itself is polled in the task's next turn, not again in this one: it may be asking
    /// for just that (tokio's budget does).
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<F::Output>> {
        if self.in_flight() == 0 {
            return Poll::Ready(None);
        }
        self.ready.register(cx);
        if let Some(output) = self.poll_taken() {
            return Poll::Ready(Some(output));
        }
        for (taken, woken) in self.taken.iter_mut().zip(&self.ready.woken) {
            // A word that is zero is left to the cores that write it.
            if woken.load(Ordering::Relaxed) != 0 {
                *taken = woken.swap(0, Ordering::AcqRel);
            }
        }
        match self.poll_taken() {
            Some(output) => Poll::Ready(Some(output)),
            None => Poll::Pending,
        }
    }

    /// Polls the slots whose bits were taken until one ends.
    fn poll_taken(&mut self) -> Option<F::Output> {
        for word in 0..self.taken.len() {
            while self.taken[word] != 0 {
                let bit = self.taken[word].trailing_zeros() as usize;
                self.taken[word] &= self.taken[word] - 1;
                let index = word * 64 + bit;
                // A wake may come late, for a future that has ended since: then the slot is empty, or polled for nothing.
                if let Poll::Ready(output) = self.poll_slot(index) {
                    self.free.push(index);
                    return Some(output);
                }
            }
        }
        None
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

#[cfg(all(test, not(userland_io_loom)))]
mod tests {
    use std::cell::RefCell;
    use std::future::poll_fn;
    use std::rc::Rc;
    use std::task::Waker;

    use tokio::sync::oneshot;

    use super::*;

    fn now<F: Future>(slots: &mut Slots<F>) -> Poll<Option<F::Output>> {
        slots.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn what_is_ready_at_once_takes_no_slot() {
        let mut slots = Slots::new(1);
        for n in 0..3 {
            assert_eq!(slots.start(std::future::ready(n)), Poll::Ready(n));
            assert_eq!(slots.in_flight(), 0);
        }
        assert_eq!(now(&mut slots), Poll::Ready(None));
    }

    #[test]
    fn only_what_was_woken_is_polled() {
        let polls = RefCell::new(Vec::new());
        let wakers: Rc<RefCell<Vec<Option<Waker>>>> = Rc::new(RefCell::new(vec![None; 100]));
        let mut slots = Slots::new(100);
        for n in 0..100_usize {
            let (polls, wakers, mut woken) = (&polls, wakers.clone(), false);
            let future = poll_fn(move |cx| {
                polls.borrow_mut().push(n);
                wakers.borrow_mut()[n] = Some(cx.waker().clone());
                match std::mem::replace(&mut woken, true) {
                    true => Poll::Ready(n),
                    false => Poll::Pending,
                }
            });
            assert!(slots.start(future).is_pending());
        }
        assert!(slots.is_full());
        assert!(now(&mut slots).is_pending());
        polls.borrow_mut().clear();
        for n in [70, 3, 99] {
            let waker = wakers.borrow()[n].clone().unwrap();
            waker.wake_by_ref();
            waker.wake();
        }
        let mut ended = Vec::new();
        while let Poll::Ready(Some(n)) = now(&mut slots) {
            ended.push(n);
        }
        assert_eq!(ended, [3, 70, 99]);
        assert_eq!(*polls.borrow(), ended);
        assert_eq!(slots.in_flight(), 97);
        // A late wake, for a future that has ended, and a slot that is used again.
        wakers.borrow()[3].as_ref().unwrap().wake_by_ref();
        assert!(now(&mut slots).is_pending());
    }

    #[test]
    #[should_panic(expected = "all 1 slots are taken")]
    fn a_full_house_is_the_callers_mistake() {
        let mut slots = Slots::new(1);
        for _ in 0..2 {
            let _ = slots.start(std::future::pending::<()>());
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_wake_from_another_thread_is_lost() {
        let mut slots = Slots::new(64);
        let mut sum = 0;
        for round in 0..500_u64 {
            for n in 0..64 {
                let (answer, asked) = oneshot::channel();
                let started = slots.start(async move { asked.await.unwrap_or(0_u64) });
                assert!(started.is_pending());
                tokio::spawn(async move { answer.send(round * 64 + n) });
            }
            while let Some(n) = poll_fn(|cx| slots.poll(cx)).await {
                sum += n;
            }
        }
        let count = 500 * 64;
        assert_eq!(sum, count * (count - 1) / 2);
    }
}

/// Every interleaving of a slot's owner and the threads that wake it, under a model checker.
#[cfg(all(test, userland_io_loom))]
mod interleavings {
    use std::future::poll_fn;

    use loom::sync::atomic::AtomicBool;
    use loom::thread;

    use super::*;

    /// Ends once a thread of its own has set the flag and called the waker.
    async fn told_by_a_thread(wakes: usize) {
        let flag = Arc::new((AtomicBool::new(false), AtomicWaker::new()));
        let mut thread = None;
        poll_fn(|cx| {
            flag.1.register_by_ref(cx.waker());
            let told = flag.clone();
            thread.get_or_insert_with(|| {
                thread::spawn(move || {
                    told.0.store(true, Ordering::Release);
                    for _ in 0..wakes {
                        told.1.wake();
                    }
                })
            });
            match flag.0.load(Ordering::Acquire) {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        })
        .await;
        if let Some(thread) = thread {
            thread.join().unwrap();
        }
    }

    fn run(futures: usize, wakes: usize, preemptions: usize) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(preemptions);
        model.check(move || {
            let mut slots = Slots::new(2);
            let mut ended = 0;
            for _ in 0..futures {
                ended += usize::from(slots.start(told_by_a_thread(wakes)).is_ready());
            }
            // A wake that is lost leaves this waiting for ever, which the checker reports.
            while let Some(()) = loom::future::block_on(poll_fn(|cx| slots.poll(cx))) {
                ended += 1;
            }
            assert_eq!(ended, futures);
        });
    }

    #[test]
    fn no_wake_is_lost() {
        run(1, 2, 4);
    }

    #[test]
    fn no_wake_is_lost_beside_another_slot() {
        run(2, 1, 1);
    }
}
