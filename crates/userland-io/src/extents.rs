//! What a range holds, told in runs: data, zeroes, or nothing allocated.
//!
//! A caller makes an [`Extents`] with a cap and hands it down; the engine pushes
//! runs that follow one another from the start of the range asked for. Equal
//! neighbours melt together, and what comes after the cap is dropped, so an
//! engine may push without counting.

/// What a run of a disk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// Bytes of which nothing is known.
    Data,
    /// Reads as zeroes, and has space allocated.
    Zero,
    /// Reads as zeroes, and has no space allocated.
    Hole,
}

/// One run: where it starts is the sum of the runs before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent<K = ExtentKind> {
    /// Its length in bytes, never 0.
    pub len: u64,
    /// What it holds.
    pub kind: K,
}

/// A capped list of runs that starts where the caller's range starts.
///
/// `K` is [`ExtentKind`] for [`Engine::extents`](crate::Engine::extents), and the
/// status word of a context for [`Engine::status`](crate::Engine::status).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extents<K = ExtentKind> {
    list: Vec<Extent<K>>,
    covered: u64,
    cap: usize,
    full: bool,
}

impl<K: Copy + PartialEq> Extents<K> {
    /// An empty list that takes at most `cap` runs (at least one).
    pub fn new(cap: usize) -> Self {
        Extents {
            list: Vec::new(),
            covered: 0,
            cap: cap.max(1),
            full: false,
        }
    }

    /// Appends a run of `len` bytes. Empty runs are dropped, and so are those beyond the cap.
    pub fn push(&mut self, len: u64, kind: K) {
        if len == 0 || self.full {
            return;
        }
        let no_room = self.room() == 0;
        match self.list.last_mut() {
            Some(last) if last.kind == kind => last.len = last.len.saturating_add(len),
            _ if no_room => {
                self.full = true;
                return;
            }
            _ => self.list.push(Extent { len, kind }),
        }
        self.covered = self.covered.saturating_add(len);
    }

    /// True once a run has been dropped: the last one is at its full length, and an engine can stop.
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// The bytes that the runs cover, from the start of the range.
    pub fn covered(&self) -> u64 {
        self.covered
    }

    /// Cuts the list back to the first `len` bytes.
    pub fn truncate(&mut self, len: u64) {
        while self.covered > len {
            let excess = self.covered - len;
            let Some(last) = self.list.last_mut() else {
                return;
            };
            let cut = excess.min(last.len);
            last.len -= cut;
            self.covered -= cut;
            if last.len == 0 {
                self.list.pop();
            }
        }
    }

    /// The runs.
    pub fn iter(&self) -> std::slice::Iter<'_, Extent<K>> {
        self.list.iter()
    }

    /// How many runs there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// True if there is no run.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// How many more runs fit.
    pub fn room(&self) -> usize {
        self.cap - self.list.len()
    }
}

impl<'a, K: Copy + PartialEq> IntoIterator for &'a Extents<K> {
    type Item = &'a Extent<K>;
    type IntoIter = std::slice::Iter<'a, Extent<K>>;
    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ExtentKind::*;

    fn runs(extents: &Extents) -> Vec<(u64, ExtentKind)> {
        extents.iter().map(|e| (e.len, e.kind)).collect()
    }

    #[test]
    fn neighbours_melt_and_empty_runs_vanish() {
        let mut extents = Extents::new(8);
        extents.push(10, Data);
        extents.push(0, Hole);
        extents.push(5, Data);
        extents.push(1, Zero);
        assert_eq!(runs(&extents), [(15, Data), (1, Zero)]);
        assert_eq!(extents.covered(), 16);
    }

    #[test]
    fn after_the_cap_nothing_follows_a_gap() {
        let mut extents = Extents::new(1);
        extents.push(10, Data);
        extents.push(5, Data);
        extents.push(5, Hole);
        extents.push(5, Data);
        assert_eq!(runs(&extents), [(15, Data)]);
    }

    #[test]
    fn truncate_cuts_through_runs() {
        let mut extents = Extents::new(8);
        extents.push(10, Data);
        extents.push(10, Hole);
        extents.push(10, Data);
        extents.truncate(15);
        assert_eq!(runs(&extents), [(10, Data), (5, Hole)]);
        extents.truncate(10);
        assert_eq!(runs(&extents), [(10, Data)]);
        extents.truncate(0);
        assert!(extents.is_empty() && extents.covered() == 0);
    }
}
