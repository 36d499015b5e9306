//! A disk that can crash: the engine at the bottom of a simulated stack.

use std::fmt;
use std::future::poll_fn;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use userland_io::{
    CrashLevel, Discard, Engine, Error, ErrorKind, ExtentKind, Extents, Features, Geometry,
    ReadBuf, Result, WriteBuf, WriteFlags,
};

use super::store::{Bytes, Piece, Store};
use super::{Keep, Tail, World};

/// What a [`SimDisk`] is like.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// Its geometry: size, limits and claims, all of which it keeps, and no more than that.
    pub geometry: Geometry,
    /// Bytes that can be allocated before writes answer `NoSpace`.
    pub capacity: Option<u64>,
    /// How long each request takes at most, in simulated time. Zero: requests overlap, but no time passes.
    pub delay: Duration,
    /// What comes after a flush that failed.
    pub after_failed_flush: AfterFailedFlush,
    /// It begins with noise instead of zeroes.
    pub dirty: bool,
    /// Answers `FAST_ONLY` zeroes with `Unsupported`.
    pub slow_zeroes: bool,
}

/// What a disk does after a flush that failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AfterFailedFlush {
    /// It still holds what was not durable: the next flush tries again.
    #[default]
    Retry,
    /// Mutations and flushes fail until it is reopened.
    Latch,
    /// It breaks the contract as a page cache does: what was not durable never will be, and the next flush succeeds.
    Forget,
}

impl DiskConfig {
    /// A disk of `size` bytes in blocks of `block` that does all there is to do and claims only what a plain
    /// disk can: [`CrashLevel::Flush`], FUA, zeroes, extents, [`Discard::Zeroes`], and that it survives a kill.
    pub fn new(size: u64, block: u32) -> Self {
        let mut geometry = Geometry::writable(size, CrashLevel::Flush);
        geometry.logical_block_size = block;
        geometry.discard = Discard::Zeroes;
        geometry.features |=
            Features::FUA | Features::WRITE_ZEROES | Features::EXTENTS | Features::SURVIVES_KILL;
        DiskConfig {
            geometry,
            capacity: None,
            delay: Duration::ZERO,
            after_failed_flush: AfterFailedFlush::default(),
            dirty: false,
            slow_zeroes: false,
        }
    }
}

/// A simulated disk. A handle: clones are the same disk.
///
/// What it holds is exactly what its geometry claims: between the start and the end of a mutation each block
/// changes at some moment of its own, reads beside it may tear, and what no flush covers a
/// [`crash`](Self::crash) may lose. A future that is dropped half-way may act until the next flush.
///
/// It also watches its caller. A request that the contract forbids (outside the disk, unaligned, empty, too
/// long, not claimed, after close) is answered `Invalid` and noted in [`World::take_breaches`].
#[derive(Clone)]
pub struct SimDisk(Arc<Inner>);

struct Inner {
    world: World,
    config: DiskConfig,
    state: Mutex<State>,
}

struct State {
    geometry: Geometry,
    store: Store,
    calls: u64,
    flushes: u64,
    faults: Vec<(Call, ErrorKind)>,
    latched: bool,
    closed: bool,
    /// The largest size it had: a caller may not have seen yet that it shrank.
    largest: u64,
    watchers: Vec<Waker>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Call {
    Any(u64),
    Flush(u64),
}

impl SimDisk {
    /// A new disk.
    ///
    /// # Panics
    /// If the geometry contradicts itself.
    pub fn new(world: &World, config: DiskConfig) -> Self {
        let geometry = config.geometry;
        if let Err(error) = geometry.validate() {
            panic!("the simulated disk's {error}");
        }
        let mut store = Store::new(geometry.size, geometry.logical_block_size, geometry.crash);
        if config.dirty {
            store.scribble(world);
        }
        Self::with(world, config, geometry, store)
    }

