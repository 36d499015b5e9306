//! What Linux tells about a block device beside its size and block sizes.

use std::fs::{self, Metadata};
use std::path::{Path, PathBuf};

use super::sys;

/// The limits of a device's queue, from sysfs. Zero or false is what is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Queue {
    /// A spinning disk.
    pub(super) rotational: bool,
    /// The longest discard in bytes; 0: there is none.
    pub(super) max_discard: u64,
    /// In bytes.
    pub(super) discard_granularity: u64,
}

impl Queue {
    /// The queue of the device, or of the disk that the partition is on.
    pub(super) fn of(metadata: &Metadata) -> Queue {
        let device = sysfs(metadata);
        let number = |name: &str| {
            let own = device.join("queue").join(name);
            let disk = device.join("../queue").join(name);
            fs::read_to_string(own)
                .or_else(|_| fs::read_to_string(disk))
                .ok()
                .and_then(|text| text.trim().parse::<u64>().ok())
                .unwrap_or(0)
        };
        Queue {
            rotational: number("rotational") == 1,
            max_discard: number("discard_max_bytes"),
            discard_granularity: number("discard_granularity"),
        }
    }
}

/// Who has the device for himself, in words that follow "is in use: ".
pub(super) fn user(metadata: &Metadata) -> String {
    let name = sys::device_name(metadata);
    if let Some(at) = fs::read_to_string("/proc/self/mountinfo")
        .ok()
        .and_then(|mounts| mounted_at(&mounts, &name))
    {
        return format!("it is mounted at {at}, unmount it first");
    }
    let holders = fs::read_dir(sysfs(metadata).join("holders"));
    if let Some(holder) = holders.ok().and_then(|mut list| list.next()?.ok()) {
        let holder = holder.file_name();
        return format!("{} rests on it", Path::new(&holder).display());
    }
    "a partition of it is mounted, or another program has it for itself".to_owned()
}

/// The first mount point of device `major:minor` (proc(5), /proc/pid/mountinfo: fields 3 and 5).
fn mounted_at(mounts: &str, device: &str) -> Option<String> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(2);
        let (number, at) = (fields.next()?, fields.nth(1)?);
        (number == device).then(|| at.to_owned())
    })
}

/// Symbolic links lead to the device's real place, below its disk if it is a partition.
fn sysfs(metadata: &Metadata) -> PathBuf {
    let link = Path::new("/sys/dev/block").join(sys::device_name(metadata));
    link.canonicalize().unwrap_or(link)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_is_found_by_device_number() {
        let mounts = "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
                      30 22 7:1 / /mnt/a\\040b rw - ext4 /dev/loop1 rw\n";
        assert_eq!(mounted_at(mounts, "7:1").as_deref(), Some("/mnt/a\\040b"));
        assert_eq!(mounted_at(mounts, "7:10"), None);
        assert_eq!(mounted_at("garbage\n\n", "7:1"), None);
    }
}
