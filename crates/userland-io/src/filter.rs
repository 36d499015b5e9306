//! Layers: engines over an engine.
//!
//! A layer that changes a few operations is a [`Filter`], which forwards all the
//! others, so that none is forgotten. One that keeps state about bytes (a cache,
//! copy-on-write) implements [`Engine`] itself and answers for everything.

use std::future::Future;
use std::ops::Range;

use crate::{
    AnyEngine, Checked, Engine, Extents, Geometry, ReadBuf, Result, WriteBuf, WriteFlags,
    changed_through,
};

/// A layer that changes some operations and forwards the rest to [`lower`](Self::lower).
///
/// Every `Filter` is an [`Engine`]. See there for what each operation means; the
/// doc of each here says only what happens if it is left out.
pub trait Filter: Send + Sync + 'static {
    /// The engine below.
    type Lower: Engine;

    /// The engine below, behind its edge.
    fn lower(&self) -> &Checked<Self::Lower>;

    /// See [`Engine::geometry`]. If left out: that of the engine below. A filter that weakens a
    /// promise, or moves offsets, must say so here.
    fn geometry(&self) -> Geometry {
        self.lower().geometry()
    }

    /// See [`Engine::read`]. If left out: forwarded.
    fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> impl Future<Output = Result> + Send {
        self.lower().read(buf, offset)
    }

    /// See [`Engine::lend`]. If left out: not forwarded, since [`read`](Self::read) would be passed by. One that changes
    /// nothing but where bytes are asks [`lower`](Self::lower).
    fn lend(&self, range: Range<u64>, to: &mut dyn FnMut(&[u8])) {
        let _ = (range, to);
    }

    /// See [`Engine::write`]. If left out: forwarded.
    fn write(
        &self,
        buf: &WriteBuf<'_>,
        offset: u64,
        flags: WriteFlags,
    ) -> impl Future<Output = Result> + Send {
        self.lower().write(buf, offset, flags)
    }

    /// See [`Engine::write_nowait`]. If left out: not forwarded, since [`write`](Self::write) would be passed by. One that
    /// changes nothing but where bytes are asks [`lower`](Self::lower).
    fn write_nowait(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Option<Result> {
        let _ = (buf, offset, flags);
        None
    }

    /// See [`Engine::lend_mut`]. If left out: not forwarded, since [`write`](Self::write) would be passed by. One that
    /// changes nothing but where bytes are asks [`lower`](Self::lower).
    fn lend_mut(
        &self,
        range: Range<u64>,
        flags: WriteFlags,
        from: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Result> {
        let _ = (range, flags, from);
        None
    }

    /// See [`Engine::flush`]. If left out: forwarded.
    fn flush(&self) -> impl Future<Output = Result> + Send {
        self.lower().flush()
    }

    /// See [`Engine::discard`]. If left out: forwarded.
    fn discard(&self, range: Range<u64>) -> impl Future<Output = Result> + Send {
        self.lower().discard(range)
    }

    /// See [`Engine::write_zeroes`]. If left out: forwarded.
    fn write_zeroes(
        &self,
        range: Range<u64>,
        flags: WriteFlags,
    ) -> impl Future<Output = Result> + Send {
        self.lower().write_zeroes(range, flags)
    }

    /// See [`Engine::extents`]. If left out: forwarded.
    fn extents(&self, range: Range<u64>, out: &mut Extents) -> impl Future<Output = Result> + Send {
        self.lower().extents(range, out)
    }

    /// See [`Engine::contexts`]. If left out: those of the engine below.
    fn contexts(&self) -> Vec<String> {
        self.lower().contexts()
    }

    /// See [`Engine::status`]. If left out: forwarded.
    fn status(
        &self,
        context: &str,
        range: Range<u64>,
        out: &mut Extents<u64>,
    ) -> impl Future<Output = Result> + Send {
        self.lower().status(context, range, out)
    }

    /// See [`Engine::prefetch`]. If left out: forwarded.
    fn prefetch(&self, range: Range<u64>) -> impl Future<Output = Result> + Send {
        self.lower().prefetch(range)
    }

    /// See [`Engine::close`]. If left out: forwarded.
    fn close(&self) -> impl Future<Output = Result> + Send {
        self.lower().close()
    }
}

impl<F: Filter> Engine for F {
    fn geometry(&self) -> Geometry {
        Filter::geometry(self)
    }

    fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> impl Future<Output = Result> + Send {
        Filter::read(self, buf, offset)
    }

    fn lend(&self, range: Range<u64>, to: &mut dyn FnMut(&[u8])) {
        Filter::lend(self, range, to);
    }

    fn write(
        &self,
        buf: &WriteBuf<'_>,
        offset: u64,
        flags: WriteFlags,
    ) -> impl Future<Output = Result> + Send {
        Filter::write(self, buf, offset, flags)
    }

    fn write_nowait(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Option<Result> {
        Filter::write_nowait(self, buf, offset, flags)
    }

    fn lend_mut(
        &self,
        range: Range<u64>,
        flags: WriteFlags,
        from: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Result> {
        Filter::lend_mut(self, range, flags, from)
    }

    fn flush(&self) -> impl Future<Output = Result> + Send {
        Filter::flush(self)
    }

    fn discard(&self, range: Range<u64>) -> impl Future<Output = Result> + Send {
        Filter::discard(self, range)
    }

    fn write_zeroes(
        &self,
        range: Range<u64>,
        flags: WriteFlags,
    ) -> impl Future<Output = Result> + Send {
        Filter::write_zeroes(self, range, flags)
    }

    fn extents(&self, range: Range<u64>, out: &mut Extents) -> impl Future<Output = Result> + Send {
        Filter::extents(self, range, out)
    }

    fn contexts(&self) -> Vec<String> {
        Filter::contexts(self)
    }

    fn status(
        &self,
        context: &str,
        range: Range<u64>,
        out: &mut Extents<u64>,
    ) -> impl Future<Output = Result> + Send {
        Filter::status(self, context, range, out)
    }

    fn prefetch(&self, range: Range<u64>) -> impl Future<Output = Result> + Send {
        Filter::prefetch(self, range)
    }

    fn changed(&self, seen: Geometry) -> impl Future<Output = Geometry> + Send {
        changed_through(self, self.lower(), seen)
    }

    fn close(&self) -> impl Future<Output = Result> + Send {
        Filter::close(self)
    }
}

/// What puts a layer over an engine: a value that holds the layer's settings.
pub trait Layer<E: Engine> {
    /// The stack of both.
    type Engine: Engine;

    /// Puts the layer over `lower`.
    ///
    /// # Errors
    /// If the settings do not fit what is below, or the engine below is not in order.
    fn layer(self, lower: Checked<E>) -> Result<Self::Engine>;
}

/// What a caller finds handy on every engine.
pub trait EngineExt: Engine + Sized {
    /// Puts `layer` over this engine.
    ///
    /// # Errors
    /// If this engine's geometry contradicts itself, or the layer's settings do not fit it.
    fn layer<L: Layer<Self>>(self, layer: L) -> Result<L::Engine> {
        layer.layer(Checked::new(self)?)
    }

    /// Erases the type, so that stacks can be composed at run time.
    fn erase(self) -> AnyEngine {
        AnyEngine::new(self)
    }
}

impl<E: Engine> EngineExt for E {}
