//! The edge: whoever calls an engine goes through [`Checked`].
//!
//! A layer stores the engine below as one, and a [`Device`](crate::Device) the top of
//! the stack, so no engine, at any depth, sees a request that it did not ask for.
//! What fits goes straight through; `bounce` rounds the rest out to blocks and
//! `zeroes` writes zeroes where an engine cannot. `locks` keeps a block's
//! read-modify-write apart from other mutations of it.

mod bounce;
mod locks;
mod zeroes;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::{
    Discard, Engine, Error, ErrorKind, Extents, Features, Geometry, InvalidGeometry, ReadBuf,
    Result, WriteBuf, WriteFlags, changed_through,
};
use locks::{Guard, RangeLocks};

/// An engine behind its edge. It implements [`Engine`] and guarantees to the one inside that
///
/// * a range lies inside the size that was last read, and is never empty: else `OutOfRange`, or `Ok` at once;
/// * it starts and ends on logical blocks, or ends where the disk ends: what does not is read, modified and
///   written, apart from every other mutation of those blocks;
/// * it is at most `max_transfer`, `max_discard` or `max_write_zeroes` long: it is split, and the parts go one
///   after another;
/// * no mutation reaches a read-only disk: `ReadOnly`;
/// * `FUA` arrives only where claimed: else a flush follows;
/// * `write_zeroes` arrives only where claimed: else, or on `Unsupported`, zeroes are written, unless `FAST_ONLY`
///   (of which pieces before the refused one may have been zeroed);
/// * `discard` arrives only where claimed, in whole granules: else `Unsupported`, or trimmed;
/// * `extents` and `status` arrive only where there are any;
/// * `lend`, `write_nowait` and `lend_mut` arrive only for what a single `read` or `write` could do, and which need not wait for
///   another request;
/// * nothing arrives after `close`: `Shutdown`.
///
/// A `flush` always reaches the engine of a writable disk; where the claims leave it nothing to do, an
/// engine that has none is taken to have succeeded.
pub struct Checked<E> {
    engine: E,
    /// The geometry as it was at the start. Of it only the size may change.
    facts: Geometry,
    size: AtomicU64,
    locks: RangeLocks,
    closed: AtomicBool,
}

impl<E: Engine> Checked<E> {
    /// Puts `engine` behind an edge.
    ///
    /// # Errors
    /// If its geometry contradicts itself.
    pub fn new(engine: E) -> Result<Self, InvalidGeometry> {
        let facts = engine.geometry();
        facts.validate()?;
        Ok(Checked {
            engine,
            facts,
            size: AtomicU64::new(facts.size),
            locks: RangeLocks::default(),
            closed: AtomicBool::new(false),
        })
    }

    /// The engine inside, for what it can do beyond the contract (a resize, a counter).
    /// Requests to it would pass the edge by: make none.
    pub fn get_ref(&self) -> &E {
        &self.engine
    }

    /// The logical block size in bytes.
    fn block(&self) -> u64 {
        u64::from(self.facts.logical_block_size)
    }

