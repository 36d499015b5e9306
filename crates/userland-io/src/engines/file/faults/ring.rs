//! Direct transfers, by threads and by a ring.

use tokio::runtime::Builder;

use super::*;

/// Runs `test` where a thread works the ring, and where a task does.
fn by_each(test: impl AsyncFn()) {
    let (mut one, mut several) = (Builder::new_current_thread(), Builder::new_multi_thread());
    for runtime in [&mut one, several.worker_threads(2)] {
        runtime.enable_all().build().unwrap().block_on(test());
    }
}

/// A disk for direct I/O.
async fn direct(aio: Aio) -> (TempDir, Faulty, File) {
    let place = tempfile::tempdir().unwrap();
    let faulty = Faulty::default();
    let open = same_file(&place).size(4 << 20).direct(true).aio(aio);
    let mut disk = open.open_with(Box::new(faulty.clone())).await.unwrap();
    never_here(&mut disk);
    assert_eq!(disk.ring.is_some(), aio == Aio::Uring);
    (place, faulty, disk)
}

#[test]
fn more_transfers_than_there_are_places_all_end() {
    by_each(async || {
        for aio in modes() {
            let (_place, _faulty, disk) = direct(aio).await;
            let disk = Arc::new(disk);
            let writes: Vec<_> = (0..500_u64)
                .map(|n| {
                    let disk = disk.clone();
                    tokio::spawn(
                        async move { write(&disk, n * 4096, &[n as u8; 4096], NONE).await },
                    )
                })
                .collect();
            for write in writes {
                write.await.unwrap().unwrap();
            }
            let bytes = read(&disk, 0, 500 * 4096).await.unwrap();
            for (n, block) in bytes.chunks(4096).enumerate() {
                assert!(block == [n as u8; 4096], "block {n}");
            }
        }
    });
}

#[test]
fn an_error_of_a_transfer_is_answered_with_its_number() {
    by_each(async || {
        for (aio, errno) in modes().into_iter().zip([EIO, ENOSPC]) {
            let (_place, faulty, disk) = direct(aio).await;
            faulty.inject(Call::Write, [Fault::Short(4096), Fault::Errno(errno)]);
            let error = write(&disk, 0, &[1; 8192], NONE).await.unwrap_err();
            assert_eq!(error.errno(), errno);
            faulty.inject(Call::Read, [Fault::Errno(EINTR), Fault::Errno(errno)]);
            assert_eq!(read(&disk, 0, 4096).await.unwrap_err().errno(), errno);
            faulty.inject(Call::Read, [Fault::Short(0)]);
            let error = read(&disk, 0, 4096).await.unwrap_err();
            assert!(error.to_string().contains("cut short"), "{error}");
            disk.flush().await.unwrap();
            assert_eq!(read(&disk, 0, 4096).await.unwrap(), [1; 4096]);
        }
    });
}

/// As where the kernel can have no thread for what would wait.
#[test]
fn what_the_kernel_gives_up_for_ever_fails() {
    by_each(async || {
        if !modes().contains(&Aio::Uring) {
            return;
        }
        let (_place, faulty, disk) = direct(Aio::Uring).await;
        write(&disk, 0, &[1; 4096], NONE).await.unwrap();
        let give_up = |times| faulty.inject(Call::Read, (0..times).map(|_| Fault::Errno(EINTR)));
        give_up(20);
        assert_eq!(read(&disk, 0, 4096).await.unwrap(), [1; 4096]);
        give_up(1_000_000);
        let error = read(&disk, 0, 4096).await.unwrap_err();
        assert!(error.to_string().contains("has moved none of"), "{error}");
        assert_eq!(error.errno(), EIO);
        faulty.0.lock().unwrap().faults.clear();
        assert_eq!(read(&disk, 0, 4096).await.unwrap(), [1; 4096]);
    });
}

#[test]
fn flush_waits_for_a_dropped_transfer_and_the_lock_does_too() {
    by_each(async || {
        for aio in modes() {
            let (place, faulty, disk) = direct(aio).await;
            for end in [false, true] {
                let (fault, is_here, go) = hold(0);
                faulty.inject(Call::Write, [fault]);
                let mut orphan = Box::pin(write(&disk, 0, &[2; 4096], NONE));
                assert!(is_pending(orphan.as_mut()));
                is_here.recv().unwrap();
                drop(orphan);
                if end {
                    drop(disk);
                    let error = same_file(&place).await.unwrap_err();
                    assert!(error.to_string().contains("in use by this"), "{error}");
                    go.send(()).unwrap();
                    break;
                }
                let syncs = faulty.count(Call::Sync);
                let mut flush = Box::pin(disk.flush());
                let patience = Instant::now();
                while patience.elapsed() < Duration::from_millis(50) {
                    assert!(is_pending(flush.as_mut()));
                    assert_eq!(faulty.count(Call::Sync), syncs);
                    tokio::task::yield_now().await;
                }
                go.send(()).unwrap();
                flush.await.unwrap();
                assert_eq!(faulty.count(Call::Sync), syncs + 1);
            }
            let patience = Instant::now();
            let disk = loop {
                match same_file(&place).await {
                    Ok(disk) => break disk,
                    Err(error) => assert!(patience.elapsed() < Duration::from_secs(30), "{error}"),
                }
            };
            assert_eq!(read(&disk, 0, 4096).await.unwrap(), [2; 4096]);
        }
    });
}

#[test]
fn after_a_failed_flush_direct_writes_fail() {
    by_each(async || {
        for aio in modes() {
            let (_place, faulty, disk) = direct(aio).await;
            let disk = Arc::new(disk);
            let (fault, is_here, go) = hold(0);
            faulty.inject(Call::Write, [fault]);
            faulty.inject(Call::Sync, [Fault::Errno(EIO)]);
            // This one is under way when the sync fails, the next is not.
            let mut first = Box::pin(write(&disk, 0, &[1; 4096], NONE));
            assert!(is_pending(first.as_mut()));
            is_here.recv().unwrap();
            assert_eq!(disk.sync().await.unwrap_err().errno(), EIO);
            let mut second = Box::pin(write(&disk, 4096, &[1; 4096], NONE));
            assert!(!is_pending(second.as_mut()));
            go.send(()).unwrap();
            first.await.unwrap();
        }
    });
}

#[tokio::test]
async fn transfers_go_on_when_the_runtime_that_the_disk_was_opened_in_ends() {
    if modes().len() == 1 {
        return;
    }
    for _ in 0..20 {
        let first = Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build();
        let first = first.unwrap();
        let (_place, _faulty, disk) = first.spawn(direct(Aio::Uring)).await.unwrap();
        let written = [7; 4096];
        let mut writes: Vec<_> = (0..300)
            .map(|n| Box::pin(write(&disk, n * 4096, &written, NONE)))
            .collect();
        writes.retain_mut(|write| is_pending(write.as_mut()));
        assert!(!writes.is_empty());
        first.shutdown_background();
        for write in writes {
            write.await.unwrap();
        }
        disk.flush().await.unwrap();
        assert!(read(&disk, 0, 300 * 4096).await.unwrap() == [7; 300 * 4096]);
    }
}

#[test]
fn a_runtime_without_io_will_do() {
    let runtime = Builder::new_multi_thread().worker_threads(2).build();
    runtime.unwrap().block_on(async {
        for aio in modes() {
            let (_place, _faulty, disk) = direct(aio).await;
            write(&disk, 0, &[3; 4096], NONE).await.unwrap();
            disk.flush().await.unwrap();
            assert_eq!(read(&disk, 0, 4096).await.unwrap(), [3; 4096]);
        }
    });
}
