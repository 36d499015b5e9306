//! The memory of requests: aligned buffers in power-of-two classes, kept for reuse.
//!
//! A pool belongs to one connection's task at a time, so nothing is locked. What is idle
//! is bounded by [`KEEP`] while the connection works, and given back by
//! [`Pool::trim`] when it rests.

use std::ops::{Deref, DerefMut};

use crate::AlignedBuf;

/// What buffers start on, in bytes: what direct I/O asks for at most on common media.
const ALIGNMENT: usize = 4096;
/// The smallest class.
const SMALLEST: usize = 4096;
/// Classes from 4 KiB doubling up to 2 GiB.
const CLASSES: usize = 20;
/// The most idle bytes that a working connection keeps.
pub(super) const KEEP: usize = 4 << 20;
/// The most idle bytes that a resting connection keeps.
const KEEP_AT_REST: usize = 512 << 10;

/// Memory of one request: the first `len` bytes of a buffer of its class.
#[derive(Debug)]
pub(super) struct Buffer {
    memory: AlignedBuf,
    len: usize,
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[..self.len]
    }
}

/// Buffers that wait for the next request.
#[derive(Debug)]
pub(super) struct Pool {
    idle: [Vec<AlignedBuf>; CLASSES],
    idle_bytes: usize,
}

impl Pool {
    /// A pool without buffers.
    pub(super) fn new() -> Self {
        Pool {
            idle: [const { Vec::new() }; CLASSES],
            idle_bytes: 0,
        }
    }

    /// A buffer of `len` bytes, whose content is left over from another request to this export.
    pub(super) fn take(&mut self, len: usize) -> Buffer {
        let memory = match self.idle.get_mut(class(len)).and_then(Vec::pop) {
            Some(memory) => {
                self.idle_bytes -= memory.len();
                memory
            }
            None => AlignedBuf::zeroed(footprint(len), ALIGNMENT),
        };
        Buffer { memory, len }
    }

    /// Takes a buffer back, or frees it if enough are idle.
    pub(super) fn give(&mut self, buffer: Buffer) {
        let len = buffer.memory.len();
        if self.idle_bytes + len > KEEP {
            return;
        }
        if let Some(idle) = self.idle.get_mut(class(len)) {
            self.idle_bytes += len;
            idle.push(buffer.memory);
        }
    }

    /// The bytes of buffers that wait.
    pub(super) fn idle_bytes(&self) -> usize {
        self.idle_bytes
    }

    /// True if [`trim`](Self::trim) would free nothing.
    pub(super) fn is_trimmed(&self) -> bool {
        self.idle_bytes <= KEEP_AT_REST
    }

    /// Frees what a connection at rest has no use for, the largest first.
    pub(super) fn trim(&mut self) {
        for idle in self.idle.iter_mut().rev() {
            while self.idle_bytes > KEEP_AT_REST {
                match idle.pop() {
                    Some(memory) => self.idle_bytes -= memory.len(),
                    None => break,
                }
            }
        }
    }
}

/// The bytes that a buffer of `len` bytes takes: its class.
pub(super) fn footprint(len: usize) -> usize {
    len.next_power_of_two().max(SMALLEST)
}

fn class(len: usize) -> usize {
    (footprint(len) / SMALLEST).trailing_zeros() as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_to_its_class() {
        let mut pool = Pool::new();
        let mut buffer = pool.take(5000);
        assert_eq!(
            (buffer.len(), buffer.as_ptr().addr() % ALIGNMENT),
            (5000, 0)
        );
        buffer.fill(7);
        pool.give(buffer);
        assert_eq!(pool.idle_bytes, 8192);
        assert!(pool.take(4097).iter().all(|&b| b == 7), "not reused");
        assert_eq!(pool.idle_bytes, 0);
        assert!(pool.take(4096).iter().all(|&b| b == 0), "of another class");
    }

    #[test]
    fn idle_memory_is_bounded_and_trimmed() {
        let mut pool = Pool::new();
        let many: Vec<_> = (0..16).map(|_| pool.take(1 << 20)).collect();
        let few: Vec<_> = (0..4).map(|_| pool.take(4096)).collect();
        few.into_iter().for_each(|b| pool.give(b));
        many.into_iter().for_each(|b| pool.give(b));
        assert!(pool.idle_bytes <= KEEP && pool.idle_bytes > KEEP / 2);
        pool.trim();
        assert_eq!(pool.idle_bytes, 4 * 4096, "small buffers stay");
        assert!(pool.is_trimmed());
    }

    #[test]
    fn lengths_beyond_the_classes_are_served_and_not_kept() {
        assert_eq!(class(0), 0);
        assert_eq!(class(4096), 0);
        assert_eq!(class(4097), 1);
        assert!(class(u32::MAX as usize) >= CLASSES);
    }
}
