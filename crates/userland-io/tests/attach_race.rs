//! Somebody who comes to use a device just when it is to go: in a program of its own, since another test's next device may have
//! the same path.
#![cfg(all(feature = "attach", target_os = "linux"))]

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use userland_io::attach::DetachError;
use userland_io::engines::Memory;

#[path = "common/attach.rs"]
mod attach;
#[path = "common/need.rs"]
mod need;
use attach::{Aligned, PATIENCE, attached, is_free, open};

const SIZE: u64 = 8 << 20;

/// Whoever has claimed a device, and could use it, can use it until they let go.
#[tokio::test]
async fn nobody_can_come_between_the_look_and_the_end() {
    for _ in 0..10 {
        let Some(mut disk) = attached(Memory::new(SIZE)).await else {
            return;
        };
        let is_over = Arc::new(AtomicBool::new(false));
        let (path, over) = (disk.path().to_owned(), is_over.clone());
        let (tell, told) = mpsc::channel();
        let user = thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_micros(500));
                if is_free(&path) {
                    continue;
                }
                let Ok(claim) = open(&path, libc::O_EXCL | libc::O_DIRECT) else {
                    continue;
                };
                let mut block = Aligned::new(512);
                // It may have been going when it was claimed.
                if claim.read_exact_at(&mut block, 0).is_ok() && !is_free(&path) {
                    for _ in 0..5 {
                        claim.read_exact_at(&mut block, 0).unwrap();
                    }
                    let _ = tell.send(());
                }
            }
        });
        told.recv_timeout(PATIENCE).unwrap();
        while let Err(error) = disk.detach().await {
            assert!(matches!(error, DetachError::InUse { .. }), "{error}");
        }
        is_over.store(true, Ordering::Relaxed);
        user.join().unwrap();
    }
}
