//! Linux.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{Advice, FallocateFlags, SeekFrom, StatxFlags};
use rustix::io::{Errno, ReadWriteFlags};
use rustix::ioctl::{Getter, Opcode, Setter, ioctl, opcode};

use super::{Calls, Os};

impl Calls for Os {
    fn read(&self, file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        file.read_at(buf, offset)
    }

    fn write(&self, file: &File, buf: &[u8], offset: u64) -> io::Result<usize> {
        file.write_at(buf, offset)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(file)?)
    }

    // Seen on Linux 6.18: ext4 and block devices read so, short if only the first part is cached, and refuse to
    // write so (EOPNOTSUPP); tmpfs refuses both.
    fn read_cached(&self, file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let bufs = &mut [IoSliceMut::new(buf)];
        Ok(rustix::io::preadv2(
            file,
            bufs,
            offset,
            ReadWriteFlags::NOWAIT,
        )?)
    }

    fn write_cached(&self, file: &File, buf: &[u8], offset: u64) -> io::Result<usize> {
        let bufs = &[IoSlice::new(buf)];
        Ok(rustix::io::pwritev2(
            file,
            bufs,
            offset,
            ReadWriteFlags::NOWAIT,
        )?)
    }

    fn write_durable(&self, file: &File, buf: &[u8], offset: u64) -> io::Result<usize> {
        let bufs = &[IoSlice::new(buf)];
        Ok(rustix::io::pwritev2(
            file,
            bufs,
            offset,
            ReadWriteFlags::DSYNC,
        )?)
    }

    fn prefetch(&self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        let len = NonZeroU64::new(len);
        Ok(rustix::fs::fadvise(file, offset, len, Advice::WillNeed)?)
    }

    fn punch(&self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(file, mode, offset, len)?)
    }

    fn zero(&self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        let mode = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(file, mode, offset, len)?)
    }

    fn next_data(&self, file: &File, from: u64) -> io::Result<Option<u64>> {
        seek(file, SeekFrom::Data(from))
    }

    fn next_hole(&self, file: &File, from: u64) -> io::Result<Option<u64>> {
        seek(file, SeekFrom::Hole(from))
    }

    fn discard_blocks(&self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        const BLKDISCARD: Opcode = opcode::none(0x12, 119);
        // SAFETY: BLKDISCARD (linux/fs.h) reads two u64, start and length in bytes, from its argument.
        unsafe {
            let call = Setter::<BLKDISCARD, [u64; 2]>::new([offset, len]);
            Ok(ioctl(file, call)?)
        }
    }

    fn zero_blocks(&self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        const BLKZEROOUT: Opcode = opcode::none(0x12, 127);
        // SAFETY: BLKZEROOUT (linux/fs.h) reads two u64, start and length in bytes, from its argument.
        unsafe {
            let call = Setter::<BLKZEROOUT, [u64; 2]>::new([offset, len]);
            Ok(ioctl(file, call)?)
        }
    }
}

/// The file's own position moves, which nothing here uses.
fn seek(file: &File, to: SeekFrom) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, to) {
        Ok(at) => Ok(Some(at)),
        Err(Errno::NXIO) => Ok(None),
        // A file system, or a file, without such seeks.
        Err(Errno::INVAL) => Err(io::ErrorKind::Unsupported.into()),
        Err(error) => Err(error.into()),
    }
}

/// How a file is to be opened.
pub(in super::super) fn open_options(writable: bool, direct: bool, exclusive: bool) -> OpenOptions {
    let mut flags = 0;
    if direct {
        flags |= rustix::fs::OFlags::DIRECT.bits();
    }
    if exclusive {
        flags |= rustix::fs::OFlags::EXCL.bits();
    }
    let mut options = OpenOptions::new();
    options.read(true).write(writable);
    options.custom_flags(flags.cast_signed());
    options
}

/// True if both are the same file.
pub(in super::super) fn is_same(a: &Metadata, b: &Metadata) -> bool {
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

/// The unit in which the file system allocates, in bytes.
pub(in super::super) fn allocation_unit(metadata: &Metadata) -> u64 {
    metadata.blksize()
}

/// No read-ahead: for a handle that only serves a small part of the file.
pub(in super::super) fn advise_random(file: &File) {
    let _ = rustix::fs::fadvise(file, 0, None, Advice::Random);
}

/// Makes a new directory entry durable.
pub(in super::super) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// What direct I/O to a file must be aligned to, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum DirectAlignment {
    Known {
        memory: u32,
        offset: u32,
    },
    /// The kernel knows that this file cannot do it.
    Impossible,
    Unknown,
}

/// Asks the kernel (`STATX_DIOALIGN`, Linux 6.1).
pub(in super::super) fn direct_alignment(file: &File) -> DirectAlignment {
    let flags = rustix::fs::AtFlags::EMPTY_PATH;
    match rustix::fs::statx(file, c"", flags, StatxFlags::DIOALIGN) {
        Ok(stat) if stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 => {
            match (stat.stx_dio_mem_align, stat.stx_dio_offset_align) {
                (0, _) | (_, 0) => DirectAlignment::Impossible,
                (memory, offset) => DirectAlignment::Known { memory, offset },
            }
        }
        _ => DirectAlignment::Unknown,
    }
}

/// True if the file's own file system makes a write with `RWF_DSYNC` durable. The flag says so
/// everywhere; but where another party does the writing (FUSE, network), it may drop it.
pub(in super::super) fn honours_durable_writes(file: &File) -> bool {
    const EXT: u32 = 0xef53;
    const XFS: u32 = 0x5846_5342;
    const BTRFS: u32 = 0x9123_683e;
    const F2FS: u32 = 0xf2f5_2010;
    [EXT, XFS, BTRFS, F2FS].contains(&file_system(file))
}

/// True if the file system keeps its bytes in memory only: reads and writes are copies, and no sync makes them last.
pub(in super::super) fn is_in_memory(file: &File) -> bool {
    const TMPFS: u32 = 0x0102_1994;
    const RAMFS: u32 = 0x8584_58f6;
    [TMPFS, RAMFS].contains(&file_system(file))
}

/// The magic number of the file system that holds `file`, 0 if it cannot be told.
fn file_system(file: &File) -> u32 {
    // All of them are 32 bits, which some systems keep in more, or with a sign.
    rustix::fs::fstatfs(file).map_or(0, |stat| stat.f_type as u32)
}

/// A block device's length in bytes.
pub(in super::super) fn device_size(file: &File) -> io::Result<u64> {
    const BLKGETSIZE64: Opcode = opcode::read::<usize>(0x12, 114);
    // SAFETY: BLKGETSIZE64 (linux/fs.h) writes a u64, whatever the `size_t` in its number.
    unsafe { Ok(ioctl(file, Getter::<BLKGETSIZE64, u64>::new())?) }
}

/// A block device's logical and physical block size in bytes.
pub(in super::super) fn device_blocks(file: &File) -> io::Result<(u32, u32)> {
    Ok((
        rustix::fs::ioctl_blksszget(file)?,
        rustix::fs::ioctl_blkpbszget(file)?,
    ))
}

/// A device number as sysfs has it in names: `major:minor`.
pub(in super::super) fn device_name(metadata: &Metadata) -> String {
    let number = metadata.rdev();
    format!(
        "{}:{}",
        rustix::fs::major(number),
        rustix::fs::minor(number)
    )
}
