//! Where a file has holes.

use std::fs::File;
use std::io;
use std::ops::Range;

use super::sys::Calls;
use crate::{ExtentKind, Extents};

/// Pushes the runs of `range`, as the file system tells them: what it calls a hole reads as zeroes.
/// (It also calls space that was allocated and never written a hole.) Without such knowledge all is data.
pub(super) fn extents(
    calls: &dyn Calls,
    file: &File,
    range: Range<u64>,
    out: &mut Extents,
) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end && !out.is_full() {
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
        // The end may have moved since; then it is data until asked again.
        let hole = again(|| calls.next_hole(file, at))?.unwrap_or(range.end);
        let hole = match hole.min(range.end) {
            hole if hole > at => hole,
            _ => range.end,
        };
        out.push(hole - at, ExtentKind::Data);
        at = hole;
    }
    Ok(())
}

fn again<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}
