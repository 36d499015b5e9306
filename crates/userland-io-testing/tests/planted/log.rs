//! A log whose records only count up: nothing says that two of them follow each other.

use tokio::sync::Mutex;
use userland_io::{
    Checked, CrashLevel, Engine, ErrorKind, Geometry, ReadBuf, Result, WriteBuf, WriteFlags,
};
use userland_io_testing::sim::SimDisk;

use crate::Bug;

/// One record is a block of header (its number, its place, and the number again) and a block of data. Without the bug,
/// recovery wipes what comes behind the last record.
pub(crate) struct Log {
    lower: Checked<SimDisk>,
    blocks: usize,
    state: Mutex<State>,
}

struct State {
    next: usize,
    index: Vec<usize>,
}

const BLOCK: usize = 64;

impl Log {
    pub(crate) async fn open(disk: SimDisk, bug: Bug) -> Result<Self> {
        let lower = Checked::new(disk)?;
        let records = lower.geometry().size as usize / BLOCK / 2;
        let blocks = 4;
        let mut state = State {
            next: 0,
            index: vec![0; blocks],
        };
        let mut bytes = [0; 2 * BLOCK];
        while state.next < records {
            let at = (state.next * 2 * BLOCK) as u64;
            lower.read(&mut ReadBuf::new(&mut bytes), at).await?;
            let sum = bytes[BLOCK..].iter().map(|&b| u32::from(b)).sum::<u32>() as u16;
            let good = bytes[0] as usize == state.next + 1
                && u16::from_le_bytes([bytes[2], bytes[3]]) == sum;
            if !good {
                break;
            }
            state.next += 1;
            state.index[bytes[1] as usize % blocks] = state.next;
        }
        if bug != Bug::OldRecordsComeBack && state.next < records {
            let range = (state.next * 2 * BLOCK) as u64..(records * 2 * BLOCK) as u64;
            lower.write_zeroes(range, WriteFlags::empty()).await?;
            lower.flush().await?;
        }
        Ok(Log {
            lower,
            blocks,
            state: Mutex::new(state),
        })
    }
}

impl Engine for Log {
    fn geometry(&self) -> Geometry {
        let size = (self.blocks * BLOCK) as u64;
        let mut geometry = Geometry::writable(size, CrashLevel::Prefix);
        geometry.logical_block_size = BLOCK as u32;
        geometry.max_transfer = BLOCK as u32;
        geometry
    }

    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        let state = self.state.lock().await;
        match state.index[offset as usize / BLOCK].checked_sub(1) {
            Some(record) => {
                let at = (record * 2 * BLOCK + BLOCK) as u64;
                self.lower.read(buf, at).await
            }
            None => {
                buf.fill(0);
                Ok(())
            }
        }
    }

    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, _: WriteFlags) -> Result {
        let mut state = self.state.lock().await;
        let at = (state.next * 2 * BLOCK) as u64;
        if at + 2 * BLOCK as u64 > self.lower.geometry().size || state.next >= 250 {
            return Err(ErrorKind::NoSpace.into());
        }
        let mut bytes = [0; 2 * BLOCK];
        buf.copy_to(&mut bytes[BLOCK..]);
        let sum = bytes[BLOCK..].iter().map(|&b| u32::from(b)).sum::<u32>() as u16;
        bytes[0] = state.next as u8 + 1;
        bytes[1] = (offset as usize / BLOCK) as u8;
        bytes[2..4].copy_from_slice(&sum.to_le_bytes());
        let none = WriteFlags::empty();
        self.lower.write(&WriteBuf::new(&bytes), at, none).await?;
        state.next += 1;
        let next = state.next;
        state.index[offset as usize / BLOCK] = next;
        Ok(())
    }

    async fn flush(&self) -> Result {
        let _state = self.state.lock().await;
        self.lower.flush().await
    }
}
