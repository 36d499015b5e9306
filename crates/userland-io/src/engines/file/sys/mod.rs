//! The system calls below the file engine, behind one seam.
//!
//! Everything that touches an open file goes through [`Calls`], one call a method,
//! with no loop and no policy in it: short transfers, `Interrupted` and
//! `Unsupported` come back as they are. Tests put their own `Calls` in front of
//! [`Os`] to inject them, also into what a ring does.
//!
//! What a system does not have is left out, and answers `Unsupported`.

use std::fs::File;
use std::io;

#[cfg(target_os = "linux")]
mod linux;
#[cfg(all(unix, not(target_os = "linux")))]
mod unix;
#[cfg(windows)]
mod windows;

#[cfg(target_os = "linux")]
pub(super) use linux::*;
#[cfg(all(unix, not(target_os = "linux")))]
pub(super) use unix::*;
#[cfg(windows)]
pub(super) use windows::*;

/// The calls of the system this runs on.
#[derive(Debug)]
pub(super) struct Os;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Read,
    Write,
}

/// One method, one system call. Lengths and offsets are bytes.
pub(super) trait Calls: Send + Sync + std::fmt::Debug + 'static {
    /// Reads some bytes; 0 at the end of the file.
    fn read(&self, file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes some bytes.
    fn write(&self, file: &File, buf: &[u8], offset: u64) -> io::Result<usize>;

    /// Makes all that was written durable. A failure is reported once.
    fn sync(&self, file: &File) -> io::Result<()>;

    /// What came of a read or a write that was not made by a method but by a ring.
    #[cfg(target_os = "linux")]
    fn transferred(&self, direction: Direction, result: io::Result<usize>) -> io::Result<usize> {
        let _ = direction;
        result
    }

    /// As `read`, of what needs no waiting; else `WouldBlock`.
    fn read_cached(&self, file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let _ = (file, buf, offset);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// As `write`, as far as it needs no waiting; else `WouldBlock`.
    fn write_cached(&self, file: &File, buf: &[u8], offset: u64) -> io::Result<usize> {
        let _ = (file, buf, offset);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Starts reading a range into the page cache.
    fn prefetch(&self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        let _ = (file, offset, len);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// As `write`, durable when it answers.
    fn write_durable(&self, file: &File, buf: &[u8], offset: u64) -> io::Result<usize> {
        let _ = (file, buf, offset);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Frees the space of a range, which reads as zeroes then; never by writing them out.
    fn punch(&self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        let _ = (file, offset, len);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Zeroes a range, and allocates what of it is not; never by writing it out.
    fn zero(&self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        let _ = (file, offset, len);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Where the next data begins, at or after `from`; `None` if there is none up to the file's end.
    fn next_data(&self, file: &File, from: u64) -> io::Result<Option<u64>> {
        let _ = (file, from);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Where the next hole begins, at or after `from`: the file's end is one. `None` beyond it.
    fn next_hole(&self, file: &File, from: u64) -> io::Result<Option<u64>> {
        let _ = (file, from);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Tells a block device that a range is no longer wanted.
    fn discard_blocks(&self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        let _ = (file, offset, len);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Zeroes a range of a block device without freeing it; the kernel may write it out.
    fn zero_blocks(&self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        let _ = (file, offset, len);
        Err(io::ErrorKind::Unsupported.into())
    }
}
