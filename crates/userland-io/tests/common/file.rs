//! Reading and writing a file engine, and where its files may lie.
#![allow(dead_code)]

use std::ops::Range;
use std::path::Path;
use tempfile::TempDir;
use userland_io::{Engine, ReadBuf, Result, WriteBuf, WriteFlags};

pub(crate) const NONE: WriteFlags = WriteFlags::empty();

pub(crate) async fn read(engine: &impl Engine, range: Range<u64>) -> Result<Vec<u8>> {
    let mut bytes = vec![0xaa; (range.end - range.start) as usize];
    engine
        .read(&mut ReadBuf::new(&mut bytes), range.start)
        .await?;
    Ok(bytes)
}

pub(crate) async fn write(engine: &impl Engine, bytes: &[u8], offset: u64) {
    engine
        .write(&WriteBuf::new(bytes), offset, NONE)
        .await
        .unwrap();
}

/// Directories on the file systems that differ most: a disk's, and (on Linux) one in memory.
pub(crate) fn places() -> Vec<TempDir> {
    let mut places = vec![tempfile::tempdir().unwrap()];
    if Path::new("/dev/shm").is_dir() {
        places.push(tempfile::tempdir_in("/dev/shm").unwrap());
    }
    places
}