    fn with(world: &World, config: DiskConfig, geometry: Geometry, store: Store) -> Self {
        SimDisk(Arc::new(Inner {
            world: world.clone(),
            config,
            state: Mutex::new(State {
                geometry,
                store,
                calls: 0,
                flushes: 0,
                faults: Vec::new(),
                latched: false,
                closed: false,
                largest: geometry.size,
                watchers: Vec::new(),
            }),
        }))
    }

    /// The disk after the machine stopped, with what `keep` says of what was not durable. The old handle stays
    /// as it is, so one moment can crash in many ways.
    pub fn crash(&self, keep: Keep) -> SimDisk {
        let state = self.state();
        let store = state.store.crash(keep, &self.0.world);
        Self::with(&self.0.world, self.0.config.clone(), state.geometry, store)
    }

    /// The disk after the process that used it died, and nothing else did.
    pub fn kill(&self) -> SimDisk {
        let state = self.state();
        let store = match state.geometry.features.contains(Features::SURVIVES_KILL) {
            true => state.store.kill(&self.0.world),
            false => state.store.crash(Keep::Subset, &self.0.world),
        };
        Self::with(&self.0.world, self.0.config.clone(), state.geometry, store)
    }

    /// The disk, to be opened again after it was closed: all is there, unless it is a memory.
    pub fn reopen(&self) -> SimDisk {
        let state = self.state();
        let store = match state.geometry.crash {
            CrashLevel::None => state.store.crash(Keep::Nothing, &self.0.world),
            _ => state.store.kill(&self.0.world),
        };
        Self::with(&self.0.world, self.0.config.clone(), state.geometry, store)
    }

    /// How many images a crash now could leave: the product over all blocks of their versions.
    pub fn images(&self) -> u64 {
        let tails = self.tails();
        if self.state().geometry.crash == CrashLevel::Prefix {
            return self.state().store.now() + 1;
        }
        let counts = tails.iter().map(|tail| tail.versions as u64);
        counts.fold(1, u64::saturating_mul)
    }

    /// The blocks of which a crash now could choose among several versions.
    pub fn tails(&self) -> Vec<Tail> {
        self.state().store.tails()
    }

    /// Makes the call number `call`, counted from 0 since this disk was opened, fail with `kind`. A mutation
    /// that fails may have had any part of its effect.
    pub fn fail(&self, call: u64, kind: ErrorKind) {
        self.state().faults.push((Call::Any(call), kind));
    }

    /// As [`fail`](Self::fail), but counts flushes only.
    pub fn fail_flush(&self, flush: u64, kind: ErrorKind) {
        self.state().faults.push((Call::Flush(flush), kind));
    }

    /// How many flushes it got since it was opened.
    pub fn flushes(&self) -> u64 {
        self.state().flushes
    }

    /// Takes back the failures that have not come yet.
    pub fn clear_faults(&self) {
        self.state().faults.clear();
    }

    /// True while an earlier failure makes it fail (see [`AfterFailedFlush::Latch`]).
    pub fn has_failed(&self) -> bool {
        self.state().latched
    }

    /// How many calls it got since it was opened.
    pub fn calls(&self) -> u64 {
        self.state().calls
    }

    /// Changes its size.
    pub fn resize(&self, size: u64) {
        let mut state = self.state();
        state.geometry.size = size;
        state.largest = state.largest.max(size);
        state.store.resize(size);
        let waiting = std::mem::take(&mut state.watchers);
        drop(state);
        waiting.into_iter().for_each(Waker::wake);
    }

