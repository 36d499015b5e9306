//! A disk attached by FUSE and a loop device: what is particular to this way. What all ways have in common is tested elsewhere.
#![cfg(all(feature = "attach", target_os = "linux"))]

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use userland_io::attach::{Attached, Builder, DetachError, Via};
use userland_io::engines::Memory;
use userland_io::{CrashLevel, Device, Engine, Geometry, ReadBuf, Result, WriteBuf, WriteFlags};

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

/// The minor number of the file system that has the file behind `device`.
fn file_system(device: &File) -> u32 {
    const LOOP_GET_STATUS64: libc::c_ulong = 0x4c05;
    // `struct loop_info64`, which begins with the number.
    let mut info = [0_u64; 29];
    // SAFETY: the call writes a `loop_info64`, which has this size.
    let told = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            LOOP_GET_STATUS64 as _,
            info.as_mut_ptr(),
        )
    };
    assert_eq!(told, 0, "{}", std::io::Error::last_os_error());
    assert_eq!(libc::major(info[0]), 0);
    libc::minor(info[0])
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
    let number = format!("0:{}", file_system(&open(&attached)));
    let seen = mounts
        .lines()
        .find(|line| line.split(' ').nth(2) == Some(&number));
    assert_eq!(seen, None);
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

#[tokio::test]
async fn who_takes_it_away_ends_it() {
    let Some(losetup) = need::program("losetup") else {
        return;
    };
    let Some(attached) = attach(Memory::new(1 << 20)).await else {
        return;
    };
    let status = Command::new(losetup)
        .arg("-d")
        .arg(attached.path())
        .status();
    assert!(status.unwrap().success());
    let why = attached.ended().await.unwrap();
    assert!(why.contains("taken"), "{why}");
}

#[tokio::test]
async fn one_that_a_program_has_open_is_left_to_it() {
    let Some(mut attached) = attach(Memory::new(1 << 20)).await else {
        return;
    };
    let file = open(&attached);
    let error = attached.detach().await.unwrap_err();
    assert!(matches!(error, DetachError::InUse { .. }), "{error}");
    file.write_all_at(b"still", 0).unwrap();
    drop(file);
    // Closing it has not taken the device away, as the kernel would have done by then.
    let mut bytes = [0; 5];
    open(&attached).read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"still");
    attached.detach().await.unwrap();
}

#[tokio::test]
async fn large_blocks_are_the_devices_where_it_can_have_them() {
    for (block, theirs) in [(4096, 4096), (65536, 4096)] {
        let memory = Arc::new(Memory::new((1 << 20) + 8191));
        let Some(mut attached) = attach(Blocks(memory.clone(), block)).await else {
            return;
        };
        let told = sysfs(&attached, "queue/logical_block_size");
        assert_eq!(told, theirs.to_string());
        assert_eq!(attached.size(), (1 << 20) + 4096);
        let file = open(&attached);
        file.write_all_at(&[7; 5000], 3000).unwrap();
        file.sync_all().unwrap();
        drop(file);
        attached.detach().await.unwrap();
        let mut bytes = [0; 5002];
        memory
            .read(&mut ReadBuf::new(&mut bytes), 2999)
            .await
            .unwrap();
        assert!(bytes[1..5001].iter().all(|byte| *byte == 7));
        assert_eq!((bytes[0], bytes[5001]), (0, 0));
    }
}

/// A memory of blocks.
struct Blocks(Arc<Memory>, u32);

impl Engine for Blocks {
    fn geometry(&self) -> Geometry {
        let mut geometry = Geometry::writable(self.0.geometry().size, CrashLevel::None);
        geometry.logical_block_size = self.1;
        geometry
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        self.0.read(buf, offset).await
    }
    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        self.0.write(buf, offset, flags).await
    }
}
