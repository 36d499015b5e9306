//! The file system of one file, as the kernel asks for it.
//!
//! The file is the root itself (a mount on a file), or has a name in a root directory that nobody lists.
//! It behaves as much like a block device as a file can: its size is the disk's, cannot be set, and to open it for truncation
//! changes nothing. What takes the engine goes through [`Requests`]; all else is answered at once.

use std::ffi::{OsStr, OsString};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite,
};

use super::requests::Requests;
use super::serve::Request;
use crate::{Device, Engine, Features, Geometry, WriteFlags};

/// The longest read or write, in bytes: 256 pages, what the kernel does unless it is told otherwise.
const MAX_TRANSFER: usize = 1 << 20;
/// What an inode of the only file is called where there is a directory, which then is the root.
const NAMED: INodeNo = INodeNo(2);
/// Sizes change without the kernel knowing, so it keeps none.
const NO_TIME: Duration = Duration::ZERO;
/// Handles of files that were opened for writing.
const WRITABLE: FileHandle = FileHandle(1);

/// A disk as a file.
pub(super) struct DiskFile<E> {
    pub(super) device: Device<E>,
    pub(super) requests: Requests,
    /// `None`: the file is the root.
    pub(super) name: Option<OsString>,
    /// The file's size is a multiple of this, in bytes.
    pub(super) block: u64,
    pub(super) depth: u16,
    pub(super) modified: Modified,
}

/// When the file was last written to, to the second.
pub(super) struct Modified(AtomicU64);

impl Modified {
    pub(super) fn now() -> Self {
        Modified(AtomicU64::new(seconds()))
    }

    fn touch(&self) {
        let now = seconds();
        // The cores share the line for as long as nobody writes it.
        if self.0.load(Ordering::Relaxed) != now {
            self.0.store(now, Ordering::Relaxed);
        }
    }

    fn get(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.0.load(Ordering::Relaxed))
    }
}

fn seconds() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

impl<E: Engine> DiskFile<E> {
    fn inode(&self) -> INodeNo {
        match self.name {
            Some(_) => NAMED,
            None => INodeNo::ROOT,
        }
    }

    fn size(&self, geometry: &Geometry) -> u64 {
        geometry.size - geometry.size % self.block
    }

    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let geometry = self.device.geometry();
        let is_file = inode == self.inode();
        if !is_file && inode != INodeNo::ROOT {
            return None;
        }
        let (kind, size, perm) = match is_file {
            true if geometry.is_read_only() => (FileType::RegularFile, self.size(&geometry), 0o400),
            true => (FileType::RegularFile, self.size(&geometry), 0o600),
            false => (FileType::Directory, 0, 0o500),
        };
        let modified = self.modified.get();
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size.div_ceil(512),
            atime: modified,
            mtime: modified,
            ctime: modified,
            crtime: modified,
            kind,
            perm,
            nlink: 1,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            rdev: 0,
            blksize: geometry.physical_block().max(4096),
            flags: 0,
        })
    }

    /// How many of `len` bytes from `offset` lie in the file.
    fn inside(&self, offset: u64, len: usize) -> usize {
        let left = self.size(&self.device.geometry()).saturating_sub(offset);
        left.min(len as u64) as usize
    }
}

impl<E: Engine> Filesystem for DiskFile<E> {
    fn init(&mut self, _: &fuser::Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = [
            // Without it a loop device has one request under way at a time.
            InitFlags::FUSE_ASYNC_DIO,
            // To open for truncation is then left to this file, which does nothing.
            InitFlags::FUSE_ATOMIC_O_TRUNC,
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
        ];
        for flag in wanted {
            // What an old kernel has not, works less well without.
            let _ = config.add_capabilities(flag);
        }
        let _ = config.set_max_write(MAX_TRANSFER as u32);
        let _ = config.set_max_background(self.depth);
        let _ = config.set_congestion_threshold(self.depth);
        Ok(())
    }

