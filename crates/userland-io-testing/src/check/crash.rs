//! C1, C2, C3: whether a crash may leave an image.
//!
//! Each cell of the image names the mutations it may show. A mutation is *required* if it completed and is
//! durable by the claim: by its own FUA, by a flush that began after it had answered, or always. C1
//! and C3 look at each cell alone: nothing required may have replaced what it shows. C2 asks
//! for a set of mutations, closed under "before", whose result is the image.

use userland_io::CrashLevel;

use super::history::{History, INITIAL, NEVER, Seen, Time};
use super::live::CellOrder;
use super::{Clause, Verdict};

/// A mutation of one cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Node {
    entry: usize,
    cell: usize,
}

/// How many ways to read zeroes with several possible writers are tried.
const MOST_CHOICES: usize = 64;

impl History {
    /// Decides whether a crash now may leave `image` under the claim `level`.
    ///
    /// # Errors
    /// The verdict on the first cell that is not legal.
    ///
    /// # Panics
    /// If `image` is not as long as the window.
    pub fn check_crash(&self, level: CrashLevel, image: &[u8]) -> Result<(), Verdict> {
        assert_eq!(
            image.len(),
            self.shape.len,
            "the image must fill the window"
        );
        if level == CrashLevel::None {
            return Ok(());
        }
        let flushes = self.entries.iter().filter(|e| e.is_flush());
        let last_flush = flushes.map(|e| e.start).max().unwrap_or(0);
        let mut shown = Vec::with_capacity(self.shape.cells());
        let mut orders = Vec::with_capacity(self.shape.cells());
        for cell in 0..self.shape.cells() {
            let order = CellOrder::new(self, cell);
            let bytes = &image[self.shape.bytes(cell..cell + 1)];
            shown.push(self.check_image_cell(level, last_flush, &order, cell, bytes)?);
            orders.push(order);
        }
        self.check_units(&orders, &shown)?;
        match level {
            CrashLevel::Prefix => self.check_prefix(last_flush, &orders, &shown),
            _ => Ok(()),
        }
    }

    /// R: decides whether a second crash, with nothing written in between, left what the first left.
    ///
    /// # Errors
    /// The verdict on the first cell that differs.
    pub fn check_recovered(&self, first: &[u8], second: &[u8]) -> Result<(), Verdict> {
        for cell in 0..self.shape.cells() {
            let bytes = self.shape.bytes(cell..cell + 1);
            let (was, is) = (&first[bytes.clone()], &second[bytes]);
            if was != is {
                let (was, is) = (self.identify(cell, was), self.identify(cell, is));
                let what = format!(
                    "recovered after the crash, the block held {}; after another crash, with nothing written in between, it holds {}",
                    self.describe(&was),
                    self.describe(&is)
                );
                return Err(self.verdict(Clause::Recovery, cell, &[], what));
            }
        }
        Ok(())
    }

    fn required(&self, level: CrashLevel, last_flush: Time, entry: usize, cell: usize) -> bool {
        let mutation = &self.entries[entry];
        let durable = level == CrashLevel::Sync || mutation.has_fua() || mutation.end < last_flush;
        entry == INITIAL
            || (mutation.took_effect(cell) && durable)
            || (level != CrashLevel::Sync && self.first_seen(entry, cell) < last_flush)
    }

    /// When a read that returned the value of this mutation, and of no other, first ended.
    fn first_seen(&self, entry: usize, cell: usize) -> Time {
        let readers = self.readers[cell].iter();
        let seen = readers.filter(|&&(r, place)| self.entries[r].seen[place].1 == Seen::One(entry));
        seen.map(|&(r, _)| self.entries[r].end)
            .min()
            .unwrap_or(NEVER)
    }

