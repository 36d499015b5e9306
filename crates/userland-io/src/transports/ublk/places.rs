//! Where the system has a device, and the process that serves it.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use crate::transports::node;

/// The character devices in sysfs.
pub(super) const CHAR_DEVICES: &str = "/sys/class/ublk-char";

/// Takes away the nodes of a device that is gone, where nobody else does.
pub(super) fn forget_nodes(index: u32) {
    let nodes = [
        (block_path(index), block_device(index)),
        (char_path(index), char_device(index)),
    ];
    for (path, device) in nodes {
        if !device.exists()
            && let Err(error) = node::forget(&path)
        {
            tracing::warn!(path = %path.display(), %error, "the node of a device that is gone");
        }
    }
}

/// True if process `pid` is there, and not merely its remains.
pub(super) fn is_alive(pid: i32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    // The state follows the name, which is in brackets and may have any character in it.
    let state = stat
        .rsplit(')')
        .next()
        .and_then(|rest| rest.trim().chars().next());
    !matches!(state, None | Some('Z' | 'X'))
}

/// The block device of an index.
pub(super) fn block_path(index: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{index}"))
}

/// Its directory in sysfs, while it is there.
pub(super) fn block_device(index: u32) -> PathBuf {
    PathBuf::from(format!("/sys/class/block/ublkb{index}"))
}

/// The character device of an index.
pub(super) fn char_path(index: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkc{index}"))
}

/// Its directory in sysfs, while it is there.
pub(super) fn char_device(index: u32) -> PathBuf {
    PathBuf::from(format!("{CHAR_DEVICES}/ublkc{index}"))
}

/// What tells a device from a later one of the same index: the number of its directory in sysfs, which is
/// given but once.
pub(crate) fn identity(index: u32) -> Option<u64> {
    std::fs::metadata(char_device(index))
        .ok()
        .map(|of| of.ino())
}
