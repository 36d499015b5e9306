//! What a test writes: bytes that say who wrote them.
//!
//! A cell is filled with (seed, operation, cell, checksum) and then with a stream that follows from these, so
//! that any change of any byte shows. A cell shorter than [`LEN`] holds as much of it as fits.

/// The length of a stamp without the stream behind it, in bytes.
pub const LEN: usize = 24;

/// Who wrote a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// The run's seed.
    pub seed: u64,
    /// The operation's number.
    pub op: u32,
    /// The cell's number.
    pub cell: u32,
}

impl Stamp {
    /// Fills `to`, the memory of the stamp's cell.
    pub fn fill(&self, to: &mut [u8]) {
        for (word, chunk) in self.words().zip(to.chunks_mut(8)) {
            chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
        }
    }

    /// True if `bytes` is exactly what [`fill`](Self::fill) makes.
    pub fn matches(&self, bytes: &[u8]) -> bool {
        let mut parts = self.words().zip(bytes.chunks(8));
        parts.all(|(word, chunk)| chunk == &word.to_le_bytes()[..chunk.len()])
    }

    /// The stamp that `bytes` begins with, if all of it is as it was written.
    pub fn decode(bytes: &[u8]) -> Option<Stamp> {
        let stamp = Self::decode_torn(bytes)?;
        stamp.matches(bytes).then_some(stamp)
    }

    /// The stamp that `bytes` begins with, whatever comes behind it.
    pub fn decode_torn(bytes: &[u8]) -> Option<Stamp> {
        let header = bytes.get(..LEN)?;
        let word = |at: usize| header[at..at + 8].try_into().map(u64::from_le_bytes).ok();
        let place = word(8)?;
        let stamp = Stamp {
            seed: word(0)?,
            op: place as u32,
            cell: (place >> 32) as u32,
        };
        (stamp.hash() == word(16)?).then_some(stamp)
    }

    fn words(&self) -> impl Iterator<Item = u64> {
        let place = u64::from(self.op) | (u64::from(self.cell) << 32);
        let hash = self.hash();
        let stream = (1..).map(move |n: u64| mix(hash.wrapping_add(n)));
        [self.seed, place, hash].into_iter().chain(stream)
    }

    fn hash(&self) -> u64 {
        let place = u64::from(self.op) | (u64::from(self.cell) << 32);
        mix(mix(self.seed ^ 0x7573_6572_6c61_6e64) ^ place)
    }
}

/// Mixes the bits of a word so that every one depends on all (the finalizer of SplitMix64).
pub(crate) fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_names_its_writer_and_notices_every_byte() {
        let stamp = Stamp {
            seed: 9,
            op: 7,
            cell: 3,
        };
        let mut bytes = [0; 50];
        stamp.fill(&mut bytes);
        assert_eq!(Stamp::decode(&bytes), Some(stamp));
        for at in 0..bytes.len() {
            bytes[at] ^= 1;
            assert_eq!(Stamp::decode(&bytes), None, "byte {at}");
            bytes[at] ^= 1;
        }
        assert_eq!(Stamp::decode(&[0; 50]), None);
    }
}
