//! The file engine on real file systems: bytes, sizes, direct I/O, claims.
#![cfg(unix)]

use std::fs;
use std::path::Path;
use userland_io::engines::File;
use userland_io::{
    CrashLevel, Device, Engine, ErrorKind, ExtentKind, Extents, Features, ReadBuf, Segment,
    WriteBuf, WriteFlags,
};
#[path = "common/file.rs"]
mod file;
#[path = "common/need.rs"]
mod need;
use file::{NONE, places, read, write};

async fn refusal(open: userland_io::engines::OpenFile) -> String {
    let text = open.await.unwrap_err().to_string();
    assert!(!text.contains('\n'), "{text:?} is more than one line");
    text
}

#[tokio::test]
async fn a_new_file_is_sparse_zero_and_there_the_next_time() {
    for place in places() {
        let path = place.path().join("disk.img");
        let disk = File::open(&path).size(10 << 30).await.unwrap();
        assert_eq!(disk.geometry().size, 10 << 30);
        assert_eq!(
            read(&disk, (10 << 30) - 4096..10 << 30).await.unwrap(),
            [0; 4096]
        );
        write(&disk, b"here", 5 << 30).await;
        disk.close().await.unwrap();
        drop(disk);
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.len(), 10 << 30);
        let used = std::os::unix::fs::MetadataExt::blocks(&metadata) * 512;
        assert!(used < 4 << 20, "{used} bytes used");
        for size in [None, Some(10 << 30)] {
            let mut open = File::open(&path);
            if let Some(size) = size {
                open = open.size(size);
            }
            let disk = open.await.unwrap();
            assert_eq!(
                read(&disk, (5 << 30)..(5 << 30) + 4).await.unwrap(),
                b"here"
            );
        }
    }
}

#[tokio::test]
async fn what_cannot_be_opened_says_why_and_what_to_do() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("disk.img");
    let name = path.display().to_string();

    let missing = refusal(File::open(&path)).await;
    assert_eq!(
        missing,
        format!("{name} does not exist: give a size (size=10G, say) to create it")
    );
    let read_only = refusal(File::open(&path).size(4096).read_only(true)).await;
    assert!(
        read_only.contains("a read-only disk is not created"),
        "{read_only}"
    );
    assert!(!path.exists());
    let lost = refusal(File::open(place.path().join("no/disk.img")).size(1)).await;
    assert!(lost.contains("its directory does not exist"), "{lost}");
    let directory = refusal(File::open(place.path())).await;
    assert!(directory.contains("is a directory"), "{directory}");
    let device = refusal(File::open("/dev/null")).await;
    assert!(
        device.contains("neither a file nor a block device"),
        "{device}"
    );

    fs::write(&path, [1; 1000]).unwrap();
    let error = File::open(&path).size(2000).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let text = error.to_string();
    assert!(text.contains("1000") && text.contains("2000"), "{text}");
    assert_eq!(fs::read(&path).unwrap(), [1; 1000], "the file is as it was");

    let huge = place.path().join("huge.img");
    let text = refusal(File::open(&huge).size(u64::MAX)).await;
    assert!(text.contains("2^63 - 1"), "{text}");
    // More than the file system can: refused, and nothing half-made stays.
    let text = refusal(File::open(&huge).size(i64::MAX as u64)).await;
    assert!(text.contains(&i64::MAX.to_string()), "{text}");
    assert!(!huge.exists());
}

#[tokio::test]
async fn a_creation_that_was_cut_short_is_finished() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("disk.img");
    fs::write(&path, []).unwrap();
    let text = refusal(File::open(&path).size(8192).read_only(true)).await;
    assert!(text.contains("has 0 bytes"), "{text}");
    // In use, it is somebody else's to finish.
    let other = File::open(&path).await.unwrap();
    let text = refusal(File::open(&path).size(8192)).await;
    assert!(text.contains("is in use"), "{text}");
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    drop(other);
    let disk = File::open(&path).size(8192).await.unwrap();
    assert_eq!(disk.geometry().size, 8192);
    assert_eq!(fs::metadata(&path).unwrap().len(), 8192);
}

