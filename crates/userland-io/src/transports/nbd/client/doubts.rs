//! Mutations that failed and may have acted all the same.
//!
//! A failed mutation leaves old or new, and once a read has shown which, that has
//! to stay. A server that is lost may have forgotten the new, and the journal puts
//! back what was older; so a loss is harmless only while nobody has looked. A
//! flush that began after the failure settles it, and so does a later mutation.

use std::ops::Range;

/// Beyond this many they count as one.
const MAX: usize = 1024;

#[derive(Clone, Debug)]
struct Doubt {
    range: Range<u64>,
    /// When it failed: see [`Journal::stamp`](super::journal::Journal::stamp).
    stamp: u64,
    /// A read has shown some of it, since the mutation was sent.
    seen: bool,
}

/// The ranges of failed mutations that are not settled yet.
#[derive(Debug, Default)]
pub(super) struct Doubts(Vec<Doubt>);

impl Doubts {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A mutation of `range` failed, after it was sent.
    pub(super) fn add(&mut self, range: Range<u64>, stamp: u64, seen: bool) {
        self.0.push(Doubt { range, stamp, seen });
        if self.0.len() > MAX {
            let one = self.0.drain(..).reduce(|a, b| Doubt {
                range: a.range.start.min(b.range.start)..a.range.end.max(b.range.end),
                stamp: a.stamp.max(b.stamp),
                seen: a.seen || b.seen,
            });
            self.0.extend(one);
        }
    }

    /// A read has shown what `range` holds.
    pub(super) fn see(&mut self, range: &Range<u64>) {
        for doubt in &mut self.0 {
            doubt.seen |= doubt.range.start < range.end && range.start < doubt.range.end;
        }
    }

    /// Something newer completed in `range`.
    pub(super) fn forget(&mut self, range: &Range<u64>) {
        if self.0.is_empty() {
            return;
        }
        let cut = |doubt: Doubt| {
            let before = doubt.range.start..doubt.range.end.min(range.start);
            let after = doubt.range.start.max(range.end)..doubt.range.end;
            [before, after].map(|range| Doubt {
                range,
                ..doubt.clone()
            })
        };
        let all = self.0.drain(..).flat_map(cut);
        self.0 = all.filter(|doubt| !doubt.range.is_empty()).collect();
    }

    /// A flush covers all that ended up to `stamp`.
    pub(super) fn retire(&mut self, stamp: u64) {
        self.0.retain(|doubt| doubt.stamp > stamp);
    }

    /// One that was seen, and so may not be undone.
    pub(super) fn seen(&self) -> Option<Range<u64>> {
        let seen = self.0.iter().find(|doubt| doubt.seen);
        seen.map(|doubt| doubt.range.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_looked_at_and_is_not_settled_counts() {
        let mut doubts = Doubts::default();
        doubts.add(10..20, 1, false);
        doubts.see(&(0..10));
        doubts.see(&(20..30));
        assert_eq!(doubts.seen(), None);
        doubts.see(&(19..20));
        assert_eq!(doubts.seen(), Some(10..20));
        doubts.retire(0);
        assert_eq!(doubts.seen(), Some(10..20));
        doubts.forget(&(12..15));
        let ranges: Vec<_> = doubts.0.iter().map(|doubt| doubt.range.clone()).collect();
        assert_eq!(ranges, [10..12, 15..20]);
        doubts.forget(&(0..12));
        doubts.forget(&(13..30));
        assert!(doubts.is_empty());
        doubts.add(10..20, 2, true);
        doubts.retire(2);
        assert!(doubts.is_empty());
    }

    #[test]
    fn very_many_count_as_one_and_none_is_forgotten() {
        let mut doubts = Doubts::default();
        for i in 0..10_000 {
            doubts.add(i * 10..i * 10 + 5, i, i == 0);
            assert!(doubts.0.len() <= MAX);
        }
        doubts.retire(9_998);
        doubts.see(&(0..1));
        assert!(
            !doubts.is_empty()
                && doubts
                    .0
                    .iter()
                    .all(|doubt| doubt.stamp == 9_999 || doubt.seen)
        );
    }
}
