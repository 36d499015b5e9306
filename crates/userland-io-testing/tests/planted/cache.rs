//! A write-back cache in front of a disk, with a front for each queue.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use tokio::sync::{Mutex, MutexGuard};
use userland_io::{
    AnyEngine, Checked, Engine, Features, Geometry, ReadBuf, Result, WriteBuf, WriteFlags,
};
use userland_io_testing::sim::SimDisk;

use crate::Bug;

pub(crate) struct Cache {
    shared: Arc<Shared>,
    queue: usize,
}

struct Shared {
    lower: Checked<SimDisk>,
    bug: Bug,
    block: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// For each block that is not below yet, its bytes and the queue that wrote it.
    dirty: BTreeMap<u64, (usize, Vec<u8>)>,
    /// What each queue has read.
    read: Vec<HashMap<u64, Vec<u8>>>,
    /// A write to the disk below may have been dropped half-way.
    doubt: bool,
}

impl Cache {
    pub(crate) async fn open(disk: SimDisk, bug: Bug) -> Result<Vec<AnyEngine>> {
        let lower = Checked::new(disk)?;
        let shared = Arc::new(Shared {
            block: lower.geometry().logical_block_size as usize,
            lower,
            bug,
            state: Mutex::new(State {
                read: vec![HashMap::new(); 3],
                ..State::default()
            }),
        });
        let front = |queue| Cache {
            shared: shared.clone(),
            queue,
        };
        Ok((0..3).map(front).map(AnyEngine::new).collect())
    }

    async fn state(&self) -> Result<MutexGuard<'_, State>> {
        let mut state = self.shared.state.lock().await;
        if state.doubt {
            self.shared.lower.flush().await?;
            state.doubt = false;
        }
        Ok(state)
    }

    fn blocks(&self, range: &Range<u64>) -> Range<u64> {
        let block = self.shared.block as u64;
        range.start / block..range.end / block
    }

    async fn write_out(&self, state: &mut State, mine_only: bool) -> Result {
        let of = |entry: &(&u64, &(usize, Vec<u8>))| !mine_only || entry.1.0 == self.queue;
        let blocks: Vec<u64> = state
            .dirty
            .iter()
            .filter(of)
            .map(|entry| *entry.0)
            .collect();
        for block in blocks {
            let Some((_, bytes)) = state.dirty.get(&block) else {
                continue;
            };
            state.doubt = true;
            let at = block * self.shared.block as u64;
            let none = WriteFlags::empty();
            let bytes = WriteBuf::new(bytes);
            let result = self.shared.lower.write(&bytes, at, none).await;
            state.doubt = false;
            result?;
            state.dirty.remove(&block);
        }
        Ok(())
    }
}

impl Engine for Cache {
    fn geometry(&self) -> Geometry {
        let mut geometry = self.shared.lower.geometry();
        geometry.features -= Features::SURVIVES_KILL | Features::EXTENTS;
        geometry
    }

    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        let mut state = self.state().await?;
        let size = self.shared.block;
        for block in self.blocks(&(offset..offset + buf.len() as u64)) {
            let at = block as usize * size - offset as usize;
            let mut part = buf.slice(at..at + size);
            if let Some((_, bytes)) = state.dirty.get(&block) {
                part.copy_from(bytes);
                continue;
            }
            if self.shared.bug == Bug::StaleCachePerQueue
                && let Some(bytes) = state.read[self.queue].get(&block)
            {
                part.copy_from(bytes);
                continue;
            }
            let mut bytes = vec![0; size];
            let below = block * size as u64;
            let mut bounce = ReadBuf::new(&mut bytes);
            self.shared.lower.read(&mut bounce, below).await?;
            part.copy_from(&bytes);
            state.read[self.queue].insert(block, bytes);
        }
        Ok(())
    }

    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        let mut state = self.state().await?;
        let size = self.shared.block;
        for block in self.blocks(&(offset..offset + buf.len() as u64)) {
            let at = block as usize * size - offset as usize;
            let mut bytes = vec![0; size];
            buf.slice(at..at + size).copy_to(&mut bytes);
            state.read[self.queue].remove(&block);
            state.dirty.insert(block, (self.queue, bytes));
        }
        if flags.contains(WriteFlags::FUA) {
            self.write_out(&mut state, false).await?;
            self.shared.lower.flush().await?;
        }
        Ok(())
    }

    async fn flush(&self) -> Result {
        let mut state = self.state().await?;
        let mine_only = self.shared.bug == Bug::FlushOfOwnQueueOnly;
        self.write_out(&mut state, mine_only).await?;
        self.shared.lower.flush().await
    }

    async fn discard(&self, range: Range<u64>) -> Result {
        self.write_zeroes(range, WriteFlags::empty()).await
    }

    async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        let mut state = self.state().await?;
        // The dirty blocks must not come after the zeroes, nor vanish if those fail.
        self.write_out(&mut state, false).await?;
        for block in self.blocks(&range) {
            for queue in &mut state.read {
                queue.remove(&block);
            }
        }
        state.doubt = true;
        let result = self.shared.lower.write_zeroes(range, flags).await;
        state.doubt = false;
        result
    }
}
