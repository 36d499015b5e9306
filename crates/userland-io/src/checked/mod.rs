//! placeholder
use crate::{Engine, Extents, Geometry, InvalidGeometry, ReadBuf, Result, WriteBuf, WriteFlags};
use std::ops::Range;
/// Edge.
#[derive(Debug)]
pub struct Checked<E>(E);
impl<E: Engine> Checked<E> {
    /// New.
    pub fn new(engine: E) -> Result<Self, InvalidGeometry> {
        engine.geometry().validate()?;
        Ok(Checked(engine))
    }
}
impl<E: Engine> Engine for Checked<E> {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        self.0.read(buf, offset).await
    }
    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        self.0.write(buf, offset, flags).await
    }
    async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        self.0.extents(range, out).await
    }
}
