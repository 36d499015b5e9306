//! When to ask the engine for holes before a read, so that zeroes need not be
//! read and sent, and so that a disk full of data pays nothing.
//!
//! A question looks ahead of the read. What it finds to be data is not asked for
//! again (should it become a hole meanwhile, it is read, and right all the same);
//! and when questions find nothing but data, the next are skipped, ever more of them.
//! That a range is zeroes is never remembered: it may be written to meanwhile.

use std::ops::Range;

/// Shorter reads are not worth a question.
const SHORTEST_READ: u64 = 64 << 10;
/// Shorter holes are not worth a chunk of their own.
pub(super) const SHORTEST_HOLE: u64 = 4096;
/// How far a question looks, from the start of the read.
pub(super) const AHEAD: u64 = 4 << 20;
/// The most reads in a row that are not asked for, as a power of two.
const MOST_SKIPPED: u32 = 6;

/// What a connection learned about its reads.
#[derive(Debug, Default)]
pub(super) struct Holes {
    data: Range<u64>,
    in_vain: u32,
    skip: u32,
}

impl Holes {
    /// True if the engine should be asked about this read.
    pub(super) fn ask(&mut self, offset: u64, len: u64) -> bool {
        if len < SHORTEST_READ || (self.data.start <= offset && offset + len <= self.data.end) {
            return false;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        true
    }

    /// Takes the answer: how many bytes from the start of the read were data, and whether any of the read was not.
    pub(super) fn learn(&mut self, offset: u64, data: u64, found_hole: bool) {
        self.data = offset..offset.saturating_add(data);
        if found_hole {
            (self.in_vain, self.skip) = (0, 0);
        } else {
            self.in_vain = (self.in_vain + 1).min(MOST_SKIPPED);
            // The first few questions in vain may be chance.
            self.skip = (1 << self.in_vain) - 2;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const K64: u64 = 64 << 10;

    #[test]
    fn short_reads_are_never_asked_for() {
        assert!(!Holes::default().ask(0, K64 - 1));
        assert!(Holes::default().ask(0, K64));
    }

    #[test]
    fn known_data_is_not_asked_for_again() {
        let mut holes = Holes::default();
        assert!(holes.ask(0, K64));
        holes.learn(0, AHEAD, false);
        for read in 1..AHEAD / K64 {
            assert!(!holes.ask(read * K64, K64));
        }
        assert!(holes.ask(AHEAD, K64));
    }

    #[test]
    fn a_disk_full_of_data_is_asked_ever_less() {
        let mut holes = Holes::default();
        let mut asked = 0;
        for read in 0..10_000 {
            let offset = (read * 7919 % 10_007) * 2 * AHEAD;
            if holes.ask(offset, K64) {
                asked += 1;
                holes.learn(offset, K64, false);
            }
        }
        assert!((150..200).contains(&asked), "{asked}");
        holes.skip = 0;
        assert!(holes.ask(1, K64));
        holes.learn(1, 0, true);
        assert!(holes.ask(1, K64), "a hole brings the questions back");
    }
}
