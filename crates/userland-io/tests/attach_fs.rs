//! A file system on an attached device: made, used, grown while it is mounted, and clean afterwards.
#![cfg(all(feature = "attach", target_os = "linux"))]

use std::fs;
use std::path::Path;

use userland_io::engines::Memory;

#[path = "common/attach.rs"]
mod attach;
#[path = "common/clients.rs"]
mod clients;
#[path = "common/mounted.rs"]
mod mounted;
#[path = "common/need.rs"]
mod need;
use attach::{attached_as, detach, opened, resized};
use clients::succeed;
use mounted::Mounted;

const MIB: u64 = 1 << 20;

#[tokio::test]
async fn a_tree_that_is_copied_to_ext4_comes_back_and_trimming_gives_memory_back() {
    let programs = ["mkfs.ext4", "e2fsck", "cp", "diff", "fstrim"].map(need::program);
    let [Some(mkfs), Some(e2fsck), Some(cp), Some(diff), Some(fstrim)] = programs else {
        return;
    };
    let device = opened(Memory::new(64 * MIB)).await;
    let Some(disk) = attached_as(&device, |builder| builder).await else {
        return;
    };
    let path = disk.path().to_str().unwrap();
    succeed(&mkfs, &["-q", "-F", path]);
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src");
    for _ in 0..2 {
        let mounted = Mounted::new(disk.path());
        let to = mounted.path().join("src");
        let to = to.to_str().unwrap();
        if !Path::new(to).exists() {
            succeed(&cp, &["-r", source, to]);
        }
        succeed(&diff, &["-r", source, to]);
    }
    succeed(&e2fsck, &["-f", "-n", path]);

    let mounted = Mounted::new(disk.path());
    let big = mounted.path().join("big");
    fs::write(&big, vec![7; 24 * MIB as usize]).unwrap();
    fs::File::open(&big).unwrap().sync_all().unwrap();
    let full = device.get_ref().allocated();
    assert!(full >= 24 * MIB, "{full}");
    fs::remove_file(&big).unwrap();
    // What was removed is free for a trim when the journal has it.
    rustix::fs::sync();
    succeed(&fstrim, &[mounted.path().to_str().unwrap()]);
    let trimmed = device.get_ref().allocated();
    assert!(
        trimmed < full - 20 * MIB,
        "{full} bytes, and {trimmed} after fstrim"
    );
    drop(mounted);
    succeed(&e2fsck, &["-f", "-n", path]);
    detach(disk).await;
}

/// True if this process may do to a mounted file system what resize2fs does.
fn may_grow() -> bool {
    const CAP_SYS_RESOURCE: u32 = 24;
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = u64::from_str_radix(effective.unwrap().trim(), 16).unwrap();
    effective & (1 << CAP_SYS_RESOURCE) != 0
}

#[tokio::test]
async fn a_mounted_ext4_grows_with_its_disk() {
    let programs = ["mkfs.ext4", "e2fsck", "resize2fs"].map(need::program);
    let [Some(mkfs), Some(e2fsck), Some(resize2fs)] = programs else {
        return;
    };
    let device = opened(Memory::new(16 * MIB)).await;
    let Some(disk) = attached_as(&device, |builder| builder).await else {
        return;
    };
    let path = disk.path().to_str().unwrap();
    succeed(&mkfs, &["-q", "-F", "-b", "4096", path]);
    let mounted = Mounted::new(disk.path());
    fs::write(mounted.path().join("before"), [1; 5000]).unwrap();
    let file = mounted.path().join("file");
    let bytes = vec![3; 24 * MIB as usize];
    assert!(fs::write(&file, &bytes).is_err(), "24 MiB fit into 16");
    fs::remove_file(&file).unwrap();

    device.get_ref().resize(48 * MIB);
    assert_eq!(resized(&disk, 16 * MIB).await, 48 * MIB);
    if may_grow() {
        succeed(&resize2fs, &[path]);
        fs::write(&file, &bytes).unwrap();
    } else {
        need::impossible("this user may not grow a file system that is mounted (CAP_SYS_RESOURCE)");
    }
    assert_eq!(fs::read(mounted.path().join("before")).unwrap(), [1; 5000]);
    drop(mounted);
    succeed(&e2fsck, &["-f", "-n", path]);
    detach(disk).await;
}
