//! A chunk of a memory disk: 64 pages, and which of them were written.
//!
//! A page that is not marked holds zeroes, so a reader need not look at the
//! marks; they are for extents, and for knowing when a chunk is empty.

use std::ops::Range;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::pages::Pages;
use crate::{ExtentKind, Extents};

/// The length of a page in bytes: what a discard frees.
pub(super) const PAGE: usize = 4096;
/// The length of a chunk in bytes: as many pages as a word has bits.
pub(super) const CHUNK: usize = PAGE * u64::BITS as usize;

/// A chunk behind its lock.
#[derive(Debug)]
pub(super) struct Slot(RwLock<Chunk>);

impl Slot {
    /// An empty chunk, whose bytes will be in `pages`.
    pub(super) fn new(pages: Pages) -> Self {
        Slot(RwLock::new(Chunk { written: 0, pages }))
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, Chunk> {
        // Nothing panics while it holds the lock half-way through a change.
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self) -> RwLockWriteGuard<'_, Chunk> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The bytes of a chunk, if any page of it was written.
#[derive(Debug)]
pub(super) struct Chunk {
    written: u64,
    /// Open while a page is marked.
    pages: Pages,
}

/// The marks of all pages that `part` touches.
fn pages(part: &Range<usize>) -> u64 {
    mask(part.start / PAGE, part.end.div_ceil(PAGE))
}

/// The bits from `first` to before `end`.
fn mask(first: usize, end: usize) -> u64 {
    if first >= end {
        return 0;
    }
    (u64::MAX >> (u64::BITS as usize - (end - first))) << first
}

impl Chunk {
    /// All bytes of the chunk, `None` if they are zeroes.
    pub(super) fn bytes(&self) -> Option<&[u8]> {
        (self.written != 0).then_some(&*self.pages)
    }

    /// The bytes of `part`, to be written to.
    pub(super) fn touch(&mut self, part: Range<usize>) -> &mut [u8] {
        if self.written == 0 {
            self.pages.open();
        }
        self.mark(self.written | pages(&part));
        &mut self.pages[part]
    }

    /// Makes `part` read as zeroes; true if that gave the chunk's memory back.
    pub(super) fn clear(&mut self, part: Range<usize>) -> bool {
        // Pages at the edges keep their mark unless they are covered whole.
        let whole = mask(part.start.div_ceil(PAGE), part.end / PAGE);
        if self.written == 0 {
            return false;
        }
        let before = self.written;
        self.mark(before & !whole);
        if self.written == 0 {
            self.pages.free();
            return true;
        }
        // Others hold zeroes, and may have no memory.
        for page in part.start / PAGE..part.end.div_ceil(PAGE) {
            if before >> page & 1 == 1 {
                let start = part.start.max(page * PAGE);
                self.pages[start..part.end.min((page + 1) * PAGE)].fill(0);
            }
        }
        false
    }

    fn mark(&mut self, written: u64) {
        let is_full = written == u64::MAX;
        if is_full != (self.written == u64::MAX) {
            self.pages.fill(is_full);
        }
        self.written = written;
    }

    /// Pushes what `part` holds.
    pub(super) fn extents(&self, part: Range<usize>, out: &mut Extents) {
        let mut at = part.start;
        while at < part.end {
            let page = at / PAGE;
            let bits = self.written >> page;
            let (kind, run) = match bits & 1 {
                1 => (ExtentKind::Data, bits.trailing_ones()),
                _ => (ExtentKind::Hole, bits.trailing_zeros()),
            };
            let end = ((page + run as usize) * PAGE).min(part.end);
            out.push((end - at) as u64, kind);
            at = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_reach_both_ends() {
        assert_eq!(mask(0, 64), u64::MAX);
        assert_eq!(mask(63, 64), 1 << 63);
        assert_eq!(mask(1, 3), 0b110);
        assert_eq!(mask(3, 3), 0);
        assert_eq!(mask(4, 3), 0);
    }

    #[test]
    fn a_page_partly_cleared_keeps_its_mark_and_the_rest_of_its_bytes() {
        let slot = Slot::new(Pages::of(8).next().unwrap());
        let mut chunk = slot.write();
        chunk.touch(0..2 * PAGE).fill(1);
        assert!(!chunk.clear(PAGE - 10..2 * PAGE));
        let bytes = chunk.bytes().unwrap();
        assert!(bytes[..PAGE - 10].iter().all(|&b| b == 1));
        assert!(bytes[PAGE - 10..].iter().all(|&b| b == 0));
        let mut out = Extents::new(8);
        chunk.extents(0..CHUNK, &mut out);
        assert_eq!(
            out.iter()
                .map(|e| (e.len as usize, e.kind))
                .collect::<Vec<_>>(),
            [(PAGE, ExtentKind::Data), (CHUNK - PAGE, ExtentKind::Hole)]
        );
        assert!(chunk.clear(0..PAGE));
        assert!(chunk.bytes().is_none());
    }
}
