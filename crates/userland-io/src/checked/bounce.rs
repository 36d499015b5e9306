//! Requests that do not fit the blocks: through memory of the edge's own.

use std::ops::Range;

use super::{Checked, limit, pieces};
use crate::{AlignedBuf, Engine, Extents, ReadBuf, Result, WriteBuf, WriteFlags};

/// How much is bounced at a time, in bytes, where the limits allow it.
const WINDOW: u64 = 256 << 10;

/// The new bytes of a read-modify-write.
#[derive(Clone, Copy)]
pub(super) enum Source<'a, 'b> {
    Bytes(&'a WriteBuf<'b>),
    Zeroes,
}

impl<E: Engine> Checked<E> {
    fn window(&self) -> u64 {
        // Both are multiples of the block or larger than any window, and a unit is always let through.
        WINDOW.min(limit(self.facts.max_transfer)).max(self.unit())
    }

    fn bounce(&self, len: u64) -> AlignedBuf {
        AlignedBuf::zeroed(len as usize, self.facts.memory_alignment as usize)
    }

    /// Reads the blocks around `range` and hands out what was asked for.
    pub(super) async fn read_unaligned(&self, buf: &mut ReadBuf<'_>, range: Range<u64>) -> Result {
        let rounded = self.round_out(&range);
        let max = self.window();
        let mut memory = self.bounce(max.min(rounded.end - rounded.start));
        for window in pieces(rounded, max, self.unit()) {
            let bytes = &mut memory[..(window.end - window.start) as usize];
            self.engine
                .read(&mut ReadBuf::new(bytes), window.start)
                .await?;
            let wanted = overlap(&window, &range);
            buf.slice(within(&wanted, range.start))
                .copy_from(&bytes[within(&wanted, window.start)]);
        }
        Ok(())
    }

    /// Reads the blocks that `range` covers in part, changes them, and writes all it touches, while
    /// nothing else may mutate them.
    pub(super) async fn modify(
        &self,
        source: Source<'_, '_>,
        range: Range<u64>,
        flags: WriteFlags,
    ) -> Result {
        let rounded = self.round_out(&range);
        let guard = self.lock(rounded.clone(), true).await?;
        let result = self.modify_locked(source, range, rounded, flags).await;
        guard.finish();
        result
    }

    async fn modify_locked(
        &self,
        source: Source<'_, '_>,
        range: Range<u64>,
        rounded: Range<u64>,
        flags: WriteFlags,
    ) -> Result {
        let (max, block) = (self.window(), self.block());
        let mut memory = self.bounce(max.min(rounded.end - rounded.start));
        for window in pieces(rounded, max, self.unit()) {
            let bytes = &mut memory[..(window.end - window.start) as usize];
            let wanted = overlap(&window, &range);
            // The first and the last block of the window, where they are not covered whole.
            let first = window.start..window.end.min(window.start + block);
            let last = (window.end - 1) / block * block..window.end;
            if wanted.start > first.start || wanted.end < first.end {
                self.engine
                    .read(
                        &mut ReadBuf::new(&mut bytes[within(&first, window.start)]),
                        first.start,
                    )
                    .await?;
            }
            if last.start > first.start && wanted.end < last.end {
                self.engine
                    .read(
                        &mut ReadBuf::new(&mut bytes[within(&last, window.start)]),
                        last.start,
                    )
                    .await?;
            }
            let changed = &mut bytes[within(&wanted, window.start)];
            match source {
                Source::Bytes(buf) => buf.slice(within(&wanted, range.start)).copy_to(changed),
                Source::Zeroes => changed.fill(0),
            }
            self.engine
                .write(&WriteBuf::new(bytes), window.start, flags)
                .await?;
        }
        Ok(())
    }
}

/// Copies the runs of `found`, which start at `asked`, to `out` as far as they lie in `wanted`. What the
/// engine did not speak of stays unsaid, but for an engine that said nothing at all.
pub(super) fn trim<K: Copy + PartialEq + Silence>(
    found: &Extents<K>,
    asked: &Range<u64>,
    wanted: &Range<u64>,
    out: &mut Extents<K>,
) {
    let before = out.covered();
    let mut at = asked.start;
    for run in found {
        let end = at.saturating_add(run.len);
        let part = overlap(&(at..end), wanted);
        out.push(part.end - part.start, run.kind);
        at = end;
    }
    // Callers ask again from where the answer ended, so each must make progress.
    if out.covered() == before && !out.is_full() {
        out.push(wanted.end - wanted.start, K::SILENCE);
    }
}

/// What an engine's silence about a range means.
pub(super) trait Silence {
    const SILENCE: Self;
}

impl Silence for crate::ExtentKind {
    const SILENCE: Self = crate::ExtentKind::Data;
}

impl Silence for u64 {
    const SILENCE: Self = 0;
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> Range<u64> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

/// `range` as positions in memory that begins at `base`.
fn within(range: &Range<u64>, base: u64) -> Range<usize> {
    (range.start - base) as usize..(range.end - base) as usize
}