    /// The mutations that the cell may legally show, none if that cannot be said.
    fn check_image_cell(
        &self,
        level: CrashLevel,
        last_flush: Time,
        order: &CellOrder<'_>,
        cell: usize,
        bytes: &[u8],
    ) -> Result<Vec<usize>, Verdict> {
        let writers = &self.writers[cell];
        // What a required mutation replaced is gone for good.
        let required = |writer: usize| self.required(level, last_flush, writer, cell);
        let gone_by = |writer: usize| {
            let mut others = writers.iter().copied();
            others
                .find(|&other| required(other) && order.before(writer, other))
                .or_else(|| order.overruled(writer, required))
        };
        let seen = self.identify(cell, bytes);
        let candidates = match &seen {
            Seen::One(one) => vec![*one],
            Seen::Several(several) => several.clone(),
            Seen::Noise => return Ok(Vec::new()),
            Seen::Bytes(bytes) => {
                let legal = writers.iter().copied();
                let legal: Vec<usize> = legal.filter(|&w| gone_by(w).is_none()).collect();
                if !self.shape.whole && self.is_mix_of(&legal, cell, bytes) {
                    return Ok(Vec::new());
                }
                let what = format!(
                    "after the crash the block holds {}. Legal: {}",
                    self.describe(&seen),
                    self.names(&legal)
                );
                let clause = Clause::of_bytes(bytes);
                return Err(self.verdict(clause, cell, &[], what));
            }
        };
        let legal = candidates.iter().copied();
        let legal: Vec<usize> = legal.filter(|&w| gone_by(w).is_none()).collect();
        if !legal.is_empty() {
            return Ok(legal);
        }
        let old = candidates[0];
        let new = gone_by(old).unwrap_or(old);
        let why = match level {
            _ if self.entries[new].has_fua() => "which carried FUA".to_owned(),
            CrashLevel::Sync => "which had answered".to_owned(),
            _ => {
                let flushes = self.entries.iter().enumerate();
                let flush = flushes
                    .filter(|(_, e)| e.is_flush() && e.start > self.entries[new].end)
                    .map(|(index, _)| self.name(index))
                    .next();
                let flush = flush.unwrap_or_else(|| "an earlier run".to_owned());
                format!("which was durable by {flush}")
            }
        };
        let what = format!(
            "after the crash the block holds {}, but {} came later, {why}",
            self.describe(&seen),
            self.name(new)
        );
        let clause = match level {
            CrashLevel::Sync => Clause::Sync,
            CrashLevel::Prefix => Clause::Prefix,
            _ => Clause::Flush,
        };
        Err(self.verdict(clause, cell, &[old, new], what))
    }

