//! L and E: each cell is a linearizable register, and what failed never acts later.
//!
//! Per cell, the mutations are ordered by time (one had ended before the other
//! began) and by what reads returned. The reads are explained iff this order has no cycle.

use super::history::{History, Outcome, Seen};
use super::order::Order;
use super::{Clause, Verdict};

/// The order of one cell's mutations, as far as it is known.
pub(super) struct CellOrder<'a> {
    history: &'a History,
    cell: usize,
    writers: &'a [usize],
    order: Order,
    observed: Vec<bool>,
}

impl History {
    /// Decides whether every read is explained.
    ///
    /// # Errors
    /// The verdict on the first cell that is not.
    pub fn check_live(&self) -> Result<(), Verdict> {
        (0..self.shape.cells()).try_for_each(|cell| self.check_cell(cell))
    }

    fn check_cell(&self, cell: usize) -> Result<(), Verdict> {
        if self.readers[cell].is_empty() {
            return Ok(());
        }
        let order = CellOrder::new(self, cell);
        if let Some((a, b)) = order.order.cycle() {
            return Err(order.explain(order.writers[a], order.writers[b]));
        }
        for &(reader, place) in &self.readers[cell] {
            match &self.entries[reader].seen[place].1 {
                Seen::One(_) | Seen::Noise => {}
                Seen::Several(writers) => {
                    if !writers.iter().any(|&w| order.may_be_read(w, reader)) {
                        let what = format!(
                            "{} found the value of {}, but each of them had been replaced before it began",
                            self.name(reader),
                            self.names(writers)
                        );
                        return Err(self.verdict(Clause::Live, cell, &[reader], what));
                    }
                }
                Seen::Bytes(bytes) => order.check_mix(reader, bytes)?,
            }
        }
        Ok(())
    }
}

impl<'a> CellOrder<'a> {
    pub(super) fn new(history: &'a History, cell: usize) -> Self {
        let writers = &history.writers[cell][..];
        let entries = &history.entries;
        let mut order = Order::new(writers.len());
        for (a, &writer) in writers.iter().enumerate() {
            for (b, &other) in writers.iter().enumerate() {
                if entries[writer].acts_until < entries[other].start {
                    order.put(a, b);
                }
            }
        }
        let mut observed = vec![false; writers.len()];
        // When the reader began and ended, and the place of the writer whose value it returned.
        let mut reads = Vec::with_capacity(history.readers[cell].len());
        for &(reader, place) in &history.readers[cell] {
            if let Seen::One(writer) = entries[reader].seen[place].1
                && let Ok(at) = writers.binary_search(&writer)
            {
                observed[at] = true;
                reads.push((entries[reader].start, entries[reader].end, at));
            }
        }
        for (at, &writer) in writers.iter().enumerate() {
            if reads.is_empty() || !(observed[at] || entries[writer].took_effect(cell)) {
                continue;
            }
            for &(start, _, seen) in &reads {
                if seen != at && entries[writer].acts_until < start {
                    order.put(at, seen);
                }
            }
        }
        for &(start, end, at) in &reads {
            for (other, &writer) in writers.iter().enumerate() {
                if other != at && end < entries[writer].start {
                    order.put(at, other);
                }
            }
            for &(_, earlier, other) in &reads {
                if other != at && earlier < start {
                    order.put(other, at);
                }
            }
        }
        if !reads.is_empty() {
            order.close();
        }
        CellOrder {
            history,
            cell,
            writers,
            order,
            observed,
        }
    }

    /// `a` comes before `b`, both entries.
    pub(super) fn before(&self, a: usize, b: usize) -> bool {
        let places = (
            self.writers.binary_search(&a),
            self.writers.binary_search(&b),
        );
        matches!(places, (Ok(a), Ok(b)) if self.order.has(a, b))
    }

    /// True if some read returned the value of this entry, and of no other.
    pub(super) fn observed(&self, writer: usize) -> bool {
        self.writers
            .binary_search(&writer)
            .is_ok_and(|at| self.observed[at])
    }

