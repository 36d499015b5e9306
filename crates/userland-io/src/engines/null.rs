//! A disk without a medium: reads answer zeroes, and writes are forgotten.
//!
//! For measuring what is around an engine. A disk whose writes read back as
//! something else breaks the one promise that every disk makes, so this one is the
//! exception that says so: nothing of it survives, not even until the next read.

use std::ops::Range;

use crate::{
    CrashLevel, Discard, Engine, ExtentKind, Extents, Features, Geometry, ReadBuf, Result,
    WriteBuf, WriteFlags,
};

/// Reads zeroes, forgets writes. Claims that nothing survives a crash.
///
/// ```
/// use userland_io::{Engine, engines::Null};
///
/// assert_eq!(Null::new(1 << 40).geometry().size, 1 << 40);
/// assert!(Null::new(1 << 40).read_only().geometry().is_read_only());
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Null {
    geometry: Geometry,
}

impl Null {
    /// A disk of `size` bytes.
    pub const fn new(size: u64) -> Self {
        let mut geometry = Geometry::writable(size, CrashLevel::None);
        geometry.discard = Discard::Zeroes;
        geometry.features = Features::WRITE_ZEROES
            .union(Features::EXTENTS)
            .union(Features::ATOMIC_READS);
        Null { geometry }
    }

    /// The same, refusing writes: then it is an honest disk of zeroes.
    pub const fn read_only(mut self) -> Self {
        self.geometry = Geometry::read_only(self.geometry.size);
        self.geometry.features = self
            .geometry
            .features
            .union(Features::EXTENTS)
            .union(Features::ATOMIC_READS)
            .union(Features::SURVIVES_KILL);
        self
    }
}

impl Engine for Null {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    async fn read(&self, buf: &mut ReadBuf<'_>, _: u64) -> Result {
        buf.fill(0);
        Ok(())
    }

    async fn write(&self, _: &WriteBuf<'_>, _: u64, _: WriteFlags) -> Result {
        Ok(())
    }

    fn write_nowait(&self, _: &WriteBuf<'_>, _: u64, _: WriteFlags) -> Option<Result> {
        Some(Ok(()))
    }

    async fn flush(&self) -> Result {
        Ok(())
    }

    async fn discard(&self, _: Range<u64>) -> Result {
        Ok(())
    }

    async fn write_zeroes(&self, _: Range<u64>, _: WriteFlags) -> Result {
        Ok(())
    }

    async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        out.push(range.end - range.start, ExtentKind::Hole);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    #[tokio::test]
    async fn reads_are_zero_even_after_a_write() {
        let disk = Device::open(Null::new(1 << 20)).await.unwrap();
        let mut page = [7; 4096];
        disk.write(&WriteBuf::new(&page), 512, WriteFlags::FUA)
            .await
            .unwrap();
        disk.read(&mut ReadBuf::new(&mut page), 512).await.unwrap();
        assert_eq!(page, [0; 4096]);
    }

    #[test]
    fn it_claims_no_more_than_it_keeps() {
        assert_eq!(Null::new(1).geometry().validate(), Ok(()));
        assert_eq!(Null::new(1).geometry().crash, CrashLevel::None);
        assert!(
            !Null::new(1)
                .geometry()
                .features
                .contains(Features::SURVIVES_KILL)
        );
        assert_eq!(Null::new(1).read_only().geometry().validate(), Ok(()));
    }
}
