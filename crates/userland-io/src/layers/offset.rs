//! A layer that shows a window of the disk below: from a byte on, for so many bytes.

use std::ops::Range;

use crate::{
    Checked, Discard, Engine, Error, ErrorKind, Extents, Filter, Geometry, Layer, ReadBuf, Result,
    WriteBuf, WriteFlags,
};

/// Puts an [`OffsetEngine`] over an engine: a window that starts at a byte of it.
///
/// Any byte can be the start. Where the window does not lie on the units of the disk below, it
/// promises less rather than refuse:
/// * its logical block is the largest power of two that divides both the start and the block below (what
///   does not fit the block below is read, modified and written there, whole);
/// * what a discard leaves is at best [`Discard::OldOrZero`], because the granules below are not the
///   window's, and those it has only a part of stay as they are;
/// * `atomic_write_unit`, `io_min` and `io_opt` are given up.
///
/// ```
/// use userland_io::{Engine, EngineExt, engines::Memory, layers::Offset};
///
/// let window = Memory::new(10 << 20).layer(Offset::new(1 << 20).size(2 << 20))?;
/// assert_eq!(window.geometry().size, 2 << 20);
/// # Ok::<(), userland_io::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offset {
    start: u64,
    size: Option<u64>,
}

impl Offset {
    /// From byte `start` to the end of the disk below, wherever that is.
    pub const fn new(start: u64) -> Self {
        Offset { start, size: None }
    }

    /// Only so many bytes.
    pub const fn size(mut self, size: u64) -> Self {
        self.size = Some(size);
        self
    }
}

impl<E: Engine> Layer<E> for Offset {
    type Engine = OffsetEngine<E>;

    /// # Errors
    /// `Invalid`, if the window does not lie inside the disk below.
    fn layer(self, lower: Checked<E>) -> Result<Self::Engine> {
        let below = lower.geometry().size;
        let invalid = |text: String| Err(Error::new(ErrorKind::Invalid, text));
        if self.start > below {
            return invalid(format!(
                "the window starts at byte {}, but the disk below has only {below}",
                self.start
            ));
        }
        let room = below - self.start;
        match self.size {
            Some(size) if size > room => invalid(format!(
                "the window is {size} bytes long, but only {room} follow byte {} of the disk below",
                self.start
            )),
            _ => Ok(OffsetEngine {
                lower,
                window: self,
            }),
        }
    }
}

/// What [`Offset`] makes.
#[derive(Debug)]
pub struct OffsetEngine<E> {
    lower: Checked<E>,
    window: Offset,
}

impl<E> OffsetEngine<E> {
    /// The place of the window's byte `offset` below. Past every disk's end if there is none.
    fn shift(&self, offset: u64) -> u64 {
        self.window.start.saturating_add(offset)
    }

    fn shifted(&self, range: Range<u64>) -> Range<u64> {
        self.shift(range.start)..self.shift(range.end)
    }
}

impl<E: Engine> Filter for OffsetEngine<E> {
    type Lower = E;

    fn lower(&self) -> &Checked<E> {
        &self.lower
    }

    fn geometry(&self) -> Geometry {
        window(self.lower.geometry(), self.window)
    }

    fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> impl Future<Output = Result> + Send {
        self.lower.read(buf, self.shift(offset))
    }

    fn lend(&self, range: Range<u64>, to: &mut dyn FnMut(&[u8])) {
        self.lower.lend(self.shifted(range), to);
    }

    fn write(
        &self,
        buf: &WriteBuf<'_>,
        offset: u64,
        flags: WriteFlags,
    ) -> impl Future<Output = Result> + Send {
        self.lower.write(buf, self.shift(offset), flags)
    }

