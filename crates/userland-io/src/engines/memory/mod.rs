//! A disk in memory: sparse, so that a large one costs what is written to it.
//!
//! Bytes live in chunks of 256 KiB that a radix table finds ([`table`]), each
//! behind its own lock ([`chunk`]), so requests to different chunks never meet. Their memory
//! ([`pages`]) comes from the kernel in huge pages where the disk is dense ([`mapping`]).
//! A discard clears pages of 4 KiB and gives a chunk back once it is empty.
//! Nothing survives a crash, and there is nothing to flush.

mod chunk;
#[cfg(target_os = "linux")]
mod mapping;
mod pages;
mod table;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;

use crate::give_way::give_way;
use crate::{
    CrashLevel, Discard, Engine, Error, ErrorKind, ExtentKind, Extents, Features, Geometry,
    ReadBuf, Result, WriteBuf, WriteFlags,
};
use chunk::{CHUNK, PAGE};
use table::Table;

/// How many chunks one call of `extents` looks at: 1 GiB of them.
const EXTENTS_CHUNKS: u32 = 4096;

/// The bytes that are copied, or freed, before other tasks get their turn.
const TURN: usize = 1 << 20;

/// A sparse disk in memory.
///
/// Claims [`CrashLevel::None`], discards to zeroes in granules of 4 KiB, native
/// `write_zeroes` and `extents`, and whole-block reads beside writes.
///
/// On Linux, memory behind what is written half full is taken 2 MiB at a time, in huge pages if the system has them: no more than
/// three times of what was written.
#[derive(Debug)]
pub struct Memory {
    table: Table,
    size: AtomicU64,
    /// One at a time: what one cuts off must be cleared before another brings it back, by a write that it cut short, too.
    resizing: Mutex<()>,
    resized: Notify,
}

impl Memory {
    /// A disk of `size` bytes that reads as zeroes. Takes almost no memory until it is written to.
    pub fn new(size: u64) -> Self {
        Memory {
            table: Table::default(),
            size: AtomicU64::new(size),
            resizing: Mutex::new(()),
            resized: Notify::new(),
        }
    }

    /// Makes the disk `size` bytes long. What lay beyond a smaller end is gone, and
    /// reads as zeroes when the disk grows again.
    pub fn resize(&self, size: u64) {
        let resizing = self.resizing.lock();
        let resizing = resizing.unwrap_or_else(PoisonError::into_inner);
        let old = self.size.swap(size, Ordering::AcqRel);
        // See `write_turn`: this finds the chunk that a write is making, or the write this size.
        fence(Ordering::SeqCst);
        if size < old {
            self.clear(size..old);
        }
        drop(resizing);
        self.resized.notify_waiters();
    }

    /// The bytes of memory that hold data, in whole chunks.
    pub fn allocated(&self) -> u64 {
        self.table.allocated() * CHUNK as u64
    }

    /// Refuses what does not lie inside the disk, which may have shrunk since the caller looked.
    fn check(&self, offset: u64, len: u64) -> Result {
        match offset.checked_add(len) {
            Some(end) if end <= self.size.load(Ordering::Acquire) => Ok(()),
            _ => Err(ErrorKind::OutOfRange.into()),
        }
    }

    /// Makes `range` read as zeroes, and gives back the chunks that are empty then.
    fn clear(&self, mut range: Range<u64>) {
        while !range.is_empty() {
            self.clear_first(&mut range);
        }
    }

    /// As [`clear`](Self::clear), in turns.
    async fn clear_in_turns(&self, mut range: Range<u64>) {
        let mut worked = 0;
        while !range.is_empty() {
            if worked >= TURN {
                give_way().await;
                worked = 0;
            }
            worked += self.clear_first(&mut range);
        }
    }

    /// Clears what of `range` lies in its first chunk, or all up to the next chunk there may be, and takes it off.
    /// Answers how much work that was, in bytes.
    fn clear_first(&self, range: &mut Range<u64>) -> usize {
        let at = range.start;
        match self.table.find(at / CHUNK as u64) {
            Ok(slot) => {
                let mut part = within(at, range.end - at);
                range.start += part.len() as u64;
                let mut chunk = slot.write();
                let work = chunk.bytes().map_or(PAGE, |_| part.len());
                // The last page may be shorter than a page. Asked under the lock: had somebody written behind the
                // end that was, this would see the size that let them.
                if self.size.load(Ordering::Acquire) <= range.end {
                    part.end = part.end.next_multiple_of(PAGE);
                }
                if chunk.clear(part) {
                    self.table.freed();
                }
                work
            }
            // A stretch without any chunk: nothing to clear.
            Err(next) => {
                range.start = next.saturating_mul(CHUNK as u64).min(range.end);
                PAGE
            }
        }
    }

