//! A raw view of memory in one or more segments, without an allocation: what
//! [`ReadBuf`](super::ReadBuf) and [`WriteBuf`](super::WriteBuf) wrap.

use super::shared;

/// One stretch of memory. Laid out as `struct iovec` is on Unix.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// Its first byte.
    pub ptr: *mut u8,
    /// Its length in bytes.
    pub len: usize,
}

// SAFETY: an address and a length; whoever follows the address answers for that.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

/// A window onto memory: one segment inline, or a slice of them with the first
/// `skip` bytes left out. `len` counts what the window shows.
#[derive(Clone, Copy)]
pub(super) struct View {
    memory: Memory,
    len: usize,
    shared: bool,
}

#[derive(Clone, Copy)]
enum Memory {
    One(*mut u8),
    Many {
        list: *const Segment,
        count: usize,
        skip: usize,
    },
}

impl View {
    /// A window onto private memory.
    pub(super) fn one(ptr: *mut u8, len: usize) -> Self {
        View {
            memory: Memory::One(ptr),
            len,
            shared: false,
        }
    }

    /// A window onto all of `segments`, which the caller keeps alive while it is used.
    pub(super) fn many(segments: &[Segment], shared: bool) -> Self {
        View {
            memory: Memory::Many {
                list: segments.as_ptr(),
                count: segments.len(),
                skip: 0,
            },
            len: segments.iter().map(|s| s.len).sum(),
            shared,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The memory, if it is private and in one piece.
    pub(super) fn contiguous(&self) -> Option<*mut u8> {
        if self.shared {
            return None;
        }
        let mut segments = self.segments();
        match (segments.next(), segments.next()) {
            (Some(only), None) => Some(only.ptr),
            (None, _) => Some(std::ptr::dangling_mut()),
            _ => None,
        }
    }

    /// The window onto `start..end` of this one.
    ///
    /// # Panics
    /// If the range does not lie inside this window.
    pub(super) fn slice(&self, start: usize, end: usize) -> View {
        assert!(
            start <= end && end <= self.len,
            "{start}..{end} of a buffer of {}",
            self.len
        );
        let memory = match self.memory {
            // wrapping_add: an address inside the window, or one past it.
            Memory::One(ptr) => Memory::One(ptr.wrapping_add(start)),
            Memory::Many { list, count, skip } => Memory::Many {
                list,
                count,
                skip: skip + start,
            },
        };
        View {
            memory,
            len: end - start,
            shared: self.shared,
        }
    }

    /// The segments under the window, cut to it, none of them empty.
    pub(super) fn segments(&self) -> Segments {
        let mut rest = *self;
        // Past the segments that the window skips as a whole, once.
        if let Memory::Many { list, count, skip } = &mut rest.memory {
            while *count > 0 {
                // SAFETY: `list` points at `count` segments, which outlive the window.
                let first = unsafe { **list };
                if *skip < first.len {
                    break;
                }
                *skip -= first.len;
                *list = list.wrapping_add(1);
                *count -= 1;
            }
        }
        Segments { rest }
    }

    /// Copies between the window and private memory at `other`, in the direction `into_window`.
    ///
    /// # Safety
    /// `other` must be valid for `self.len` bytes in that direction and not overlap the window, and the
    /// window's memory must be alive and, if `into_window`, writable.
    pub(super) unsafe fn copy(&self, other: *mut u8, into_window: bool) {
        let mut at = 0;
        for segment in self.segments() {
            let beside = other.wrapping_add(at);
            let (from, to) = match into_window {
                true => (beside, segment.ptr),
                false => (segment.ptr, beside),
            };
            // SAFETY: by the caller's word both are valid for this segment's length, which `at` keeps inside
            // `other`; shared memory goes by the copy that may race.
            unsafe {
                match self.shared {
                    true => shared::copy(from, to, segment.len),
                    false => std::ptr::copy_nonoverlapping(from, to, segment.len),
                }
            }
            at += segment.len;
        }
    }

    /// Sets every byte of the window.
    ///
    /// # Safety
    /// The window's memory must be alive and writable.
    pub(super) unsafe fn fill(&self, value: u8) {
        for segment in self.segments() {
            // SAFETY: by the caller's word; shared memory goes by the access that may race.
            unsafe {
                match self.shared {
                    true => shared::fill(segment.ptr, value, segment.len),
                    false => std::ptr::write_bytes(segment.ptr, value, segment.len),
                }
            }
        }
    }
}

/// The segments under a window; see [`ReadBuf::segments`](super::ReadBuf::segments).
pub(super) struct Segments {
    rest: View,
}

impl Iterator for Segments {
    type Item = Segment;

    fn next(&mut self) -> Option<Segment> {
        if self.rest.len == 0 {
            return None;
        }
        let segment = match &mut self.rest.memory {
            Memory::One(ptr) => Segment {
                ptr: *ptr,
                len: self.rest.len,
            },
            Memory::Many { list, count, skip } => loop {
                if *count == 0 {
                    return None;
                }
                // SAFETY: `list` points at `count` segments, which outlive the window.
                let segment = unsafe { **list };
                *list = list.wrapping_add(1);
                *count -= 1;
                let skipped = std::mem::take(skip);
                if segment.len > skipped {
                    break Segment {
                        ptr: segment.ptr.wrapping_add(skipped),
                        len: (segment.len - skipped).min(self.rest.len),
                    };
                }
            },
        };
        self.rest.len -= segment.len;
        Some(segment)
    }
}
