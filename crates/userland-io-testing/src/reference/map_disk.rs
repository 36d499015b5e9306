//! C1: what a flush covered survives, and each block is old or new on its own.
//!
//! The disk below holds a map, and slots of one block each. The map says for each block which slot has its bytes,
//! or that it reads as zeroes. In memory the map is always right; below it is as the last flush left it. That is legal
//! as long as a crash never finds the old map pointing at newer bytes of another block, and so
//! * a block that has a slot is overwritten there (old or new, and never another's);
//! * a slot that the map gives up is *resting* until a flush has made the new map durable, and only then used again;
//! * a flush makes the slots durable first, then writes the map, then makes that durable.
//!
//! A slot that is being filled for the first time rests, too, until its write has answered: if that fails, or
//! its future is dropped, it may still be written to until the next flush.

use std::collections::BTreeSet;
use std::ops::Range;

use tokio::sync::{Mutex, MutexGuard};
use userland_io::{
    Checked, CrashLevel, Discard, Engine, Error, ErrorKind, ExtentKind, Extents, Features,
    Geometry, ReadBuf, Result, WriteBuf, WriteFlags,
};

use super::{checksum, too_small};

/// A disk with a map from blocks to slots.
#[derive(Debug)]
pub struct MapDisk<E> {
    lower: Checked<E>,
    block: usize,
    /// Blocks of the disk.
    blocks: usize,
    /// Where the slots begin, in blocks of the disk below.
    first_slot: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// For each block its slot plus 1, or 0.
    map: Vec<u32>,
    /// Map blocks that differ from those below.
    dirty: BTreeSet<usize>,
    free: Vec<u32>,
    /// Slots that become free by the next flush.
    resting: Vec<u32>,
}

impl<E: Engine> MapDisk<E> {
    /// Opens the disk that `lower` holds; one that is all zeroes is a new disk.
    ///
    /// # Errors
    /// If `lower` is too small, fails, or holds a map block that is damaged.
    pub async fn open(lower: E) -> Result<Self> {
        let lower = Checked::new(lower)?;
        let geometry = lower.geometry();
        let block = (geometry.logical_block_size as usize).max(64);
        let total = (geometry.size / block as u64) as usize;
        let per_block = block / 4 - 2;
        // A quarter more slots than blocks, so that some can rest.
        let blocks = (1..total)
            .take_while(|n| n.div_ceil(per_block) + n + n / 4 < total)
            .last()
            .ok_or_else(|| too_small("a map"))?;
        let first_slot = blocks.div_ceil(per_block);
        let disk = MapDisk {
            block,
            blocks,
            first_slot,
            state: Mutex::new(State {
                map: Vec::new(),
                dirty: BTreeSet::new(),
                free: Vec::new(),
                resting: Vec::new(),
            }),
            lower,
        };
        disk.load(total - first_slot).await?;
        Ok(disk)
    }

    async fn load(&self, slots: usize) -> Result {
        let mut state = self.state.lock().await;
        let mut bytes = vec![0; self.block];
        for at in 0..self.first_slot {
            let place = (at * self.block) as u64;
            self.lower
                .read(&mut ReadBuf::new(&mut bytes), place)
                .await?;
            let (entries, sum) = bytes.split_at(self.block - 8);
            let blank = bytes.iter().all(|&byte| byte == 0);
            if !blank && sum != checksum(&[entries]).to_le_bytes() {
                let text = format!("the map block at {place} is damaged");
                return Err(Error::new(ErrorKind::Protection, text));
            }
            for entry in entries.chunks_exact(4) {
                let slot = u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
                state.map.push(slot.min(slots as u32));
            }
        }
        state.map.truncate(self.blocks);
        let used: BTreeSet<u32> = state.map.iter().copied().collect();
        state.free = (0..slots as u32)
            .filter(|slot| !used.contains(&(slot + 1)))
            .collect();
        Ok(())
    }

    fn map_block(&self, block: usize) -> usize {
        block / (self.block / 4 - 2)
    }

    fn slot_place(&self, slot: u32) -> u64 {
        ((self.first_slot + slot as usize) * self.block) as u64
    }

    fn blocks_of(&self, range: &Range<u64>) -> Range<usize> {
        (range.start / self.block as u64) as usize..range.end.div_ceil(self.block as u64) as usize
    }

