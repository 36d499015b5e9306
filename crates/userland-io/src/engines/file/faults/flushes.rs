//! Which flushes share a sync.

use super::*;

/// A disk whose first syncs are held: where each says that it is there, and what lets it go.
async fn holding(errnos: &[i32]) -> (TempDir, Faulty, File, Vec<(Receiver<()>, Sender<()>)>) {
    let (place, faulty, disk) = disk(1 << 20).await;
    let mut ways = Vec::new();
    for errno in errnos {
        let (fault, is_here, go) = hold(*errno);
        faulty.inject(Call::Sync, [fault]);
        ways.push((is_here, go));
    }
    (place, faulty, disk, ways)
}

#[tokio::test]
async fn flushes_share_the_next_sync_and_never_one_that_has_begun() {
    let (_place, faulty, disk, ways) = holding(&[0, 0]).await;
    let mut first = Box::pin(disk.flush());
    assert!(is_pending(first.as_mut()));
    ways[0].0.recv().unwrap();
    let mut later: Vec<_> = (0..10).map(|_| Box::pin(disk.flush())).collect();
    assert!(later.iter_mut().all(|flush| is_pending(flush.as_mut())));
    drop(later.pop());
    ways[0].1.send(()).unwrap();
    first.await.unwrap();
    ways[1].0.recv().unwrap();
    assert!(later.iter_mut().all(|flush| is_pending(flush.as_mut())));
    ways[1].1.send(()).unwrap();
    for flush in later {
        flush.await.unwrap();
    }
    assert_eq!(faulty.count(Call::Sync), 2);
    disk.flush().await.unwrap();
    assert_eq!(faulty.count(Call::Sync), 3);
}

#[tokio::test]
async fn all_who_share_a_sync_hear_of_its_failure() {
    let (_place, faulty, disk, ways) = holding(&[0, EIO]).await;
    let mut first = Box::pin(disk.flush());
    assert!(is_pending(first.as_mut()));
    ways[0].0.recv().unwrap();
    let mut later: Vec<_> = (0..10).map(|_| Box::pin(disk.flush())).collect();
    assert!(later.iter_mut().all(|flush| is_pending(flush.as_mut())));
    ways[0].1.send(()).unwrap();
    first.await.unwrap();
    ways[1].1.send(()).unwrap();
    for flush in later {
        assert_eq!(flush.await.unwrap_err().errno(), EIO);
    }
    assert!(disk.flush().await.is_err());
    assert_eq!(faulty.count(Call::Sync), 2);
}

#[tokio::test]
async fn a_panic_reaches_one_who_shares_the_sync_and_an_error_the_others() {
    let (_place, faulty, disk, ways) = holding(&[0]).await;
    let disk = Arc::new(disk);
    faulty.inject(Call::Sync, [Fault::Panic]);
    let mut first = Box::pin(disk.flush());
    assert!(is_pending(first.as_mut()));
    ways[0].0.recv().unwrap();
    let later: Vec<_> = (0..3)
        .map(|_| {
            let disk = disk.clone();
            tokio::spawn(async move { disk.flush().await })
        })
        .collect();
    // One turn each: now they wait for the same sync.
    tokio::task::yield_now().await;
    ways[0].1.send(()).unwrap();
    first.await.unwrap();
    let (mut panics, mut errors) = (0, 0);
    for flush in later {
        match flush.await {
            Err(ended) => panics += i32::from(ended.is_panic()),
            Ok(result) => errors += i32::from(result.is_err()),
        }
    }
    assert_eq!((panics, errors), (1, 2));
    disk.flush().await.unwrap();
}

#[tokio::test]
async fn a_flush_of_what_is_in_memory_is_made_at_once_and_can_still_fail() {
    let (_place, faulty, mut disk) = disk(1 << 20).await;
    Arc::get_mut(&mut disk.image).unwrap().never_waits = true;
    disk.flush().await.unwrap();
    assert!(faulty.was_made_here(Call::Sync));
    faulty.inject(Call::Sync, [Fault::Errno(EIO)]);
    assert_eq!(disk.flush().await.unwrap_err().errno(), EIO);
    assert_eq!(disk.flush().await.unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(faulty.count(Call::Sync), 2);
}
