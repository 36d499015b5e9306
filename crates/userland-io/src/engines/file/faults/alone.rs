//! What waits for the disk while nothing else does.

use super::super::alone::Crowd;
use super::*;

/// Tests that run beside these may have the places, and the disk may be slow for a while.
const PATIENCE: Duration = Duration::from_secs(30);

/// A disk for direct I/O that is alone, and has been for a while.
async fn alone(aio: Aio) -> (TempDir, Faulty, File) {
    let place = tempfile::tempdir().unwrap();
    let faulty = Faulty::default();
    let open = same_file(&place).size(1 << 20).direct(true).aio(aio);
    let mut disk = open.open_with(Box::new(faulty.clone())).await.unwrap();
    let crowd = Box::leak(Box::new(Crowd::new()));
    Arc::get_mut(&mut disk.image).unwrap().alone = Alone::among(crowd);
    // Holes are read in no time.
    write(&disk, 0, &[1; 8192], NONE).await.unwrap();
    disk.flush().await.unwrap();
    (place, faulty, disk)
}

async fn comes_to_be_here(disk: &File, faulty: &Faulty) {
    let patience = Instant::now();
    while {
        disk.image.alone.forget();
        read(disk, 0, 4096).await.unwrap();
        !faulty.was_made_here(Call::Read)
    } {
        assert!(patience.elapsed() < PATIENCE, "never");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_alone_is_done_here_and_is_the_same() {
    for aio in modes() {
        let (_place, faulty, disk) = alone(aio).await;
        comes_to_be_here(&disk, &faulty).await;
        let mut here = [0; 3];
        for step in 0..500_u32 {
            let bytes = [step as u8; 4096];
            let flags = [NONE, WriteFlags::FUA][usize::from(step % 5 == 0)];
            disk.image.alone.forget();
            write(&disk, 8192, &bytes, flags).await.unwrap();
            here[0] += u32::from(faulty.was_made_here(Call::Write));
            disk.image.alone.forget();
            disk.flush().await.unwrap();
            here[1] += u32::from(faulty.was_made_here(Call::Sync));
            disk.image.alone.forget();
            assert_eq!(read(&disk, 8192, 4096).await.unwrap(), bytes);
            here[2] += u32::from(faulty.was_made_here(Call::Read));
        }
        // How many of them depends on who has the places.
        let some = |&count: &u32| (1..500).contains(&count);
        assert!(here.iter().all(some), "{here:?}");
        faulty.inject(Call::Read, [Fault::Errno(EINTR), Fault::Errno(EIO)]);
        assert_eq!(read(&disk, 0, 4096).await.unwrap_err().errno(), EIO);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_that_are_asked_for_together_wait_side_by_side() {
    for aio in modes() {
        let (_place, faulty, disk) = alone(aio).await;
        comes_to_be_here(&disk, &faulty).await;
        let two = async || {
            let (one, other) = tokio::join!(read(&disk, 0, 4096), read(&disk, 4096, 4096));
            assert_eq!(one.unwrap(), other.unwrap());
        };
        two().await;
        // One that went elsewhere is under way for as long as this. A disk may be quicker than a busy machine, so it is not left to them.
        for _ in 0..300 {
            let _elsewhere = disk.image.alone.begin();
            two().await;
            assert!(!faulty.was_made_here(Call::Read));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sync_that_fails_here_fails_all_that_comes() {
    let (_place, faulty, disk) = alone(Aio::Threads).await;
    let patience = Instant::now();
    loop {
        assert!(patience.elapsed() < PATIENCE, "never");
        comes_to_be_here(&disk, &faulty).await;
        disk.flush().await.unwrap();
        if faulty.was_made_here(Call::Sync) {
            break;
        }
    }
    faulty.inject(Call::Sync, [Fault::Errno(EIO)]);
    assert_eq!(disk.flush().await.unwrap_err().errno(), EIO);
    let syncs = faulty.count(Call::Sync);
    assert_eq!(disk.flush().await.unwrap_err().kind(), ErrorKind::Io);
    assert!(write(&disk, 0, &[1; 4096], NONE).await.is_err());
    assert_eq!(faulty.count(Call::Sync), syncs);
}

/// Here the test's thread runs all tasks.
#[tokio::test]
async fn where_one_thread_runs_all_tasks_none_waits() {
    for aio in modes() {
        let (_place, faulty, disk) = alone(aio).await;
        for _ in 0..300 {
            read(&disk, 0, 4096).await.unwrap();
            assert!(!faulty.was_made_here(Call::Read));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sync_of_much_is_never_made_here() {
    let place = tempfile::tempdir().unwrap();
    let faulty = Faulty::default();
    let open = same_file(&place).size(4 << 20);
    let mut disk = open.open_with(Box::new(faulty.clone())).await.unwrap();
    let image = Arc::get_mut(&mut disk.image).unwrap();
    // Also where temporary files are in memory.
    image.never_waits = false;
    image.alone = Alone::among(Box::leak(Box::new(Crowd::new())));
    let is_made_here = async |len: usize| {
        write(&disk, 0, &vec![1; len], NONE).await.unwrap();
        assert_eq!(disk.image.is_soon_synced(), len <= 1 << 20);
        disk.image.alone.forget();
        disk.flush().await.unwrap();
        assert!(disk.image.is_soon_synced());
        faulty.was_made_here(Call::Sync)
    };
    for _ in 0..40 {
        let patience = Instant::now();
        while !is_made_here(4096).await {
            assert!(patience.elapsed() < PATIENCE, "never");
        }
        assert!(!is_made_here((1 << 20) + 1).await);
    }
}
