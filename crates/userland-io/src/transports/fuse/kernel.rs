//! FUSE file systems of the kernel: made without being seen anywhere, put in a place, and taken away.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
};

/// Where the kernel's FUSE is.
pub(crate) const DEVICE: &str = "/dev/fuse";

/// A file system that has a connection, and is in no place yet. It goes when this and all its open files are closed.
pub(crate) struct FileSystem {
    /// What the kernel's requests are read from.
    pub(crate) connection: File,
    mount: OwnedFd,
}

impl FileSystem {
    /// Makes one whose root is a directory, or else a file. Takes root.
    pub(crate) fn new(root_is_directory: bool, is_read_only: bool) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let connection = options.read(true).write(true).open(DEVICE);
        let connection = connection
            .map_err(|error| io::Error::new(error.kind(), format!("{DEVICE}: {error}")))?;
        let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let context = context.as_fd();
        let set = |key: &str, value: &str| fsconfig_set_string(context, key, value);
        let root = match root_is_directory {
            true => FileType::Directory,
            false => FileType::RegularFile,
        };
        set("source", "ulio")?;
        set("subtype", "ulio")?;
        set("fd", &connection.as_raw_fd().to_string())?;
        set("rootmode", &format!("{:o}", root.as_raw_mode()))?;
        set("user_id", &rustix::process::geteuid().as_raw().to_string())?;
        set("group_id", &rustix::process::getegid().as_raw().to_string())?;
        fsconfig_set_flag(context, "default_permissions")?;
        let mut attributes = MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NOEXEC
            | MountAttrFlags::MOUNT_ATTR_NOATIME;
        if is_read_only {
            fsconfig_set_flag(context, "ro")?;
            attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
        }
        fsconfig_create(context)?;
        let mount = fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        Ok(FileSystem { connection, mount })
    }

    /// Its connection, and the mount.
    pub(crate) fn into_parts(self) -> (File, OwnedFd) {
        (self.connection, self.mount)
    }
}

/// Opens for reading and perhaps writing the file `name` in the root of `mount`, which may be in no place.
#[cfg(feature = "attach")]
pub(crate) fn open_in(mount: BorrowedFd<'_>, name: &Path, write: bool) -> io::Result<File> {
    let access = if write { OFlags::RDWR } else { OFlags::RDONLY };
    let file = rustix::fs::openat(mount, name, access | OFlags::CLOEXEC, Mode::empty())?;
    Ok(file.into())
}

/// Puts `mount` in its place.
pub(super) fn put(mount: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(move_mount(mount, "", CWD, path, flags)?)
}

/// Takes away what is mounted at `path`. In use: `ResourceBusy`, unless `anyway`; its users get errors then.
pub(super) fn take_away(path: &Path, anyway: bool) -> io::Result<()> {
    let flags = match anyway {
        // The first cuts the connection, the second takes the mount out of sight.
        true => {
            let _ = unmount(path, UnmountFlags::FORCE);
            UnmountFlags::DETACH
        }
        false => UnmountFlags::NOFOLLOW,
    };
    match unmount(path, flags) {
        // Nothing is mounted there, any more.
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(Errno::PERM) => helper(path, anyway),
        Err(error) => Err(error.into()),
    }
}

/// Asks fusermount3, which may do it for the user who mounted it.
fn helper(path: &Path, anyway: bool) -> io::Result<()> {
    let mut command = Command::new("fusermount3");
    command
        .arg(if anyway { "-uz" } else { "-u" })
        .arg("--")
        .arg(path);
    let output = command.stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    match output.status.success() {
        true => Ok(()),
        false if said.contains("busy") => Err(io::ErrorKind::ResourceBusy.into()),
        false => Err(io::Error::other(said.trim().replace('\n', "; "))),
    }
}

/// Cuts the connection of the FUSE file system with this device number: its requests fail, and no more come.
pub(super) fn cut(device: u64) -> io::Result<()> {
    let minor = rustix::fs::minor(device);
    std::fs::write(format!("/sys/fs/fuse/connections/{minor}/abort"), "1")
}
