//! What the NBD client keeps to tell a server again: its bound, its flushes, and writes that failed.
#![cfg(feature = "nbd")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::task::JoinHandle;
use userland_io::transports::nbd::Client;
use userland_io::transports::nbd::session::ReplyMode;
use userland_io::transports::nbd::wire::{TransmissionFlags, cmd, error};
use userland_io::{Device, Engine, ErrorKind, Result, WriteBuf, WriteFlags};
mod nbd_peers;
use nbd_peers::requests::{
    NONE, beside_flushes, connected, ends_for_good, failed, read, seen, start_flush, start_read,
    start_write, write, written,
};
use nbd_peers::{Fake, FakeConn, within};

#[tokio::test]
async fn what_completed_while_a_flush_ran_is_told_again() {
    let (fake, client, mut conn) = connected(|plain| plain).await;
    written(&client, &mut conn, 0, 1).await;
    let flush = start_flush(&client);
    let (flushing, _) = conn.request().await.unwrap();
    assert_eq!(flushing.command, cmd::FLUSH);
    // The flush says nothing about this one.
    written(&client, &mut conn, 512, 2).await;
    conn.done(&flushing).await;
    within(flush).await.unwrap().unwrap();
    drop(conn);
    let mut conn = fake.accept().await;
    let (request, payload) = conn.request().await.unwrap();
    assert_eq!((request.offset, payload), (512, vec![2; 512]));
    conn.done(&request).await;
    assert!(conn.is_quiet().await, "it told more than was needed");
}

#[tokio::test]
async fn after_a_failed_flush_the_journal_is_written_again_before_the_next() {
    let (fake, client, mut conn) = connected(|plain| plain).await;
    written(&client, &mut conn, 0, 1).await;
    let flush = start_flush(&client);
    let (request, _) = conn.request().await.unwrap();
    conn.fail(&request, error::EIO).await;
    assert_eq!(
        within(flush).await.unwrap().unwrap_err().kind(),
        ErrorKind::Io
    );
    // It leaves as it should.
    assert_eq!(conn.request().await.unwrap().0.command, cmd::DISC);
    drop(conn);
    let mut conn = fake.accept().await;
    let flush = start_flush(&client);
    let (request, payload) = conn.request().await.unwrap();
    assert_eq!((request.command, payload), (cmd::WRITE, vec![1; 512]));
    conn.done(&request).await;
    let (request, _) = conn.request().await.unwrap();
    assert_eq!(request.command, cmd::FLUSH);
    conn.done(&request).await;
    within(flush).await.unwrap().unwrap();
}

/// The server has told its failure once, and takes what it lost for written.
#[tokio::test]
async fn a_flush_beside_one_that_failed_is_sent_again_after_the_replay() {
    let (fake, client, mut conn) = connected(|plain| plain).await;
    written(&client, &mut conn, 0, 1).await;
    let failing = start_flush(&client);
    let (first, _) = conn.request().await.unwrap();
    let lied_to = start_flush(&client);
    let (second, _) = conn.request().await.unwrap();
    conn.fail(&first, error::EIO).await;
    within(failing).await.unwrap().unwrap_err();
    conn.done(&second).await;
    assert_eq!(conn.request().await.unwrap().0.command, cmd::DISC);
    drop(conn);
    let mut conn = fake.accept().await;
    let (request, payload) = conn.request().await.unwrap();
    assert_eq!((request.command, payload), (cmd::WRITE, vec![1; 512]));
    conn.done(&request).await;
    let (request, _) = conn.request().await.unwrap();
    assert_eq!(request.command, cmd::FLUSH);
    assert!(!lied_to.is_finished(), "it was answered for what was lost");
    conn.done(&request).await;
    within(lied_to).await.unwrap().unwrap();
}

#[tokio::test]
async fn where_others_write_nothing_is_told_twice() {
    for loss in [false, true] {
        let (fake, client, mut conn) = connected(|to| to.shared(true)).await;
        written(&client, &mut conn, 0, 1).await;
        let writing = start_write(&client, 512, 2);
        let (on_its_way, _) = conn.request().await.unwrap();
        if loss {
            drop(conn);
        } else {
            let flush = start_flush(&client);
            let (request, _) = conn.request().await.unwrap();
            conn.fail(&request, error::EIO).await;
            // Time enough to hear of it; but nobody hears that the write has failed while it may yet act.
            for _ in 0..1000 {
                tokio::task::yield_now().await;
            }
            assert!(!writing.is_finished());
            conn.done(&on_its_way).await;
            let error = within(flush).await.unwrap().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Io);
        }
        let written = within(writing).await.unwrap();
        assert_eq!(written.is_err(), loss);
        for result in [
            read(&client, 0, 512).await.map(drop),
            write(&client, 0, &[1; 512], NONE).await,
            within(client.flush()).await,
            within(client.close()).await,
        ] {
            let error = result.unwrap_err().to_string();
            assert!(error.contains("opened anew"), "{error}");
            assert!(error.contains("others write"), "{error}");
        }
        assert!(fake.is_left_alone().await, "it has connected again");
    }
}

