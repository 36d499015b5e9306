//! Engines that block: plain functions over slices, on a pool of threads.
//!
//! Who has a client library without `async`, or a disk that is a few system calls,
//! implements [`BlockingEngine`] and wraps it in [`Blocking`]. Payloads are copied,
//! once each way, because a request's memory may be gone before a thread is done
//! with it. No runtime is needed.

use std::ops::Range;
use std::sync::Arc;

use crate::threads::Pool;
use crate::{Engine, ErrorKind, Extents, Geometry, ReadBuf, Result, WriteBuf, WriteFlags};

/// A storage engine whose operations block. [`Blocking`] makes it an [`Engine`].
///
/// The contract is that of [`Engine`], in plain functions: callers guarantee the same, and the engine owes
/// the same, but for dropped futures, which [`Blocking`] takes care of. Operations run on several threads at once.
///
/// ```
/// use userland_io::{Blocking, BlockingEngine, Geometry, Result};
///
/// /// A disk on which each byte is its offset, modulo 256.
/// struct Ramp(u64);
///
/// impl BlockingEngine for Ramp {
///     fn geometry(&self) -> Geometry {
///         Geometry::read_only(self.0)
///     }
///     fn read(&self, buf: &mut [u8], offset: u64) -> Result {
///         for (byte, at) in buf.iter_mut().zip(offset..) {
///             *byte = at as u8;
///         }
///         Ok(())
///     }
/// }
///
/// let engine = Blocking::new(Ramp(1 << 20), 4)?;
/// # Ok::<(), userland_io::Error>(())
/// ```
pub trait BlockingEngine: Send + Sync + 'static {
    /// Size, limits and claims. Cheap, and never blocks: it is not called on the pool. Only `size` may
    /// change while open.
    fn geometry(&self) -> Geometry;

    /// Fills all of `buf` from `offset`.
    ///
    /// # Errors
    /// On an error the content of `buf` means nothing.
    fn read(&self, buf: &mut [u8], offset: u64) -> Result;

    /// Stores all of `buf` at `offset`; durable on return if `flags` has `FUA`,
    /// which arrives only where [`Features::FUA`](crate::Features::FUA) is claimed.
    ///
    /// If left out: the engine is read-only, and its geometry must say so.
    fn write(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result {
        let _ = (buf, offset, flags);
        Err(ErrorKind::ReadOnly.into())
    }

    /// Makes every mutation that completed before this call durable.
    ///
    /// If left out: `Unsupported`, and a [`Device`](crate::Device) opens only if the engine claims that
    /// nothing survives a crash ([`CrashLevel::None`](crate::CrashLevel::None)) or that every write is
    /// durable already ([`CrashLevel::Sync`](crate::CrashLevel::Sync)).
    ///
    /// # Errors
    /// A failed flush promises nothing. The next may succeed only if everything completed before it
    /// is in fact durable.
    fn flush(&self) -> Result {
        Err(ErrorKind::Unsupported.into())
    }

    /// The bytes of `range`, whole granules, are no longer wanted. What reads return then is the
    /// claim [`Geometry::discard`]. It is a mutation like any other.
    ///
    /// If left out: that claim must be [`Discard::None`](crate::Discard::None), and nobody asks.
    fn discard(&self, range: Range<u64>) -> Result {
        let _ = range;
        Err(ErrorKind::Unsupported.into())
    }

    /// Makes `range` read as zeroes. With `NO_UNMAP` its space stays allocated; with `FAST_ONLY` it
    /// answers `Unsupported`, at once and with nothing changed, rather than write zeroes out. Asked only where
    /// [`Features::WRITE_ZEROES`](crate::Features::WRITE_ZEROES) is claimed.
    ///
    /// If left out, or on `Unsupported`: the edge writes zeroes, or hands the refusal of `FAST_ONLY` on.
    fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        let _ = (range, flags);
        Err(ErrorKind::Unsupported.into())
    }

    /// Pushes what `range` begins with. An engine may stop after one run, or when `out` is full;
    /// callers ask again for the rest. Asked only where
    /// [`Features::EXTENTS`](crate::Features::EXTENTS) is claimed.
    ///
    /// If left out: everything is data.
    fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        let _ = (range, out);
        Err(ErrorKind::Unsupported.into())
    }

    /// Ends the engine's work. Called once, after the last request.
    ///
    /// If left out: flushes, where the claims leave a flush something to do.
    fn close(&self) -> Result {
        match self.geometry().needs_flush() {
            true => self.flush(),
            false => Ok(()),
        }
    }
}

/// A [`BlockingEngine`] as an [`Engine`], on threads of its own.
///
/// A mutation whose future is dropped half-way runs on; `flush` and `close` wait for it first. A panic in the
/// engine is raised again where the request is awaited, and costs no thread.
#[derive(Debug)]
pub struct Blocking<B> {
    engine: Arc<B>,
    pool: Pool,
}

impl<B: BlockingEngine> Blocking<B> {
    /// Puts `engine` on up to `threads` threads (at least one), which is how many operations run at once.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn new(engine: B, threads: usize) -> Result<Self> {
        Ok(Blocking {
            engine: Arc::new(engine),
            pool: Pool::new("ulio-blocking", threads)?,
        })
    }

    /// The engine inside.
    pub fn get_ref(&self) -> &B {
        &self.engine
    }
}

impl<B: BlockingEngine> Engine for Blocking<B> {
    fn geometry(&self) -> Geometry {
        self.engine.geometry()
    }

    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        let (engine, len) = (self.engine.clone(), buf.len());
        let bytes = self
            .pool
            .run(move || {
                let mut bytes = vec![0; len];
                engine.read(&mut bytes, offset).map(|()| bytes)
            })
            .await?;
        buf.copy_from(&bytes);
        Ok(())
    }

    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        let engine = self.engine.clone();
        let mut bytes = vec![0; buf.len()];
        buf.copy_to(&mut bytes);
        self.pool
            .mutate(move || engine.write(&bytes, offset, flags))
            .await
    }

    async fn flush(&self) -> Result {
        self.pool.settle().await;
        let engine = self.engine.clone();
        self.pool.run(move || engine.flush()).await
    }

    async fn discard(&self, range: Range<u64>) -> Result {
        let engine = self.engine.clone();
        self.pool.mutate(move || engine.discard(range)).await
    }

    async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        let engine = self.engine.clone();
        self.pool
            .mutate(move || engine.write_zeroes(range, flags))
            .await
    }

    async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        let (engine, room) = (self.engine.clone(), out.room());
        let runs = self
            .pool
            .run(move || {
                let mut runs = Extents::new(room);
                engine.extents(range, &mut runs).map(|()| runs)
            })
            .await?;
        for run in &runs {
            out.push(run.len, run.kind);
        }
        Ok(())
    }

    async fn close(&self) -> Result {
        self.pool.settle().await;
        let engine = self.engine.clone();
        self.pool.run(move || engine.close()).await
    }
}
