//! An engine without its type, for stacks that are composed at run time.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;

use crate::{Engine, Extents, Geometry, ReadBuf, Result, WriteBuf, WriteFlags};

/// Any engine, its type erased. Costs one small allocation and some 20 ns for each request that takes a future.
pub struct AnyEngine(Box<dyn DynEngine>);

impl AnyEngine {
    /// Erases the type of `engine`.
    pub fn new(engine: impl Engine) -> Self {
        AnyEngine(Box::new(engine))
    }
}

impl std::fmt::Debug for AnyEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("AnyEngine")
            .field(&self.0.geometry())
            .finish()
    }
}

type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// `Engine` with boxed futures. Private to this module: its names are the
/// trait's own, and where both are in scope every call would be ambiguous.
trait DynEngine: Send + Sync + 'static {
    fn geometry(&self) -> Geometry;
    fn read<'a>(&'a self, buf: &'a mut ReadBuf<'_>, offset: u64) -> Boxed<'a, Result>;
    fn lend(&self, range: Range<u64>, to: &mut dyn FnMut(&[u8]));
    fn write<'a>(
        &'a self,
        buf: &'a WriteBuf<'_>,
        offset: u64,
        flags: WriteFlags,
    ) -> Boxed<'a, Result>;
    fn write_nowait(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Option<Result>;
    fn lend_mut(
        &self,
        range: Range<u64>,
        flags: WriteFlags,
        from: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Result>;
    fn flush(&self) -> Boxed<'_, Result>;
    fn discard(&self, range: Range<u64>) -> Boxed<'_, Result>;
    fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Boxed<'_, Result>;
    fn extents<'a>(&'a self, range: Range<u64>, out: &'a mut Extents) -> Boxed<'a, Result>;
    fn contexts(&self) -> Vec<String>;
    fn status<'a>(
        &'a self,
        context: &'a str,
        range: Range<u64>,
        out: &'a mut Extents<u64>,
    ) -> Boxed<'a, Result>;
    fn prefetch(&self, range: Range<u64>) -> Boxed<'_, Result>;
    fn changed(&self, seen: Geometry) -> Boxed<'_, Geometry>;
    fn close(&self) -> Boxed<'_, Result>;
}

impl<E: Engine> DynEngine for E {
    fn geometry(&self) -> Geometry {
        Engine::geometry(self)
    }
    fn read<'a>(&'a self, buf: &'a mut ReadBuf<'_>, offset: u64) -> Boxed<'a, Result> {
        Box::pin(Engine::read(self, buf, offset))
    }
    fn lend(&self, range: Range<u64>, to: &mut dyn FnMut(&[u8])) {
        Engine::lend(self, range, to);
    }
    fn write<'a>(
        &'a self,
        buf: &'a WriteBuf<'_>,
        offset: u64,
        flags: WriteFlags,
    ) -> Boxed<'a, Result> {
        Box::pin(Engine::write(self, buf, offset, flags))
    }
    fn write_nowait(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Option<Result> {
        Engine::write_nowait(self, buf, offset, flags)
    }
    fn lend_mut(
        &self,
        range: Range<u64>,
        flags: WriteFlags,
        from: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Result> {
        Engine::lend_mut(self, range, flags, from)
    }
    fn flush(&self) -> Boxed<'_, Result> {
        Box::pin(Engine::flush(self))
    }
    fn discard(&self, range: Range<u64>) -> Boxed<'_, Result> {
        Box::pin(Engine::discard(self, range))
    }
    fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Boxed<'_, Result> {
        Box::pin(Engine::write_zeroes(self, range, flags))
    }
    fn extents<'a>(&'a self, range: Range<u64>, out: &'a mut Extents) -> Boxed<'a, Result> {
        Box::pin(Engine::extents(self, range, out))
    }
    fn contexts(&self) -> Vec<String> {
        Engine::contexts(self)
    }
    fn status<'a>(
        &'a self,
        context: &'a str,
        range: Range<u64>,
        out: &'a mut Extents<u64>,
    ) -> Boxed<'a, Result> {
        Box::pin(Engine::status(self, context, range, out))
    }
    fn prefetch(&self, range: Range<u64>) -> Boxed<'_, Result> {
        Box::pin(Engine::prefetch(self, range))
    }
    fn changed(&self, seen: Geometry) -> Boxed<'_, Geometry> {
        Box::pin(Engine::changed(self, seen))
    }
    fn close(&self) -> Boxed<'_, Result> {
        Box::pin(Engine::close(self))
    }
}

// `async fn` here, not the boxed future itself: the latter would have to outlive two elided lifetimes at once.
impl Engine for AnyEngine {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        self.0.read(buf, offset).await
    }
    fn lend(&self, range: Range<u64>, to: &mut dyn FnMut(&[u8])) {
        self.0.lend(range, to);
    }
    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        self.0.write(buf, offset, flags).await
    }
    fn write_nowait(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Option<Result> {
        self.0.write_nowait(buf, offset, flags)
    }
    fn lend_mut(
        &self,
        range: Range<u64>,
        flags: WriteFlags,
        from: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Result> {
        self.0.lend_mut(range, flags, from)
    }
    async fn flush(&self) -> Result {
        self.0.flush().await
    }
    async fn discard(&self, range: Range<u64>) -> Result {
        self.0.discard(range).await
    }
    async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        self.0.write_zeroes(range, flags).await
    }
    async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        self.0.extents(range, out).await
    }
    fn contexts(&self) -> Vec<String> {
        self.0.contexts()
    }
    async fn status(&self, context: &str, range: Range<u64>, out: &mut Extents<u64>) -> Result {
        self.0.status(context, range, out).await
    }
    async fn prefetch(&self, range: Range<u64>) -> Result {
        self.0.prefetch(range).await
    }
    async fn changed(&self, seen: Geometry) -> Geometry {
        self.0.changed(seen).await
    }
    async fn close(&self) -> Result {
        self.0.close().await
    }
}
