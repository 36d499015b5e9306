//! The top edge of a stack, with a lifecycle: what a transport holds.
//!
//! A [`Device`] is a [`Checked`] engine that has shown it can flush, with counters
//! ([`stats`]) and a guard against panics ([`request`]) around each request, shared by any
//! number of handles of which the last one closes it.

mod request;
mod stats;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::{
    AnyEngine, Checked, CrashLevel, Engine, Error, ErrorKind, Extents, Geometry, InvalidGeometry,
    ReadBuf, Result, WriteBuf, WriteFlags,
};
use request::Monitor;
pub use stats::{Histogram, Op, OpStats, Stats};

/// An open disk: a cheap handle that any number of transports may share.
///
/// What each handle can do is what [`Engine`] says, behind the guarantees of [`Checked`]. Beyond that, an
/// engine's panic fails that request with `Io` and nothing else; after one in a mutation or a flush, all
/// mutations and flushes fail until the disk is opened anew, while reads go on.
///
/// Requests end before the handle they were made on: the future borrows it. So when the last handle is
/// [closed](Self::close), nothing is in flight.
pub struct Device<E = AnyEngine> {
    inner: Arc<Inner<E>>,
    read_only: bool,
}

struct Inner<E> {
    engine: Checked<E>,
    monitor: Monitor,
    /// Whether dropping the disk as it is may lose writes.
    owes_flush: AtomicBool,
}

impl<E> std::fmt::Debug for Device<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device")
            .field("engine", &self.inner.engine)
            .field("read_only", &self.read_only)
            .finish()
    }
}

impl<E> Clone for Device<E> {
    fn clone(&self) -> Self {
        Device {
            inner: self.inner.clone(),
            read_only: self.read_only,
        }
    }
}

/// Why an engine cannot be opened as a [`Device`].
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The geometry contradicts itself.
    #[error(transparent)]
    Geometry(#[from] InvalidGeometry),
    /// The engine claims that a flush makes writes durable, and has no `flush`.
    #[error(
        "the engine is writable and claims crash level {0:?}, but does not implement flush: implement it, \
         or claim CrashLevel::None (nothing survives a crash) or CrashLevel::Sync (every write is durable when it answers)"
    )]
    NoFlush(CrashLevel),
    /// The first flush failed.
    #[error("the engine's first flush failed: {0}")]
    Flush(Error),
}

impl From<OpenError> for Error {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Flush(error) => error,
            other => Error::new(ErrorKind::Invalid, other),
        }
    }
}

impl<E: Engine> Device<E> {
    /// Opens `engine` as a disk.
    ///
    /// # Errors
    /// If the geometry contradicts itself, or the engine is writable, its claims give `flush` something to do, and a
    /// first flush fails.
    pub async fn open(engine: E) -> Result<Self, OpenError> {
        let engine = Checked::new(engine)?;
        let geometry = engine.geometry();
        if geometry.needs_flush() {
            engine.flush().await.map_err(|error| match error.kind() {
                ErrorKind::Unsupported => OpenError::NoFlush(geometry.crash),
                _ => OpenError::Flush(error),
            })?;
        }
        Ok(Device {
            inner: Arc::new(Inner {
                engine,
                monitor: Monitor::default(),
                owes_flush: AtomicBool::new(geometry.needs_flush()),
            }),
            read_only: false,
        })
    }

    /// A handle to the same disk that accepts no mutation.
    pub fn read_only(&self) -> Self {
        Device {
            inner: self.inner.clone(),
            read_only: true,
        }
    }

    /// What the device has done since it was opened, through all its handles.
    pub fn stats(&self) -> Stats {
        self.inner.monitor.counters.stats()
    }

    /// The engine, for what it can do beyond the contract (a resize, a counter). Requests to it
    /// would pass the edge by: make none.
    pub fn get_ref(&self) -> &E {
        self.inner.engine.get_ref()
    }

    /// Gives this handle back. The last one flushes and closes the engine, and tells how that went.
    ///
    /// After a panic in a mutation or a flush the engine's own close is not called, like any other request that
    /// vouches for data: the engine is dropped as it is.
    ///
    /// # Errors
    /// As a flush; it promises no more than a failed flush then. Always after such a panic.
    pub async fn close(self) -> Result {
        let Some(inner) = Arc::into_inner(self.inner) else {
            return Ok(());
        };
        inner.owes_flush.store(false, Ordering::Relaxed);
        let closing = inner.engine.close();
        let closed = inner.monitor.run(Op::Flush, 0, 0, closing).await;
        // What a panic left half-way was not made durable by a close either.
        inner.monitor.healthy().and(closed)
    }
}

impl<E> Drop for Inner<E> {
    fn drop(&mut self) {
        if *self.owes_flush.get_mut() {
            tracing::warn!(
                "a disk was dropped without close: writes after the last flush may be lost"
            );
        }
    }
}

