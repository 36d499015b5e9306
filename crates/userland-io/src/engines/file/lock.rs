//! One writer, or any number of readers: the lock on an image.
//!
//! It hangs on the open file (an OFD lock on Linux, `flock` on other Unix systems, the
//! share mode on Windows), not on the process as POSIX locks do: it lasts until the
//! last reference to the open file is gone, I/O in flight included, and closing
//! another handle to the same file does not drop it.
//!
//! On Linux it keeps QEMU's convention (docs of `file.locking`), so that its tools and
//! this library stop each other: a permission in use is a shared lock on byte 100 + n,
//! one that nobody else may use is a shared lock on byte 200 + n, and who comes later
//! tests the bytes that contradict it. All of them are shared locks, so two who come
//! at the same moment may both be refused, but never both be let in. Byte 0 is locked
//! plainly, shared or exclusive, against programs that lock the whole file.

use std::fs::File;
use std::io;

#[cfg(target_os = "linux")]
pub(super) use linux::{holder, lock};

/// Why a file was not locked.
#[derive(Debug)]
#[cfg_attr(windows, expect(dead_code, reason = "opening the file is the lock"))]
pub(super) enum Refused {
    /// Somebody else's lock is in the way.
    Busy,
    /// It cannot be locked at all.
    Failed(io::Error),
}

/// Locks `file`, exclusively or shared, without waiting.
#[cfg(all(unix, not(target_os = "linux")))]
pub(super) fn lock(file: &File, exclusive: bool) -> Result<(), Refused> {
    flock(file, exclusive)
}

/// On Windows, opening the file was the lock.
#[cfg(windows)]
pub(super) fn lock(_: &File, _: bool) -> Result<(), Refused> {
    Ok(())
}

/// Who but `file` itself holds a lock on the file at the path, as far as this system tells.
#[cfg(not(target_os = "linux"))]
pub(super) fn holder(_: &File, _: &std::path::Path) -> Option<String> {
    None
}

#[cfg(unix)]
fn flock(file: &File, exclusive: bool) -> Result<(), Refused> {
    use rustix::fs::FlockOperation;
    let operation = match exclusive {
        true => FlockOperation::NonBlockingLockExclusive,
        false => FlockOperation::NonBlockingLockShared,
    };
    rustix::fs::flock(file, operation).map_err(|error| match error {
        rustix::io::Errno::WOULDBLOCK => Refused::Busy,
        error => Refused::Failed(error.into()),
    })
}

#[cfg(target_os = "linux")]
mod linux {
    use std::fs::{self, File};
    use std::io;
    use std::ops::Range;
    use std::os::fd::AsRawFd;
    use std::path::Path;

    use super::Refused;

    // QEMU's permissions: consistent read 0, write 1, write unchanged 2, resize 3.
    const HELD: i64 = 100;
    const NOT_SHARED: i64 = 200;

    /// Locks `file`, exclusively or shared, without waiting. A refused one holds nothing.
    pub(in super::super) fn lock(file: &File, exclusive: bool) -> Result<(), Refused> {
        try_lock(file, exclusive).inspect_err(|_| {
            let _ = ofd(file, libc::F_OFD_SETLK, libc::F_UNLCK, 0..NOT_SHARED + 4);
        })
    }

    fn try_lock(file: &File, exclusive: bool) -> Result<(), Refused> {
        let (held, not_shared): (&[i64], &[i64]) = match exclusive {
            true => (&[0, 1, 2, 3], &[0, 1, 2, 3]),
            // Others may read, and write what is there already.
            false => (&[0], &[1, 3]),
        };
        match take(file, 0, exclusive) {
            // A kernel, or a file system, without OFD locks.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                return super::flock(file, exclusive);
            }
            other => refused(other)?,
        }
        for n in held {
            refused(take(file, HELD + n, false))?;
        }
        for n in not_shared {
            refused(take(file, NOT_SHARED + n, false))?;
        }
        for n in held {
            is_free(file, NOT_SHARED + n)?;
        }
        for n in not_shared {
            is_free(file, HELD + n)?;
        }
        Ok(())
    }

    fn refused(result: io::Result<()>) -> Result<(), Refused> {
        result.map_err(|error| match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => Refused::Busy,
            _ => Refused::Failed(error),
        })
    }

    fn take(file: &File, byte: i64, exclusive: bool) -> io::Result<()> {
        let kind = match exclusive {
            true => libc::F_WRLCK,
            false => libc::F_RDLCK,
        };
        ofd(file, libc::F_OFD_SETLK, kind, byte..byte + 1).map(drop)
    }

    /// Refused if anybody else holds even a shared lock on `byte`.
    fn is_free(file: &File, byte: i64) -> Result<(), Refused> {
        match ofd(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte..byte + 1) {
            Ok(found) if found == libc::F_UNLCK as libc::c_short => Ok(()),
            Ok(_) => Err(Refused::Busy),
            Err(error) => refused(Err(error)),
        }
    }

    /// One call of `fcntl`; answers the type of lock that it left in the argument.
    #[cfg(target_pointer_width = "64")]
    fn ofd(
        file: &File,
        command: libc::c_int,
        kind: libc::c_int,
        bytes: Range<i64>,
    ) -> io::Result<libc::c_short> {
        // SAFETY: `flock` consists of integers, for which all zeroes is a value; OFD locks demand `l_pid` 0.
        let mut range: libc::flock = unsafe { std::mem::zeroed() };
        range.l_type = kind as libc::c_short;
        range.l_whence = libc::SEEK_SET as libc::c_short;
        range.l_start = bytes.start;
        range.l_len = bytes.end - bytes.start;
        loop {
            // SAFETY: the descriptor is open, and both commands take a `struct flock`, which `range` is.
            let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut range) };
            if result != -1 {
                return Ok(range.l_type);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// The commands take another struct there: `flock` serves.
    #[cfg(not(target_pointer_width = "64"))]
    fn ofd(_: &File, _: libc::c_int, _: libc::c_int, _: Range<i64>) -> io::Result<libc::c_short> {
        Err(io::ErrorKind::InvalidInput.into())
    }

    /// The process that holds a lock on the file at `path` by another handle than `file`: the kernel names the owners of OFD locks only
    /// in each process's own list of open files, which root sees all of, others their own.
    pub(in super::super) fn holder(file: &File, path: &Path) -> Option<String> {
        let own = Path::new("/proc")
            .join(std::process::id().to_string())
            .join("fd")
            .join(file.as_raw_fd().to_string());
        let path = path.canonicalize().ok()?;
        for process in fs::read_dir("/proc").ok()?.flatten() {
            let name = process.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            let Ok(open_files) = fs::read_dir(process.path().join("fd")) else {
                continue;
            };
            for open_file in open_files.flatten() {
                if open_file.path() != own
                    && fs::read_link(open_file.path()).is_ok_and(|target| target == path)
                    && fs::read_to_string(process.path().join("fdinfo").join(open_file.file_name()))
                        .is_ok_and(|info| info.contains("lock:"))
                {
                    if pid == std::process::id() {
                        return Some(format!("this process (pid {pid})"));
                    }
                    let command = fs::read_to_string(process.path().join("comm"));
                    let command = command.as_deref().map_or("a process", str::trim);
                    return Some(format!("{command} (pid {pid})"));
                }
            }
        }
        None
    }
}
