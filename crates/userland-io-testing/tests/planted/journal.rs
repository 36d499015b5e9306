//! A disk that writes to a journal first, and then to the block's home.
//!
//! Below: a header (the block's number and a sum), the bytes, and then the homes. Opening brings home what is in the
//! journal and empties it.

use tokio::sync::Mutex;
use userland_io::{Checked, CrashLevel, Engine, Geometry, ReadBuf, Result, WriteBuf, WriteFlags};
use userland_io_testing::sim::SimDisk;

use crate::Bug;

pub(crate) struct Journal {
    lower: Checked<SimDisk>,
    lock: Mutex<()>,
}

const BLOCK: usize = 64;
const NONE: WriteFlags = WriteFlags::empty();

fn home(block: u64) -> u64 {
    (2 + block) * BLOCK as u64
}

fn sum(block: u64, bytes: &[u8]) -> u64 {
    let seed = block.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    bytes.iter().fold(seed, |sum, &byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

impl Journal {
    pub(crate) async fn open(disk: SimDisk, bug: Bug) -> Result<Self> {
        let lower = Checked::new(disk)?;
        let mut bytes = [0; 2 * BLOCK];
        lower.read(&mut ReadBuf::new(&mut bytes), 0).await?;
        let (header, data) = bytes.split_at(BLOCK);
        let word = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().unwrap());
        let (block, found) = (word(0), word(8));
        if found == sum(block, data) && home(block) < lower.geometry().size {
            lower.write(&WriteBuf::new(data), home(block), NONE).await?;
            if bug != Bug::RecoveryWithoutFlush {
                lower.flush().await?;
            }
            lower.write_zeroes(0..BLOCK as u64, NONE).await?;
            if bug != Bug::RecoveryWithoutFlush {
                lower.flush().await?;
            }
        }
        Ok(Journal {
            lower,
            lock: Mutex::new(()),
        })
    }
}

impl Engine for Journal {
    fn geometry(&self) -> Geometry {
        let size = self.lower.geometry().size - 2 * BLOCK as u64;
        let mut geometry = Geometry::writable(size, CrashLevel::Sync);
        geometry.logical_block_size = BLOCK as u32;
        geometry.max_transfer = BLOCK as u32;
        geometry
    }

    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        let _lock = self.lock.lock().await;
        self.lower.read(buf, offset + 2 * BLOCK as u64).await
    }

    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, _: WriteFlags) -> Result {
        let _lock = self.lock.lock().await;
        let block = offset / BLOCK as u64;
        let mut bytes = [0; 2 * BLOCK];
        buf.copy_to(&mut bytes[BLOCK..]);
        let check = sum(block, &bytes[BLOCK..]);
        bytes[..8].copy_from_slice(&block.to_le_bytes());
        bytes[8..16].copy_from_slice(&check.to_le_bytes());
        // What the journal held must be home for good before it is overwritten.
        self.lower.flush().await?;
        self.lower.write(&WriteBuf::new(&bytes), 0, NONE).await?;
        self.lower.flush().await?;
        self.lower.write(buf, home(block), NONE).await
    }
}
