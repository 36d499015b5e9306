//! A disk with a map from blocks to slots, as the reference engine for C1 has it, and ways to get it wrong.
//!
//! Block 0 below is the map, one byte a block: its slot plus 1, or 0. The slots follow. In memory only, if the
//! bug is about what happens while the disk runs.

use std::ops::Range;
use std::sync::Arc;

use tokio::sync::{Mutex, MutexGuard};
use userland_io::{
    AnyEngine, Checked, CrashLevel, Discard, Engine, ErrorKind, Features, Geometry, ReadBuf,
    Result, WriteBuf, WriteFlags,
};
use userland_io_testing::sim::SimDisk;

use crate::Bug;

pub(crate) struct Map {
    lower: Arc<Checked<SimDisk>>,
    /// What lies below, where nothing was written.
    base: Option<Checked<SimDisk>>,
    bug: Bug,
    block: usize,
    state: Mutex<State>,
}

struct State {
    map: Vec<u8>,
    /// Blocks of which nothing shows of what lies below, though they have no slot.
    zeroed: Vec<bool>,
    free: Vec<u8>,
    resting: Vec<u8>,
    /// Slots to punch, later.
    punch: Vec<u8>,
}

impl Map {
    pub(crate) async fn open(mut disks: Vec<SimDisk>, bug: Bug) -> Result<Vec<AnyEngine>> {
        let lower = Checked::new(disks.remove(0))?;
        let base = disks.pop().map(Checked::new).transpose()?;
        let block = lower.geometry().logical_block_size as usize;
        let slots = (lower.geometry().size as usize / block - 1) as u8;
        let blocks = usize::from(slots) * 2 / 3;
        let mut bytes = vec![0; block];
        lower.read(&mut ReadBuf::new(&mut bytes), 0).await?;
        let map: Vec<u8> = bytes[..blocks]
            .iter()
            .map(|&slot| slot.min(slots))
            .collect();
        let disk = Map {
            lower: Arc::new(lower),
            base,
            bug,
            block,
            state: Mutex::new(State {
                free: (0..slots)
                    .filter(|slot| !map.contains(&(slot + 1)))
                    .collect(),
                zeroed: vec![false; blocks],
                map,
                resting: Vec::new(),
                punch: Vec::new(),
            }),
        };
        Ok(vec![AnyEngine::new(disk)])
    }

    fn blocks(&self, range: &Range<u64>) -> Range<usize> {
        range.start as usize / self.block..range.end as usize / self.block
    }

    fn place(&self, slot: u8) -> u64 {
        (1 + u64::from(slot)) * self.block as u64
    }

    async fn sync(&self, state: &mut MutexGuard<'_, State>) -> Result {
        if self.bug != Bug::MetadataBeforeData {
            self.lower.flush().await?;
        }
        self.write_map(state).await?;
        self.lower.flush().await?;
        let state = &mut **state;
        state.free.append(&mut state.resting);
        Ok(())
    }

    async fn write_map(&self, state: &State) -> Result {
        let mut bytes = state.map.clone();
        bytes.resize(self.block, 0);
        let none = WriteFlags::empty();
        self.lower.write(&WriteBuf::new(&bytes), 0, none).await
    }

    async fn late_punch(&self, state: &mut State) -> Result {
        // It should have been before the slot was free again.
        if state.punch.len() > 1 {
            let at = self.place(state.punch.remove(0));
            let range = at..at + self.block as u64;
            let none = WriteFlags::empty();
            self.lower.write_zeroes(range, none).await?;
        }
        Ok(())
    }
}

impl Engine for Map {
    fn geometry(&self) -> Geometry {
        let blocks = self.state.try_lock().map_or(0, |state| state.map.len());
        let blocks = match blocks {
            0 => (self.lower.geometry().size as usize / self.block - 1) * 2 / 3,
            blocks => blocks,
        };
        let level = match self.base {
            Some(_) => CrashLevel::None,
            None => CrashLevel::Flush,
        };
        let mut geometry = Geometry::writable((blocks * self.block) as u64, level);
        geometry.logical_block_size = self.block as u32;
        geometry.discard = Discard::Zeroes;
        geometry.features |= Features::WRITE_ZEROES;
        if self.bug == Bug::MapOnlyAtFlushUnderKill {
            geometry.features |= Features::SURVIVES_KILL;
        }
        geometry
    }

    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        let state = self.state.lock().await;
        for block in self.blocks(&(offset..offset + buf.len() as u64)) {
            let at = block * self.block - offset as usize;
            let mut part = buf.slice(at..at + self.block);
            match (state.map[block].checked_sub(1), &self.base) {
                (Some(slot), _) => self.lower.read(&mut part, self.place(slot)).await?,
                (None, Some(base)) if !state.zeroed[block] => {
                    base.read(&mut part, (block * self.block) as u64).await?;
                }
                _ => part.fill(0),
            }
        }
        Ok(())
    }

    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, _: WriteFlags) -> Result {
        let mut state = self.state.lock().await;
        for block in self.blocks(&(offset..offset + buf.len() as u64)) {
            let at = block * self.block - offset as usize;
            let part = buf.slice(at..at + self.block);
            let none = WriteFlags::empty();
            if let Some(slot) = state.map[block].checked_sub(1) {
                self.lower.write(&part, self.place(slot), none).await?;
                continue;
            }
            if state.free.is_empty() {
                self.sync(&mut state).await?;
            }
            let slot = state.free.pop().ok_or(ErrorKind::NoSpace)?;
            state.resting.push(slot);
            self.lower.write(&part, self.place(slot), none).await?;
            state.resting.retain(|&resting| resting != slot);
            state.map[block] = slot + 1;
        }
        self.late_punch(&mut state).await
    }

    async fn flush(&self) -> Result {
        let mut state = self.state.lock().await;
        self.sync(&mut state).await
    }

    async fn discard(&self, range: Range<u64>) -> Result {
        let mut state = self.state.lock().await;
        for block in self.blocks(&range) {
            if let Some(slot) = std::mem::take(&mut state.map[block]).checked_sub(1) {
                match self.bug {
                    Bug::LateHolePunch => {
                        state.free.push(slot);
                        state.punch.push(slot);
                    }
                    Bug::SlotReusedBeforeFlush => state.free.push(slot),
                    _ => state.resting.push(slot),
                }
            }
            state.zeroed[block] = self.bug != Bug::ZeroesShowWhatLiesBelow;
        }
        Ok(())
    }

    async fn write_zeroes(&self, range: Range<u64>, _: WriteFlags) -> Result {
        self.discard(range).await
    }
}
