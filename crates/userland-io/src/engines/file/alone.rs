//! What waits for the disk, in the task that asks, while nothing else does.
//!
//! Who asks for the next block only when the last one was answered gains nothing from a ring or a pool, and pays for the way
//! there and back: on a fast disk about as much as for all the rest. But a task that waits itself does nothing else
//! meanwhile, nor takes another request. So one in [`SAMPLE`] goes the other way; if any other begins while it is under
//! way, of whichever disk of the process, all do, until [`CALM`] in a row have met none. And the disk
//! must be quick: on average, below [`QUICK`]. A disk that hangs after all holds the one thread that runs the task, so
//! there must be another that runs tasks: a runtime of several threads.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::runtime::{Handle, RuntimeFlavor};

use super::at_once::{self, Place};

/// For so long a task may be held up, on average. Fast disks take a tenth of it, those that turn ten times as long.
const QUICK: Duration = Duration::from_millis(1);
/// How much of the average is the last one's: one in so many may take longer by this factor.
const WEIGHT: u64 = 16;
/// So many in a row that met no other are no accident.
const CALM: u32 = 64;
/// One in so many finds out whether there are others by now. A prime: of those that somebody asks for together, each comes to be
/// the one, not always the last, which nobody meets.
const SAMPLE: u32 = 17;

/// What is under way in this process.
static ALL: Crowd = Crowd::new();

/// Counts what is under way.
#[derive(Debug)]
pub(super) struct Crowd {
    under_way: AtomicUsize,
    /// How many in a row have begun with no other under way.
    calm: AtomicU32,
}

/// Whether what waits for one file's disk is done in the task that asks.
#[derive(Debug)]
pub(super) struct Alone {
    may_wait: bool,
    /// How long one takes, in nanoseconds.
    average: AtomicU64,
    crowd: &'static Crowd,
}

/// One that is under way, until dropped.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    alone: &'a Alone,
    is_alone: bool,
    began: Instant,
}

impl Crowd {
    pub(super) const fn new() -> Self {
        Crowd {
            under_way: AtomicUsize::new(0),
            calm: AtomicU32::new(0),
        }
    }
}

impl Alone {
    /// `is_local`: the disk is this machine's own. With one processor there would be none left for others.
    pub(super) fn new(is_local: bool) -> Self {
        Alone {
            may_wait: is_local && at_once::processors() > 1,
            average: AtomicU64::new(0),
            crowd: &ALL,
        }
    }

    /// In a crowd of its own.
    #[cfg(test)]
    pub(super) fn among(crowd: &'static Crowd) -> Self {
        Alone {
            may_wait: true,
            average: AtomicU64::new(0),
            crowd,
        }
    }

    /// Takes the disk for a quick one again.
    #[cfg(test)]
    pub(super) fn forget(&self) {
        self.average.store(0, Ordering::Relaxed);
    }

    /// Notes one that begins.
    pub(super) fn begin(&self) -> Turn<'_> {
        // Nothing is read or written under a count's protection: they only count.
        let others = self.crowd.under_way.fetch_add(1, Ordering::Relaxed);
        let calm = &self.crowd.calm;
        let is_alone = match others {
            0 => {
                let before = calm.fetch_add(1, Ordering::Relaxed);
                before >= CALM && !before.is_multiple_of(SAMPLE)
            }
            _ => {
                calm.store(0, Ordering::Relaxed);
                false
            }
        };
        Turn {
            alone: self,
            is_alone,
            began: Instant::now(),
        }
    }

    fn note(&self, took: Duration) {
        let before = self.average.load(Ordering::Relaxed);
        let took = nanos(took) / WEIGHT;
        let after = (before - before / WEIGHT).saturating_add(took);
        self.average.store(after, Ordering::Relaxed);
    }

    fn is_quick(&self) -> bool {
        self.average.load(Ordering::Relaxed) < nanos(QUICK)
    }
}

/// True if tasks have several threads to run on, so that one that waits leaves others.
pub(super) fn others_go_on(runtime: &Handle) -> bool {
    runtime.runtime_flavor() == RuntimeFlavor::MultiThread && runtime.metrics().num_workers() > 1
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Turn<'_> {
    /// Makes the call here, unless there may be others, it may take long, too many wait so already, or nothing else could
    /// go on meanwhile.
    pub(super) fn attempt<T>(&self, call: impl FnOnce() -> T) -> Option<T> {
        let may_wait = self.alone.may_wait && self.is_alone && self.alone.is_quick();
        if !may_wait || !Handle::try_current().is_ok_and(|runtime| others_go_on(&runtime)) {
            return None;
        }
        let _place = Place::take()?;
        Some(call())
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.alone.note(self.began.elapsed());
        let under_way = &self.alone.crowd.under_way;
        under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alone() -> Alone {
        Alone::among(Box::leak(Box::new(Crowd::new())))
    }

    #[test]
    fn after_a_while_alone_all_but_one_in_seventeen_are_made_here() {
        let alone = alone();
        assert!((0..CALM).all(|_| !alone.begin().is_alone));
        for _ in 0..4 {
            let here = (0..SAMPLE).filter(|_| alone.begin().is_alone);
            assert_eq!(here.count(), SAMPLE as usize - 1);
        }
    }

    #[test]
    fn one_that_meets_another_ends_the_calm_for_all() {
        let first = alone();
        let second = Alone::among(first.crowd);
        while !first.begin().is_alone {}
        let held = first.begin();
        assert!(!second.begin().is_alone);
        drop(held);
        assert!((0..CALM).all(|_| !first.begin().is_alone));
        assert!(second.begin().is_alone);
    }

    #[test]
    fn a_slow_disk_is_waited_for_elsewhere_and_a_slow_moment_is_not() {
        let alone = alone();
        while !alone.begin().is_alone {}
        (0..100).for_each(|_| alone.note(QUICK / 10));
        alone.note(8 * QUICK);
        assert!(alone.is_quick());
        (0..100).for_each(|_| alone.note(2 * QUICK));
        assert!(!alone.is_quick());
        assert_eq!(alone.begin().attempt(|| ()), None);
        alone.note(Duration::MAX);
        assert!(!alone.is_quick());
        (0..1000).for_each(|_| alone.note(QUICK / 10));
        assert!(alone.is_quick());
    }
}