    fn lookup(&self, _: &fuser::Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let is_it = parent == INodeNo::ROOT && self.name.as_deref() == Some(name);
        match self.attributes(NAMED).filter(|_| is_it) {
            Some(attributes) => reply.entry(&NO_TIME, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &fuser::Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode) {
            Some(attributes) => reply.attr(&NO_TIME, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    /// Times are taken note of nowhere; all else is as it is.
    fn setattr(
        &self,
        _: &fuser::Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<fuser::TimeOrNow>,
        _: Option<fuser::TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let Some(attributes) = self.attributes(inode) else {
            return reply.error(Errno::ENOENT);
        };
        let fits = size.is_none_or(|size| size == attributes.size)
            && mode.is_none_or(|mode| mode & 0o7777 == attributes.perm.into())
            && uid.is_none_or(|uid| uid == attributes.uid)
            && gid.is_none_or(|gid| gid == attributes.gid);
        match fits {
            true => reply.attr(&NO_TIME, &attributes),
            false => reply.error(Errno::EPERM),
        }
    }

    fn open(&self, _: &fuser::Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if inode != self.inode() {
            return reply.error(Errno::EISDIR);
        }
        // No cache but the caller's: a disk has one already, or wants none.
        let direct = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        match flags.acc_mode() {
            OpenAccMode::O_RDONLY => {
                reply.opened(FileHandle(0), direct | FopenFlags::FOPEN_NOFLUSH)
            }
            _ if self.device.geometry().is_read_only() => reply.error(Errno::EROFS),
            _ => reply.opened(WRITABLE, direct),
        }
    }

    fn read(
        &self,
        _: &fuser::Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        len: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let len = len as usize;
        match self.inside(offset, len) {
            0 => reply.data(&[]),
            _ if len > MAX_TRANSFER => reply.error(Errno::EINVAL),
            len => {
                let request = Request::Read { offset, len, reply };
                self.requests.start(len, &[], request);
            }
        }
    }

    fn write(
        &self,
        _: &fuser::Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        bytes: &[u8],
        _: fuser::WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let flags = match flags.0 & libc::O_DSYNC {
            0 => WriteFlags::empty(),
            _ => WriteFlags::FUA,
        };
        match self.inside(offset, bytes.len()) {
            _ if bytes.is_empty() => reply.written(0),
            // As a block device answers.
            0 => reply.error(Errno::ENOSPC),
            _ if bytes.len() > MAX_TRANSFER => reply.error(Errno::EINVAL),
            len => {
                self.modified.touch();
                let request = Request::Write {
                    offset,
                    len,
                    flags,
                    reply,
                };
                self.requests.start(len, &bytes[..len], request);
            }
        }
    }

    /// At each close of a file that was opened for writing.
    fn flush(
        &self,
        _: &fuser::Request,
        _: INodeNo,
        handle: FileHandle,
        _: LockOwner,
        reply: ReplyEmpty,
    ) {
        match handle == WRITABLE {
            true => self.requests.start(0, &[], Request::Flush { reply }),
            false => reply.ok(),
        }
    }

    fn fsync(&self, _: &fuser::Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.requests.start(0, &[], Request::Flush { reply });
    }

    fn fallocate(
        &self,
        _: &fuser::Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        len: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let geometry = self.device.geometry();
        let size = self.size(&geometry);
        let end = offset.saturating_add(len);
        let beyond = end > size;
        let has_zeroes = geometry.features.contains(Features::WRITE_ZEROES);
        let (range, flags) = match mode & !libc::FALLOC_FL_KEEP_SIZE {
            // A hole reads as zeroes, and the caller may mean just that: so it is no discard. Where zeroes would have to be
            // written out it is refused, since who trims a disk does not want it written from end to end.
            libc::FALLOC_FL_PUNCH_HOLE if has_zeroes => {
                (offset.min(size)..end.min(size), WriteFlags::empty())
            }
            libc::FALLOC_FL_ZERO_RANGE if !beyond => (offset..end, WriteFlags::NO_UNMAP),
            libc::FALLOC_FL_ZERO_RANGE => return reply.error(Errno::ENOSPC),
            _ => return reply.error(Errno::EOPNOTSUPP),
        };
        if range.is_empty() {
            return reply.ok();
        }
        self.modified.touch();
        let request = Request::Zeroes {
            range,
            flags,
            reply,
        };
        self.requests.start(0, &[], request);
    }

    fn lseek(
        &self,
        _: &fuser::Request,
        _: INodeNo,
        _: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let size = self.size(&self.device.geometry());
        let data = match whence {
            libc::SEEK_DATA => true,
            libc::SEEK_HOLE => false,
            _ => return reply.error(Errno::EINVAL),
        };
        match u64::try_from(offset) {
            Ok(from) if from < size => {
                let range = from..size;
                let request = Request::Seek { range, data, reply };
                self.requests.start(0, &[], request);
            }
            _ => reply.error(Errno::ENXIO),
        }
    }

    fn statfs(&self, _: &fuser::Request, _: INodeNo, reply: ReplyStatfs) {
        let geometry = self.device.geometry();
        // A loop device trims in these units.
        let unit = geometry.discard_granule().max(512);
        let blocks = geometry.size / u64::from(unit);
        reply.statfs(blocks, 0, 0, 1, 0, unit, 255, unit);
    }
}