    /// What no write may be split in, in bytes: the block, or what the engine writes whole or not at all.
    fn unit(&self) -> u64 {
        self.block().max(self.facts.atomic_write_unit.into())
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn open(&self) -> Result {
        match self.closed.load(Ordering::Acquire) {
            true => Err(ErrorKind::Shutdown.into()),
            false => Ok(()),
        }
    }

    fn writable(&self) -> Result {
        match self.facts.is_read_only() {
            true => Err(ErrorKind::ReadOnly.into()),
            false => Ok(()),
        }
    }

    /// The range of a request, if it lies inside the disk.
    fn range(&self, offset: u64, len: u64) -> Result<Range<u64>> {
        let inside = |size| offset.checked_add(len).filter(|&end| end <= size);
        // The disk may have grown since anyone asked.
        match inside(self.size()).or_else(|| inside(self.geometry().size)) {
            Some(end) => Ok(offset..end),
            None => Err(ErrorKind::OutOfRange.into()),
        }
    }

    /// As [`range`](Self::range), for a range that somebody else made.
    fn valid(&self, range: Range<u64>) -> Result<Range<u64>> {
        match range.end.checked_sub(range.start) {
            Some(len) => self.range(range.start, len),
            None => Err(ErrorKind::Invalid.into()),
        }
    }

    fn is_aligned(&self, range: &Range<u64>) -> bool {
        let mask = self.block() - 1;
        range.start & mask == 0 && (range.end & mask == 0 || self.is_end(range.end))
    }

    /// What a mutation of `range` that does not wait goes to the engine with: a place and flags. `None` for what is refused,
    /// empty, to be cut, to be flushed behind, or to wait.
    #[inline]
    fn enter_now(&self, range: Range<u64>, flags: WriteFlags) -> Option<(Guard<'_>, WriteFlags)> {
        self.open().and_then(|()| self.writable()).ok()?;
        let (flags, flush) = self.split_fua(flags & WriteFlags::FUA);
        let is_long = range.end - range.start > limit(self.facts.max_transfer);
        if range.is_empty() || is_long || !self.is_aligned(&range) || flush {
            return None;
        }
        let guard = match self.block() {
            1 => Guard::none(),
            _ => self.locks.enter_now(range)?,
        };
        Some((guard, flags))
    }

    /// True if the disk ends at `at`: a part of a block there is all there is of it. Asked anew, because a disk
    /// that has grown since ends elsewhere, and this is no whole block any more.
    fn is_end(&self, at: u64) -> bool {
        at == self.geometry().size
    }

    /// The blocks that `range` touches.
    fn round_out(&self, range: &Range<u64>) -> Range<u64> {
        let mask = self.block() - 1;
        // Sizes are below 2^63 and blocks at most 64 KiB, so this cannot overflow.
        let end = (range.end + mask) & !mask;
        range.start & !mask..match end == range.end {
            true => end,
            false => end.min(self.geometry().size.max(range.end)),
        }
    }

    /// The units of `unit` bytes that `range` covers whole. The one at the disk's end may be shorter.
    fn round_in(&self, range: &Range<u64>, unit: u64) -> Range<u64> {
        let start = range.start.next_multiple_of(unit);
        let end = match range.end % unit {
            0 => range.end,
            _ if self.is_end(range.end) => range.end,
            part => range.end - part,
        };
        start..end.max(start)
    }

    /// What of FUA goes to the engine, and whether a flush must follow.
    fn split_fua(&self, flags: WriteFlags) -> (WriteFlags, bool) {
        if !flags.contains(WriteFlags::FUA) || self.facts.features.contains(Features::FUA) {
            return (flags, false);
        }
        (flags - WriteFlags::FUA, self.facts.needs_flush())
    }

    /// Keeps read-modify-writes off the blocks of an aligned mutation, where there can be any.
    async fn beside_rmw(&self, range: &Range<u64>) -> Result<Guard<'_>> {
        match self.block() {
            1 => Ok(Guard::none()),
            _ => self.lock(range.clone(), false).await,
        }
    }

    async fn lock(&self, range: Range<u64>, exclusive: bool) -> Result<Guard<'_>> {
        if self.locks.is_crowded() {
            self.flush_engine().await?;
        }
        let guard = self.locks.queue(range, exclusive);
        while guard.wait().await.is_err() {
            // An operation ahead was dropped half-way. Only a flush says when it can no longer act.
            self.flush_engine().await?;
        }
        Ok(guard)
    }

    /// Flushes, and so ends what dropped operations may still be doing.
    async fn flush_engine(&self) -> Result {
        let orphans = self.locks.orphans();
        match self.engine.flush().await {
            // Not implemented, and nothing to do: then a dropped mutation does not act either.
            Err(error) if error.kind() == ErrorKind::Unsupported && !self.facts.needs_flush() => {}
            result => result?,
        }
        self.locks.settled(&orphans);
        Ok(())
    }
}

