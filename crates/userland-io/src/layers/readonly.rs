//! A layer that accepts no mutation.

use std::ops::Range;

use crate::{Checked, Engine, ErrorKind, Filter, Geometry, Layer, Result, WriteBuf, WriteFlags};

/// Puts a [`ReadOnlyEngine`] over an engine: reads go through, mutations are refused.
///
/// The engine below is still opened as it was: to open a file without the right to write to it,
/// say so to the file.
///
/// ```
/// use userland_io::{Engine, EngineExt, engines::Memory, layers::ReadOnly};
///
/// let disk = Memory::new(1 << 20).layer(ReadOnly)?;
/// assert!(disk.geometry().is_read_only());
/// # Ok::<(), userland_io::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct ReadOnly;

impl<E: Engine> Layer<E> for ReadOnly {
    type Engine = ReadOnlyEngine<E>;

    fn layer(self, lower: Checked<E>) -> Result<Self::Engine> {
        Ok(ReadOnlyEngine { lower })
    }
}

/// What [`ReadOnly`] makes.
#[derive(Debug)]
pub struct ReadOnlyEngine<E> {
    lower: Checked<E>,
}

impl<E: Engine> Filter for ReadOnlyEngine<E> {
    type Lower = E;

    fn lower(&self) -> &Checked<E> {
        &self.lower
    }

    fn geometry(&self) -> Geometry {
        self.lower.geometry().into_read_only()
    }

    fn lend(&self, range: Range<u64>, to: &mut dyn FnMut(&[u8])) {
        self.lower.lend(range, to);
    }

    // The edge above keeps mutations away; these stand for whoever passes it by.
    async fn write(&self, _: &WriteBuf<'_>, _: u64, _: WriteFlags) -> Result {
        Err(ErrorKind::ReadOnly.into())
    }

    async fn discard(&self, _: Range<u64>) -> Result {
        Err(ErrorKind::ReadOnly.into())
    }

    async fn write_zeroes(&self, _: Range<u64>, _: WriteFlags) -> Result {
        Err(ErrorKind::ReadOnly.into())
    }
}
