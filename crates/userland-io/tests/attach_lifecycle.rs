//! Attached devices come, are used, and go without a trace.
#![cfg(all(feature = "attach", target_os = "linux"))]

use std::os::unix::fs::FileExt;

use userland_io::attach::DetachError;
use userland_io::engines::Memory;

#[path = "common/attach.rs"]
mod attach;
#[path = "common/need.rs"]
mod need;
use attach::{Aligned, attached, detach, direct, open};

const SIZE: u64 = 8 << 20;

#[tokio::test]
async fn a_device_in_use_is_not_detached_and_goes_on() {
    let Some(mut disk) = attached(Memory::new(SIZE)).await else {
        return;
    };
    let claim = open(disk.path(), libc::O_EXCL).unwrap();
    for _ in 0..2 {
        match disk.detach().await {
            Err(DetachError::InUse { path, holders }) => {
                assert_eq!(path, disk.path());
                // This process serves it, and so is not named.
                assert_eq!(holders, []);
            }
            other => panic!("{other:?}"),
        }
        claim.write_all_at(&[7; 512], 4096).unwrap();
        claim.sync_all().unwrap();
    }
    drop(claim);
    let mut block = Aligned::new(512);
    direct(disk.path()).read_exact_at(&mut block, 4096).unwrap();
    assert_eq!(block[..], [7; 512]);
    detach(disk).await;
}