impl<E> std::fmt::Debug for Checked<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Checked").field(&self.facts).finish()
    }
}

/// The longest piece of a request under a limit, where 0 is none.
fn limit(limit: u32) -> u64 {
    match limit {
        0 => u64::MAX,
        limit => u64::from(limit),
    }
}

/// `range` in pieces of at most `max` bytes, which is at least a unit; all but the last end where a unit does.
fn pieces(range: Range<u64>, max: u64, unit: u64) -> impl Iterator<Item = Range<u64>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let most = at.saturating_add(max);
        let end = match most >= range.end {
            true => range.end,
            false => most - most % unit,
        };
        let piece = at..end;
        at = end;
        (!piece.is_empty()).then_some(piece)
    })
}

impl<E: Engine> Engine for Checked<E> {
    fn geometry(&self) -> Geometry {
        let size = self.engine.geometry().size.min(Geometry::MAX_SIZE);
        self.size.store(size, Ordering::Release);
        Geometry { size, ..self.facts }
    }

    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        self.open()?;
        let len = buf.len() as u64;
        let range = self.range(offset, len)?;
        if range.is_empty() {
            return Ok(());
        }
        let max = limit(self.facts.max_transfer);
        if !self.is_aligned(&range) {
            return Box::pin(self.read_unaligned(buf, range)).await;
        }
        if len <= max {
            return self.engine.read(buf, offset).await;
        }
        for piece in pieces(range, max, self.block()) {
            let part = (piece.start - offset) as usize..(piece.end - offset) as usize;
            self.engine.read(&mut buf.slice(part), piece.start).await?;
        }
        Ok(())
    }

    fn lend(&self, range: Range<u64>, to: &mut dyn FnMut(&[u8])) {
        let Ok(range) = self.open().and_then(|()| self.valid(range)) else {
            return;
        };
        let len = range.end - range.start;
        if len == 0 || len > limit(self.facts.max_transfer) || !self.is_aligned(&range) {
            return;
        }
        let mut lent = false;
        self.engine.lend(range, &mut |bytes| {
            // Once, and all of it: whoever asked has promised as much already.
            if !lent && bytes.len() as u64 == len {
                lent = true;
                to(bytes);
            }
        });
    }

    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        self.open()?;
        self.writable()?;
        let range = self.range(offset, buf.len() as u64)?;
        if range.is_empty() {
            return Ok(());
        }
        let (flags, flush) = self.split_fua(flags & WriteFlags::FUA);
        if self.is_aligned(&range) {
            let guard = self.beside_rmw(&range).await?;
            let result = self.write_pieces(buf, range, flags).await;
            guard.finish();
            result?;
        } else {
            Box::pin(self.modify(bounce::Source::Bytes(buf), range, flags)).await?;
        }
        match flush {
            true => self.flush_engine().await,
            false => Ok(()),
        }
    }

    fn write_nowait(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Option<Result> {
        let range = self.range(offset, buf.len() as u64).ok()?;
        let (guard, flags) = self.enter_now(range, flags)?;
        let written = self.engine.write_nowait(buf, offset, flags);
        guard.finish();
        written
    }

    fn lend_mut(
        &self,
        range: Range<u64>,
        flags: WriteFlags,
        from: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Result> {
        let range = self.valid(range).ok()?;
        let (guard, flags) = self.enter_now(range.clone(), flags)?;
        let len = range.end - range.start;
        let mut lent = 0;
        let written = self.engine.lend_mut(range, flags, &mut |memory| {
            // No more than all of it: whoever asked has promised as much already.
            let left = len.saturating_sub(lent).min(memory.len() as u64) as usize;
            lent = lent.saturating_add(memory.len() as u64);
            from(&mut memory[..left]);
        });
        guard.finish();
        let due = match &written {
            Some(Err(_)) => return written,
            Some(Ok(())) => len,
            None => 0,
        };
        if lent == due {
            return written;
        }
        // What was taken from the sender cannot be written in another way.
        let text = format!("the engine lent {lent} bytes to be written to, where it owed {due}");
        Some(Err(Error::new(ErrorKind::Io, text)))
    }

    async fn flush(&self) -> Result {
        self.open()?;
        match self.facts.is_read_only() {
            true => Ok(()),
            false => self.flush_engine().await,
        }
    }

    async fn discard(&self, range: Range<u64>) -> Result {
        self.open()?;
        self.writable()?;
        if self.facts.discard == Discard::None {
            return Err(ErrorKind::Unsupported.into());
        }
        let range = self.valid(range)?;
        let range = self.round_in(&range, self.facts.discard_granule().into());
        if range.is_empty() {
            return Ok(());
        }
        let guard = self.beside_rmw(&range).await?;
        let mut result = Ok(());
        let granule = self.facts.discard_granule().into();
        for piece in pieces(range, limit(self.facts.max_discard), granule) {
            result = self.engine.discard(piece).await;
            if result.is_err() {
                break;
            }
        }
        guard.finish();
        result
    }

    async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        self.open()?;
        self.writable()?;
        let range = self.valid(range)?;
        if range.is_empty() {
            return Ok(());
        }
        let (flags, flush) = self.split_fua(flags);
        Box::pin(self.zero(range, flags)).await?;
        match flush {
            true => self.flush_engine().await,
            false => Ok(()),
        }
    }

    async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        self.open()?;
        let range = self.valid(range)?;
        if !self.facts.features.contains(Features::EXTENTS) {
            out.push(range.end - range.start, crate::ExtentKind::Data);
            return Ok(());
        }
        if range.is_empty() {
            return Ok(());
        }
        let asked = self.round_out(&range);
        let mut found = Extents::new(out.room().saturating_add(2));
        self.engine.extents(asked.clone(), &mut found).await?;
        bounce::trim(&found, &asked, &range, out);
        Ok(())
    }

    fn contexts(&self) -> Vec<String> {
        self.engine.contexts()
    }

    async fn status(&self, context: &str, range: Range<u64>, out: &mut Extents<u64>) -> Result {
        self.open()?;
        let range = self.valid(range)?;
        if range.is_empty() {
            return Ok(());
        }
        let asked = self.round_out(&range);
        let mut found = Extents::new(out.room().saturating_add(2));
        self.engine
            .status(context, asked.clone(), &mut found)
            .await?;
        bounce::trim(&found, &asked, &range, out);
        Ok(())
    }

    async fn prefetch(&self, range: Range<u64>) -> Result {
        self.open()?;
        let range = self.valid(range)?;
        if range.is_empty() {
            return Ok(());
        }
        self.engine.prefetch(self.round_out(&range)).await
    }

    async fn changed(&self, seen: Geometry) -> Geometry {
        changed_through(self, &self.engine, seen).await
    }

    async fn close(&self) -> Result {
        match self.closed.swap(true, Ordering::AcqRel) {
            true => Ok(()),
            false => self.engine.close().await,
        }
    }
}

impl<E: Engine> Checked<E> {
    /// Writes aligned bytes in pieces that the engine takes.
    async fn write_pieces(
        &self,
        buf: &WriteBuf<'_>,
        range: Range<u64>,
        flags: WriteFlags,
    ) -> Result {
        let (offset, max) = (range.start, limit(self.facts.max_transfer));
        if range.end - offset <= max {
            return self.engine.write(buf, offset, flags).await;
        }
        for piece in pieces(range, max, self.unit()) {
            let part = (piece.start - offset) as usize..(piece.end - offset) as usize;
            self.engine
                .write(&buf.slice(part), piece.start, flags)
                .await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
