//! What a device has done: counters by operation, and how long requests took.
//!
//! Each thread adds to a shard of its own, so that connections on different
//! cores do not pull one cache line back and forth; a reader sums the shards.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// An operation on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// [`Engine::read`](crate::Engine::read)
    Read,
    /// [`Engine::write`](crate::Engine::write)
    Write,
    /// [`Engine::flush`](crate::Engine::flush)
    Flush,
    /// [`Engine::discard`](crate::Engine::discard)
    Discard,
    /// [`Engine::write_zeroes`](crate::Engine::write_zeroes)
    WriteZeroes,
    /// [`Engine::extents`](crate::Engine::extents)
    Extents,
    /// [`Engine::status`](crate::Engine::status)
    Status,
    /// [`Engine::prefetch`](crate::Engine::prefetch)
    Prefetch,
}

impl Op {
    /// Every operation.
    pub const ALL: [Op; 8] = [
        Op::Read,
        Op::Write,
        Op::Flush,
        Op::Discard,
        Op::WriteZeroes,
        Op::Extents,
        Op::Status,
        Op::Prefetch,
    ];

    /// Its name, as the method is called.
    pub const fn name(self) -> &'static str {
        match self {
            Op::Read => "read",
            Op::Write => "write",
            Op::Flush => "flush",
            Op::Discard => "discard",
            Op::WriteZeroes => "write_zeroes",
            Op::Extents => "extents",
            Op::Status => "status",
            Op::Prefetch => "prefetch",
        }
    }

    /// True if it changes the disk, or vouches for changes.
    pub(super) const fn is_mutation_or_flush(self) -> bool {
        matches!(self, Op::Write | Op::Flush | Op::Discard | Op::WriteZeroes)
    }
}

/// What a device has done since it was opened; see [`Device::stats`](crate::Device::stats).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats([OpStats; Op::ALL.len()]);

impl Stats {
    /// The figures of one operation.
    pub fn of(&self, op: Op) -> &OpStats {
        &self.0[op as usize]
    }
}

/// What a device has done of one operation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpStats {
    /// Requests that were answered, errors included; but not those that never set out: what a read-only
    /// handle refuses, and mutations and flushes after a panic in one.
    pub ops: u64,
    /// The bytes of those that succeeded.
    pub bytes: u64,
    /// Requests that failed.
    pub errors: u64,
    /// How long they took.
    pub latency: Histogram,
}

/// How many requests took how long, in steps of powers of two.
///
/// Requests that had to wait are all counted. Of those that were answered at
/// once, one in 32 is timed and stands for the others, so that the clock costs
/// a fast engine nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram([u64; BUCKETS]);

/// Bucket n counts what took less than 2^n ns, and no bucket before it does; the last counts the rest.
const BUCKETS: usize = 40;

impl Default for Histogram {
    fn default() -> Self {
        Histogram([0; BUCKETS])
    }
}

impl Histogram {
    /// Each step that has requests in it: its upper bound, and how many took less than that but not
    /// less than the bound before.
    pub fn iter(&self) -> impl Iterator<Item = (Duration, u64)> + '_ {
        let steps = self.0.iter().enumerate().filter(|(_, count)| **count > 0);
        steps.map(|(bucket, &count)| (bound(bucket), count))
    }

    /// An upper bound, within a factor of two, of the time that the fraction `q` (0 to 1) of requests took;
    /// `None` if there were none.
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        let total: u64 = self.0.iter().sum();
        let rank = (total as f64 * q.clamp(0.0, 1.0)).ceil().max(1.0) as u64;
        let mut seen = 0;
        self.iter()
            .find(|(_, count)| {
                seen += count;
                seen >= rank
            })
            .map(|(bound, _)| bound)
    }
}

fn bound(bucket: usize) -> Duration {
    Duration::from_nanos(1 << bucket)
}

fn bucket(took: Duration) -> usize {
    let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
    ((u64::BITS - nanos.leading_zeros()) as usize).min(BUCKETS - 1)
}

