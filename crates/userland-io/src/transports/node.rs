//! Nodes of devices in `/dev`: the kernel's own file system there (devtmpfs) or udev has them, and where there is neither,
//! as in many containers, they are made here.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

/// Sees to it that `node` is the node of the device that sysfs has in `device`, a directory with a file `dev`.
///
/// # Errors
/// `NotFound` if there is no such device; else as the system says.
pub(crate) fn ensure(node: &Path, device: &Path, kind: FileType) -> io::Result<()> {
    let text = fs::read_to_string(device.join("dev"))?;
    let number = number(&text).ok_or(io::ErrorKind::InvalidData)?;
    if is(node, number, kind) {
        return Ok(());
    }
    // One that an earlier device of this name has left.
    forget(node)?;
    match mknodat(CWD, node, kind, Mode::RUSR | Mode::WUSR, number) {
        // Somebody was faster.
        Err(rustix::io::Errno::EXIST) if is(node, number, kind) => Ok(()),
        made => made.map_err(io::Error::from),
    }
}

/// Takes `node` away, whose device is gone. Anything but a device's node stays.
pub(crate) fn forget(node: &Path) -> io::Result<()> {
    let is_node = fs::symlink_metadata(node).is_ok_and(|of| {
        let kind = of.file_type();
        kind.is_block_device() || kind.is_char_device()
    });
    match is_node.then(|| fs::remove_file(node)) {
        Some(Err(error)) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Claims a block device for as long as the file is open: nobody else can mount it meanwhile, or claim it.
///
/// It waits while the kernel looks for partitions on the device, and for the last writes of whoever has just closed
/// it; so does closing it. That is for threads on which nothing that serves the device depends.
///
/// # Errors
/// `ResourceBusy` if somebody else has claimed it or a partition of it. Any other says nothing of whether it is used.
pub(crate) fn claim(node: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.custom_flags(libc::O_EXCL | libc::O_NONBLOCK);
    options.read(true).open(node)
}

fn is(node: &Path, number: u64, kind: FileType) -> bool {
    fs::metadata(node)
        .is_ok_and(|of| of.rdev() == number && FileType::from_raw_mode(of.mode()) == kind)
}

/// The number in a file `dev` of sysfs: `major:minor`.
fn number(text: &str) -> Option<u64> {
    let (major, minor) = text.trim_end().split_once(':')?;
    Some(makedev(major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_read_as_sysfs_writes_it() {
        assert_eq!(number("259:1048575\n"), Some(makedev(259, 1_048_575)));
        for text in ["", "259\n", "259:\n", "a:1\n", "-1:0\n"] {
            assert_eq!(number(text), None, "{text:?}");
        }
    }

    #[test]
    fn only_nodes_of_devices_are_taken_away() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "mine").unwrap();
        forget(&file).unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"mine");
        forget(&directory.path().join("nothing")).unwrap();
    }

    #[test]
    fn a_node_is_made_where_there_is_none_and_replaced_where_it_is_another() {
        let directory = tempfile::tempdir().unwrap();
        let device = Path::new("/sys/class/mem/null");
        let zero = Path::new("/sys/class/mem/zero");
        let node = directory.path().join("node");
        match ensure(&node, device, FileType::CharacterDevice) {
            // Not root, or not in the device cgroup: nothing to see here.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            made => made.unwrap(),
        }
        let of = |path: &Path| fs::metadata(path).unwrap().rdev();
        assert_eq!(of(&node), of(Path::new("/dev/null")));
        ensure(&node, zero, FileType::CharacterDevice).unwrap();
        assert_eq!(of(&node), of(Path::new("/dev/zero")));
        forget(&node).unwrap();
        assert!(!node.exists());
    }
}
