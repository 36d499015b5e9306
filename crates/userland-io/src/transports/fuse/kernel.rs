//! FUSE file systems of the kernel: made without being seen anywhere, put in a place, and taken away.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{CWD, FileType};
#[cfg(feature = "attach")]
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// Where the kernel's FUSE is.
pub(crate) const DEVICE: &str = "/dev/fuse";
/// What mountinfo calls our file systems.
const TYPE: &str = "fuse.ulio";
/// What mounts for those who may not.
const HELPER: &str = "fusermount3";

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
        Err(Errno::PERM) => unmount_by_helper(path, anyway),
        Err(error) => Err(error.into()),
    }
}

/// True if the uppermost mount at `path`, which may be dead, is one of ours.
pub(super) fn is_ours(path: &Path) -> io::Result<bool> {
    // Nothing is asked of the last part, which would not answer.
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent.canonicalize()?,
        _ => Path::new(".").canonicalize()?,
    };
    let at = parent.join(name);
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    Ok(uppermost(&mounts, &at) == Some(TYPE))
}

/// The type of what was mounted at `at` last, by the lines of mountinfo (proc_pid_mountinfo(5)).
fn uppermost<'a>(mounts: &'a str, at: &Path) -> Option<&'a str> {
    // As the kernel writes it.
    let at = at.to_str()?;
    let at = at.replace('\\', "\\134").replace(' ', "\\040");
    let at = at.replace('\t', "\\011").replace('\n', "\\012");
    let mut found = None;
    for line in mounts.lines() {
        let mut fields = line.split(' ');
        if fields.nth(4) == Some(&at) {
            found = fields.skip_while(|field| *field != "-").nth(1);
        }
    }
    found
}

/// Lets fusermount3, which may do so for anybody, mount a file system of one file on the file `path` of the caller's.
pub(super) fn mount_by_helper(path: &Path, is_read_only: bool) -> io::Result<File> {
    let (ours, its) = UnixStream::pair()?;
    let mut options =
        "fsname=ulio,subtype=ulio,default_permissions,nodev,nosuid,noexec,noatime".to_owned();
    if is_read_only {
        options += ",ro";
    }
    let mut command = Command::new(HELPER);
    // It sends the connection over the socket that it finds at the number told, which is that of its standard input.
    command.env("_FUSE_COMMFD", "0").stdin(OwnedFd::from(its));
    command.arg("-o").arg(options).arg("--").arg(path);
    let output = command.output();
    // Its copy of the other end, which would keep the socket open.
    drop(command);
    let output = output?;
    if !output.status.success() {
        return Err(said(&output));
    }
    let no_connection = || io::Error::other(format!("{HELPER} mounted it, and gave no connection"));
    let connection = receive(&ours).and_then(|connection| connection.ok_or_else(no_connection));
    if connection.is_err() {
        // It is there all the same, and nobody serves it.
        let _ = take_away(path, true);
    }
    connection
}

/// The file that comes with the next byte.
fn receive(socket: &UnixStream) -> io::Result<Option<File>> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [IoSliceMut::new(&mut byte)];
    recvmsg(socket, &mut bytes, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let files = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    });
    Ok(files.map(File::from))
}

/// What fusermount3 complained of.
fn said(output: &Output) -> io::Error {
    let text = String::from_utf8_lossy(&output.stderr);
    let text = text.trim().replace('\n', "; ");
    match text.contains("busy") {
        true => io::Error::new(io::ErrorKind::ResourceBusy, text),
        false if text.is_empty() => io::Error::other(format!("{HELPER} failed")),
        false => io::Error::other(text),
    }
}

/// Asks fusermount3, which may do it for the user who mounted it.
fn unmount_by_helper(path: &Path, anyway: bool) -> io::Result<()> {
    let mut command = Command::new(HELPER);
    command
        .arg(if anyway { "-uz" } else { "-u" })
        .arg("--")
        .arg(path);
    let output = command.stdin(Stdio::null()).output()?;
    match output.status.success() {
        true => Ok(()),
        false => Err(said(&output)),
    }
}

/// Cuts the connection of the FUSE file system with this device number: its requests fail, and no more come.
pub(super) fn cut(device: u64) -> io::Result<()> {
    let minor = rustix::fs::minor(device);
    std::fs::write(format!("/sys/fs/fuse/connections/{minor}/abort"), "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uppermost_mount_is_told_by_its_type() {
        let mounts = "36 35 0:40 / /a\\040b rw,noatime shared:1 - ext4 /dev/sda1 rw\n\
                      37 36 0:41 / /a\\040b rw - fuse.ulio ulio rw\n\
                      38 35 0:42 / /c rw - fuse.ulio ulio rw\n\
                      39 38 0:43 / /c rw master:2 - fuse.sshfs there: rw\n";
        let of = |path: &str| uppermost(mounts, Path::new(path));
        assert_eq!(of("/a b"), Some("fuse.ulio"));
        assert_eq!(of("/c"), Some("fuse.sshfs"));
        assert_eq!(of("/a"), None);
    }
}
