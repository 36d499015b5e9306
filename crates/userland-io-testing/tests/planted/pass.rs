//! A layer that passes everything on, but for its bug.

use std::ops::Range;
use std::sync::Mutex;

use userland_io::{
    Checked, CrashLevel, Engine, Extents, Features, Filter, Geometry, ReadBuf, Result, WriteBuf,
    WriteFlags,
};
use userland_io_testing::sim::SimDisk;

use crate::Bug;

pub(crate) struct Pass {
    lower: Checked<SimDisk>,
    bug: Bug,
    late: Mutex<Vec<Late>>,
    /// What the extents were when someone first asked.
    extents: Mutex<Option<Extents>>,
    /// What was read last, and where.
    last: Mutex<(u64, Vec<u8>)>,
}

/// A write that comes again, or too late.
struct Late {
    offset: u64,
    bytes: Vec<u8>,
    /// So many operations later.
    wait: u32,
}

impl Pass {
    pub(crate) async fn open(disk: SimDisk, bug: Bug) -> Result<Self> {
        Ok(Pass {
            lower: Checked::new(disk)?,
            bug,
            late: Mutex::default(),
            extents: Mutex::default(),
            last: Mutex::default(),
        })
    }

    fn later(&self, offset: u64, bytes: Vec<u8>, wait: u32) {
        let late = Late {
            offset,
            bytes,
            wait,
        };
        self.late.lock().unwrap().push(late);
    }

    /// Does what is late.
    async fn catch_up(&self) -> Result {
        let due: Vec<Late> = {
            let mut late = self.late.lock().unwrap();
            for late in late.iter_mut() {
                late.wait -= 1;
            }
            late.extract_if(.., |late| late.wait == 0).collect()
        };
        for late in due {
            let bytes = WriteBuf::new(&late.bytes);
            let none = WriteFlags::empty();
            self.lower.write(&bytes, late.offset, none).await?;
        }
        Ok(())
    }

    fn block(&self) -> u64 {
        u64::from(self.lower.geometry().logical_block_size)
    }
}

/// Writes its bytes when it is dropped before it was done: much later.
struct OnDrop<'a> {
    pass: &'a Pass,
    offset: u64,
    bytes: Vec<u8>,
    done: bool,
}

impl Drop for OnDrop<'_> {
    fn drop(&mut self) {
        if !self.done && self.pass.bug == Bug::DroppedFutureActsAfterFlush {
            let bytes = std::mem::take(&mut self.bytes);
            self.pass.later(self.offset, bytes, 4);
        }
    }
}

impl Filter for Pass {
    type Lower = SimDisk;

    fn lower(&self) -> &Checked<SimDisk> {
        &self.lower
    }