    /// The world it is in.
    pub fn world(&self) -> &World {
        &self.0.world
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call, and decides whether it fails.
    fn enter(&self) -> Option<ErrorKind> {
        let mut state = self.state();
        let call = Call::Any(state.calls);
        state.calls += 1;
        let fault = state.faults.iter().find(|fault| fault.0 == call);
        fault.map(|fault| fault.1)
    }

    fn enter_flush(&self) -> Option<ErrorKind> {
        let fault = self.enter();
        let mut state = self.state();
        let call = Call::Flush(state.flushes);
        state.flushes += 1;
        let of_flush = state.faults.iter().find(|fault| fault.0 == call);
        fault.or(of_flush.map(|fault| fault.1))
    }

    /// True if a request need not wait: now and then there is something to wait for.
    fn has_time(&self) -> bool {
        let world = &self.0.world;
        !world.one_in(3) && world.try_event()
    }

    /// Writes at once.
    fn write_now(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        let world = &self.0.world;
        let pieces = self.written(buf, offset, flags)?;
        let fault = self.enter();
        let call = self.submit(|_| pieces, true)?;
        let some = fault.map_or(usize::MAX, |_| world.draw(4) as usize);
        let durable = fault.is_none() && flags.contains(WriteFlags::FUA);
        let mut state = self.state();
        state.store.land(call, some, world);
        state.store.finish(call, fault.is_none(), durable);
        fault.map_or(Ok(()), |kind| Err(Error::new(kind, "injected")))
    }

    async fn delay(&self) {
        let most = self.0.config.delay.as_nanos() as u64;
        if most > 0 {
            let time = Duration::from_nanos(self.0.world.draw(most));
            self.0.world.sleep(time).await;
        }
        self.0.world.pause().await;
    }

    /// Refuses, and notes, what no caller may ask.
    fn check(&self, what: &str, range: &Range<u64>, most: u32, unit: u32, claimed: bool) -> Result {
        let state = self.state();
        let geometry = &state.geometry;
        let aligned = |at: u64| at.is_multiple_of(u64::from(unit));
        let fault = if state.closed {
            "after close"
        } else if !claimed {
            "which it does not claim to do"
        } else if range.start >= range.end {
            "an empty range"
        } else if range.end > geometry.size {
            if range.end <= state.largest {
                return Err(ErrorKind::OutOfRange.into());
            }
            "outside the disk"
        } else if !aligned(range.start) || !(aligned(range.end) || range.end == geometry.size) {
            "off the block grid"
        } else if most != 0 && range.end - range.start > u64::from(most) {
            "longer than the limit"
        } else {
            return Ok(());
        };
        let size = geometry.size;
        drop(state);
        let text = format!("{what} {range:?}: {fault} (size {size}, unit {unit}, limit {most})");
        self.0
            .world
            .breach(format!("the simulated disk was asked to {text}"));
        Err(Error::new(ErrorKind::Invalid, text))
    }

    fn writable(&self) -> bool {
        !self.state().geometry.is_read_only()
    }

    /// Copies what lies in one unit.
    fn copy(&self, offset: u64, to: &mut [u8], tears: bool) -> Result {
        let world = &self.0.world;
        let mut state = self.state();
        state.store.stir(world);
        if offset + to.len() as u64 > state.geometry.size {
            return Err(ErrorKind::OutOfRange.into());
        }
        state.store.read(offset, to, tears.then_some(world));
        Ok(())
    }

    /// The end of a flush that began at `since`.
    fn settle(&self, since: u64, fault: Option<ErrorKind>) -> Result {
        let mut state = self.state();
        state.store.settle(&self.0.world);
        let Some(kind) = fault else {
            state.store.flush(since);
            return Ok(());
        };
        match self.0.config.after_failed_flush {
            AfterFailedFlush::Retry => {}
            AfterFailedFlush::Latch => state.latched = true,
            AfterFailedFlush::Forget => state.store.lose(since),
        }
        Err(Error::new(kind, "injected"))
    }

    /// Refuses, and notes, a write that no caller may ask for; else tells what it consists of.
    fn written(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result<Vec<Piece>> {
        let geometry = self.geometry();
        let range = offset..offset.saturating_add(buf.len() as u64);
        let claimed = self.writable()
            && (flags - WriteFlags::FUA).is_empty()
            && (!flags.contains(WriteFlags::FUA) || geometry.features.contains(Features::FUA));
        let block = geometry.logical_block_size;
        self.check("write", &range, geometry.max_transfer, block, claimed)?;
        Ok(self.state().store.pieces(range, |part| {
            let mut data = vec![0; part.len()];
            buf.slice(part).copy_to(&mut data);
            Some(Bytes::Data(data.into()))
        }))
    }

    /// Begins a mutation of these pieces.
    fn submit(&self, pieces: impl FnOnce(&Store) -> Vec<Piece>, grows: bool) -> Result<usize> {
        let world = &self.0.world;
        let mut state = self.state();
        if state.latched {
            return Err(Error::new(ErrorKind::Io, "an earlier flush failed"));
        }
        let pieces = pieces(&state.store);
        if grows && let Some(capacity) = self.0.config.capacity {
            let more = (pieces.len() * state.store.unit_len()) as u64;
            if state.store.allocated() + more > capacity {
                return Err(ErrorKind::NoSpace.into());
            }
        }
        state.store.stir(world);
        Ok(state.store.submit(pieces, world))
    }

    async fn mutate(
        &self,
        pieces: impl FnOnce(&Store) -> Vec<Piece>,
        grows: bool,
        fua: bool,
    ) -> Result {
        let world = &self.0.world;
        let fault = self.enter();
        let call = self.submit(pieces, grows)?;
        let mut owner = Owner {
            disk: self,
            call: Some(call),
        };
        self.delay().await;
        if let Some(kind) = fault {
            world.event().await;
            let part = match world.draw(3) {
                0 => 0,
                1 => usize::MAX,
                _ => world.draw(4) as usize,
            };
            self.state().store.land(call, part, world);
            owner.finish(false, false);
            return Err(Error::new(kind, "injected"));
        }
        loop {
            world.event().await;
            let some = match world.one_in(3) {
                true => 1,
                false => usize::MAX,
            };
            if self.state().store.land(call, some, world) {
                break;
            }
            world.pause().await;
        }
        world.pause().await;
        if fua {
            world.event().await;
        }
        owner.finish(true, fua);
        Ok(())
    }
}

/// Notices when the future of a mutation is dropped.
struct Owner<'a> {
    disk: &'a SimDisk,
    call: Option<usize>,
}

impl Owner<'_> {
    fn finish(&mut self, success: bool, durable: bool) {
        if let Some(call) = self.call.take() {
            self.disk.state().store.finish(call, success, durable);
        }
    }
}

impl Drop for Owner<'_> {
    fn drop(&mut self) {
        if let Some(call) = self.call {
            self.disk.state().store.abandon(call);
        }
    }
}