/// The operations of [`Engine`], which see.
impl<E: Engine> Device<E> {
    /// See [`Engine::geometry`].
    pub fn geometry(&self) -> Geometry {
        let geometry = self.inner.engine.geometry();
        match self.read_only {
            true => geometry.into_read_only(),
            false => geometry,
        }
    }

    /// See [`Engine::read`].
    pub async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        let len = buf.len() as u64;
        let reading = self.inner.engine.read(buf, offset);
        self.inner.monitor.run(Op::Read, offset, len, reading).await
    }

    /// See [`Engine::lend`]. True if `to` was called. A panic of the engine's after that is no failure; one of `to` goes on.
    pub fn lend(&self, range: Range<u64>, to: &mut dyn FnMut(&[u8])) -> bool {
        let (offset, len) = place(&range);
        let lending = |to: &mut dyn FnMut(&[u8])| self.inner.engine.lend(range, to);
        self.inner.monitor.lend(offset, len, to, lending)
    }

    /// See [`Engine::write`].
    pub async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        self.writable()?;
        let len = buf.len() as u64;
        let writing = self.inner.engine.write(buf, offset, flags);
        self.inner
            .monitor
            .run(Op::Write, offset, len, writing)
            .await
    }

    /// See [`Engine::write_nowait`]. `None` also for what would be refused: [`write`](Self::write) tells why.
    pub fn write_nowait(
        &self,
        buf: &WriteBuf<'_>,
        offset: u64,
        flags: WriteFlags,
    ) -> Option<Result> {
        self.writable().ok()?;
        let len = buf.len() as u64;
        let writing = || self.inner.engine.write_nowait(buf, offset, flags);
        self.inner.monitor.now(Op::Write, offset, len, writing)
    }

    /// See [`Engine::lend_mut`]. `None` also for what would be refused: [`write`](Self::write) tells why. A panic of `from` counts as
    /// the engine's.
    pub fn lend_mut(
        &self,
        range: Range<u64>,
        flags: WriteFlags,
        from: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Result> {
        self.writable().ok()?;
        let (offset, len) = place(&range);
        let writing = || self.inner.engine.lend_mut(range, flags, from);
        self.inner.monitor.now(Op::Write, offset, len, writing)
    }

    /// See [`Engine::flush`].
    pub async fn flush(&self) -> Result {
        let flushing = self.inner.engine.flush();
        self.inner.monitor.run(Op::Flush, 0, 0, flushing).await
    }

    /// See [`Engine::discard`].
    pub async fn discard(&self, range: Range<u64>) -> Result {
        self.writable()?;
        let (offset, len) = place(&range);
        let discarding = self.inner.engine.discard(range);
        self.inner
            .monitor
            .run(Op::Discard, offset, len, discarding)
            .await
    }

    /// See [`Engine::write_zeroes`].
    pub async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        self.writable()?;
        let (offset, len) = place(&range);
        let zeroing = self.inner.engine.write_zeroes(range, flags);
        self.inner
            .monitor
            .run(Op::WriteZeroes, offset, len, zeroing)
            .await
    }

    /// See [`Engine::extents`].
    pub async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        let (offset, len) = place(&range);
        let asking = self.inner.engine.extents(range, out);
        self.inner
            .monitor
            .run(Op::Extents, offset, len, asking)
            .await
    }

    /// See [`Engine::contexts`].
    pub fn contexts(&self) -> Vec<String> {
        self.inner.engine.contexts()
    }

    /// See [`Engine::status`].
    pub async fn status(&self, context: &str, range: Range<u64>, out: &mut Extents<u64>) -> Result {
        let (offset, len) = place(&range);
        let asking = self.inner.engine.status(context, range, out);
        self.inner
            .monitor
            .run(Op::Status, offset, len, asking)
            .await
    }

    /// See [`Engine::prefetch`].
    pub async fn prefetch(&self, range: Range<u64>) -> Result {
        let (offset, len) = place(&range);
        let fetching = self.inner.engine.prefetch(range);
        self.inner
            .monitor
            .run(Op::Prefetch, offset, len, fetching)
            .await
    }

    /// See [`Engine::changed`]. `seen` is what [`geometry`](Self::geometry) of this handle said.
    pub async fn changed(&self, seen: Geometry) -> Geometry {
        loop {
            let below = self.inner.engine.geometry();
            let own = self.geometry();
            if own != seen {
                return own;
            }
            self.inner.engine.changed(below).await;
        }
    }

    fn writable(&self) -> Result {
        match self.read_only {
            true => Err(ErrorKind::ReadOnly.into()),
            false => Ok(()),
        }
    }
}

/// Where a range starts, and its length. One that runs backwards is refused at the edge.
fn place(range: &Range<u64>) -> (u64, u64) {
    (range.start, range.end.saturating_sub(range.start))
}

#[cfg(test)]
mod tests;
