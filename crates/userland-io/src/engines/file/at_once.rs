//! Buffered writes in the caller's task, where no flag keeps them from waiting.
//!
//! ext4 and block devices refuse a write that promises not to wait (`RWF_NOWAIT`), and a trip to a
//! thread of the pool costs several times what the copy into the page cache does. Such a write seldom
//! waits: of whole blocks, or blocks that the cache has, nothing need be read first. What is left is the kernel
//! holding back who dirties memory faster than the disk takes it (up to 200 ms at a time), a full journal, a
//! disk that hangs. So each is timed: after a long one all go to the pool for [`REST`] times as long.
//!
//! A thread that runs tasks is lost to waiting for a seventeenth of its time at most, and at any moment half
//! of the processors' number of threads at most, over all files of the process. A runtime that has fewer threads may
//! have all of them wait.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// A write that takes longer has waited for something. Shorter is what another program's turn on the processor
/// takes, too, which no pool avoids; the kernel holds a writer back for 10 ms and more.
const LONG: Duration = Duration::from_millis(5);
/// For how many times as long as a long write took none is made at once.
const REST: u32 = 16;
/// How many are being made in this process.
static UNDER_WAY: AtomicUsize = AtomicUsize::new(0);

/// Whether writes to one file are made at once.
#[derive(Debug)]
pub(super) struct AtOnce {
    start: Instant,
    /// In microseconds after `start`.
    rests_until: AtomicU64,
}

impl AtOnce {
    pub(super) fn new() -> Self {
        AtOnce {
            start: Instant::now(),
            rests_until: AtomicU64::new(0),
        }
    }

    /// Makes the call, unless the last one that took long was just now, or too many are under way.
    pub(super) fn attempt<T>(&self, call: impl FnOnce() -> T) -> Option<T> {
        let began = self.start.elapsed();
        if !self.is_due(began) {
            return None;
        }
        let _place = Place::take()?;
        let result = call();
        self.note(began, self.start.elapsed());
        Some(result)
    }

    fn is_due(&self, now: Duration) -> bool {
        micros(now) >= self.rests_until.load(Ordering::Relaxed)
    }

    fn note(&self, began: Duration, ended: Duration) {
        let took = ended.saturating_sub(began);
        if took >= LONG {
            let until = ended.saturating_add(took.saturating_mul(REST));
            self.rests_until.fetch_max(micros(until), Ordering::Relaxed);
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// How many this process may use.
pub(super) fn processors() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// One of the places for what may wait in a task: free again when dropped.
pub(super) struct Place;

impl Place {
    pub(super) fn take() -> Option<Place> {
        static PLACES: OnceLock<usize> = OnceLock::new();
        let places = *PLACES.get_or_init(|| (processors() / 2).max(1));
        // Nothing is read or written under a place's protection: it only counts.
        // Lazily: a place that was not taken must not be given back.
        UNDER_WAY
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
                (taken < places).then_some(taken + 1)
            })
            .is_ok()
            .then(|| Place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        UNDER_WAY.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn half_of_the_processors_wait_at_most() {
        let processors = processors();
        let all: Vec<_> = (0..4 * processors).map(|_| Place::take()).collect();
        assert!(all.iter().flatten().count() <= (processors / 2).max(1));
        assert!(all.iter().any(Option::is_none));
        let again = Place::take();
        assert!(again.is_none() || all.iter().flatten().count() == 0);
    }

    #[test]
    fn after_a_long_write_none_is_made_at_once_for_sixteen_times_as_long() {
        let writes = AtOnce::new();
        writes.note(ms(0), ms(4));
        assert!(writes.is_due(ms(4)), "no longer than another's turn");
        writes.note(ms(100), ms(110));
        assert!(!writes.is_due(ms(110)) && !writes.is_due(ms(269)));
        assert!(writes.is_due(ms(270)));
        // One that began before, and ends meanwhile, makes no rest shorter.
        writes.note(ms(200), ms(400));
        writes.note(ms(395), ms(401));
        assert!(!writes.is_due(ms(3599)) && writes.is_due(ms(3600)));
        writes.note(ms(0), Duration::MAX);
        assert!(!writes.is_due(ms(u64::MAX / 2000)));
    }
}
