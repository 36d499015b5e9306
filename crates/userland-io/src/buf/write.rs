//! The buffer that an engine drains.

use std::marker::PhantomData;
use std::ops::Range;

use super::segments::{Segment, View};

/// Memory that a write stores: one private slice, or segments that may be shared with a guest.
///
/// An engine takes the bytes with [`copy_to`](Self::copy_to), or in place where
/// [`as_slice`](Self::as_slice) allows, and passes parts of it on with [`slice`](Self::slice).
/// Shared memory may change between two looks: what must be the same twice (a checksum and the
/// bytes it stands for) is copied first.
#[derive(Clone, Copy)]
pub struct WriteBuf<'a> {
    view: View,
    memory: PhantomData<&'a [u8]>,
}

// SAFETY: it stands for a `&[u8]` (or memory that any thread may touch), which may move between threads.
unsafe impl Send for WriteBuf<'_> {}
// SAFETY: it only reads the memory, as any number of threads may.
unsafe impl Sync for WriteBuf<'_> {}

impl<'a> WriteBuf<'a> {
    /// All of `memory`, in one piece.
    pub fn new(memory: &'a [u8]) -> Self {
        WriteBuf {
            view: View::one(memory.as_ptr().cast_mut(), memory.len()),
            memory: PhantomData,
        }
    }

    /// The memory of `segments`, in their order. `shared`: another party may access it meanwhile.
    ///
    /// # Safety
    /// Each segment must be valid for reads for `'a`. Unless `shared`, nothing may write to it for `'a`.
    /// If `shared`, no `&mut` reference to it may be used for `'a`.
    pub unsafe fn from_parts(segments: &'a [Segment], shared: bool) -> Self {
        WriteBuf {
            view: View::many(segments, shared),
            memory: PhantomData,
        }
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.view.len()
    }

    /// True if it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies its bytes to `to`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy_to(&self, to: &mut [u8]) {
        assert_eq!(self.len(), to.len(), "the lengths must be equal");
        // SAFETY: `to` has the window's length, and cannot overlap it: it is an exclusive reference. The
        // window is only read.
        unsafe { self.view.copy(to.as_mut_ptr(), false) }
    }

    /// The memory as a slice, if it is private and in one piece; else [`copy_to`](Self::copy_to) memory of your own.
    pub fn as_slice(&self) -> Option<&'a [u8]> {
        let ptr = self.view.contiguous()?;
        // SAFETY: private memory in one piece, which nothing writes to for `'a`.
        Some(unsafe { std::slice::from_raw_parts(ptr, self.len()) })
    }

    /// A part of it.
    ///
    /// # Panics
    /// If `range` does not lie inside it.
    pub fn slice(&self, range: Range<usize>) -> WriteBuf<'a> {
        WriteBuf {
            view: self.view.slice(range.start, range.end),
            memory: PhantomData,
        }
    }

    /// True if every segment starts and ends on multiples of `alignment` bytes.
    pub fn is_aligned(&self, alignment: usize) -> bool {
        self.segments()
            .all(|s| s.ptr.addr().is_multiple_of(alignment) && s.len.is_multiple_of(alignment))
    }

    /// The stretches of memory it consists of, for system calls that take a vector. They are only to be read.
    pub fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        self.view.segments()
    }
}

impl std::fmt::Debug for WriteBuf<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WriteBuf({} bytes)", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_copied_out_private_or_shared() {
        let mut memory: Vec<u8> = (0..9).collect();
        let ptr = memory.as_mut_ptr();
        let list = [
            Segment { ptr, len: 4 },
            Segment {
                ptr: ptr.wrapping_add(4),
                len: 5,
            },
        ];
        for shared in [false, true] {
            // SAFETY: the segments tile `memory`, which nothing writes to here.
            let buf = unsafe { WriteBuf::from_parts(&list, shared) };
            let mut out = [0; 4];
            buf.slice(2..6).copy_to(&mut out);
            assert_eq!(out, [2, 3, 4, 5]);
            assert_eq!(buf.slice(5..9).as_slice().is_none(), shared);
        }
    }

    #[test]
    fn alignment_counts_addresses_and_lengths() {
        let memory = super::super::AlignedBuf::zeroed(8192, 4096);
        let buf = WriteBuf::new(&memory);
        assert!(buf.is_aligned(4096));
        assert!(!buf.slice(0..512).is_aligned(4096));
        assert!(buf.slice(512..1024).is_aligned(512));
        assert!(!buf.slice(1..513).is_aligned(512));
    }
}
