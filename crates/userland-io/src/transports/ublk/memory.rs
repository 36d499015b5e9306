//! The memory of a queue: the descriptions of its requests, shared with the driver, and a buffer for each tag.
//!
//! Who may touch what: the driver writes a tag's description, and the bytes of a write to its buffer, before it
//! completes the tag's command; it reads the buffer of a read while the next command is handed in. In between
//! the tag, its description and its buffer are the task's that serves it. Both belong to the queue's thread.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::rc::Rc;

use rustix::mm::{self, Advice, MapFlags, MlockFlags, ProtFlags};

use super::abi::{DESCRIPTION_LEN, Description, descriptions_offset};
use crate::uring::Ring;

/// How much of each buffer is there before it is used. The rest, which few requests need, is made when first used, and kept.
const AT_ONCE: usize = 16 << 10;

/// The descriptions of a queue's requests.
#[derive(Debug)]
pub(super) struct Descriptions {
    memory: NonNull<c_void>,
    len: usize,
    depth: u16,
}

impl Descriptions {
    /// Maps those of queue `queue` of the character device `file`.
    pub(super) fn map(file: &File, queue: u16, depth: u16) -> io::Result<Self> {
        let page = rustix::param::page_size();
        let len = (usize::from(depth) * DESCRIPTION_LEN).next_multiple_of(page);
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let memory = unsafe {
            mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ,
                MapFlags::SHARED | MapFlags::POPULATE,
                file,
                descriptions_offset(queue, page),
            )
        }?;
        Ok(Descriptions {
            memory: NonNull::new(memory).ok_or(io::ErrorKind::OutOfMemory)?,
            len,
            depth,
        })
    }

    /// The request that `tag` stands for. It means something only between the end of the tag's command and the next.
    pub(super) fn get(&self, tag: u16) -> Description {
        assert!(tag < self.depth, "tag {tag} of {}", self.depth);
        let at = usize::from(tag) * DESCRIPTION_LEN;
        // SAFETY: inside the mapping, which has `depth` descriptions, by the line above. The driver wrote this one before it
        // ended the tag's command, and writes the next after we give it one. Reading that end from the ring (an acquire of
        // its tail) orders the bytes before this read, and giving the command (a release) after it. Volatile, because no
        // code of this process writes there; bytes are valid whatever the driver wrote.
        let bytes = unsafe {
            self.memory
                .as_ptr()
                .byte_add(at)
                .cast::<[u8; DESCRIPTION_LEN]>()
                .read_volatile()
        };
        Description::decode(&bytes)
    }
}

impl Drop for Descriptions {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of that length, into which nothing points any more.
        let _ = unsafe { mm::munmap(self.memory.as_ptr(), self.len) };
    }
}

/// A buffer for each tag of a queue: whole pages, which are not swapped out once they are there.
#[derive(Debug)]
pub(super) struct Buffers {
    memory: NonNull<c_void>,
    len: usize,
    each: usize,
    /// Where the driver may still have operations that use them.
    ring: Rc<Ring>,
}

impl Buffers {
    /// Buffers of `each` bytes, a multiple of pages, for `depth` tags.
    pub(super) fn new(depth: u16, each: usize, ring: Rc<Ring>) -> io::Result<Self> {
        let len = usize::from(depth) * each;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let memory = unsafe {
            mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let buffers = Buffers {
            memory: NonNull::new(memory).ok_or(io::ErrorKind::OutOfMemory)?,
            len,
            each,
            ring,
        };
        buffers.settle();
        Ok(buffers)
    }

    /// Wishes about the memory, which work without, too.
    fn settle(&self) {
        let memory = self.memory.as_ptr();
        // SAFETY: our own mapping, which is not in use yet.
        unsafe {
            // A huge page for each tag would be a lot of memory for small requests.
            let _ = mm::madvise(memory, self.len, Advice::LinuxNoHugepage);
            // Serving a request must not wait for memory that can only be had by writing to this very disk.
            if let Err(error) = mm::mlock_with(memory, self.len, MlockFlags::ONFAULT) {
                tracing::debug!(%error, "the buffers of a queue are not locked in memory");
            }
        }
    }

    /// Makes the first pages of each buffer, for the requests to come. They are made when they are used, otherwise.
    pub(super) fn populate(&self) {
        for tag in (0..self.len).step_by(self.each) {
            // SAFETY: inside our own mapping. Whoever uses it meanwhile sees no byte change.
            let _ = unsafe {
                let first = self.memory.as_ptr().byte_add(tag);
                mm::madvise(first, self.each.min(AT_ONCE), Advice::LinuxPopulateWrite)
            };
        }
    }

    /// Where the buffer of `tag` is.
    pub(super) fn address(&self, tag: u16) -> *mut u8 {
        let at = usize::from(tag) * self.each;
        assert!(at < self.len, "tag {tag} has no buffer");
        // SAFETY: inside the mapping, by the line above.
        unsafe { self.memory.as_ptr().byte_add(at).cast() }
    }

    /// The first `len` bytes of `tag`'s buffer; `None` if it is not that long.
    ///
    /// # Safety
    /// Nobody else may use that buffer while the slice is: it is between the end of the tag's command and the
    /// next, and this is the only slice.
    #[expect(
        clippy::mut_from_ref,
        reason = "the bytes are not part of `self`, and each tag's are handed out once at a time by the caller's word"
    )]
    pub(super) unsafe fn slice(&self, tag: u16, len: usize) -> Option<&mut [u8]> {
        let memory = self.address(tag);
        // SAFETY: `each` bytes from there are the tag's, initialized by the kernel, and by the caller's word ours alone.
        (len <= self.each).then(|| unsafe { std::slice::from_raw_parts_mut(memory, len) })
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        if self.ring.is_busy() {
            // The queue broke off, and the driver was not seen to let go of them.
            return;
        }
        // SAFETY: our own mapping, of that length. No operation that knows of it is under way, and slices borrow `self`.
        let _ = unsafe { mm::munmap(self.memory.as_ptr(), self.len) };
    }
}
