//! A disk in a file, or a block device as a disk.
//!
//! Buffered unless asked otherwise: what the page cache can serve at once goes straight between
//! it and the caller's memory (Linux, where the file system allows), all the rest through memory of
//! the engine's own by a ring or on a pool of threads, so that a dropped request leaves nothing behind that
//! touches its memory. A flush is `fdatasync`.
//!
//! `open` makes the engine, `image` does the work, `sys` is the one place with system calls;
//! `ring` makes transfers that wait for the disk where there is io_uring, by `driver`;
//! `at_once` decides about writes that may wait but seldom do, `alone` about what waits while nothing else does;
//! `flushes` merges what comes together;
//! `direct`, `extents`, `blockdev` and `lock` are what their names say.

use std::ops::Range;
use std::sync::Arc;

use crate::give_way::give_way;
use crate::threads::Pool;
use crate::{
    AlignedBuf, Engine, ErrorKind, ExtentKind, Extents, Geometry, ReadBuf, Result, WriteBuf,
    WriteFlags,
};

mod alone;
#[cfg_attr(
    not(target_os = "linux"),
    allow(dead_code, reason = "nobody can tell there whose file system it is")
)]
mod at_once;
#[cfg(target_os = "linux")]
mod blockdev;
#[cfg(target_os = "linux")]
mod direct;
#[cfg(target_os = "linux")]
mod driver;
mod extents;
#[cfg(all(test, target_os = "linux"))]
mod faults;
mod flushes;
mod image;
mod lock;
mod open;
#[cfg_attr(not(target_os = "linux"), path = "no_ring.rs")]
mod ring;
mod sys;

use flushes::Flushes;
use image::{Image, Lane};
pub use open::{Aio, OpenFile};
use ring::Ring;

/// A disk whose bytes are a file's, or a block device's.
///
/// ```no_run
/// # async fn example() -> userland_io::Result<()> {
/// use userland_io::engines::File;
///
/// let new = File::open("disk.img").size(10 << 30).await?;
/// let golden = File::open("golden.img").read_only(true).await?;
/// let device = File::open("/dev/sdb").direct(true).await?;
/// # Ok(()) }
/// ```
///
/// # Claims
///
/// [`CrashLevel::Flush`](crate::CrashLevel::Flush), and every completed mutation survives the end of the
/// process. A file that Linux keeps in memory only (tmpfs, ramfs) is gone when the machine stops, whatever was
/// flushed: there it is [`CrashLevel::None`](crate::CrashLevel::None). On Linux also: `FUA` where the file system is known to honour it, `write_zeroes`; for files
/// `extents`, and `discard` (to zeroes) where holes can be punched; for devices `discard` (to anything).
///
/// After a failed flush every mutation and flush fails until the file is opened again, because the kernel
/// forgets what it could not write. Reads go on.
///
/// # What may hold a task up
///
/// A buffered write to a local file system or device is a copy into the page cache, and is made in the task that asks for it, also
/// where the kernel cannot promise that it does not wait (ext4, block devices). Where it did, for 5 ms or more (the kernel throttles
/// who writes faster than the disk does, by up to 200 ms at a time), the next go to threads, for 16 times as long
/// as it took. All else that waits for a disk is done by an io_uring ring or by threads ([`Aio`]).
///
/// But while one operation at a time waits, over all files of the process, and for less than 1 ms on average, the task that asks
/// does that itself, too, unless it is a flush of more than 1 MiB: it costs half as much. One in 17 goes the other way, to find out whether others come meanwhile. At any
/// moment half of the processors' number of threads wait so, at most, and none where there is one processor.
///
/// # The lock
///
/// A writable disk has the file for itself, read-only ones share it, and QEMU's tools keep to the same
/// lock. It lasts until the last operation under way has ended.
#[derive(Debug)]
pub struct File {
    image: Arc<Image>,
    flushes: Flushes,
    /// For transfers that must wait; `None` if threads of the pool make them, too.
    ring: Option<Ring>,
    pool: Pool,
}