#[tokio::test]
async fn the_journal_stays_within_its_bound_by_flushes_of_its_own() {
    const JOURNAL: u64 = 256 << 10;
    let fake = Fake::new(ReplyMode::Structured).await;
    let uri = fake.uri();
    let mut disk = vec![0; 1 << 20];
    let server = async { fake.accept().await.serve(&mut disk).await };
    let client = async {
        let client = Client::builder(&uri)
            .journal(JOURNAL)
            .connect()
            .await
            .unwrap();
        // Each is more than half of the journal or less, so that some wait for what is still on its way.
        let client = Arc::new(client);
        let writers: Vec<_> = (0..4u64)
            .map(|writer| {
                let client = client.clone();
                tokio::spawn(async move {
                    let mut random = fastrand::Rng::with_seed(writer);
                    for _ in 0..100 {
                        let len = random.usize(1..200_000);
                        write(&client, writer << 18, &vec![1; len], NONE)
                            .await
                            .unwrap();
                    }
                })
            })
            .collect();
        for writer in writers {
            within(writer).await.unwrap();
        }
        within(client.close()).await.unwrap();
    };
    let (log, ()) = tokio::join!(server, client);
    let mut unflushed = 0;
    for request in &log {
        match request.command {
            cmd::FLUSH => unflushed = 0,
            cmd::WRITE => unflushed += request.length,
            _ => {}
        }
        assert!(unflushed <= JOURNAL, "{unflushed} bytes without a flush");
    }
    assert_eq!(log.iter().filter(|r| r.command == cmd::WRITE).count(), 400);
}

