//! Windows: plain reads, writes and flushes.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::windows::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::{Calls, Os};

impl Calls for Os {
    fn read(&self, file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        // It moves the file's own position, which nothing here uses.
        match file.seek_read(buf, offset) {
            // ERROR_HANDLE_EOF
            Err(error) if error.raw_os_error() == Some(38) => Ok(0),
            other => other,
        }
    }

    fn write(&self, file: &File, buf: &[u8], offset: u64) -> io::Result<usize> {
        file.seek_write(buf, offset)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        // FlushFileBuffers
        file.sync_all()
    }
}

/// It cannot be told here.
pub(in super::super) fn is_in_memory(_: &File) -> bool {
    false
}

/// How a file is to be opened. What is shared with others is the lock: a writer shares nothing, a
/// reader reading.
pub(in super::super) fn open_options(writable: bool) -> OpenOptions {
    const FILE_SHARE_READ: u32 = 1;
    let mut options = OpenOptions::new();
    options.read(true).write(writable);
    options.share_mode(if writable { 0 } else { FILE_SHARE_READ });
    options
}

/// The unit in which the file system allocates, in bytes: NTFS's default.
pub(in super::super) fn allocation_unit(_: &Metadata) -> u64 {
    4096
}

/// NTFS's journal has directory entries.
pub(in super::super) fn sync_directory(_: &Path) -> io::Result<()> {
    Ok(())
}
