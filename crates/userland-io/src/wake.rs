//! How other threads wake the tasks of a thread that runs several: a bit for each task, and a bell that is rung only if
//! the thread sleeps.
//!
//! Who may touch what: any thread may set a bit of `woken` and then swap [`WOKEN`] into `state`; only
//! the tasks' thread takes bits, and puts [`RUNNING`] or [`SLEEPING`] into `state`. It goes to sleep by
//! a compare-and-swap from `RUNNING`, which fails if anyone has called since it last looked. All of that
//! happens on one word, so there is no moment at which a call is neither seen nor rung for.

use std::sync::Arc;
use std::task::{Wake, Waker};

#[cfg(userland_io_loom)]
use loom::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
#[cfg(all(feature = "ublk", not(userland_io_loom)))]
use std::sync::atomic::AtomicBool;
#[cfg(not(userland_io_loom))]
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::bell::Bell;

/// The thread is awake, and nobody has called since it last looked.
const RUNNING: u8 = 0;
/// Somebody has called.
const WOKEN: u8 = 1;
/// The thread sleeps, or is about to: whoever calls rings.
const SLEEPING: u8 = 2;

/// What the tasks' thread shares with those who wake its tasks.
pub(crate) struct Calls<B> {
    woken: Box<[AtomicU64]>,
    state: AtomicU8,
    #[cfg(feature = "ublk")]
    quit: AtomicBool,
    bell: B,
}

impl<B: Bell> Calls<B> {
    pub(crate) fn new(tasks: usize, bell: B) -> Self {
        Calls {
            woken: (0..tasks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            state: AtomicU8::new(RUNNING),
            #[cfg(feature = "ublk")]
            quit: AtomicBool::new(false),
            bell,
        }
    }

    pub(crate) fn bell(&self) -> &B {
        &self.bell
    }

    /// Wakes task `index`. For any thread.
    fn call(&self, index: usize) {
        let (word, bit) = (index / 64, 1 << (index % 64));
        // Release: the task's poll sees what was written before. A bit that is set already belongs to a call
        // that is yet to be answered, and whoever made it tells the thread.
        if self.woken[word].fetch_or(bit, Ordering::AcqRel) & bit == 0 {
            self.tell();
        }
    }

    /// Asks the thread to stop at once. For any thread.
    #[cfg(feature = "ublk")]
    pub(crate) fn quit(&self) {
        self.quit.store(true, Ordering::Release);
        self.tell();
    }

    fn tell(&self) {
        if self.state.swap(WOKEN, Ordering::AcqRel) == SLEEPING {
            self.bell.ring();
        }
    }

    /// True once the thread was asked to stop.
    #[cfg(feature = "ublk")]
    pub(crate) fn has_quit(&self) -> bool {
        self.quit.load(Ordering::Acquire)
    }

    /// True if the thread may sleep now: nobody has called since [`answer`](Self::answer). From now on, calls ring.
    pub(crate) fn fall_asleep(&self) -> bool {
        self.state
            .compare_exchange(RUNNING, SLEEPING, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// Ends the sleep, if there was one, and moves the bits of the tasks to be polled to `taken`. True if there may be any.
    pub(crate) fn answer(&self, taken: &mut [u64]) -> bool {
        // Two looks, because the first costs nothing: it is a word that this thread wrote last.
        if self.state.load(Ordering::Relaxed) == RUNNING
            || self.state.swap(RUNNING, Ordering::AcqRel) != WOKEN
        {
            return false;
        }
        for (taken, woken) in taken.iter_mut().zip(&self.woken) {
            if woken.load(Ordering::Relaxed) != 0 {
                *taken |= woken.swap(0, Ordering::AcqRel);
            }
        }
        true
    }
}

struct TaskWaker<B> {
    calls: Arc<Calls<B>>,
    index: usize,
}

impl<B: Bell> Wake for TaskWaker<B> {
    fn wake(self: Arc<Self>) {
        self.calls.call(self.index);
    }
    fn wake_by_ref(self: &Arc<Self>) {
        self.calls.call(self.index);
    }
}

/// The waker of task `index`.
pub(crate) fn waker<B: Bell>(calls: &Arc<Calls<B>>, index: usize) -> Waker {
    Waker::from(Arc::new(TaskWaker {
        calls: calls.clone(),
        index,
    }))
}

#[cfg(all(test, not(userland_io_loom)))]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);
    impl Bell for Arc<Count> {
        fn ring(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn only_a_sleeper_is_rung_for_and_only_once() {
        let rung = Arc::new(Count::default());
        let calls = Arc::new(Calls::new(130, rung.clone()));
        let wakers: Vec<_> = (0..130).map(|n| waker(&calls, n)).collect();
        let mut taken = [0; 3];
        wakers[0].wake_by_ref();
        assert!(!calls.fall_asleep(), "a call since the last look");
        assert!(calls.answer(&mut taken));
        assert_eq!((taken, rung.0.load(Ordering::SeqCst)), ([1, 0, 0], 0));
        assert!(!calls.answer(&mut taken), "nobody called since");
        assert!(calls.fall_asleep());
        for n in [129, 70, 129] {
            wakers[n].wake_by_ref();
        }
        assert_eq!(rung.0.load(Ordering::SeqCst), 1);
        let mut taken = [0; 3];
        assert!(calls.answer(&mut taken));
        assert_eq!(taken, [0, 1 << 6, 2]);
    }
}

/// Every interleaving of a thread that sleeps and those that wake it, under a model checker.
#[cfg(all(test, userland_io_loom))]
mod interleavings {
    use loom::sync::atomic::AtomicUsize;
    use loom::sync::{Condvar, Mutex};
    use loom::thread;

    use super::*;

    /// As an eventfd that is polled: remembers a ring until someone waits for it.
    struct Counter(Mutex<bool>, Condvar);
    impl Bell for Arc<Counter> {
        fn ring(&self) {
            *self.0.lock().unwrap() = true;
            self.1.notify_one();
        }
    }

    /// `threads` threads each write to a place of their own and wake a task, which must see it.
    fn run(threads: usize, tasks: usize) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(move || {
            let bell = Arc::new(Counter(Mutex::new(false), Condvar::new()));
            let calls = Arc::new(Calls::new(tasks, bell.clone()));
            let written: Arc<Vec<_>> =
                Arc::new((0..threads).map(|_| AtomicUsize::new(0)).collect());
            let wakers = (0..threads).map(|n| {
                let (waker, written) = (waker(&calls, n % tasks), written.clone());
                thread::spawn(move || {
                    // Relaxed: only the call carries it over.
                    written[n].store(1, Ordering::Relaxed);
                    waker.wake();
                })
            });
            let wakers: Vec<_> = wakers.collect();
            let mut seen = vec![false; threads];
            while !seen.iter().all(|seen| *seen) {
                // A call that is lost leaves this waiting for ever, which the checker reports.
                if calls.fall_asleep() {
                    let mut rung = bell.0.lock().unwrap();
                    while !*rung {
                        rung = bell.1.wait(rung).unwrap();
                    }
                    *rung = false;
                }
                let mut taken = [0];
                if calls.answer(&mut taken) {
                    for n in 0..threads {
                        let woken = taken[0] & (1 << (n % tasks)) != 0;
                        seen[n] |= woken && written[n].load(Ordering::Relaxed) == 1;
                    }
                }
            }
            for waker in wakers {
                waker.join().unwrap();
            }
        });
    }

    #[test]
    fn no_call_to_one_task_is_lost() {
        run(2, 1);
    }

    #[test]
    fn no_call_beside_another_tasks_is_lost() {
        run(2, 2);
    }
}