    fn write_nowait(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Option<Result> {
        self.lower.write_nowait(buf, self.shift(offset), flags)
    }

    fn lend_mut(
        &self,
        range: Range<u64>,
        flags: WriteFlags,
        from: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Result> {
        self.lower.lend_mut(self.shifted(range), flags, from)
    }

    fn discard(&self, range: Range<u64>) -> impl Future<Output = Result> + Send {
        self.lower.discard(self.shifted(range))
    }

    fn write_zeroes(
        &self,
        range: Range<u64>,
        flags: WriteFlags,
    ) -> impl Future<Output = Result> + Send {
        self.lower.write_zeroes(self.shifted(range), flags)
    }

    fn extents(&self, range: Range<u64>, out: &mut Extents) -> impl Future<Output = Result> + Send {
        self.lower.extents(self.shifted(range), out)
    }

    fn status(
        &self,
        context: &str,
        range: Range<u64>,
        out: &mut Extents<u64>,
    ) -> impl Future<Output = Result> + Send {
        self.lower.status(context, self.shifted(range), out)
    }

    fn prefetch(&self, range: Range<u64>) -> impl Future<Output = Result> + Send {
        self.lower.prefetch(self.shifted(range))
    }
}

/// What a window of the disk `below` can promise.
fn window(below: Geometry, Offset { start, size }: Offset) -> Geometry {
    let room = below.size.saturating_sub(start);
    let follows_the_end = size.is_none();
    let size = size.unwrap_or(room).min(room);
    let end = start.saturating_add(size);
    // 0 is no wish, and a wish that the window's start does not keep is none any more.
    let on_units = |unit: u32| match unit {
        0 => 0,
        unit if start.is_multiple_of(u64::from(unit)) => unit,
        _ => 0,
    };
    let granule = below.discard_granule();
    // A disk that ends with the window may grow, and then the window's last granule is a part of one.
    let whole_granules = start.is_multiple_of(granule.into())
        && (end.is_multiple_of(granule.into()) || follows_the_end);
    Geometry {
        size,
        logical_block_size: common_block(below.logical_block_size, start),
        physical_block_size: match below.physical_block_size {
            0 => 0,
            physical => common_block(physical, start),
        },
        io_min: on_units(below.io_min),
        io_opt: on_units(below.io_opt),
        atomic_write_unit: on_units(below.atomic_write_unit),
        discard_granularity: match below.discard {
            Discard::None => 0,
            // Spelt out, because the window's own block may be smaller.
            _ => granule,
        },
        max_discard: match below.discard {
            Discard::None => 0,
            _ => below.max_discard,
        },
        discard: match whole_granules {
            true => below.discard,
            false => below.discard.min(Discard::OldOrZero),
        },
        ..below
    }
}

/// The largest power of two that divides both `block`, itself one, and `start`.
fn common_block(block: u32, start: u64) -> u32 {
    match u32::try_from(1u64 << start.trailing_zeros().min(63)) {
        Ok(start) => block.min(start),
        Err(_) => block,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engines::Memory;
    use crate::{CrashLevel, EngineExt};

    fn below() -> Geometry {
        let mut below = Geometry::writable(1 << 20, CrashLevel::Flush);
        below.logical_block_size = 512;
        below.physical_block_size = 4096;
        below.io_min = 4096;
        below.io_opt = 65536;
        below.max_transfer = 1 << 20;
        below.discard_granularity = 4096;
        below.max_discard = 1 << 20;
        below.atomic_write_unit = 4096;
        below.discard = Discard::Zeroes;
        below
    }

    #[test]
    fn an_aligned_window_promises_what_is_below() {
        let got = window(below(), Offset::new(65536).size(65536));
        assert_eq!(
            got,
            Geometry {
                size: 65536,
                ..below()
            }
        );
    }

    #[test]
    fn an_unaligned_window_promises_less() {
        // start, size, then what is left: block, physical, atomic unit, io_opt, discard
        let zeroes = Discard::Zeroes;
        let partly = Discard::OldOrZero;
        let table = [
            (4096, 8192, 512, 4096, 4096, 0, zeroes),
            (512, 8192, 512, 512, 0, 0, partly),
            (768, 8192, 256, 256, 0, 0, partly),
            (1, 8192, 1, 1, 0, 0, partly),
            (65536, 5000, 512, 4096, 4096, 65536, partly),
            (0, 1 << 20, 512, 4096, 4096, 65536, zeroes),
        ];
        for (start, size, block, physical, atomic, io_opt, discard) in table {
            let got = window(below(), Offset::new(start).size(size));
            assert_eq!(got.validate(), Ok(()), "{start}+{size}");
            assert_eq!(got.logical_block_size, block, "{start}+{size}");
            assert_eq!(got.physical_block_size, physical, "{start}+{size}");
            assert_eq!(got.atomic_write_unit, atomic, "{start}+{size}");
            assert_eq!(got.io_opt, io_opt, "{start}+{size}");
            assert_eq!(got.discard, discard, "{start}+{size}");
            assert_eq!(got.discard_granularity, 4096);
        }
    }

    #[test]
    fn a_disk_that_ends_inside_a_granule_still_discards_to_its_end() {
        let mut short = below();
        short.size = 10_000;
        assert_eq!(window(short, Offset::new(4096)).discard, Discard::Zeroes);
    }

    #[tokio::test]
    async fn what_a_discard_leaves_is_as_claimed_after_the_disk_below_has_grown() {
        let flags = WriteFlags::empty();
        for offset in [Offset::new(4096), Offset::new(4096).size(904)] {
            let disk = Memory::new(5000).layer(offset).unwrap();
            let disk = Checked::new(disk).unwrap();
            let claim = disk.geometry().discard;
            disk.get_ref().lower.get_ref().resize(10_000);
            let size = disk.geometry().size as usize;
            disk.write(&WriteBuf::new(&vec![7; size]), 0, flags)
                .await
                .unwrap();
            disk.discard(0..size as u64).await.unwrap();
            let mut bytes = vec![1; size];
            disk.read(&mut ReadBuf::new(&mut bytes), 0).await.unwrap();
            let zeroes = bytes.iter().all(|&byte| byte == 0);
            assert!(
                zeroes || claim == Discard::OldOrZero,
                "{offset:?}: {claim:?}"
            );
        }
    }

    #[test]
    fn a_window_outside_the_disk_is_refused_with_the_numbers() {
        let refused = |offset: Offset| {
            let error = Memory::new(1000).layer(offset).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            error.to_string()
        };
        assert_eq!(
            refused(Offset::new(1001)),
            "the window starts at byte 1001, but the disk below has only 1000"
        );
        assert_eq!(
            refused(Offset::new(900).size(101)),
            "the window is 101 bytes long, but only 100 follow byte 900 of the disk below"
        );
        assert_eq!(
            refused(Offset::new(1).size(u64::MAX)),
            "the window is 18446744073709551615 bytes long, but only 999 follow byte 1 of the disk below"
        );
    }

    #[tokio::test]
    async fn a_window_at_any_byte_reads_back_and_leaves_its_neighbours() {
        let disk = Memory::new(64).layer(Offset::new(5).size(20)).unwrap();
        let disk = Checked::new(disk).unwrap();
        let flags = WriteFlags::empty();
        disk.write(&WriteBuf::new(&[7; 20]), 0, flags)
            .await
            .unwrap();
        disk.write_zeroes(3..5, flags).await.unwrap();
        let mut all = [0; 64];
        let memory = disk.get_ref().lower.get_ref();
        memory.read(&mut ReadBuf::new(&mut all), 0).await.unwrap();
        let mut expected = [0; 64];
        expected[5..25].fill(7);
        expected[8..10].fill(0);
        assert_eq!(all, expected);
        let past = disk.write(&WriteBuf::new(&[7]), 20, flags).await;
        assert_eq!(past.unwrap_err().kind(), ErrorKind::OutOfRange);
    }

    #[tokio::test]
    async fn the_window_shrinks_and_grows_with_the_disk_below() {
        let disk = Memory::new(100).layer(Offset::new(40).size(50)).unwrap();
        let memory = disk.lower.get_ref();
        memory.resize(60);
        assert_eq!(Engine::geometry(&disk).size, 20);
        memory.resize(10);
        assert_eq!(Engine::geometry(&disk).size, 0);
        memory.resize(1000);
        assert_eq!(Engine::geometry(&disk).size, 50);
    }
}