    /// Reads `buf` at once.
    fn read_turn(&self, buf: &mut ReadBuf<'_>, offset: u64) {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let part = within(at, (buf.len() - done) as u64);
            let mut piece = buf.slice(done..done + part.len());
            done += part.len();
            match self.table.find(at / CHUNK as u64) {
                Ok(chunk) => match chunk.read().bytes() {
                    Some(bytes) => piece.copy_from(&bytes[part]),
                    None => piece.fill(0),
                },
                Err(_) => piece.fill(0),
            }
        }
    }

    /// Writes `buf` at once, and leaves none of it beyond the end.
    fn write_turn(&self, buf: &WriteBuf<'_>, offset: u64) -> Result {
        let mut done = 0;
        self.put_turn(offset, buf.len() as u64, |memory| {
            let piece = done..done + memory.len();
            done = piece.end;
            buf.slice(piece).copy_to(memory);
        })
    }

    /// Has `put` write the next `len` bytes from `offset` on at once, part by part, and leaves none of them beyond the end.
    #[inline]
    fn put_turn(&self, offset: u64, len: u64, mut put: impl FnMut(&mut [u8])) -> Result {
        self.check(offset, len)?;
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let part = within(at, end - at);
            let mut chunk = self.table.find_or_make(at / CHUNK as u64).write();
            if chunk.bytes().is_none() {
                self.table.made();
                // A resize that does not find this chunk yet comes before this, and the look at the size below sees
                // it. One that does find it is kept apart by the chunk's lock.
                fence(Ordering::SeqCst);
            }
            at += part.len() as u64;
            put(chunk.touch(part));
        }
        // A resize may have cut the disk short under this write.
        match self.size.load(Ordering::Acquire) < end {
            true => Err(self.cut_short(offset..end)),
            false => Ok(()),
        }
    }

    /// Ends a write to `range` during which the disk was shorter: what it left beyond the end must not come back.
    #[cold]
    fn cut_short(&self, range: Range<u64>) -> Error {
        // Held, so that the disk does not grow meanwhile: what others write there then is theirs.
        let resizing = self.resizing.lock();
        let _resizing = resizing.unwrap_or_else(PoisonError::into_inner);
        let size = self.size.load(Ordering::Acquire);
        self.clear(size.max(range.start)..range.end);
        ErrorKind::OutOfRange.into()
    }
}

/// `len` bytes in turns.
fn turns(len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len)
        .step_by(TURN)
        .map(move |at| at..len.min(at.saturating_add(TURN)))
}

/// The part of the chunk that holds `at` which the next `len` bytes cover.
fn within(at: u64, len: u64) -> Range<usize> {
    let start = (at % CHUNK as u64) as usize;
    start..start + len.min((CHUNK - start) as u64) as usize
}

