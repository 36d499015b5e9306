//! Unix systems other than Linux: plain reads, writes and flushes.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use super::{Calls, Os};

impl Calls for Os {
    fn read(&self, file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        file.read_at(buf, offset)
    }

    fn write(&self, file: &File, buf: &[u8], offset: u64) -> io::Result<usize> {
        file.write_at(buf, offset)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        // On Apple systems this is F_FULLFSYNC: a plain fsync leaves the bytes in the drive's cache.
        file.sync_all()
    }
}

/// It cannot be told here.
pub(in super::super) fn is_in_memory(_: &File) -> bool {
    false
}

/// How a file is to be opened.
pub(in super::super) fn open_options(writable: bool) -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(writable);
    options
}

/// The unit in which the file system allocates, in bytes.
pub(in super::super) fn allocation_unit(metadata: &Metadata) -> u64 {
    metadata.blksize()
}

/// Makes a new directory entry durable.
pub(in super::super) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}
