//! Chance, time and the moment at which everything stops.

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

/// The one source of chance and time in a simulated run. A cheap handle.
///
/// Each thing that a simulated disk does is an event. [`stop_after`](Self::stop_after) sets how many
/// may happen: the next one never does, and whoever waits for it waits for ever. That is
/// how a crash can be put at every point of a run.
#[derive(Clone, Debug)]
pub struct World(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    rng: fastrand::Rng,
    now: Duration,
    timers: BTreeMap<(Duration, u64), Waker>,
    next_timer: u64,
    events: u64,
    stop_at: Option<u64>,
    stopped: bool,
    forgotten: u64,
    breaches: Vec<String>,
}

impl World {
    /// A world whose every choice follows from `seed`.
    pub fn new(seed: u64) -> Self {
        World(Arc::new(Mutex::new(State {
            rng: fastrand::Rng::with_seed(seed),
            now: Duration::ZERO,
            timers: BTreeMap::new(),
            next_timer: 0,
            events: 0,
            stop_at: None,
            stopped: false,
            forgotten: 0,
            breaches: Vec::new(),
        })))
    }

    /// A number below `limit` (0 if that is 0).
    pub fn draw(&self, limit: u64) -> u64 {
        match limit {
            0 => 0,
            _ => self.state().rng.u64(..limit),
        }
    }

    /// True once in `n` times.
    pub fn one_in(&self, n: u64) -> bool {
        self.draw(n) == 0
    }

    /// The simulated time since the world began.
    pub fn now(&self) -> Duration {
        self.state().now
    }

    /// Waits for `time` of simulated time. It passes only while nothing else can happen.
    pub fn sleep(&self, time: Duration) -> impl Future<Output = ()> + Send + use<> {
        let mut timer = Timer {
            world: self.clone(),
            time,
            key: None,
        };
        poll_fn(move |cx| timer.poll(cx.waker()))
    }

    /// Lets others go first, or not.
    pub fn pause(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut turns = self.draw(5).saturating_sub(2);
        poll_fn(move |cx| {
            if turns == 0 {
                return Poll::Ready(());
            }
            turns -= 1;
            cx.waker().wake_by_ref();
            Poll::Pending
        })
    }

    /// Passes when one more event may happen, and counts it; never passes again once the world has stopped.
    pub fn event(&self) -> impl Future<Output = ()> + Send + use<> {
        let world = self.clone();
        poll_fn(move |_| match world.try_event() {
            true => Poll::Ready(()),
            false => Poll::Pending,
        })
    }

    /// As [`event`](Self::event), but does not wait: false once the world has stopped.
    pub(super) fn try_event(&self) -> bool {
        let mut state = self.state();
        if state.stopped || state.stop_at.is_some_and(|at| state.events >= at) {
            state.stopped = true;
            return false;
        }
        state.events += 1;
        true
    }

    /// Lets `more` further events happen (`None`: any number), and forgets that the world had stopped.
    pub fn stop_after(&self, more: Option<u64>) {
        let mut state = self.state();
        state.stop_at = more.map(|more| state.events.saturating_add(more));
        state.stopped = false;
    }

    /// True once an event was held up.
    pub fn has_stopped(&self) -> bool {
        self.state().stopped
    }

    /// How many events have happened.
    pub fn events(&self) -> u64 {
        self.state().events
    }

    /// Says that a future was forgotten (`mem::forget`), not dropped: nothing else could tell a disk that the
    /// requests now in flight may have lost their owner.
    pub fn note_forgotten(&self) {
        self.state().forgotten += 1;
    }

    pub(crate) fn forgotten(&self) -> u64 {
        self.state().forgotten
    }

    /// Notes that a caller broke its half of the contract with a simulated disk.
    pub(crate) fn breach(&self, what: String) {
        self.state().breaches.push(what);
    }

    /// What callers of simulated disks did that the contract forbids, and forgets it.
    pub fn take_breaches(&self) -> Vec<String> {
        std::mem::take(&mut self.state().breaches)
    }

    /// Moves the clock to the next timer and wakes its owner. False if there is none.
    pub(super) fn advance(&self) -> bool {
        let mut state = self.state();
        let Some(((at, _), waker)) = state.timers.pop_first() else {
            return false;
        };
        state.now = at;
        drop(state);
        waker.wake();
        true
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Timer {
    world: World,
    time: Duration,
    key: Option<(Duration, u64)>,
}

impl Timer {
    fn poll(&mut self, waker: &Waker) -> Poll<()> {
        let mut state = self.world.state();
        let key = *self.key.get_or_insert_with(|| {
            state.next_timer += 1;
            (state.now + self.time, state.next_timer)
        });
        if state.now >= key.0 {
            state.timers.remove(&key);
            return Poll::Ready(());
        }
        state.timers.insert(key, waker.clone());
        Poll::Pending
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.world.state().timers.remove(&key);
        }
    }
}
