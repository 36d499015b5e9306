//! A disk on which every place says where it is.

use crate::{Engine, Features, Geometry, ReadBuf, Result};

/// A read-only disk whose every aligned 8 bytes hold their own offset, big-endian.
///
/// Bytes that turn up in the wrong place name the one they came from. Any byte can be read on its
/// own: the one at `offset` is byte `offset % 8` of that number.
///
/// ```
/// use userland_io::{Device, ReadBuf, engines::Pattern};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> userland_io::Result {
/// let disk = Device::open(Pattern::new(1 << 40)).await?;
/// let mut place = [0; 8];
/// disk.read(&mut ReadBuf::new(&mut place), 0x12_3456_7890).await?;
/// assert_eq!(u64::from_be_bytes(place), 0x12_3456_7890);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Pattern {
    size: u64,
}

impl Pattern {
    /// A disk of `size` bytes.
    pub const fn new(size: u64) -> Self {
        Pattern { size }
    }
}

impl Engine for Pattern {
    fn geometry(&self) -> Geometry {
        let mut geometry = Geometry::read_only(self.size);
        geometry.features |= Features::ATOMIC_READS | Features::SURVIVES_KILL;
        geometry
    }

    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        match buf.as_mut_slice() {
            Some(bytes) => fill(bytes, offset),
            None => fill_pieces(buf, offset),
        }
        Ok(())
    }
}

/// Memory in segments, or shared with a guest: through a page of our own.
fn fill_pieces(buf: &mut ReadBuf<'_>, offset: u64) {
    let mut page = [0; 4096];
    let mut done = 0;
    while done < buf.len() {
        let part = &mut page[..(buf.len() - done).min(4096)];
        fill(part, offset + done as u64);
        buf.slice(done..done + part.len()).copy_from(part);
        done += part.len();
    }
}

fn fill(bytes: &mut [u8], mut at: u64) {
    // Up to the first whole number, the whole ones, and what is left.
    let head = (at.next_multiple_of(8) - at) as usize;
    let (head, rest) = bytes.split_at_mut(head.min(bytes.len()));
    part(head, at);
    at += head.len() as u64;
    let mut words = rest.chunks_exact_mut(8);
    for word in &mut words {
        word.copy_from_slice(&at.to_be_bytes());
        at += 8;
    }
    part(words.into_remainder(), at);
}

/// Fewer than 8 bytes, all of one number.
fn part(bytes: &mut [u8], at: u64) {
    let number = (at & !7).to_be_bytes();
    let from = (at % 8) as usize;
    bytes.copy_from_slice(&number[from..from + bytes.len()]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::WriteBuf;

    #[test]
    fn any_range_is_a_part_of_the_whole() {
        let mut whole = vec![0; 64];
        fill(&mut whole, 0xffff_fff0);
        for (n, word) in whole.chunks(8).enumerate() {
            assert_eq!(word, (0xffff_fff0 + 8 * n as u64).to_be_bytes());
        }
        for start in 0..whole.len() {
            for end in start..=whole.len() {
                let mut part = vec![0xee; end - start];
                fill(&mut part, 0xffff_fff0 + start as u64);
                assert_eq!(part, whole[start..end], "{start}..{end}");
            }
        }
    }

    #[test]
    fn what_goes_through_a_page_is_the_same() {
        let (mut direct, mut bounced) = (vec![0; 10_001], vec![0; 10_001]);
        fill(&mut direct, 3);
        fill_pieces(&mut ReadBuf::new(&mut bounced), 3);
        assert_eq!(direct, bounced);
    }

    #[tokio::test]
    async fn it_takes_no_writes() {
        let pattern = Pattern::new(64);
        assert_eq!(pattern.geometry().validate(), Ok(()));
        let flags = crate::WriteFlags::empty();
        let refused = pattern.write(&WriteBuf::new(&[0]), 0, flags).await;
        assert_eq!(refused.unwrap_err().kind(), crate::ErrorKind::ReadOnly);
    }
}