/// The longest stretch that is copied before other tasks get their turn, in bytes.
const MAX_INLINE: usize = 256 << 10;
/// The longest read that is answered by way of the stack, in bytes.
const MAX_LENT: usize = 4 << 10;

impl Engine for File {
    fn geometry(&self) -> Geometry {
        self.image.geometry
    }

    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        self.inside(offset, buf.len())?;
        let mut done = self.read_cached(buf, offset).await;
        while done < buf.len() {
            let at = offset + done as u64;
            let (lane, len) = self.image.piece(at, buf.len() - done);
            let memory = self.read_piece(lane, len, at).await?;
            buf.slice(done..done + len).copy_from(&memory[..len]);
            self.image.buffers.give(memory);
            done += len;
        }
        Ok(())
    }

    /// What the page cache has, by way of the stack: a copy more, but no future.
    fn lend(&self, range: Range<u64>, to: &mut dyn FnMut(&[u8])) {
        let mut memory = [0; MAX_LENT];
        let len = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX);
        if let Some(part) = memory.get_mut(..len)
            && self.inside_range(&range).is_ok()
            && self.image.read_cached(part, range.start) == len
        {
            to(part);
        }
    }

    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        self.writable()?;
        self.inside(offset, buf.len())?;
        let durable = flags.contains(WriteFlags::FUA);
        if durable && self.image.piece(offset, buf.len()) == (Lane::Main, buf.len()) {
            self.write_piece(buf, offset, Lane::Main, true).await?;
            return self.image.agree().await;
        }
        let mut done = self.write_cached(buf, offset).await;
        while done < buf.len() {
            let at = offset + done as u64;
            let (lane, len) = self.image.piece(at, buf.len() - done);
            self.write_piece(&buf.slice(done..done + len), at, lane, false)
                .await?;
            done += len;
        }
        match durable {
            true => self.sync().await,
            false => Ok(()),
        }
    }

    fn write_nowait(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Option<Result> {
        // What is refused is left to `write`.
        self.writable().ok()?;
        self.inside(offset, buf.len()).ok()?;
        match flags.contains(WriteFlags::FUA) {
            true => None,
            false => self.image.write_now(buf.as_slice()?, offset),
        }
    }

    async fn flush(&self) -> Result {
        if self.image.geometry.is_read_only() {
            return Ok(());
        }
        self.pool.settle().await;
        if let Some(ring) = &self.ring {
            ring.settle().await;
        }
        self.sync().await
    }

    /// Flushes whatever is claimed: that waits for dropped operations.
    async fn close(&self) -> Result {
        self.flush().await
    }

    async fn discard(&self, range: Range<u64>) -> Result {
        self.writable()?;
        self.inside_range(&range)?;
        let image = self.image.clone();
        self.pool.mutate(move || image.discard(range)).await
    }

    async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        self.writable()?;
        self.inside_range(&range)?;
        let image = self.image.clone();
        self.pool
            .mutate(move || image.write_zeroes(range, flags))
            .await?;
        match flags.contains(WriteFlags::FUA) {
            true => self.image.agree().await,
            false => Ok(()),
        }
    }

    async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        self.inside_range(&range)?;
        if self.image.known_data.covers(&range) {
            out.push(range.end - range.start, ExtentKind::Data);
            return Ok(());
        }
        let (image, room) = (self.image.clone(), out.room());
        let runs = self
            .pool
            .run(move || {
                let mut runs = Extents::new(room);
                image.extents(range, &mut runs).map(|()| runs)
            })
            .await?;
        for run in &runs {
            out.push(run.len, run.kind);
        }
        Ok(())
    }

    async fn prefetch(&self, range: Range<u64>) -> Result {
        // Length 0 would mean all of the file.
        if self.inside_range(&range).is_ok() && !range.is_empty() && !self.image.direct {
            let image = self.image.clone();
            self.pool.run(move || image.prefetch(range)).await;
        }
        Ok(())
    }
}