    /// Writes one block, into its slot or a new one.
    async fn put(
        &self,
        state: &mut MutexGuard<'_, State>,
        block: usize,
        bytes: &WriteBuf<'_>,
    ) -> Result {
        let none = WriteFlags::empty();
        if let Some(slot) = state.map[block].checked_sub(1) {
            return self.lower.write(bytes, self.slot_place(slot), none).await;
        }
        if state.free.is_empty() {
            self.sync(state).await?;
        }
        let slot = state.free.pop().ok_or(ErrorKind::NoSpace)?;
        state.resting.push(slot);
        self.lower.write(bytes, self.slot_place(slot), none).await?;
        state.resting.retain(|&resting| resting != slot);
        state.map[block] = slot + 1;
        state.dirty.insert(self.map_block(block));
        Ok(())
    }

    fn unmap(&self, state: &mut State, blocks: Range<usize>) {
        for block in blocks {
            if let Some(slot) = std::mem::take(&mut state.map[block]).checked_sub(1) {
                state.resting.push(slot);
                state.dirty.insert(self.map_block(block));
            }
        }
    }

    /// Slots, map, durable; then nothing below needs the slots that rest.
    async fn sync(&self, state: &mut MutexGuard<'_, State>) -> Result {
        self.lower.flush().await?;
        let dirty: Vec<usize> = state.dirty.iter().copied().collect();
        let per_block = self.block / 4 - 2;
        for &at in &dirty {
            let entries = state.map[at * per_block..].iter().take(per_block);
            let mut bytes: Vec<u8> = entries.flat_map(|slot| slot.to_le_bytes()).collect();
            bytes.resize(self.block - 8, 0);
            bytes.extend(checksum(&[&bytes]).to_le_bytes());
            let place = (at * self.block) as u64;
            let bytes = WriteBuf::new(&bytes);
            self.lower.write(&bytes, place, WriteFlags::empty()).await?;
        }
        if !dirty.is_empty() {
            self.lower.flush().await?;
        }
        let state = &mut **state;
        state.dirty.clear();
        state.free.append(&mut state.resting);
        Ok(())
    }
}

impl<E: Engine> Engine for MapDisk<E> {
    fn geometry(&self) -> Geometry {
        let size = (self.blocks * self.block) as u64;
        let mut geometry = Geometry::writable(size, CrashLevel::Flush);
        geometry.logical_block_size = self.block as u32;
        geometry.discard = Discard::Zeroes;
        geometry.features |= Features::WRITE_ZEROES | Features::EXTENTS;
        geometry
    }

    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        let state = self.state.lock().await;
        for block in self.blocks_of(&(offset..offset + buf.len() as u64)) {
            let at = block * self.block - offset as usize;
            let mut part = buf.slice(at..at + self.block);
            match state.map[block].checked_sub(1) {
                Some(slot) => self.lower.read(&mut part, self.slot_place(slot)).await?,
                None => part.fill(0),
            }
        }
        Ok(())
    }

    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, _: WriteFlags) -> Result {
        let mut state = self.state.lock().await;
        for block in self.blocks_of(&(offset..offset + buf.len() as u64)) {
            let at = block * self.block - offset as usize;
            let part = buf.slice(at..at + self.block);
            self.put(&mut state, block, &part).await?;
        }
        Ok(())
    }

    async fn flush(&self) -> Result {
        let mut state = self.state.lock().await;
        self.sync(&mut state).await
    }

    async fn discard(&self, range: Range<u64>) -> Result {
        let mut state = self.state.lock().await;
        self.unmap(&mut state, self.blocks_of(&range));
        Ok(())
    }

    async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        let mut state = self.state.lock().await;
        if !flags.contains(WriteFlags::NO_UNMAP) {
            self.unmap(&mut state, self.blocks_of(&range));
            return Ok(());
        }
        if flags.contains(WriteFlags::FAST_ONLY) {
            return Err(ErrorKind::Unsupported.into());
        }
        let zeroes = vec![0; self.block];
        for block in self.blocks_of(&range) {
            self.put(&mut state, block, &WriteBuf::new(&zeroes)).await?;
        }
        Ok(())
    }

    async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        let state = self.state.lock().await;
        let mut at = range.start;
        for block in self.blocks_of(&range) {
            let end = ((block + 1) * self.block) as u64;
            let kind = match state.map[block] {
                0 => ExtentKind::Hole,
                _ => ExtentKind::Data,
            };
            out.push(end.min(range.end) - at, kind);
            at = end;
        }
        Ok(())
    }

    async fn close(&self) -> Result {
        self.flush().await?;
        self.lower.close().await
    }
}