    /// Aligned units of one request are all there or not at all.
    fn check_units(&self, orders: &[CellOrder<'_>], shown: &[Vec<usize>]) -> Result<(), Verdict> {
        let unit = self.shape.atomic_cells;
        if unit < 2 {
            return Ok(());
        }
        for start in (0..shown.len()).step_by(unit) {
            let cells = start..(start + unit).min(shown.len());
            for cell in cells.clone() {
                let [writer] = shown[cell][..] else { continue };
                let request = self.entries[writer].request.cells();
                if writer == INITIAL || request.start > cells.start || request.end < cells.end {
                    continue;
                }
                for other in cells.clone() {
                    let older = |&w: &usize| orders[other].before(w, writer);
                    if !shown[other].is_empty() && shown[other].iter().all(older) {
                        let what = format!(
                            "after the crash block {cell} shows {}, but block {other} of the same atomic unit is older",
                            self.name(writer)
                        );
                        return Err(self.verdict(Clause::Tearing, other, &[writer], what));
                    }
                }
            }
        }
        Ok(())
    }

    fn check_prefix(
        &self,
        last_flush: Time,
        orders: &[CellOrder<'_>],
        shown: &[Vec<usize>],
    ) -> Result<(), Verdict> {
        let choices: usize = shown
            .iter()
            .map(|legal| legal.len().max(1))
            .fold(1, usize::saturating_mul);
        let mut first = None;
        for choice in 0..choices.min(MOST_CHOICES) {
            let mut rest = choice;
            let visible: Vec<Option<usize>> = shown
                .iter()
                .map(|legal| {
                    // Too many ways: then such a cell says nothing.
                    if legal.is_empty() || (legal.len() > 1 && choices > MOST_CHOICES) {
                        return None;
                    }
                    let picked = legal[rest % legal.len()];
                    rest /= legal.len();
                    Some(picked)
                })
                .collect();
            match self.check_choice(last_flush, orders, &visible) {
                Ok(()) => return Ok(()),
                Err(verdict) => first = first.or(Some(verdict)),
            }
        }
        first.map_or(Ok(()), Err)
    }

    /// The prefix check, for one way to say which mutation each cell shows.
    fn check_choice(
        &self,
        last_flush: Time,
        orders: &[CellOrder<'_>],
        visible: &[Option<usize>],
    ) -> Result<(), Verdict> {
        let (prefix, known_by) = self.closure(last_flush, orders, visible);
        let visible_at = |node: &Node| visible[node.cell];
        for node in &prefix {
            let Some(shown) = visible_at(node) else {
                continue;
            };
            if shown != node.entry && orders[node.cell].before(shown, node.entry) {
                let latest = prefix.iter().max_by_key(|n| self.entries[n.entry].start);
                let because = match latest {
                    Some(latest) if latest.entry != node.entry => format!(
                        "{} (seen in block {}) is there",
                        self.name(latest.entry),
                        latest.cell
                    ),
                    _ => "it was durable".to_owned(),
                };
                let what = format!(
                    "after the crash {because}, so {} must be there too, but its block {} shows the older {}",
                    self.name(node.entry),
                    node.cell,
                    self.name(shown)
                );
                let involved = [
                    shown,
                    node.entry,
                    latest.map_or(node.entry, |latest| latest.entry),
                ];
                return Err(self.verdict(Clause::Prefix, node.cell, &involved, what));
            }
        }
        self.peel(&prefix, &known_by, orders, visible)
    }

    /// What must be there: the visible and the required mutations, and all that came before any of them. With the
    /// first moment at which each was known to have acted.
    fn closure(
        &self,
        last_flush: Time,
        orders: &[CellOrder<'_>],
        visible: &[Option<usize>],
    ) -> (Vec<Node>, Vec<Time>) {
        let mut nodes = Vec::new();
        let mut known = Vec::new();
        let mut inside = Vec::new();
        for (cell, writers) in self.writers.iter().enumerate() {
            for &entry in &writers[1..] {
                let mutation = &self.entries[entry];
                let is_visible = visible[cell] == Some(entry);
                let observed = orders[cell].observed(entry);
                if !is_visible && !observed && !mutation.took_effect(cell) {
                    continue;
                }
                let read = match observed {
                    true => self.first_seen(entry, cell),
                    false => NEVER,
                };
                known.push(mutation.acts_until.min(read));
                nodes.push(Node { entry, cell });
                let required = self.required(CrashLevel::Prefix, last_flush, entry, cell);
                inside.push(is_visible || required);
            }
        }
        loop {
            let starts = nodes.iter().zip(&inside).filter(|(_, inside)| **inside);
            let latest = starts.map(|(node, _)| self.entries[node.entry].start);
            let latest = latest.max().unwrap_or(0);
            let mut grew = false;
            for at in 0..nodes.len() {
                if inside[at] {
                    continue;
                }
                let node = nodes[at];
                let precedes = known[at] < latest
                    || nodes.iter().zip(&inside).any(|(other, inside)| {
                        *inside
                            && other.cell == node.cell
                            && orders[node.cell].before(node.entry, other.entry)
                    });
                if precedes {
                    inside[at] = true;
                    grew = true;
                }
            }
            if !grew {
                break;
            }
        }
        let mut keep = inside.iter();
        known.retain(|_| keep.next() == Some(&true));
        let mut keep = inside.iter();
        nodes.retain(|_| keep.next() == Some(&true));
        (nodes, known)
    }

    /// Takes away what nothing comes before, until nothing is left, or a cycle.
    fn peel(
        &self,
        prefix: &[Node],
        known_by: &[Time],
        orders: &[CellOrder<'_>],
        visible: &[Option<usize>],
    ) -> Result<(), Verdict> {
        let n = prefix.len();
        let in_cell = |a: usize, b: usize| {
            let (a, b) = (prefix[a], prefix[b]);
            a.cell == b.cell
                && (orders[a.cell].before(a.entry, b.entry)
                    || (visible[b.cell] == Some(b.entry) && a.entry != b.entry))
        };
        let mut left: Vec<usize> = (0..n).collect();
        while !left.is_empty() {
            // What ended first of all that is left comes before whatever began later.
            let first = left.iter().copied().min_by_key(|&at| known_by[at]);
            let free = left.iter().position(|&at| {
                let begins = self.entries[prefix[at].entry].start;
                let in_time = first.is_none_or(|f| f == at || known_by[f] >= begins);
                in_time && !left.iter().any(|&other| other != at && in_cell(other, at))
            });
            match free {
                Some(at) => drop(left.swap_remove(at)),
                None => {
                    let node = prefix[left[0]];
                    let mut involved: Vec<usize> =
                        left.iter().map(|&at| prefix[at].entry).collect();
                    involved.sort_unstable();
                    involved.dedup();
                    involved.truncate(8);
                    let what = format!(
                        "no order of the mutations ends in what the blocks show after the crash: {} contradict each other",
                        involved
                            .iter()
                            .map(|&entry| self.name(entry))
                            .collect::<Vec<_>>()
                            .join(", ")
                    );
                    return Err(self.verdict(Clause::Prefix, node.cell, &involved, what));
                }
            }
        }
        Ok(())
    }
}