impl Engine for SimDisk {
    fn geometry(&self) -> Geometry {
        self.state().geometry
    }

    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        let geometry = self.geometry();
        let range = offset..offset.saturating_add(buf.len() as u64);
        self.check(
            "read",
            &range,
            geometry.max_transfer,
            geometry.logical_block_size,
            true,
        )?;
        let fault = self.enter();
        self.delay().await;
        self.0.world.event().await;
        if let Some(kind) = fault {
            return Err(Error::new(kind, "injected"));
        }
        let tears = !geometry.features.contains(Features::ATOMIC_READS);
        let unit = self.state().store.unit_len();
        let mut bounce = vec![0; unit];
        let mut at = 0;
        while at < buf.len() {
            let inside = (offset + at as u64) % unit as u64;
            let len = (unit - inside as usize).min(buf.len() - at);
            self.copy(offset + at as u64, &mut bounce[..len], tears)?;
            buf.slice(at..at + len).copy_from(&bounce[..len]);
            at += len;
            if at < buf.len() && self.0.world.one_in(4) {
                self.0.world.pause().await;
            }
        }
        self.0.world.pause().await;
        Ok(())
    }

    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        let pieces = self.written(buf, offset, flags)?;
        let fua = flags.contains(WriteFlags::FUA);
        self.mutate(|_| pieces, true, fua).await
    }

    fn write_nowait(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Option<Result> {
        self.has_time().then(|| self.write_now(buf, offset, flags))
    }

    fn lend_mut(
        &self,
        range: Range<u64>,
        flags: WriteFlags,
        from: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Result> {
        if !self.has_time() {
            return None;
        }
        if range.end > self.geometry().size {
            return Some(Err(ErrorKind::OutOfRange.into()));
        }
        let mut memory = vec![0; (range.end - range.start) as usize];
        let unit = {
            let state = self.state();
            state.store.peek(range.start, &mut memory);
            state.store.unit_len()
        };
        memory.chunks_mut(unit).for_each(from);
        Some(self.write_now(&WriteBuf::new(&memory), range.start, flags))
    }

    async fn flush(&self) -> Result {
        let world = &self.0.world;
        let claimed = self.writable() && !self.state().closed;
        if !claimed {
            world.breach("the simulated disk was asked to flush: closed, or read-only".to_owned());
            return Err(ErrorKind::Invalid.into());
        }
        let fault = self.enter_flush();
        let since = self.state().store.now();
        if self.state().latched {
            return Err(Error::new(ErrorKind::Io, "an earlier flush failed"));
        }
        self.delay().await;
        world.event().await;
        self.settle(since, fault)?;
        world.pause().await;
        Ok(())
    }

    async fn discard(&self, range: Range<u64>) -> Result {
        let geometry = self.geometry();
        let claimed = self.writable() && geometry.discard != Discard::None;
        let granule = geometry.discard_granule();
        self.check("discard", &range, geometry.max_discard, granule, claimed)?;
        let world = &self.0.world;
        let pieces = |store: &Store| {
            store.pieces(range, |part| match (geometry.discard, world.draw(3)) {
                (Discard::Zeroes, _) | (_, 1) => Some(Bytes::Hole),
                (Discard::Unspecified, 2) => {
                    let noise = part.map(|_| world.draw(256) as u8);
                    Some(Bytes::Data(noise.collect()))
                }
                _ => None,
            })
        };
        self.mutate(pieces, false, false).await
    }

    async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        let geometry = self.geometry();
        let fua = flags.contains(WriteFlags::FUA);
        let claimed = self.writable()
            && geometry.features.contains(Features::WRITE_ZEROES)
            && (!fua || geometry.features.contains(Features::FUA));
        let block = geometry.logical_block_size;
        let most = geometry.max_write_zeroes;
        self.check("write_zeroes", &range, most, block, claimed)?;
        if self.0.config.slow_zeroes && flags.contains(WriteFlags::FAST_ONLY) {
            self.enter();
            return Err(ErrorKind::Unsupported.into());
        }
        let keep = flags.contains(WriteFlags::NO_UNMAP);
        let pieces = |store: &Store| {
            store.pieces(range, |_| match keep {
                true => Some(Bytes::Zero),
                false => Some(Bytes::Hole),
            })
        };
        self.mutate(pieces, keep, fua).await
    }

    async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        let claimed = self.geometry().features.contains(Features::EXTENTS);
        self.check("tell the extents of", &range, 0, 1, claimed)?;
        let fault = self.enter();
        self.delay().await;
        self.0.world.event().await;
        if let Some(kind) = fault {
            return Err(Error::new(kind, "injected"));
        }
        let mut state = self.state();
        let unit = state.store.unit_len() as u64;
        let mut at = range.start;
        while at < range.end && !out.is_full() {
            let end = ((at / unit + 1) * unit).min(range.end);
            if end > state.geometry.size {
                return Err(ErrorKind::OutOfRange.into());
            }
            let kind = match state.store.look((at / unit) as usize) {
                Bytes::Hole => ExtentKind::Hole,
                Bytes::Zero => ExtentKind::Zero,
                Bytes::Data(_) => ExtentKind::Data,
            };
            out.push(end - at, kind);
            at = end;
        }
        Ok(())
    }

    async fn changed(&self, seen: Geometry) -> Geometry {
        poll_fn(|cx| {
            let mut state = self.state();
            if state.geometry != seen {
                return Poll::Ready(state.geometry);
            }
            state.watchers.push(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    async fn close(&self) -> Result {
        if self.geometry().needs_flush() {
            self.flush().await?;
        }
        self.state().closed = true;
        Ok(())
    }
}

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        f.debug_struct("SimDisk")
            .field("geometry", &state.geometry)
            .field("calls", &state.calls)
            .finish_non_exhaustive()
    }
}
