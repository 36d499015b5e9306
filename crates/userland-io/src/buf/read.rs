//! The buffer that an engine fills.

use std::marker::PhantomData;
use std::ops::Range;

use super::segments::{Segment, View};

/// Memory that a read fills: one private slice, or segments that may be shared with a guest.
///
/// An engine fills it with [`copy_from`](Self::copy_from) or [`fill`](Self::fill), or in place where
/// [`as_mut_slice`](Self::as_mut_slice) allows, and passes parts of it on with [`slice`](Self::slice).
pub struct ReadBuf<'a> {
    view: View,
    memory: PhantomData<&'a mut [u8]>,
}

// SAFETY: it stands for a `&mut [u8]` (or memory that any thread may touch), which may move between threads.
unsafe impl Send for ReadBuf<'_> {}
// SAFETY: through `&ReadBuf` only lengths and addresses are read, never the memory.
unsafe impl Sync for ReadBuf<'_> {}

impl<'a> ReadBuf<'a> {
    /// All of `memory`, in one piece.
    pub fn new(memory: &'a mut [u8]) -> Self {
        ReadBuf {
            view: View::one(memory.as_mut_ptr(), memory.len()),
            memory: PhantomData,
        }
    }

    /// The memory of `segments`, in their order. `shared`: another party may access it meanwhile.
    ///
    /// # Safety
    /// Each segment must be valid for reads and writes for `'a`, and not overlap another. Unless `shared`, nothing
    /// else may access it for `'a`. If `shared`, no Rust reference to it may be used for `'a`.
    pub unsafe fn from_parts(segments: &'a [Segment], shared: bool) -> Self {
        ReadBuf {
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

    /// Fills it with the bytes of `from`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy_from(&mut self, from: &[u8]) {
        assert_eq!(self.len(), from.len(), "the lengths must be equal");
        // SAFETY: `from` has the window's length, and cannot overlap it: it is a reference, and the window is
        // exclusive or shared memory that no reference is made to. The window is writable by construction.
        unsafe { self.view.copy(from.as_ptr().cast_mut(), true) }
    }

    /// Sets every byte to `value`.
    pub fn fill(&mut self, value: u8) {
        // SAFETY: the window is alive and writable by construction.
        unsafe { self.view.fill(value) }
    }

    /// The memory as a slice, if it is private and in one piece; else bounce through memory of your own.
    pub fn as_mut_slice(&mut self) -> Option<&mut [u8]> {
        let ptr = self.view.contiguous()?;
        // SAFETY: private memory in one piece, exclusively ours for as long as `self` is borrowed.
        Some(unsafe { std::slice::from_raw_parts_mut(ptr, self.len()) })
    }

    /// A part of it.
    ///
    /// # Panics
    /// If `range` does not lie inside it.
    pub fn slice(&mut self, range: Range<usize>) -> ReadBuf<'_> {
        ReadBuf {
            view: self.view.slice(range.start, range.end),
            memory: PhantomData,
        }
    }

    /// The first `mid` bytes, and the rest.
    ///
    /// # Panics
    /// If `mid` lies beyond its end.
    pub fn split_at(&mut self, mid: usize) -> (ReadBuf<'_>, ReadBuf<'_>) {
        let part = |start, end| ReadBuf {
            view: self.view.slice(start, end),
            memory: PhantomData,
        };
        (part(0, mid), part(mid, self.len()))
    }

    /// True if every segment starts and ends on multiples of `alignment` bytes.
    pub fn is_aligned(&self, alignment: usize) -> bool {
        self.segments()
            .all(|s| s.ptr.addr().is_multiple_of(alignment) && s.len.is_multiple_of(alignment))
    }

    /// The stretches of memory it consists of, for system calls that take a vector. Writing to them is
    /// for the time that `self` is borrowed, by means that do not mind a race if the memory is shared.
    pub fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        self.view.segments()
    }
}

impl std::fmt::Debug for ReadBuf<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ReadBuf({} bytes)", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments(memory: &mut [u8], lens: &[usize]) -> Vec<Segment> {
        let mut at = memory.as_mut_ptr();
        let mut list = Vec::new();
        for &len in lens {
            list.push(Segment { ptr: at, len });
            at = at.wrapping_add(len);
        }
        list
    }

    #[test]
    fn segments_fill_in_order_private_or_shared() {
        for shared in [false, true] {
            let mut memory = [0; 10];
            let list = segments(&mut memory, &[3, 0, 1, 6]);
            // SAFETY: the segments tile `memory`, which nothing else touches until `buf` is gone.
            let mut buf = unsafe { ReadBuf::from_parts(&list, shared) };
            assert!(buf.as_mut_slice().is_none());
            buf.copy_from(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
            buf.slice(2..5).copy_from(&[20, 30, 40]);
            let (mut head, mut tail) = buf.split_at(7);
            head.slice(6..7).fill(60);
            tail.slice(1..2).fill(80);
            assert_eq!(memory, [0, 1, 20, 30, 40, 5, 60, 7, 80, 9]);
        }
    }

    #[test]
    fn slices_of_slices_keep_to_their_window() {
        let mut memory = [0; 8];
        let list = segments(&mut memory, &[2, 2, 2, 2]);
        // SAFETY: the segments tile `memory`, which nothing else touches until `buf` is gone.
        let mut buf = unsafe { ReadBuf::from_parts(&list, false) };
        let mut outer = buf.slice(1..7);
        let mut inner = outer.slice(2..5);
        assert_eq!(inner.segments().map(|s| s.len).collect::<Vec<_>>(), [1, 2]);
        inner.fill(1);
        assert_eq!(inner.slice(1..3).as_mut_slice(), Some(&mut [1, 1][..]));
        assert_eq!(memory, [0, 0, 0, 1, 1, 1, 0, 0]);
    }

    #[test]
    #[should_panic(expected = "3..9 of a buffer of 8")]
    fn a_slice_beyond_the_end_is_refused() {
        let mut memory = [0; 8];
        let _ = ReadBuf::new(&mut memory).slice(3..9);
    }

    #[test]
    fn shared_memory_is_never_a_slice() {
        let mut memory = [0; 4];
        let list = segments(&mut memory, &[4]);
        // SAFETY: nothing else touches `memory` until `buf` is gone.
        let mut buf = unsafe { ReadBuf::from_parts(&list, true) };
        assert!(buf.as_mut_slice().is_none());
    }
}
