//! Finds the chunk of an offset: a radix tree of five levels, made as it is
//! needed and never taken apart, so that a look-up takes no lock.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use super::chunk::Slot;
use super::pages::Pages;

/// The bits of a chunk's index that each level looks at. Five levels make 45 bits, which
/// with the 18 of a chunk reach the largest disk there is.
const BITS: u32 = 9;
const FANOUT: usize = 1 << BITS;

type Node<T> = OnceLock<Box<[T]>>;

/// All chunks of a disk, by index.
#[derive(Debug, Default)]
pub(super) struct Table {
    root: Node<Node<Node<Node<Node<Slot>>>>>,
    allocated: AtomicU64,
}

impl Table {
    /// The chunk at `index`, or else the next index at which there may be one.
    pub(super) fn find(&self, index: u64) -> Result<&Slot, u64> {
        let l4 = child(&self.root, index, 4)?;
        let l3 = child(l4, index, 3)?;
        let l2 = child(l3, index, 2)?;
        let l1 = child(l2, index, 1)?;
        child(l1, index, 0)
    }

    /// The chunk at `index`, made if it is not there.
    pub(super) fn find_or_make(&self, index: u64) -> &Slot {
        let l4 = make(&self.root, index, 4);
        let l3 = make(l4, index, 3);
        let l2 = make(l3, index, 2);
        let l1 = make(l2, index, 1);
        make_with(l1, index, 0, || Pages::of(FANOUT).map(Slot::new).collect())
    }

    /// How many chunks hold bytes.
    pub(super) fn allocated(&self) -> u64 {
        self.allocated.load(Ordering::Relaxed)
    }

    /// A chunk got its bytes.
    pub(super) fn made(&self) {
        self.allocated.fetch_add(1, Ordering::Relaxed);
    }

    /// A chunk gave its bytes back.
    pub(super) fn freed(&self) {
        self.allocated.fetch_sub(1, Ordering::Relaxed);
    }
}

fn slot(index: u64, level: u32) -> usize {
    (index >> (level * BITS)) as usize % FANOUT
}

fn child<T>(node: &Node<T>, index: u64, level: u32) -> Result<&T, u64> {
    match node.get() {
        Some(children) => Ok(&children[slot(index, level)]),
        // The whole node is missing: on to what the next one of this level covers.
        None => {
            let covered = (level + 1) * BITS;
            Err(((index >> covered) + 1) << covered)
        }
    }
}

fn make<T: Default>(node: &Node<T>, index: u64, level: u32) -> &T {
    make_with(node, index, level, || {
        std::iter::repeat_with(T::default).take(FANOUT).collect()
    })
}

fn make_with<T>(node: &Node<T>, index: u64, level: u32, children: impl FnOnce() -> Box<[T]>) -> &T {
    &node.get_or_init(children)[slot(index, level)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn far_chunks_are_distinct_and_gaps_are_skipped_by_level() {
        let table = Table::default();
        let last = (1 << 45) - 1;
        assert!(matches!(table.find(0), Err(next) if next == 1 << 45));
        for index in [0, 1, FANOUT as u64, last] {
            table.find_or_make(index).write().touch(0..1)[0] = index as u8 | 1;
        }
        assert_eq!(table.find(0).unwrap().read().bytes().unwrap()[0], 1);
        assert_eq!(table.find(last).unwrap().read().bytes().unwrap()[0], 255);
        assert!(table.find(2).unwrap().read().bytes().is_none());
        assert!(matches!(table.find(2 * FANOUT as u64), Err(next) if next == 3 * FANOUT as u64));
        assert!(matches!(table.find(1 << 40), Err(next) if next == (1 << 40) + (1 << 36)));
    }
}
