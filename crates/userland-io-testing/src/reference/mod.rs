//! Three engines, one for each thing a disk can promise about crashes, written to be read.
//!
//! * [`SyncDisk`] claims [`CrashLevel::Sync`](userland_io::CrashLevel::Sync): every mutation is durable when it answers.
//! * [`MapDisk`] claims [`CrashLevel::Flush`](userland_io::CrashLevel::Flush): a map in memory says where each block is; a flush writes it.
//! * [`LogDisk`] claims [`CrashLevel::Prefix`](userland_io::CrashLevel::Prefix): mutations are appended to a log, and a crash cuts its end off.
//!
//! All keep their bytes on another engine, so that the simulated disk can be that engine. They take
//! one request at a time and give up speed for clarity wherever the two compete. Each says in its module how it stays legal
//! when a crash, an error or a dropped future comes at the worst moment.

mod log_disk;
mod map_disk;
mod sync_disk;

pub use log_disk::LogDisk;
pub use map_disk::MapDisk;
pub use sync_disk::SyncDisk;

use userland_io::{Error, ErrorKind};

/// A checksum for what these engines write (64-bit FNV-1a, good enough to tell torn from whole).
fn checksum(parts: &[&[u8]]) -> u64 {
    let bytes = parts.iter().flat_map(|part| part.iter());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn too_small(what: &str) -> Error {
    Error::new(
        ErrorKind::Invalid,
        format!("the disk below is too small for {what}"),
    )
}
