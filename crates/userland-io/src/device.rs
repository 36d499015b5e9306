//! The top edge of a stack: what a transport holds.
use std::ops::Range;
use std::sync::Arc;

use crate::{
    AnyEngine, Checked, Engine, Error, ErrorKind, Extents, Geometry, InvalidGeometry, ReadBuf,
    Result, WriteBuf, WriteFlags,
};

/// An open disk: a cheap handle that any number of transports may share.
#[derive(Debug)]
pub struct Device<E = AnyEngine> {
    inner: Arc<Inner<E>>,
    read_only: bool,
}

#[derive(Debug)]
struct Inner<E> {
    engine: Checked<E>,
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
    NoFlush(crate::CrashLevel),
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
            inner: Arc::new(Inner { engine }),
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

    /// Gives this handle back. The last one flushes and closes the engine.
    pub async fn close(self) -> Result {
        match Arc::into_inner(self.inner) {
            Some(inner) => inner.engine.close().await,
            None => Ok(()),
        }
    }

    fn writable(&self) -> Result {
        match self.read_only {
            true => Err(ErrorKind::ReadOnly.into()),
            false => Ok(()),
        }
    }
}

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
        self.inner.engine.read(buf, offset).await
    }
    /// See [`Engine::write`].
    pub async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        self.writable()?;
        self.inner.engine.write(buf, offset, flags).await
    }
    /// See [`Engine::flush`].
    pub async fn flush(&self) -> Result {
        self.inner.engine.flush().await
    }
    /// See [`Engine::discard`].
    pub async fn discard(&self, range: Range<u64>) -> Result {
        self.writable()?;
        self.inner.engine.discard(range).await
    }
    /// See [`Engine::write_zeroes`].
    pub async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        self.writable()?;
        self.inner.engine.write_zeroes(range, flags).await
    }
    /// See [`Engine::extents`].
    pub async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        self.inner.engine.extents(range, out).await
    }
    /// See [`Engine::contexts`].
    pub fn contexts(&self) -> Vec<String> {
        self.inner.engine.contexts()
    }
    /// See [`Engine::status`].
    pub async fn status(&self, context: &str, range: Range<u64>, out: &mut Extents<u64>) -> Result {
        self.inner.engine.status(context, range, out).await
    }
    /// See [`Engine::prefetch`].
    pub async fn prefetch(&self, range: Range<u64>) -> Result {
        self.inner.engine.prefetch(range).await
    }
    /// See [`Engine::changed`].
    pub async fn changed(&self, seen: Geometry) -> Geometry {
        self.inner.engine.changed(seen).await
    }
}
