//! Direct I/O: what it must be aligned to, and who serves an odd tail.
//!
//! The kernel tells the alignment (`STATX_DIOALIGN`), or the device does, or trial
//! reads find it. Where the file's size is no multiple of it, the end cannot be
//! reached by direct I/O: from [`tail_start`] on, a second, buffered handle serves it.
//!
//! The two handles never meet in one page. The tail starts on a boundary that is a
//! multiple of every page size and of the file system's block, all requests are split
//! there, and read-ahead is off for the buffered handle; so no page of the cache holds
//! bytes that go past it, none can be stale, and writing back a dirty page cannot undo a
//! direct write beside it. One `fdatasync` covers both: they are one inode.

use std::fs::File;
use std::io;

use super::sys::{Calls, DirectAlignment, direct_alignment};
use crate::{AlignedBuf, Geometry};

/// What memory and offsets must be multiples of, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    pub(super) memory: u32,
    pub(super) offset: u32,
}

/// No page is larger, on any system that Linux runs on with 64 bits or less.
const MAX_PAGE: u64 = 64 << 10;
/// What no disk refuses.
const SAFE: u32 = 4096;

/// The alignment of `file`, which is open for direct I/O; `None` if it cannot do any.
pub(super) fn alignment(
    calls: &dyn Calls,
    file: &File,
    device_block: Option<u32>,
) -> io::Result<Option<Alignment>> {
    let offset = match direct_alignment(file) {
        DirectAlignment::Known { memory, offset } => {
            let known = Alignment { memory, offset };
            let fits = |n: u32| n.is_power_of_two() && n <= Geometry::MAX_LOGICAL_BLOCK;
            return Ok((fits(memory) && fits(offset)).then_some(known));
        }
        DirectAlignment::Impossible => return Ok(None),
        DirectAlignment::Unknown => match device_block {
            Some(block) => Some(block),
            None => probe(|len| {
                let mut buf = AlignedBuf::zeroed(len as usize, SAFE as usize);
                calls.read(file, &mut buf, 0).map(drop)
            })?,
        },
    };
    Ok(offset.map(|offset| Alignment {
        memory: SAFE.max(offset),
        offset,
    }))
}

/// Finds the smallest length that `read` does not refuse.
fn probe(mut read: impl FnMut(u32) -> io::Result<()>) -> io::Result<Option<u32>> {
    let mut accepts = |len| loop {
        match read(len) {
            Ok(()) => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    };
    // Some file systems check nothing where there is a hole, or nothing at all: then a trial shows nothing.
    if accepts(1)? {
        return Ok(Some(SAFE));
    }
    for len in [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536] {
        if accepts(len)? {
            return Ok(Some(len));
        }
    }
    Ok(None)
}

/// Where the part begins that the buffered handle serves: `size` if there is none.
pub(super) fn tail_start(size: u64, block: u32, allocation_unit: u64) -> u64 {
    if size.is_multiple_of(u64::from(block)) {
        return size;
    }
    let unit = match allocation_unit {
        unit if unit.is_power_of_two() => unit.max(MAX_PAGE),
        _ => MAX_PAGE,
    };
    let unit = unit.max(u64::from(block));
    size - size % unit
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk_of(block: u32) -> impl FnMut(u32) -> io::Result<()> {
        move |len| match len.is_multiple_of(block) {
            true => Ok(()),
            false => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    #[test]
    fn trial_reads_find_the_block() {
        assert_eq!(probe(disk_of(512)).unwrap(), Some(512));
        assert_eq!(probe(disk_of(4096)).unwrap(), Some(4096));
        assert_eq!(probe(disk_of(1 << 20)).unwrap(), None);
        assert_eq!(
            probe(disk_of(1)).unwrap(),
            Some(SAFE),
            "a trial that shows nothing"
        );
        assert!(probe(|_| Err(io::Error::from_raw_os_error(5))).is_err());
    }

    #[test]
    fn the_tail_shares_no_page_with_the_rest() {
        assert_eq!(tail_start(1 << 20, 512, 4096), 1 << 20);
        assert_eq!(tail_start((1 << 20) + 1, 512, 4096), 1 << 20);
        assert_eq!(
            tail_start((1 << 20) - 1, 4096, 4096),
            (1 << 20) - (64 << 10)
        );
        assert_eq!(tail_start(100, 512, 4096), 0);
        assert_eq!(tail_start((3 << 20) - 1, 512, 1 << 20), 2 << 20);
    }
}
