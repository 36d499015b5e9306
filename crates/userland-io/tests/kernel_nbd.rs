//! Block devices by the kernel's NBD client: what is its own among the ways to attach a disk.
#![cfg(all(feature = "attach", target_os = "linux"))]

#[path = "common/need.rs"]
mod need;

use std::fs;
use std::os::unix::fs::FileExt;

use userland_io::attach::{Attached, Builder, Via};
use userland_io::engines::Memory;
use userland_io::transports::kernel_nbd;
use userland_io::{Device, Engine};

/// True if this kernel has what is tested here.
fn is_possible() -> bool {
    let is_there = kernel_nbd::available().is_ok();
    if !is_there {
        need::guest("an NBD client in the kernel");
    }
    is_there
}

async fn attach<E: Engine>(disk: Device<E>) -> Attached {
    Builder::new(disk).via(Via::Nbd).attach().await.unwrap()
}

#[tokio::test]
async fn what_is_written_is_read_back() {
    if !is_possible() {
        return;
    }
    let disk = Device::open(Memory::new(64 << 20)).await.unwrap();
    let mut attached = attach(disk).await;
    // This runtime has one thread, which waits for the device here: nothing of the device's needs it.
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(attached.path())
        .unwrap();
    file.write_all_at(&[7; 70_000], 12_345).unwrap();
    file.sync_all().unwrap();
    let mut back = vec![0; 70_000];
    file.read_exact_at(&mut back, 12_345).unwrap();
    assert!(back.iter().all(|byte| *byte == 7));
    drop(file);
    attached.detach().await.unwrap();
}
