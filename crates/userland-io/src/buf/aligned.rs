//! Heap memory that starts where direct I/O wants it to.

use std::ops::{Deref, DerefMut};

/// Bytes that start on a multiple of the alignment asked for.
pub struct AlignedBuf {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    /// `len` zeroes that start on a multiple of `alignment`, a power of two.
    ///
    /// # Panics
    /// If `alignment` is no power of two.
    pub fn zeroed(len: usize, alignment: usize) -> Self {
        assert!(
            alignment.is_power_of_two(),
            "{alignment} is no power of two"
        );
        // Longer by less than the alignment, so that some start inside fits. Zeroed memory from the
        // allocator costs nothing until it is touched.
        let memory = vec![0; len + alignment - 1];
        let start = memory.as_ptr().addr().wrapping_neg() & (alignment - 1);
        AlignedBuf { memory, start, len }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

impl std::fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_starts_where_asked() {
        for alignment in [1, 512, 4096, 1 << 20] {
            let mut buf = AlignedBuf::zeroed(1000, alignment);
            assert_eq!(buf.as_ptr().addr() % alignment, 0);
            assert_eq!(buf.len(), 1000);
            buf.fill(1);
        }
    }
}