#[tokio::test]
async fn a_read_only_disk_takes_no_mutation() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("disk.img");
    fs::write(&path, [7; 5000]).unwrap();
    let disk = File::open(&path).read_only(true).await.unwrap();
    assert!(disk.geometry().is_read_only());
    assert_eq!(read(&disk, 4990..5000).await.unwrap(), [7; 10]);
    let buf = WriteBuf::new(&[1]);
    let error = disk.write(&buf, 0, NONE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    let error = disk.write_zeroes(0..4096, NONE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    let error = disk.discard(0..4096).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    disk.close().await.unwrap();
    assert_eq!(fs::read(&path).unwrap(), [7; 5000]);
}

#[tokio::test]
async fn a_range_outside_the_disk_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("disk.img");
    let disk = File::open(&path).size(1000).await.unwrap();
    for range in [990..1001, 5000..5001] {
        let error = read(&disk, range.clone()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange);
        let bytes = vec![1; (range.end - range.start) as usize];
        let buf = WriteBuf::new(&bytes);
        let error = disk.write(&buf, range.start, NONE).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange);
    }
    let buf = WriteBuf::new(&[1]);
    let error = disk.write(&buf, u64::MAX, NONE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange);
    assert_eq!(fs::metadata(&path).unwrap().len(), 1000);
}

/// Random operations against a copy in memory, through the edge that a transport uses.
async fn follows_the_model(path: &Path, size: u64, direct: bool, seed: u64) {
    let open = File::open(path).size(size).direct(direct);
    let engine = match open.await {
        Ok(engine) => engine,
        Err(error) if direct && error.kind() == ErrorKind::Unsupported => {
            need::impossible(&error.to_string());
            return;
        }
        Err(error) => panic!("{error}"),
    };
    assert!(direct == (engine.geometry().memory_alignment > 1));
    let disk = Device::open(engine).await.unwrap();
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut model = vec![0; size as usize];
    for step in 0..400_u64 {
        let start = match rng.u8(0..4) {
            // Near the end, where an odd tail is.
            0 => size - rng.u64(1..=size.min(150_000)),
            _ => rng.u64(0..size),
        };
        let longest = (size - start).min(if rng.u8(0..20) == 0 { 3 << 20 } else { 70_000 });
        let end = start + rng.u64(1..=longest);
        let part = start as usize..end as usize;
        match rng.u8(0..10) {
            0..5 => {
                let bytes: Vec<u8> = (start..end).map(|at| (at ^ step) as u8 | 1).collect();
                let flags = match rng.u8(0..8) {
                    0 => WriteFlags::FUA,
                    _ => NONE,
                };
                let buf = WriteBuf::new(&bytes);
                disk.write(&buf, start, flags).await.unwrap();
                model[part].copy_from_slice(&bytes);
            }
            5 => {
                let flags = match rng.u8(0..3) {
                    0 => WriteFlags::NO_UNMAP,
                    1 => WriteFlags::FUA,
                    _ => NONE,
                };
                disk.write_zeroes(start..end, flags).await.unwrap();
                model[part].fill(0);
            }
            6 => disk.flush().await.unwrap(),
            _ => {
                let mut bytes = vec![0xaa; part.len()];
                let mut buf = ReadBuf::new(&mut bytes);
                disk.read(&mut buf, start).await.unwrap();
                assert!(bytes == model[part], "step {step}: {start}..{end} differs");
            }
        }
    }
    let mut bytes = vec![0xaa; size as usize];
    let mut buf = ReadBuf::new(&mut bytes);
    disk.read(&mut buf, 0).await.unwrap();
    assert!(bytes == model);
    disk.close().await.unwrap();
    assert!(fs::read(path).unwrap() == model, "as others see the file");
}