#[tokio::test]
async fn a_write_that_waits_for_room_gets_it_once_there_is_something_to_flush() {
    let (_fake, client, mut conn) = connected(|to| to.journal(1600)).await;
    let first = start_write(&client, 0, 1);
    let (one, _) = conn.request().await.unwrap();
    // Less than half of the journal is used, and too little left; nothing has completed yet.
    let second = {
        let client = client.clone();
        tokio::spawn(async move { write(&client, 4096, &[2; 1024], NONE).await })
    };
    assert!(conn.is_quiet().await, "it did not wait for room");
    conn.done(&one).await;
    within(first).await.unwrap().unwrap();
    let (flush, _) = conn.request().await.unwrap();
    assert_eq!(flush.command, cmd::FLUSH);
    conn.done(&flush).await;
    let (two, _) = conn.request().await.unwrap();
    assert_eq!((two.command, two.offset), (cmd::WRITE, 4096));
    conn.done(&two).await;
    within(second).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_full_journal_that_cannot_be_flushed_refuses_writes() {
    let fake = Fake::new(ReplyMode::Structured).await;
    let uri = fake.uri();
    let server = async {
        loop {
            let mut conn = fake.accept().await;
            while let Some((request, _)) = conn.request().await {
                match request.command {
                    cmd::FLUSH => conn.fail(&request, error::EIO).await,
                    cmd::DISC => break,
                    _ => conn.done(&request).await,
                }
            }
        }
    };
    let client = async {
        let client = Client::builder(&uri)
            .journal(64 << 10)
            .connect()
            .await
            .unwrap();
        for i in 0..1000u64 {
            if let Err(error) = write(&client, i * 512, &[1; 512], NONE).await {
                assert!(error.to_string().contains("cannot be flushed"), "{error}");
                assert!(i > 50, "only {i} writes fitted");
                return;
            }
        }
        panic!("writes went on without end");
    };
    tokio::select! {
        () = server => {}
        () = within(client) => {}
    }
}

#[tokio::test]
async fn a_failed_write_that_was_seen_is_not_undone_by_the_replay() {
    let (fake, client, mut conn) = connected(|plain| plain).await;
    written(&client, &mut conn, 0, 1).await;
    failed(&client, &mut conn, 0, 2).await;
    // It acted all the same.
    seen(&client, &mut conn, 0, 2).await;
    drop(conn);
    ends_for_good(&client, &fake).await;
}

/// Writes 1s, which are answered, and then 2s, which are not, though a read shows them.
async fn seen_on_its_way(client: &Arc<Client>, conn: &mut FakeConn) -> JoinHandle<Result> {
    written(client, conn, 0, 1).await;
    let writing = start_write(client, 0, 2);
    assert_eq!(conn.request().await.unwrap().0.command, cmd::WRITE);
    seen(client, conn, 0, 2).await;
    writing
}

#[tokio::test]
async fn a_write_that_was_seen_on_its_way_and_failed_is_not_undone_by_the_replay() {
    let (fake, client, mut conn) = connected(|to| to.reconnect(Duration::from_millis(50))).await;
    let writing = seen_on_its_way(&client, &mut conn).await;
    drop(conn);
    // It takes too long, so the write fails.
    let error = within(writing).await.unwrap().unwrap_err();
    assert!(error.to_string().contains("not reachable"), "{error}");
    let mut conn = fake.accept().await;
    assert!(conn.request().await.is_none(), "it goes on");
    let error = read(&client, 0, 512).await.unwrap_err().to_string();
    assert!(error.contains("opened anew"), "{error}");
}

/// The server may have zeroed what came before the piece that would not be fast.
#[tokio::test]
async fn a_fast_zero_that_was_refused_may_have_acted() {
    let (fake, client, mut conn) = connected(|plain| plain).await;
    written(&client, &mut conn, 0, 1).await;
    let task = client.clone();
    let zeroing =
        tokio::spawn(async move { within(task.write_zeroes(0..512, WriteFlags::FAST_ONLY)).await });
    let (request, _) = conn.request().await.unwrap();
    assert_eq!(request.command, cmd::WRITE_ZEROES);
    conn.fail(&request, error::ENOTSUP).await;
    let error = within(zeroing).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    seen(&client, &mut conn, 0, 0).await;
    drop(conn);
    ends_for_good(&client, &fake).await;
}

/// The replay has put older bytes in its place by then.
#[tokio::test]
async fn a_write_that_was_seen_and_fails_when_it_is_sent_again_ends_the_client() {
    let (fake, client, mut conn) = connected(|plain| plain).await;
    let writing = seen_on_its_way(&client, &mut conn).await;
    drop(conn);
    let mut conn = fake.accept().await;
    let reading = start_read(&client, 0);
    for byte in [1, 2] {
        let (request, payload) = conn.request().await.unwrap();
        assert_eq!((request.command, payload), (cmd::WRITE, vec![byte; 512]));
        match byte {
            1 => conn.done(&request).await,
            _ => conn.fail(&request, error::ENOSPC).await,
        }
    }
    let error = within(writing).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert!(beside_flushes(&mut conn).await.is_none(), "it goes on");
    let error = within(reading).await.unwrap().unwrap_err().to_string();
    assert!(error.contains("opened anew"), "{error}");
}

#[tokio::test]
async fn a_write_that_was_seen_and_fails_during_the_replay_ends_the_client() {
    let (fake, client, mut conn) = connected(|to| to.reconnect(Duration::from_millis(50))).await;
    let writing = seen_on_its_way(&client, &mut conn).await;
    drop(conn);
    let mut conn = fake.accept().await;
    let (request, payload) = conn.request().await.unwrap();
    assert_eq!((request.command, payload), (cmd::WRITE, vec![1; 512]));
    // It takes too long, so the write fails.
    let error = within(writing).await.unwrap().unwrap_err();
    assert!(error.to_string().contains("not reachable"), "{error}");
    conn.done(&request).await;
    assert!(beside_flushes(&mut conn).await.is_none(), "it goes on");
    let error = read(&client, 0, 512).await.unwrap_err().to_string();
    assert!(error.contains("opened anew"), "{error}");
}

#[tokio::test]
async fn a_failed_write_that_nobody_saw_leaves_the_client_alone() {
    let (fake, client, mut conn) = connected(|plain| plain).await;
    written(&client, &mut conn, 0, 1).await;
    failed(&client, &mut conn, 0, 2).await;
    // Next to it is not in it; and what is written over it later holds, whoever saw it.
    seen(&client, &mut conn, 512, 0).await;
    failed(&client, &mut conn, 1024, 2).await;
    seen(&client, &mut conn, 1024, 2).await;
    let writing = start_write(&client, 1024, 3);
    let (request, _) = beside_flushes(&mut conn).await.unwrap();
    conn.done(&request).await;
    within(writing).await.unwrap().unwrap();
    drop(conn);
    let mut conn = fake.accept().await;
    let mut replay = Vec::new();
    for _ in 0..2 {
        let (request, payload) = conn.request().await.unwrap();
        replay.push((request.command, request.offset, payload[0]));
        conn.done(&request).await;
    }
    replay.sort();
    assert_eq!(replay, [(cmd::WRITE, 0, 1), (cmd::WRITE, 1024, 3)]);
    seen(&client, &mut conn, 0, 1).await;
}

#[tokio::test]
async fn a_flush_settles_a_failed_write_without_being_asked_for() {
    let (fake, client, mut conn) = connected(|plain| plain).await;
    let failing = start_write(&client, 0, 2);
    let (request, _) = conn.request().await.unwrap();
    conn.fail(&request, error::EIO).await;
    within(failing).await.unwrap().unwrap_err();
    let (flush, _) = conn.request().await.unwrap();
    assert_eq!(flush.command, cmd::FLUSH);
    conn.done(&flush).await;
    seen(&client, &mut conn, 0, 2).await;
    drop(conn);
    let mut conn = fake.accept().await;
    seen(&client, &mut conn, 0, 2).await;
}

/// There is no flush that could settle it.
#[tokio::test]
async fn without_flush_a_failed_write_that_was_seen_fails_flushes_until_it_is_written_anew() {
    let mut fake = Fake::new(ReplyMode::Structured).await;
    fake.flags = TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FUA;
    let uri = fake.uri();
    let (client, mut conn) = tokio::join!(Client::connect(&uri), fake.accept());
    let client = Arc::new(client.unwrap());
    failed(&client, &mut conn, 0, 1).await;
    // What nobody knows of may be lost.
    within(client.flush()).await.unwrap();
    seen(&client, &mut conn, 0, 1).await;
    for _ in 0..2 {
        let error = within(client.flush()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains("0..512"), "{error}");
    }
    written(&client, &mut conn, 0, 1).await;
    within(client.flush()).await.unwrap();
}

/// A write that was on its way when the flush began has to have ended well, or not to have been seen.
#[tokio::test]
async fn without_flush_a_flush_tells_what_became_of_the_writes_that_it_waits_for() {
    let mut fake = Fake::new(ReplyMode::Structured).await;
    fake.flags = TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FUA;
    let uri = fake.uri();
    for loss in [false, true] {
        let (client, mut conn) = tokio::join!(Client::connect(&uri), fake.accept());
        let client = Arc::new(client.unwrap());
        let writing = start_write(&client, 0, 1);
        let (request, _) = conn.request().await.unwrap();
        seen(&client, &mut conn, 0, 1).await;
        let flush = start_flush(&client);
        // It has begun.
        seen(&client, &mut conn, 0, 1).await;
        assert!(!flush.is_finished());
        match loss {
            true => conn.raw(&[0x5a; 64]).await,
            false => conn.fail(&request, error::EIO).await,
        }
        within(writing).await.unwrap().unwrap_err();
        let error = within(flush).await.unwrap().unwrap_err();
        let latched = error.to_string().contains("opened anew");
        assert_eq!(latched, loss, "{error}");
    }
}

#[tokio::test]
async fn a_large_write_gets_its_room_beside_steady_small_ones() {
    const JOURNAL: u64 = 64 << 10;
    let fake = Fake::new(ReplyMode::Structured).await;
    let uri = fake.uri();
    let mut disk = vec![0; 1 << 20];
    let server = async { fake.accept().await.serve(&mut disk).await };
    let client = async {
        let client = Client::builder(&uri)
            .journal(JOURNAL)
            .connect()
            .await
            .unwrap();
        let device = Device::open(client).await.unwrap();
        let done = Arc::new(AtomicU64::new(0));
        let small: Vec<_> = (0..16u64)
            .map(|writer| {
                let (device, done) = (device.clone(), done.clone());
                tokio::spawn(async move {
                    for i in 0..1000u64 {
                        let at = writer * 8192 + i % 16 * 512;
                        let bytes = [1; 512];
                        device
                            .write(&WriteBuf::new(&bytes), at, NONE)
                            .await
                            .unwrap();
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        while done.load(Ordering::Relaxed) < 100 {
            tokio::task::yield_now().await;
        }
        let bytes = vec![2; JOURNAL as usize];
        let large = WriteBuf::new(&bytes);
        within(device.write(&large, 512 << 10, NONE)).await.unwrap();
        assert!(
            small.iter().all(|task| !task.is_finished()),
            "it waited for the end of the small ones"
        );
        for task in small {
            within(task).await.unwrap();
        }
        within(device.close()).await.unwrap();
    };
    tokio::join!(server, client);
}