/// One request in this many is timed though it was answered at once.
const SAMPLE: u64 = 32;
const SHARDS: usize = 16;

/// The counters of a device. Any thread may add at any time.
#[derive(Debug, Default)]
pub(super) struct Counters([Shard; SHARDS]);

#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard([OpCounters; Op::ALL.len()]);

#[derive(Debug)]
struct OpCounters {
    ops: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    latency: [AtomicU64; BUCKETS],
}

impl Default for OpCounters {
    fn default() -> Self {
        OpCounters {
            ops: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            latency: [const { AtomicU64::new(0) }; BUCKETS],
        }
    }
}

thread_local! {
    static TICK: Cell<u64> = const { Cell::new(0) };
}

/// Whether a request that is answered at once is to be timed: one in [`SAMPLE`] of each thread's.
pub(super) fn is_sampled() -> bool {
    let is_sampled = is_next_sampled();
    TICK.set(TICK.get().wrapping_add(1));
    is_sampled
}

/// What [`is_sampled`] will answer next, for what may turn out to be no request.
pub(super) fn is_next_sampled() -> bool {
    TICK.get().wrapping_add(1).is_multiple_of(SAMPLE)
}

fn shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static SHARD: usize = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
    }
    SHARD.with(|shard| *shard)
}

impl Counters {
    /// Counts a request that was answered. `took` is given if it was timed; `waited` if it was not answered at once.
    pub(super) fn count(&self, op: Op, done: Option<u64>, took: Option<Duration>, waited: bool) {
        let counters = &self.0[shard()].0[op as usize];
        let add = |counter: &AtomicU64, n| counter.fetch_add(n, Ordering::Relaxed);
        add(&counters.ops, 1);
        match done {
            Some(bytes) => add(&counters.bytes, bytes),
            None => add(&counters.errors, 1),
        };
        if let Some(took) = took {
            let stands_for = if waited { 1 } else { SAMPLE };
            add(&counters.latency[bucket(took)], stands_for);
        }
    }

    pub(super) fn stats(&self) -> Stats {
        let mut stats = Stats::default();
        for shard in &self.0 {
            for (sum, counters) in stats.0.iter_mut().zip(&shard.0) {
                let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
                sum.ops += get(&counters.ops);
                sum.bytes += get(&counters.bytes);
                sum.errors += get(&counters.errors);
                for (sum, count) in sum.latency.0.iter_mut().zip(&counters.latency) {
                    *sum += get(count);
                }
            }
        }
        stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_add_up_and_quantiles_bound_from_above() {
        let counters = Counters::default();
        std::thread::scope(|scope| {
            for _ in 0..20 {
                scope.spawn(|| {
                    for micros in [1, 10, 100, 1000] {
                        let took = Some(Duration::from_micros(micros));
                        counters.count(Op::Write, Some(10), took, true);
                    }
                    counters.count(Op::Write, None, None, true);
                });
            }
        });
        let stats = counters.stats();
        let write = stats.of(Op::Write);
        assert_eq!((write.ops, write.bytes, write.errors), (100, 800, 20));
        assert_eq!(stats.of(Op::Read), &OpStats::default());
        for (q, micros) in [(0.0, 1), (0.25, 1), (0.5, 10), (0.75, 100), (1.0, 1000)] {
            let bound = write.latency.quantile(q).unwrap();
            let took = Duration::from_micros(micros);
            assert!(took < bound && bound <= 2 * took, "{q}: {bound:?}");
        }
        assert_eq!(stats.of(Op::Read).latency.quantile(0.5), None);
    }

    #[test]
    fn what_is_sampled_stands_for_the_others() {
        let counters = Counters::default();
        for _ in 0..SAMPLE * 10 {
            let took = is_sampled().then_some(Duration::from_nanos(5));
            counters.count(Op::Read, Some(1), took, false);
        }
        let steps: Vec<_> = counters.stats().of(Op::Read).latency.iter().collect();
        assert_eq!(steps, [(Duration::from_nanos(8), SAMPLE * 10)]);
    }
}