    fn geometry(&self) -> Geometry {
        let mut geometry = self.lower.geometry();
        match self.bug {
            Bug::ReorderingUnderPrefix => geometry.crash = CrashLevel::Prefix,
            Bug::TornBlock => geometry.logical_block_size *= 2,
            Bug::SyncWithoutFlush => {
                geometry.crash = CrashLevel::Sync;
                geometry.features -= Features::VOLATILE_CACHE;
            }
            Bug::TornUnit => geometry.atomic_write_unit = 2 * geometry.logical_block_size,
            _ => {}
        }
        geometry
    }

    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        self.catch_up().await?;
        let block = self.block();
        if self.bug == Bug::ShortRead && buf.len() as u64 > 2 * block {
            let len = buf.len() - block as usize;
            return self.lower.read(&mut buf.slice(0..len), offset).await;
        }
        self.lower.read(buf, offset).await?;
        if self.bug == Bug::StaleLend {
            let mut bytes = vec![0; buf.len()];
            self.lower
                .read(&mut ReadBuf::new(&mut bytes), offset)
                .await?;
            buf.copy_from(&bytes);
            *self.last.lock().unwrap() = (offset, bytes);
        }
        Ok(())
    }

    fn lend(&self, range: Range<u64>, to: &mut dyn FnMut(&[u8])) {
        let (offset, bytes) = &*self.last.lock().unwrap();
        if *offset == range.start && bytes.len() as u64 == range.end - range.start {
            to(bytes);
        }
    }

    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        self.catch_up().await?;
        let mut bytes = vec![0; buf.len()];
        buf.copy_to(&mut bytes);
        let block = self.block() as usize;
        match self.bug {
            Bug::FuaIgnored => return self.lower.write(buf, offset, flags - WriteFlags::FUA).await,
            Bug::LostError => {
                let _lost = self.lower.write(buf, offset, flags).await;
                return Ok(());
            }
            Bug::LateSecondLeg => self.later(offset, bytes.clone(), 3),
            Bug::WrongFuaSplit if buf.len() > block => {
                let (head, tail) = (buf.slice(0..block), buf.slice(block..buf.len()));
                self.lower.write(&head, offset, flags).await?;
                let none = WriteFlags::empty();
                return self.lower.write(&tail, offset + block as u64, none).await;
            }
            Bug::TornBlock => {
                for at in (0..buf.len()).step_by(block) {
                    let part = buf.slice(at..at + block);
                    self.lower.write(&part, offset + at as u64, flags).await?;
                }
                return Ok(());
            }
            Bug::LastBlockOffByOne
                if offset + buf.len() as u64 == self.lower.geometry().size && buf.len() > block =>
            {
                let part = buf.slice(0..buf.len() - block);
                return self.lower.write(&part, offset, flags).await;
            }
            _ => {}
        }
        let mut guard = OnDrop {
            pass: self,
            offset,
            bytes,
            done: false,
        };
        let result = self.lower.write(buf, offset, flags).await;
        guard.done = true;
        result
    }

    fn write_nowait(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Option<Result> {
        let head = buf.len().saturating_sub(self.block() as usize);
        match self.bug {
            Bug::None => self.lower.write_nowait(buf, offset, flags),
            Bug::NowaitTailLate if head > 0 => {
                let written = self
                    .lower
                    .write_nowait(&buf.slice(0..head), offset, flags)?;
                let mut tail = vec![0; buf.len() - head];
                buf.slice(head..buf.len()).copy_to(&mut tail);
                self.later(offset + head as u64, tail, 2);
                Some(written)
            }
            _ => None,
        }
    }

    fn lend_mut(
        &self,
        range: Range<u64>,
        flags: WriteFlags,
        from: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Result> {
        let end = range.end.saturating_sub(self.block());
        match self.bug {
            Bug::None => self.lower.lend_mut(range, flags, from),
            Bug::LentZeroes => self.lower.lend_mut(range, flags, &mut |memory| {
                memory.fill(0);
                from(memory);
            }),
            Bug::LentTailLate if end > range.start => {
                let written = self.lower.lend_mut(range.start..end, flags, from)?;
                let mut tail = vec![0; (range.end - end) as usize];
                from(&mut tail);
                self.later(end, tail, 2);
                Some(written)
            }
            _ => None,
        }
    }

    async fn flush(&self) -> Result {
        match self.bug {
            Bug::FlushDoesNothing => Ok(()),
            Bug::FlushErrorSwallowed => {
                let _lost = self.lower.flush().await;
                Ok(())
            }
            _ => self.lower.flush().await,
        }
    }

    async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        self.catch_up().await?;
        match self.bug {
            Bug::FuaIgnored => {
                self.lower
                    .write_zeroes(range, flags - WriteFlags::FUA)
                    .await
            }
            _ => self.lower.write_zeroes(range, flags).await,
        }
    }

    async fn discard(&self, range: Range<u64>) -> Result {
        self.catch_up().await?;
        let two = 2 * self.block();
        let range = match self.bug {
            Bug::DiscardBelowGranularity => {
                range.start / two * two
                    ..range
                        .end
                        .next_multiple_of(two)
                        .min(self.lower.geometry().size)
            }
            _ => range,
        };
        self.lower.discard(range).await
    }

    async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        if self.bug != Bug::StaleExtents {
            return self.lower.extents(range, out).await;
        }
        let known = self.extents.lock().unwrap().clone();
        let known = match known {
            Some(known) => known,
            None => {
                let mut all = Extents::new(100);
                let size = self.lower.geometry().size;
                self.lower.extents(0..size, &mut all).await?;
                self.extents.lock().unwrap().get_or_insert(all).clone()
            }
        };
        let mut at = 0;
        for run in &known {
            let part = range.start.max(at)..range.end.min(at + run.len);
            out.push(part.end.saturating_sub(part.start), run.kind);
            at += run.len;
        }
        Ok(())
    }
}
