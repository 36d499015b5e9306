//! Where a file has holes.
//!
//! The system is asked where the next hole is, and in some file systems (tmpfs) it then looks at every page up to there, with the
//! file locked: as long as the file, where there is none. So the last run of data that it told of is remembered. That this is still
//! data is always a right answer; what makes holes forgets it, so that it is also a good one. Holes are never remembered:
//! they may be written to. The lock is held during the question, so that of many at once one does the looking.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::image::again;
use super::sys::Calls;
use crate::{ExtentKind, Extents};

/// The last run of data that was found.
#[derive(Debug, Default)]
pub(super) struct KnownData(Mutex<Range<u64>>);

impl KnownData {
    /// True if all of `range` is known to be data. Does not wait.
    pub(super) fn covers(&self, range: &Range<u64>) -> bool {
        let known = self.0.try_lock();
        known.is_ok_and(|known| known.start <= range.start && range.end <= known.end)
    }

    /// To be called once holes were made.
    pub(super) fn forget(&self) {
        *self.lock() = 0..0;
    }

    fn lock(&self) -> MutexGuard<'_, Range<u64>> {
        // Nothing is half done where it could panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Pushes the runs of `range`, as the file system tells them: what it calls a hole reads as zeroes.
/// (It also calls space that was allocated and never written a hole.) Without such knowledge all is data.
pub(super) fn extents(
    calls: &dyn Calls,
    file: &File,
    known: &KnownData,
    range: Range<u64>,
    out: &mut Extents,
) -> io::Result<()> {
    let mut known = known.lock();
    let mut at = range.start;
    while at < range.end && !out.is_full() {
        if !known.contains(&at) {
            match again(|| calls.next_data(file, at))? {
                Some(data) => {
                    let data = data.clamp(at, range.end);
                    out.push(data - at, ExtentKind::Hole);
                    at = data;
                }
                None => {
                    // No data from here on. A file that has been cut short ends before the range does: of what
                    // lies beyond nothing is known.
                    let end = file.metadata()?.len().clamp(at, range.end);
                    out.push(end - at, ExtentKind::Hole);
                    out.push(range.end - end, ExtentKind::Data);
                    return Ok(());
                }
            }
            if at == range.end || out.is_full() {
                break;
            }
            match again(|| calls.next_hole(file, at))? {
                Some(hole) if hole > at => *known = at..hole,
                // The end has moved since: it is data until asked again.
                _ => {
                    out.push(range.end - at, ExtentKind::Data);
                    return Ok(());
                }
            }
        }
        let hole = known.end.min(range.end);
        out.push(hole - at, ExtentKind::Data);
        at = hole;
    }
    Ok(())
}