impl File {
    async fn read_piece(&self, lane: Lane, len: usize, offset: u64) -> Result<AlignedBuf> {
        let mut memory = self.image.buffers.take(len);
        let turn = self.image.alone.begin();
        let read = || self.image.read(lane, &mut memory[..len], offset);
        if let Some(read) = turn.attempt(read) {
            return read.map(|()| memory);
        }
        if let Some(ring) = &self.ring {
            return ring.read(&self.image, lane, memory, len, offset).await;
        }
        let image = self.image.clone();
        let read = move || {
            image
                .read(lane, &mut memory[..len], offset)
                .map(|()| memory)
        };
        self.pool.run(read).await
    }

    async fn write_piece(
        &self,
        buf: &WriteBuf<'_>,
        offset: u64,
        lane: Lane,
        durable: bool,
    ) -> Result {
        let (image, len) = (self.image.clone(), buf.len());
        let mut memory: AlignedBuf = self.image.buffers.take(len);
        buf.copy_to(&mut memory[..len]);
        let write = move |memory: &AlignedBuf| match durable {
            true => image.write_durable(lane, &memory[..len], offset),
            false => image.write(lane, &memory[..len], offset),
        };
        let is_direct = self.image.direct && lane == Lane::Main;
        let turn = self.image.alone.begin();
        // One that the page cache could not take at once waits for longer than a task may, and so may a sync that comes with it.
        let may_be_here = match durable {
            true => self.image.is_soon_synced(),
            false => is_direct,
        };
        if may_be_here && let Some(written) = turn.attempt(|| write(&memory)) {
            self.image.buffers.give(memory);
            return written;
        }
        let memory = match &self.ring {
            // A buffered one does not wait for the disk in the ring, either, but for a thread of the kernel's.
            Some(ring) if is_direct && !durable => {
                let image = &self.image;
                ring.write(image, lane, memory, len, offset).await?
            }
            _ => {
                let write = move || write(&memory).map(|()| memory);
                self.pool.mutate(write).await?
            }
        };
        self.image.buffers.give(memory);
        Ok(())
    }

    async fn sync(&self) -> Result {
        self.image.check()?;
        let turn = self.image.alone.begin();
        let here = match self.image.never_waits {
            true => Some(self.image.sync()),
            false if self.image.is_soon_synced() => turn.attempt(|| self.image.sync()),
            false => None,
        };
        if let Some(synced) = here {
            synced?;
            return self.image.agree().await;
        }
        let image = self.image.clone();
        let sync = move || image.sync().map(|()| image.syncs.mark());
        let beside = self.flushes.flush(&self.pool, sync).await?;
        self.image.agree_with(beside).await
    }

    /// Reads the part that the page cache has, from the start, into the caller's memory.
    async fn read_cached(&self, buf: &mut ReadBuf<'_>, offset: u64) -> usize {
        let Some(memory) = buf.as_mut_slice() else {
            return 0;
        };
        let mut done = 0;
        for part in memory.chunks_mut(MAX_INLINE) {
            if done > 0 {
                give_way().await;
            }
            let got = self.image.read_cached(part, offset + done as u64);
            done += got;
            if got < part.len() {
                break;
            }
        }
        done
    }

    /// Writes the part that the page cache takes, from the start, from the caller's memory.
    async fn write_cached(&self, buf: &WriteBuf<'_>, offset: u64) -> usize {
        let Some(memory) = buf.as_slice() else {
            return 0;
        };
        let mut done = 0;
        for part in memory.chunks(MAX_INLINE) {
            if done > 0 {
                give_way().await;
            }
            let put = self.image.write_cached(part, offset + done as u64);
            done += put;
            if put < part.len() {
                break;
            }
        }
        done
    }

    fn writable(&self) -> Result {
        match self.image.geometry.is_read_only() {
            true => Err(ErrorKind::ReadOnly.into()),
            false => self.image.check(),
        }
    }

    fn inside(&self, offset: u64, len: usize) -> Result {
        match offset.checked_add(len as u64) {
            Some(end) if end <= self.image.geometry.size => Ok(()),
            _ => Err(ErrorKind::OutOfRange.into()),
        }
    }

    fn inside_range(&self, range: &Range<u64>) -> Result {
        match range.start <= range.end && range.end <= self.image.geometry.size {
            true => Ok(()),
            false => Err(ErrorKind::OutOfRange.into()),
        }
    }
}
