//! Short reads and writes that need no future.

use super::super::at_once::AtOnce;
use super::*;

/// A new disk in the page cache, on a file system as ext4 is or on one in memory.
async fn cached(in_memory: bool) -> (TempDir, Faulty, File) {
    let (place, faulty, mut disk) = disk(1 << 20).await;
    let image = Arc::get_mut(&mut disk.image).unwrap();
    image.never_waits = in_memory;
    image.at_once = (!in_memory).then(AtOnce::new);
    faulty.inject(Call::WriteCached, [Fault::Errno(EOPNOTSUPP)]);
    write(&disk, 0, &vec![1; 1 << 20], NONE).await.unwrap();
    (place, faulty, disk)
}

fn write_now(disk: &File, at: u64, bytes: &[u8], flags: WriteFlags) -> Option<Result> {
    disk.write_nowait(&WriteBuf::new(bytes), at, flags)
}

/// Tests that run beside these may have the places.
fn comes_to_be_written(disk: &File, at: u64, bytes: &[u8]) {
    let patience = Instant::now();
    while write_now(disk, at, bytes, NONE).is_none_or(|written| written.is_err()) {
        assert!(patience.elapsed() < Duration::from_secs(30), "never");
    }
}

fn lent(disk: &File, at: u64, len: u64) -> Option<Vec<u8>> {
    let mut bytes = None;
    disk.lend(at..at + len, &mut |lent| bytes = Some(lent.to_vec()));
    bytes
}

#[tokio::test]
async fn what_is_written_without_waiting_is_there_and_what_is_not_is_as_it_was() {
    for in_memory in [false, true] {
        let (_place, faulty, disk) = cached(in_memory).await;
        for (at, len) in [
            (0, 4096),
            (64 << 10, 64 << 10),
            (4096 + 512, 512),
            (200_000, 1),
        ] {
            comes_to_be_written(&disk, at, &vec![2; len]);
            assert_eq!(read(&disk, at, len).await.unwrap(), vec![2; len]);
        }
        let page = [3; 4096];
        let at = 512 << 10;
        assert!(write_now(&disk, at, &page, WriteFlags::FUA).is_none());
        assert!(write_now(&disk, (1 << 20) - 1, &page, NONE).is_none());
        assert!(write_now(&disk, at - 4096, &vec![3; (64 << 10) + 1], NONE).is_none());
        if !in_memory {
            // The rest of the block would have to be read.
            faulty.inject(Call::ReadCached, [Fault::Errno(EAGAIN)]);
            assert!(write_now(&disk, at, &page[..512], NONE).is_none());
        }
        for errno in [EINTR, EIO, ENOSPC] {
            let before = faulty.count(Call::Write);
            while faulty.count(Call::Write) == before {
                faulty.0.lock().unwrap().faults.clear();
                faulty.inject(Call::Write, [Fault::Errno(errno)]);
                assert!(write_now(&disk, at, &page, NONE).is_none());
            }
        }
        assert_eq!(read(&disk, at, 4096).await.unwrap(), [1; 4096]);
        faulty.inject(Call::Sync, [Fault::Errno(EIO)]);
        assert_eq!(disk.flush().await.unwrap_err().errno(), EIO);
        assert!(write_now(&disk, at, &page, NONE).is_none(), "latched");
        assert_eq!(read(&disk, at, 4096).await.unwrap(), [1; 4096]);
    }
}

#[tokio::test]
async fn what_falls_short_is_written_to_its_end() {
    for in_memory in [false, true] {
        let (_place, faulty, disk) = cached(in_memory).await;
        faulty.inject(Call::Write, [Fault::Short(100), Fault::Short(1000)]);
        let before = faulty.count(Call::Write);
        comes_to_be_written(&disk, 4096, &[2; 4096]);
        assert_eq!(faulty.count(Call::Write), before + 3);
        assert_eq!(read(&disk, 4096, 4096).await.unwrap(), [2; 4096]);
        // What was begun is a write that fails, not none.
        let full = || Fault::Errno(ENOSPC);
        let failed = loop {
            faulty.0.lock().unwrap().faults.clear();
            faulty.inject(Call::Write, [Fault::Short(100), full(), full()]);
            if let Some(written) = write_now(&disk, 4096, &[3; 4096], NONE) {
                break written.unwrap_err();
            }
        };
        assert_eq!(failed.kind(), ErrorKind::NoSpace);
    }
}

#[tokio::test]
async fn what_the_cache_has_is_lent_whole_or_not_at_all() {
    let (_place, faulty, disk) = cached(false).await;
    write(&disk, 10, &[2; 100], NONE).await.unwrap();
    assert_eq!(lent(&disk, 10, 100), Some(vec![2; 100]));
    assert_eq!(lent(&disk, 4096, 4096), Some(vec![1; 4096]));
    assert_eq!(lent(&disk, 4096, 4097), None, "too long");
    assert_eq!(lent(&disk, (1 << 20) - 1, 2), None, "outside");
    for fault in [Fault::Short(99), Fault::Errno(EAGAIN), Fault::Errno(EIO)] {
        faulty.inject(Call::ReadCached, [fault]);
        assert_eq!(lent(&disk, 10, 100), None);
    }
    assert_eq!(lent(&disk, 10, 100), Some(vec![2; 100]));
}

#[tokio::test]
async fn past_the_page_cache_nothing_is_lent_nor_written_without_waiting() {
    let place = tempfile::tempdir().unwrap();
    let disk = same_file(&place).size(1 << 20).direct(true).await.unwrap();
    write(&disk, 0, &[1; 4096], NONE).await.unwrap();
    assert_eq!(lent(&disk, 0, 4096), None);
    assert!(write_now(&disk, 0, &[2; 4096], NONE).is_none());
    assert_eq!(read(&disk, 0, 4096).await.unwrap(), [1; 4096]);
}
