//! Mutations that completed and that no flush covers yet.
//!
//! A server that died may have lost them, though callers have seen them. The
//! journal keeps, for each byte, the newest such mutation, and it is written
//! again to the server that comes back, before anything else is. Because only
//! the newest is kept, the pieces do not overlap, their order does not matter,
//! and none of them is older than what a flush or `FUA` has made durable.

use std::collections::BTreeMap;
use std::ops::Range;

use super::op::{Data, Kind};
use crate::transports::nbd::wire::CommandFlags;

/// What was done to a range.
#[derive(Clone, Debug)]
pub(super) struct Content {
    /// A mutation's.
    pub(super) kind: Kind,
    /// How to do it again.
    pub(super) flags: CommandFlags,
    pub(super) data: Data,
}

#[derive(Debug)]
struct Piece {
    end: u64,
    stamp: u64,
    content: Content,
}

/// The newest unflushed mutation of each byte.
#[derive(Debug, Default)]
pub(super) struct Journal {
    /// By start; they do not overlap.
    pieces: BTreeMap<u64, Piece>,
    stamp: u64,
    /// The stamp of the newest mutation that was not kept.
    missed: Option<u64>,
}

impl Journal {
    /// The stamp of the newest mutation that ended.
    pub(super) fn stamp(&self) -> u64 {
        self.stamp
    }

    /// A stamp for a mutation that failed.
    pub(super) fn next_stamp(&mut self) -> u64 {
        self.stamp += 1;
        self.stamp
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// True if a mutation that no flush covers was not kept, so that it could not be restored.
    pub(super) fn is_incomplete(&self) -> bool {
        self.missed.is_some()
    }

    /// `range` now holds `content`, not durably.
    pub(super) fn keep(&mut self, range: Range<u64>, content: Content) {
        self.forget(range.clone());
        let piece = Piece {
            end: range.end,
            stamp: self.next_stamp(),
            content,
        };
        self.pieces.insert(range.start, piece);
    }

    /// `range` holds something that is durable already.
    pub(super) fn forget(&mut self, range: Range<u64>) {
        // Only the piece before `range` can reach into it from the left.
        let before = self.pieces.range(..range.start).next_back();
        if let Some((&start, piece)) = before
            && piece.end > range.start
        {
            let (end, stamp, content) = (piece.end, piece.stamp, piece.content.clone());
            if end > range.end {
                let mut content = content;
                content.data = content.data.skip(range.end - start);
                let tail = Piece {
                    end,
                    stamp,
                    content,
                };
                self.pieces.insert(range.end, tail);
            }
            if let Some(piece) = self.pieces.get_mut(&start) {
                piece.end = range.start;
                piece.content.data.truncate(range.start - start);
            }
        }
        while let Some((&start, _)) = self.pieces.range(range.clone()).next() {
            let Some(mut piece) = self.pieces.remove(&start) else {
                return;
            };
            if piece.end > range.end {
                piece.content.data = piece.content.data.skip(range.end - start);
                self.pieces.insert(range.end, piece);
            }
        }
    }

    /// A mutation completed that cannot be kept: all is lost until a flush covers it.
    pub(super) fn miss(&mut self) {
        self.missed = Some(self.next_stamp());
        self.pieces.clear();
    }

    /// All mutations up to `stamp` are durable.
    pub(super) fn retire(&mut self, stamp: u64) {
        self.pieces.retain(|_, piece| piece.stamp > stamp);
        if self.missed.is_some_and(|missed| missed <= stamp) {
            self.missed = None;
        }
    }

    /// What has to be done again, in any order.
    pub(super) fn pieces(&self) -> Vec<(Range<u64>, Content)> {
        self.pieces
            .iter()
            .map(|(&start, piece)| (start..piece.end, piece.content.clone()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::op::Budget;
    use super::*;

    fn write(bytes: Vec<u8>) -> Content {
        let charge = Budget::new(u64::MAX).take(bytes.len() as u64);
        Content {
            kind: Kind::Write,
            flags: CommandFlags::empty(),
            data: Data::new(bytes, charge),
        }
    }

    /// Replays over `disk`, and checks that no byte is written twice.
    fn replay(journal: &Journal, disk: &mut [u8]) {
        let mut seen = vec![false; disk.len()];
        for (range, content) in journal.pieces() {
            let range = range.start as usize..range.end as usize;
            assert!(!seen[range.clone()].iter().any(|&s| s), "pieces overlap");
            seen[range.clone()].fill(true);
            match content.kind {
                Kind::Write => disk[range].copy_from_slice(content.data.bytes()),
                _ => disk[range].fill(0),
            }
        }
    }

    #[test]
    fn the_newest_of_each_byte_is_restored_and_never_what_is_durable() {
        const SIZE: usize = 200;
        for seed in 0..500 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut journal = Journal::default();
            // `durable`: what a crash leaves at worst. `seen`: what readers were told.
            let (mut durable, mut seen) = ([0u8; SIZE], [0u8; SIZE]);
            for step in 0..60 {
                let start = random.usize(0..SIZE - 1);
                let end = random.usize(start + 1..SIZE.min(start + 60) + 1).min(SIZE);
                let (range, wide) = (start..end, start as u64..end as u64);
                match random.u8(0..10) {
                    0 => {
                        journal.retire(journal.stamp());
                        durable = seen;
                    }
                    1 | 2 => {
                        seen[range.clone()].fill(step);
                        durable[range].fill(step);
                        journal.forget(wide);
                    }
                    3 => {
                        seen[range.clone()].fill(0);
                        let mut content = write(Vec::new());
                        content.kind = Kind::WriteZeroes;
                        journal.keep(wide, content);
                    }
                    _ => {
                        let bytes: Vec<u8> = range.clone().map(|_| random.u8(..)).collect();
                        seen[range].copy_from_slice(&bytes);
                        journal.keep(wide, write(bytes));
                    }
                }
                let mut restored = durable;
                replay(&journal, &mut restored);
                assert_eq!(restored, seen, "seed {seed} step {step}");
            }
        }
    }

    #[test]
    fn a_flush_covers_only_what_completed_before_it() {
        let mut journal = Journal::default();
        journal.keep(0..4, write(vec![1; 4]));
        let covers = journal.stamp();
        journal.keep(2..6, write(vec![2; 4]));
        journal.retire(covers);
        let pieces = journal.pieces();
        assert_eq!((pieces.len(), &pieces[0].0), (1, &(2..6)));
    }

    #[test]
    fn what_was_not_kept_counts_until_a_flush_covers_it() {
        let mut journal = Journal::default();
        journal.keep(0..4, write(vec![1; 4]));
        let before = journal.stamp();
        journal.miss();
        assert!(journal.is_incomplete());
        journal.retire(before);
        assert!(journal.is_incomplete());
        journal.retire(journal.stamp());
        assert!(!journal.is_incomplete());
    }
}