impl Engine for Memory {
    fn geometry(&self) -> Geometry {
        let mut geometry = Geometry::writable(self.size.load(Ordering::Acquire), CrashLevel::None);
        geometry.discard = Discard::Zeroes;
        geometry.discard_granularity = PAGE as u32;
        geometry.features =
            Features::FUA | Features::WRITE_ZEROES | Features::EXTENTS | Features::ATOMIC_READS;
        geometry
    }

    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        self.check(offset, buf.len() as u64)?;
        for turn in turns(buf.len()) {
            if turn.start > 0 {
                give_way().await;
            }
            let at = offset + turn.start as u64;
            self.read_turn(&mut buf.slice(turn), at);
        }
        Ok(())
    }

    fn lend(&self, range: Range<u64>, to: &mut dyn FnMut(&[u8])) {
        let len = range.end - range.start;
        let part = within(range.start, len);
        if part.len() as u64 == len
            && self.check(range.start, len).is_ok()
            && let Ok(chunk) = self.table.find(range.start / CHUNK as u64)
            && let Some(bytes) = chunk.read().bytes()
        {
            to(&bytes[part]);
        }
    }

    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, _: WriteFlags) -> Result {
        self.check(offset, buf.len() as u64)?;
        for turn in turns(buf.len()) {
            if turn.start > 0 {
                give_way().await;
            }
            let at = offset + turn.start as u64;
            self.write_turn(&buf.slice(turn), at)?;
        }
        Ok(())
    }

    fn write_nowait(&self, buf: &WriteBuf<'_>, offset: u64, _: WriteFlags) -> Option<Result> {
        (buf.len() <= TURN).then(|| self.write_turn(buf, offset))
    }

    fn lend_mut(
        &self,
        range: Range<u64>,
        _: WriteFlags,
        from: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Result> {
        let len = range.end - range.start;
        (len <= TURN as u64).then(|| self.put_turn(range.start, len, from))
    }

    async fn flush(&self) -> Result {
        Ok(())
    }

    async fn discard(&self, range: Range<u64>) -> Result {
        self.check(range.start, range.end - range.start)?;
        self.clear_in_turns(range).await;
        Ok(())
    }

    async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        if !flags.contains(WriteFlags::NO_UNMAP) {
            return self.discard(range).await;
        }
        // Space can only be kept by writing to it, which the edge does, unless that is too slow.
        Err(ErrorKind::Unsupported.into())
    }

    async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        self.check(range.start, range.end - range.start)?;
        let mut at = range.start;
        for _ in 0..EXTENTS_CHUNKS {
            if at == range.end || out.is_full() {
                break;
            }
            let len = match self.table.find(at / CHUNK as u64) {
                Ok(chunk) => {
                    let part = within(at, range.end - at);
                    let len = part.len();
                    chunk.read().extents(part, out);
                    len as u64
                }
                Err(next) => {
                    let end = next.saturating_mul(CHUNK as u64).min(range.end);
                    out.push(end - at, ExtentKind::Hole);
                    end - at
                }
            };
            at += len;
        }
        Ok(())
    }

    async fn changed(&self, seen: Geometry) -> Geometry {
        loop {
            let resized = self.resized.notified();
            tokio::pin!(resized);
            // Registered before the look, so that a resize between the two is not missed.
            resized.as_mut().enable();
            let geometry = self.geometry();
            if geometry != seen {
                return geometry;
            }
            resized.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::{Future, poll_fn};
    use std::task::Poll;

    use super::*;
    use crate::{Checked, Device};

    const C: u64 = CHUNK as u64;

    async fn runs(engine: &impl Engine, range: Range<u64>) -> Vec<(u64, ExtentKind)> {
        let mut out = Extents::new(16);
        engine.extents(range, &mut out).await.unwrap();
        out.iter().map(|e| (e.len, e.kind)).collect()
    }

    #[tokio::test]
    async fn a_request_across_chunks_comes_back_whole() {
        let disk = Memory::new(1 << 40);
        let bytes: Vec<u8> = (0..3 * CHUNK).map(|i| (i / 7) as u8).collect();
        let at = (1 << 39) + C - 100;
        disk.write(&WriteBuf::new(&bytes), at, WriteFlags::empty())
            .await
            .unwrap();
        let mut back = vec![9; bytes.len() + 200];
        disk.read(&mut ReadBuf::new(&mut back), at - 100)
            .await
            .unwrap();
        assert!(back[100..back.len() - 100] == bytes[..]);
        assert_eq!((back[99], back[back.len() - 100]), (0, 0));
        assert_eq!(disk.allocated(), 4 * C);
    }

    #[tokio::test]
    async fn what_lies_in_one_chunk_is_lent_and_holes_are_not() {
        let disk = Memory::new(4 * C);
        let bytes: Vec<u8> = (0..2 * CHUNK).map(|i| (i / 7) as u8).collect();
        disk.write(&WriteBuf::new(&bytes), 0, WriteFlags::empty())
            .await
            .unwrap();
        let lent = |range| {
            let mut lent = None;
            disk.lend(range, &mut |bytes| lent = Some(bytes.to_vec()));
            lent
        };
        assert_eq!(lent(C - 100..C).unwrap(), bytes[CHUNK - 100..CHUNK]);
        assert_eq!(lent(C - 100..C + 1), None, "of two chunks");
        assert_eq!(lent(3 * C..3 * C + 1), None, "never written");
        disk.resize(C);
        assert_eq!(lent(C..C + 1), None, "beyond the end");
    }

    #[tokio::test]
    async fn what_is_short_is_written_without_waiting() {
        let disk = Memory::new(16 * C);
        let bytes: Vec<u8> = (0..8 * CHUNK).map(|i| (i / 7) as u8).collect();
        let now =
            |len, at| disk.write_nowait(&WriteBuf::new(&bytes[..len]), at, WriteFlags::empty());
        now(TURN, C - 100).unwrap().unwrap();
        let mut back = vec![9; TURN];
        disk.read(&mut ReadBuf::new(&mut back), C - 100)
            .await
            .unwrap();
        assert!(back[..] == bytes[..TURN]);
        assert!(now(TURN + 1, 0).is_none(), "others' turn would come late");
        disk.resize(C);
        let refused = now(1, C).unwrap().unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::OutOfRange);
    }

    #[tokio::test]
    async fn memory_to_be_written_to_comes_with_what_is_there() {
        let disk = Memory::new(16 * C);
        let none = WriteFlags::empty();
        disk.write(&WriteBuf::new(&[1; 200]), C - 100, none)
            .await
            .unwrap();
        let mut was = Vec::new();
        let lent = disk.lend_mut(C - 200..C + 200, none, &mut |memory| {
            was.push(memory.to_vec());
            memory[..100].fill(7);
        });
        lent.unwrap().unwrap();
        let (old, hole) = ([1; 100], [0; 100]);
        assert_eq!(was, [[hole, old].concat(), [old, hole].concat()]);
        let mut back = [9; 400];
        disk.read(&mut ReadBuf::new(&mut back), C - 200)
            .await
            .unwrap();
        let new = [7; 100];
        assert_eq!(back[..], [new, old, new, hole].concat());
        let refuse = |range| disk.lend_mut(range, none, &mut |_| panic!("lent"));
        assert!(
            refuse(0..TURN as u64 + 1).is_none(),
            "others' turn would come late"
        );
        let outside = refuse(16 * C..16 * C + 1).unwrap().unwrap_err();
        assert_eq!(outside.kind(), ErrorKind::OutOfRange);
    }

    #[tokio::test]
    async fn a_discard_gives_memory_back_and_extents_show_it() {
        let disk = Memory::new(4 * C);
        disk.write(&WriteBuf::new(&vec![1; 2 * CHUNK]), C, WriteFlags::empty())
            .await
            .unwrap();
        assert_eq!(disk.allocated(), 2 * C);
        disk.discard(C..2 * C).await.unwrap();
        assert_eq!(disk.allocated(), C);
        assert_eq!(
            runs(&disk, 0..4 * C).await,
            [
                (2 * C, ExtentKind::Hole),
                (C, ExtentKind::Data),
                (C, ExtentKind::Hole)
            ]
        );
        assert_eq!(runs(&disk, 3 * C - 10..3 * C + 10).await.len(), 2);
    }

    #[tokio::test]
    async fn the_largest_disk_is_one_hole() {
        let disk = Memory::new(Geometry::MAX_SIZE);
        let whole = runs(&disk, 0..Geometry::MAX_SIZE).await;
        assert_eq!(whole, [(Geometry::MAX_SIZE, ExtentKind::Hole)]);
        disk.discard(0..Geometry::MAX_SIZE).await.unwrap();
    }

    #[tokio::test]
    async fn a_shrunk_disk_answers_out_of_range_and_forgets_its_end() {
        let disk = Memory::new(2 * C);
        disk.write(&WriteBuf::new(&[7; 16]), 2 * C - 16, WriteFlags::empty())
            .await
            .unwrap();
        let seen = disk.geometry();
        disk.resize(C);
        assert_eq!(disk.changed(seen).await.size, C);
        let mut buf = [0; 16];
        let error = disk
            .read(&mut ReadBuf::new(&mut buf), 2 * C - 16)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange);
        disk.resize(2 * C);
        buf.fill(1);
        disk.read(&mut ReadBuf::new(&mut buf), 2 * C - 16)
            .await
            .unwrap();
        assert_eq!(buf, [0; 16]);
    }

    #[tokio::test]
    async fn zeroes_that_keep_their_space_stay_allocated() {
        let disk = Checked::new(Memory::new(C)).unwrap();
        disk.write_zeroes(0..C, WriteFlags::NO_UNMAP).await.unwrap();
        assert_eq!(runs(&disk, 0..C).await, [(C, ExtentKind::Data)]);
        let fast = WriteFlags::NO_UNMAP | WriteFlags::FAST_ONLY;
        let refused = disk.write_zeroes(0..C, fast).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported);
    }

    #[tokio::test]
    async fn a_disk_that_ends_inside_a_page_gives_all_its_memory_back() {
        let disk = Checked::new(Memory::new(C + 100)).unwrap();
        let all = 0..C + 100;
        disk.write(
            &WriteBuf::new(&vec![1; CHUNK + 100]),
            0,
            WriteFlags::empty(),
        )
        .await
        .unwrap();
        // A page that goes on behind the range stays.
        disk.get_ref().discard(0..C + 50).await.unwrap();
        assert_eq!(disk.get_ref().allocated(), C);
        disk.discard(all.clone()).await.unwrap();
        assert_eq!(disk.get_ref().allocated(), 0);
        assert_eq!(runs(&disk, all).await, [(C + 100, ExtentKind::Hole)]);
    }

    /// How often a request lets others have their turn.
    async fn turns_given(request: impl Future<Output = Result>) -> usize {
        let mut request = std::pin::pin!(request);
        let mut given = 0;
        poll_fn(|cx| {
            let polled = request.as_mut().poll(cx);
            given += usize::from(polled.is_pending());
            polled
        })
        .await
        .unwrap();
        given
    }

    #[tokio::test]
    async fn long_requests_let_others_have_their_turn() {
        let disk = Memory::new(64 * C);
        let flags = WriteFlags::empty();
        let mut bytes: Vec<u8> = (0..16 * CHUNK).map(|at| (at >> 8) as u8).collect();
        let long = WriteBuf::new(&bytes);
        assert_eq!(turns_given(disk.write(&long, 100, flags)).await, 3);
        let short = long.slice(0..1 << 20);
        assert_eq!(turns_given(disk.write(&short, 40 * C, flags)).await, 0);
        let mut back = vec![0; bytes.len()];
        let mut back_buf = ReadBuf::new(&mut back);
        assert_eq!(turns_given(disk.read(&mut back_buf, 100)).await, 3);
        assert!(back == bytes);
        let mut short = ReadBuf::new(&mut bytes[..1 << 20]);
        assert_eq!(turns_given(disk.read(&mut short, 100)).await, 0);
        assert_eq!(turns_given(disk.discard(0..64 * C)).await, 5);
        assert_eq!(disk.allocated(), 0);
        // Where there is nothing to clear, even much of it is soon done.
        assert_eq!(turns_given(disk.discard(0..64 * C)).await, 0);
    }

    #[tokio::test]
    async fn nothing_of_a_write_that_a_resize_cut_short_comes_back() {
        let disk = Memory::new(16 * C);
        let bytes = vec![7; 16 * CHUNK];
        let buf = WriteBuf::new(&bytes);
        {
            let mut write = std::pin::pin!(disk.write(&buf, 0, WriteFlags::empty()));
            let first = poll_fn(|cx| Poll::Ready(write.as_mut().poll(cx))).await;
            assert!(first.is_pending());
            disk.resize(C);
            let refused = write.await.unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::OutOfRange);
        }
        disk.resize(16 * C);
        let mut back = vec![1; 15 * CHUNK];
        disk.read(&mut ReadBuf::new(&mut back), C).await.unwrap();
        assert!(back.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn a_write_that_was_cut_short_leaves_alone_what_others_wrote_since() {
        let disk = Memory::new(2 * C);
        // As if it were held up where it has found the disk shorter, while that grows again.
        disk.resize(C);
        disk.resize(2 * C);
        let written = disk.write_nowait(&WriteBuf::new(&[7; 512]), C, WriteFlags::empty());
        written.unwrap().unwrap();
        let refused = disk.cut_short(C..C + 512);
        assert_eq!(refused.kind(), ErrorKind::OutOfRange);
        let mut kept = false;
        disk.lend(C..C + 512, &mut |bytes| kept = bytes == [7; 512]);
        assert!(kept);
    }

    #[tokio::test]
    async fn opens_as_a_device() {
        let device = Device::open(Memory::new(C)).await.unwrap();
        device.flush().await.unwrap();
        device.close().await.unwrap();
    }
}
