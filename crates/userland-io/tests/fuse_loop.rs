//! A disk attached by FUSE and a loop device: what is particular to this way. What all ways have in common is tested elsewhere.
#![cfg(all(feature = "attach", target_os = "linux"))]

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use userland_io::attach::{Attached, Builder, Via};
use userland_io::{Device, Engine, engines::Memory};

#[path = "common/need.rs"]
mod need;

/// Attaches `engine`, or tells why it cannot be.
async fn attach<E: Engine>(engine: E) -> Option<Attached> {
    if !rustix::process::geteuid().is_root() {
        need::impossible("only root makes block devices");
        return None;
    }
    if !["/dev/fuse", "/dev/loop-control"]
        .iter()
        .all(|node| Path::new(node).exists())
    {
        need::impossible("this kernel has no FUSE or no loop devices");
        return None;
    }
    let device = Device::open(engine).await.unwrap();
    Some(Builder::new(device).via(Via::Fuse).attach().await.unwrap())
}

fn open(attached: &Attached) -> File {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .open(attached.path())
        .unwrap()
}

/// What sysfs tells of the device.
fn sysfs(attached: &Attached, name: &str) -> String {
    let device = attached.path().file_name().unwrap().to_str().unwrap();
    let text = fs::read_to_string(format!("/sys/block/{device}/{name}"));
    text.unwrap_or_default().trim().to_owned()
}

#[tokio::test]
async fn it_is_there_and_leaves_nothing() {
    let Some(mut attached) = attach(Memory::new((1 << 20) + 700)).await else {
        return;
    };
    assert_eq!(attached.size(), (1 << 20) + 512);
    assert_eq!(sysfs(&attached, "loop/dio"), "1");
    assert_eq!(sysfs(&attached, "queue/rotational"), "0");
    let backing = sysfs(&attached, "loop/backing_file");
    assert!(
        backing.starts_with(&format!("/ulio-{}-", std::process::id())),
        "{backing}"
    );
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let ours = format!("ulio/{}-", std::process::id());
    assert!(!mounts.contains(&ours), "{mounts}");
    let file = open(&attached);
    file.write_all_at(b"hello", 1000).unwrap();
    file.sync_all().unwrap();
    let mut bytes = [0; 7];
    file.read_exact_at(&mut bytes, 999).unwrap();
    assert_eq!(&bytes, b"\0hello\0");
    drop(file);
    attached.detach().await.unwrap();
    assert_eq!(sysfs(&attached, "loop/backing_file"), "");
}
