//! Which writes are made in the caller's task where the file system promises nothing.

use super::super::at_once::AtOnce;
use super::*;

/// A disk on a file system as ext4 is, which refuses writes that promise not to wait.
async fn refusing(size: u64) -> (TempDir, Faulty, File) {
    let (place, faulty, mut disk) = disk(size).await;
    let image = Arc::get_mut(&mut disk.image).unwrap();
    image.at_once = Some(AtOnce::new());
    faulty.inject(Call::WriteCached, [Fault::Errno(EOPNOTSUPP)]);
    write(&disk, 0, &vec![1; size as usize], NONE)
        .await
        .unwrap();
    assert_eq!(faulty.count(Call::WriteCached), 1);
    (place, faulty, disk)
}

/// Writes, and answers whether that was at once.
async fn is_at_once(disk: &File, faulty: &Faulty, at: u64, len: usize) -> bool {
    write(disk, at, &vec![2; len], NONE).await.unwrap();
    faulty.was_made_here(Call::Write)
}

/// Tests that run beside this one may have the places, and this thread may be held up itself.
async fn comes_to_be_at_once(disk: &File, faulty: &Faulty, at: u64, len: usize) {
    let patience = Instant::now();
    while !is_at_once(disk, faulty, at, len).await {
        assert!(patience.elapsed() < Duration::from_secs(30), "never");
    }
}

#[tokio::test]
async fn a_write_that_needs_no_read_is_made_at_once() {
    let (_place, faulty, disk) = refusing(4 << 20).await;
    for (at, len) in [(0, 4096), (8192, 200_000), (4096 + 512, 512), (10, 1 << 20)] {
        comes_to_be_at_once(&disk, &faulty, at, len).await;
        assert!(read(&disk, at, len).await.unwrap() == vec![2; len]);
    }
    // For these the cache would have to be filled with the rest of a block.
    for (at, len) in [(512, 4096 - 512), (0, 512), (512, 1024)] {
        faulty.inject(Call::ReadCached, [Fault::Errno(EAGAIN)]);
        assert!(!is_at_once(&disk, &faulty, at, len).await);
    }
    assert_eq!(faulty.count(Call::WriteCached), 1, "asked again");
}

#[tokio::test]
async fn after_a_long_write_the_next_go_to_the_pool() {
    let (_place, faulty, disk) = refusing(1 << 20).await;
    let held = Duration::from_millis(50);
    loop {
        let (fault, is_here, go) = hold(0);
        faulty.inject(Call::Write, [fault]);
        let throttle = thread::spawn(move || {
            is_here.recv().unwrap();
            thread::sleep(held);
            go.send(()).unwrap();
        });
        let was_at_once = is_at_once(&disk, &faulty, 0, 4096).await;
        throttle.join().unwrap();
        if was_at_once {
            break;
        }
    }
    let ended = Instant::now();
    assert!(!is_at_once(&disk, &faulty, 0, 4096).await);
    comes_to_be_at_once(&disk, &faulty, 0, 4096).await;
    assert!(ended.elapsed() > 10 * held);
}

#[tokio::test]
async fn what_fails_or_falls_short_at_once_is_finished_by_another_call() {
    let (_place, faulty, disk) = refusing(1 << 20).await;
    for fault in [
        Fault::Errno(EIO),
        Fault::Errno(EINTR),
        Fault::Short(100),
        Fault::Short(0),
    ] {
        comes_to_be_at_once(&disk, &faulty, 0, 4096).await;
        let before = faulty.count(Call::Write);
        faulty.inject(Call::Write, [fault]);
        match write(&disk, 0, &[3; 4096], NONE).await {
            Ok(()) => {
                assert_eq!(faulty.count(Call::Write), before + 2);
                assert_eq!(read(&disk, 0, 4096).await.unwrap(), [3; 4096]);
            }
            // Not at once: then the pool met the fault.
            Err(_) => assert_eq!(faulty.count(Call::Write), before + 1),
        }
    }
}