#[tokio::test]
async fn every_byte_is_where_it_was_put() {
    for place in places() {
        for (seed, size) in [1, 511, 100_003, 5 << 20, (5 << 20) + 12_345]
            .into_iter()
            .enumerate()
        {
            for direct in [false, true] {
                if direct && cfg!(not(target_os = "linux")) {
                    continue;
                }
                let path = place.path().join(format!("{size}-{direct}.img"));
                follows_the_model(&path, size, direct, seed as u64).await;
            }
        }
    }
}

#[tokio::test]
async fn a_request_in_pieces_of_memory_is_served() {
    let place = tempfile::tempdir().unwrap();
    let disk = File::open(place.path().join("disk.img")).size(1 << 20);
    let disk = disk.await.unwrap();
    for shared in [false, true] {
        let mut from: Vec<u8> = (0..10_000_u32)
            .map(|at| at as u8 ^ u8::from(shared))
            .collect();
        let expected = from.clone();
        let cut = |memory: &mut [u8]| {
            let (one, rest) = memory.split_at_mut(1234);
            let (two, three) = rest.split_at_mut(5000);
            [one, two, three].map(|part| Segment {
                ptr: part.as_mut_ptr(),
                len: part.len(),
            })
        };
        let segments = cut(&mut from);
        // SAFETY: the segments tile `from`, which nothing else touches until the write is done.
        let buf = unsafe { WriteBuf::from_parts(&segments, shared) };
        disk.write(&buf, 77, NONE).await.unwrap();
        let mut to = vec![0xaa; 10_000];
        let segments = cut(&mut to);
        // SAFETY: as above.
        let mut buf = unsafe { ReadBuf::from_parts(&segments, shared) };
        disk.read(&mut buf, 77).await.unwrap();
        assert!(to == expected);
    }
}