    /// A value that a read returned after `writer`, which nobody ever saw to act, had ended: so it acted before that, or
    /// never. That holds across a crash once a flush has settled it. Of such values one that is `required`, or that
    /// a required one replaced.
    pub(super) fn overruled(
        &self,
        writer: usize,
        required: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let entries = &self.history.entries;
        let entry = &entries[writer];
        let settled = |since| entries.iter().any(|e| e.is_flush() && e.start > since);
        let settled = match entry.outcome {
            Outcome::Open => false,
            Outcome::Abandoned(since) => settled(since),
            _ => settled(entry.acts_until),
        };
        if !settled || entry.took_effect(self.cell) || self.observed(writer) {
            return None;
        }
        let reads = self.history.readers[self.cell].iter();
        let mut values = reads.filter_map(|&(reader, place)| {
            let later = entries[reader].start > entry.acts_until;
            match entries[reader].seen[place].1 {
                Seen::One(value) if later => Some(value),
                _ => None,
            }
        });
        values.find_map(|value| {
            let mut newer = self.writers.iter().copied();
            newer.find(|&w| required(w) && (w == value || self.before(value, w)))
        })
    }

    /// True if nothing stands against `reader` having seen `writer`.
    fn may_be_read(&self, writer: usize, reader: usize) -> bool {
        let entries = &self.history.entries;
        let start = entries[reader].start;
        if entries[writer].start > entries[reader].end {
            return false;
        }
        let replaced = self.writers.iter().enumerate().any(|(at, &other)| {
            let acted = self.observed[at] || entries[other].took_effect(self.cell);
            acted && entries[other].acts_until < start && self.before(writer, other)
        });
        let overtaken = self.history.readers[self.cell].iter().any(|&(r, place)| {
            matches!(entries[r].seen[place].1, Seen::One(other)
                if entries[r].end < start && self.before(writer, other))
        });
        !replaced && !overtaken
    }

    fn check_mix(&self, reader: usize, bytes: &[u8]) -> Result<(), Verdict> {
        let history = self.history;
        let read = &history.entries[reader];
        let flying = self.writers.iter().any(|&writer| {
            let entry = &history.entries[writer];
            entry.start < read.end && entry.acts_until > read.start
        });
        if (flying && !history.shape.atomic_reads) || !history.shape.whole {
            let legal = self.writers.iter().copied();
            let legal: Vec<usize> = legal.filter(|&w| self.may_be_read(w, reader)).collect();
            if history.is_mix_of(&legal, self.cell, bytes) {
                return Ok(());
            }
        }
        let what = format!(
            "{} found {}, and no mutation in flight explains it",
            history.name(reader),
            history.describe(&Seen::Bytes(bytes.to_vec()))
        );
        Err(history.verdict(Clause::of_bytes(bytes), self.cell, &[reader], what))
    }

    /// Says why `a` and `b` come before each other.
    fn explain(&self, a: usize, b: usize) -> Verdict {
        let history = self.history;
        let entries = &history.entries;
        let gone = |writer: usize| !matches!(entries[writer].outcome, Outcome::Ok | Outcome::Open);
        let clause = |writer| match gone(writer) {
            true => Clause::Error,
            false => Clause::Live,
        };
        for &(reader, place) in &history.readers[self.cell] {
            let Seen::One(seen) = entries[reader].seen[place].1 else {
                continue;
            };
            for &other in self.writers {
                let newer = entries[other].took_effect(self.cell)
                    && entries[seen].acts_until < entries[other].start
                    && entries[other].acts_until < entries[reader].start;
                if newer {
                    let what = format!(
                        "{} found the value of {}, which {} had replaced before the read began",
                        history.name(reader),
                        history.name(seen),
                        history.name(other)
                    );
                    let entries = [seen, other, reader];
                    return history.verdict(clause(seen), self.cell, &entries, what);
                }
            }
        }
        let (first, second) = match gone(b) {
            true => (b, a),
            false => (a, b),
        };
        let what = match gone(first) {
            true => format!(
                "{} acted after it had ended: reads show the value of {} in between",
                history.name(first),
                history.name(second)
            ),
            false => format!(
                "reads show {} before {}, and also after it",
                history.name(first),
                history.name(second)
            ),
        };
        history.verdict(clause(first), self.cell, &[first, second], what)
    }
}