#[tokio::test]
async fn a_file_cut_short_answers_an_error_that_names_the_place() {
    for place in places() {
        let path = place.path().join("disk.img");
        let disk = File::open(&path).size(1 << 20).await.unwrap();
        write(&disk, &[1; 4096], 0).await;
        let other = fs::OpenOptions::new().write(true).open(&path).unwrap();
        other.set_len(300_000).unwrap();
        assert_eq!(read(&disk, 0..300_000).await.unwrap().len(), 300_000);
        let error = read(&disk, 299_000..301_000).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains("300000"), "{error}");
        let error = read(&disk, 900_000..900_001).await.unwrap_err();
        assert!(error.to_string().contains("900000"), "{error}");
        // What is beyond the end is not called a hole, which would read as zeroes.
        let mut runs = Extents::new(9);
        if disk.extents(100_000..900_000, &mut runs).await.is_ok() {
            assert_eq!(runs.covered(), 800_000);
            let last = runs.iter().last().unwrap();
            assert_eq!((last.len, last.kind), (600_000, ExtentKind::Data));
        }
        // A write brings it back, zeroes between.
        write(&disk, &[2; 10], (1 << 20) - 10).await;
        assert_eq!(read(&disk, 400_000..400_100).await.unwrap(), [0; 100]);
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use super::need;

    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn it_claims_what_a_file_keeps() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("disk.img");
        let disk = File::open(&path).size(1 << 20).await.unwrap();
        let geometry = disk.geometry();
        geometry.validate().unwrap();
        assert_eq!(geometry.crash, CrashLevel::Flush);
        assert_eq!(geometry.logical_block_size, 1);
        assert!(geometry.needs_flush());
        let features = Features::SURVIVES_KILL | Features::EXTENTS | Features::WRITE_ZEROES;
        assert!(geometry.features.contains(features));
        drop(disk);
        let disk = File::open(&path).read_only(true).await.unwrap();
        disk.geometry().validate().unwrap();
        assert!(!disk.geometry().needs_flush());
    }

    #[tokio::test]
    async fn a_file_in_memory_claims_no_more_than_memory_keeps() {
        let Ok(place) = tempfile::tempdir_in("/dev/shm") else {
            return;
        };
        let path = place.path().join("disk.img");
        let disk = File::open(&path).size(1 << 20).await.unwrap();
        let geometry = disk.geometry();
        geometry.validate().unwrap();
        assert_eq!(geometry.crash, CrashLevel::None);
        assert!(!geometry.needs_flush());
        assert!(!geometry.features.contains(Features::FUA));
        assert!(geometry.features.contains(Features::SURVIVES_KILL));
        disk.flush().await.unwrap();
    }

    #[tokio::test]
    async fn direct_io_goes_by_whole_blocks_and_serves_the_odd_tail() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("disk.img");
        let size = (1 << 20) + 4096 + 100;
        let disk = match File::open(&path).size(size).direct(true).await {
            Ok(disk) => disk,
            Err(error) => {
                need::impossible(&error.to_string());
                return;
            }
        };
        let geometry = disk.geometry();
        geometry.validate().unwrap();
        let block = geometry.logical_block_size;
        assert!(
            block >= 512 && geometry.memory_alignment > 1,
            "{geometry:?}"
        );
        assert_eq!(geometry.size, size);
        // From misaligned memory, across the place where the buffered handle takes over, to the last byte.
        let bytes: Vec<u8> = (0..=size).map(|at| (at % 251) as u8).collect();
        write(&disk, &bytes[1..], 0).await;
        assert!(read(&disk, 0..size).await.unwrap() == bytes[1..]);
        // Past the page cache: what was written by direct I/O is on the disk, and no page of it is kept.
        disk.flush().await.unwrap();
        assert!(fs::read(&path).unwrap() == bytes[1..]);
    }

    /// Writers of the tail and of the block beside it, at once: neither may undo the other.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_tail_and_the_block_beside_it_do_not_disturb_each_other() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("disk.img");
        // The tail is the last page's second half, or all from the last 64 KiB boundary: wherever the
        // hand-over is, all blocks near it are written.
        let size = (128 << 10) + 4096 + 100;
        let disk = match File::open(&path).size(size).direct(true).await {
            Ok(disk) => Arc::new(disk),
            Err(error) => {
                need::impossible(&error.to_string());
                return;
            }
        };
        let block = u64::from(disk.geometry().logical_block_size);
        let last = size - size % block;
        let mut tasks = Vec::new();
        for at in [(128 << 10) - block, 128 << 10, last - block, last] {
            let disk = disk.clone();
            let len = block.min(size - at) as usize;
            tasks.push(tokio::spawn(async move {
                for round in 1..=250_u8 {
                    write(&*disk, &vec![round; len], at).await;
                    if round % 16 == 0 {
                        disk.flush().await.unwrap();
                    }
                    let bytes = read(&*disk, at..at + len as u64).await.unwrap();
                    assert!(bytes == vec![round; len], "at {at} in round {round}");
                }
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        disk.flush().await.unwrap();
        let bytes = fs::read(&path).unwrap();
        for at in [(128 << 10) - block, 128 << 10, last - block, last] {
            assert_eq!(bytes[at as usize], 250, "at {at}");
        }
    }

    #[tokio::test]
    async fn a_dropped_write_acts_no_more_once_a_flush_has_answered() {
        for place in places() {
            let path = place.path().join("disk.img");
            let disk = File::open(&path).size(4 << 20).threads(4).await.unwrap();
            for round in 0..100_u8 {
                let bytes = vec![1; 3 << 20];
                for _ in 0..3 {
                    let buf = WriteBuf::new(&bytes);
                    let mut late = Box::pin(disk.write(&buf, 0, NONE));
                    let waker = std::task::Waker::noop();
                    let _ = late
                        .as_mut()
                        .poll(&mut std::task::Context::from_waker(waker));
                    if round % 2 == 0 {
                        std::mem::forget(late);
                    }
                }
                disk.flush().await.unwrap();
                let zero = WriteBuf::new(&[0; 4096]);
                disk.write(&zero, 0, NONE).await.unwrap();
                tokio::task::yield_now().await;
                assert_eq!(
                    read(&disk, 0..4096).await.unwrap(),
                    [0; 4096],
                    "round {round}"
                );
            }
        }
    }
}
