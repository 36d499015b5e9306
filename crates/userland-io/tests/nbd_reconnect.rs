//! The NBD client and servers that go away: nothing that was answered is lost, and no flush lies.
#![cfg(feature = "nbd")]

mod nbd_peers;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use nbd_peers::{Fake, FakeConn, Peer, within};
use tokio::task::JoinHandle;
use userland_io::engines::Memory;
use userland_io::transports::nbd::session::ReplyMode;
use userland_io::transports::nbd::wire::{Request, TransmissionFlags, cmd, error};
use userland_io::transports::nbd::{Client, ClientBuilder, Server};
use userland_io::{Device, Engine, ErrorKind, ReadBuf, Result, WriteBuf, WriteFlags};

const NONE: WriteFlags = WriteFlags::empty();

async fn read(client: &Client, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0xee; len];
    within(client.read(&mut ReadBuf::new(&mut bytes), offset)).await?;
    Ok(bytes)
}

async fn write(client: &Client, offset: u64, bytes: &[u8], flags: WriteFlags) -> Result {
    within(client.write(&WriteBuf::new(bytes), offset, flags)).await
}

/// Connects to a fake server, which gives its side of the connection.
async fn pair(fake: &Fake, builder: ClientBuilder) -> (Arc<Client>, FakeConn) {
    let (client, conn) = tokio::join!(builder.connect(), fake.accept());
    (Arc::new(client.unwrap()), conn)
}

fn start_write(client: &Arc<Client>, offset: u64, byte: u8) -> JoinHandle<Result> {
    let client = client.clone();
    tokio::spawn(async move { write(&client, offset, &[byte; 512], NONE).await })
}

fn start_read(client: &Arc<Client>, offset: u64) -> JoinHandle<Result<Vec<u8>>> {
    let client = client.clone();
    tokio::spawn(async move { read(&client, offset, 512).await })
}

fn start_flush(client: &Arc<Client>) -> JoinHandle<Result> {
    let client = client.clone();
    tokio::spawn(async move { within(client.flush()).await })
}

/// A write that the server answers.
async fn written(client: &Arc<Client>, conn: &mut FakeConn, offset: u64, byte: u8) {
    let writing = start_write(client, offset, byte);
    let (request, _) = conn.request().await.unwrap();
    assert_eq!((request.command, request.offset), (cmd::WRITE, offset));
    conn.done(&request).await;
    within(writing).await.unwrap().unwrap();
}

/// What was answered is in the image, however often the server was killed.
async fn loses_nothing_when_killed(peer: Peer, connections: usize) {
    let (uri, image) = (peer.uri(), peer.image());
    let mut peer = Some(peer);
    let model = under_load(&uri, connections, async || {
        if let Some(mut killed) = peer.take() {
            let restart = tokio::task::spawn_blocking(move || {
                killed.kill();
                killed.restart();
                killed
            });
            peer = Some(restart.await.unwrap());
        }
    })
    .await;
    let image = std::fs::read(image).unwrap();
    assert!(image[..model.len()] == model, "the image differs");
}

/// Restarts a server five times under six writers, each on a part of its own; gives what it has to hold then.
async fn under_load(uri: &str, connections: usize, mut restart: impl AsyncFnMut()) -> Vec<u8> {
    const PART: u64 = 1 << 20;
    let client = Client::builder(uri)
        .connections(connections)
        .connect()
        .await
        .unwrap();
    assert_eq!(client.connections(), connections);
    let device = Device::open(client).await.unwrap();
    let done = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let tasks: Vec<_> = (0..6u64)
        .map(|part| {
            let (device, done, stop) = (device.clone(), done.clone(), stop.clone());
            tokio::spawn(async move {
                let mut random = fastrand::Rng::with_seed(part);
                let mut model = vec![0u8; PART as usize];
                while !stop.load(Ordering::Relaxed) {
                    let start = random.u64(0..PART - 1);
                    let end = (start + random.u64(1..30_000)).min(PART);
                    let mine = start as usize..end as usize;
                    let at = part * PART + start;
                    match random.u8(0..10) {
                        0..=3 => {
                            let mut bytes = vec![1; mine.len()];
                            device
                                .read(&mut ReadBuf::new(&mut bytes), at)
                                .await
                                .unwrap();
                            assert!(bytes == model[mine], "{at}+{} differs", end - start);
                        }
                        4..=7 => {
                            let bytes: Vec<u8> = mine.clone().map(|_| random.u8(..)).collect();
                            let flags = match random.u8(0..6) {
                                0 => WriteFlags::FUA,
                                _ => NONE,
                            };
                            device
                                .write(&WriteBuf::new(&bytes), at, flags)
                                .await
                                .unwrap();
                            model[mine].copy_from_slice(&bytes);
                        }
                        8 => {
                            device
                                .write_zeroes(at..at + end - start, NONE)
                                .await
                                .unwrap();
                            model[mine].fill(0);
                        }
                        _ => device.flush().await.unwrap(),
                    }
                    done.fetch_add(1, Ordering::Relaxed);
                }
                let mut bytes = vec![1; PART as usize];
                device
                    .read(&mut ReadBuf::new(&mut bytes), part * PART)
                    .await
                    .unwrap();
                assert!(bytes == model, "part {part} differs at the end");
                model
            })
        })
        .collect();
    for kill in 1..=5u64 {
        within(async {
            while done.load(Ordering::Relaxed) < kill * 150 {
                assert!(tasks.iter().all(|task| !task.is_finished()));
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        restart().await;
    }
    stop.store(true, Ordering::Relaxed);
    let mut models = Vec::new();
    for task in tasks {
        models.extend(within(task).await.unwrap());
    }
    within(device.close()).await.unwrap();
    models
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_when_nbdkit_is_killed_under_load() {
    if let Some(peer) = Peer::nbdkit(&["file", "{dir}/disk"]) {
        loses_nothing_when_killed(peer, 1).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_when_qemu_nbd_is_killed_under_load() {
    if let Some(peer) = Peer::qemu_nbd(&["-f", "raw", "{dir}/disk"]) {
        loses_nothing_when_killed(peer, 1).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_on_several_connections() {
    if let Some(peer) = Peer::nbdkit(&["file", "{dir}/disk"]) {
        loses_nothing_when_killed(peer, 4).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_when_our_own_server_is_restarted_under_load() {
    let disk = Device::open(Memory::new(8 << 20)).await.unwrap();
    let serve = async |address: &str| {
        Server::new()
            .export("disk", disk.clone())
            .bind([address])
            .await
            .unwrap()
    };
    let first = serve("nbd://127.0.0.1:0").await;
    let address = format!("nbd://{}", first.addresses()[0]);
    let uri = first.uri("disk").to_string();
    let mut server = Some(first);
    let model = under_load(&uri, 3, async || {
        if let Some(old) = server.take() {
            within(old.shutdown()).await.unwrap();
        }
        server = Some(serve(&address).await);
    })
    .await;
    let mut bytes = vec![1; model.len()];
    disk.read(&mut ReadBuf::new(&mut bytes), 0).await.unwrap();
    assert!(bytes == model, "the disk differs");
}

#[tokio::test]
async fn what_a_server_forgot_it_is_told_again_and_nothing_that_was_durable() {
    // This one forgets all that it held, as a machine that lost its power.
    let Some(mut peer) = Peer::nbdkit(&["memory", "1M"]) else {
        return;
    };
    let client = Client::connect(&peer.uri()).await.unwrap();
    write(&client, 0, &[1; 8192], NONE).await.unwrap();
    within(client.flush()).await.unwrap();
    write(&client, 4096, &[2; 8192], NONE).await.unwrap();
    write(&client, 8192, &[3; 1024], WriteFlags::FUA)
        .await
        .unwrap();
    within(client.write_zeroes(10240..11264, NONE))
        .await
        .unwrap();
    write(&client, 6000, &[4; 100], NONE).await.unwrap();
    peer.kill();
    peer.restart();
    let mut expected = vec![0; 16384];
    // What was durable before is the server's business, and this one lost it.
    expected[4096..8192].fill(2);
    expected[9216..10240].fill(2);
    expected[11264..12288].fill(2);
    expected[6000..6100].fill(4);
    assert!(read(&client, 0, 16384).await.unwrap() == expected);
    within(client.flush()).await.unwrap();
    peer.kill();
    peer.restart();
    // The flush covered the replay, so there is nothing to tell again.
    assert!(read(&client, 0, 16384).await.unwrap() == [0; 16384]);
    within(client.close()).await.unwrap();
}

#[tokio::test]
async fn after_a_loss_comes_first_what_completed_then_what_was_on_its_way() {
    let fake = Fake::new(ReplyMode::Structured).await;
    let (client, mut conn) = pair(&fake, Client::builder(&fake.uri())).await;
    written(&client, &mut conn, 0, 1).await;
    written(&client, &mut conn, 512, 2).await;
    let third = start_write(&client, 1024, 3);
    assert_eq!(conn.request().await.unwrap().0.offset, 1024);
    let flush = start_flush(&client);
    assert_eq!(conn.request().await.unwrap().0.command, cmd::FLUSH);
    drop(conn);

    let mut conn = fake.accept().await;
    let mut replay = Vec::new();
    for _ in 0..2 {
        let (request, payload) = conn.request().await.unwrap();
        replay.push((request.offset, payload[0]));
        // Nothing else comes before both are answered.
        if replay.len() == 2 {
            assert!(conn.is_quiet().await, "it did not wait for the replay");
        }
        conn.done(&request).await;
    }
    replay.sort();
    assert_eq!(replay, [(0, 1), (512, 2)]);
    let mut rest = Vec::new();
    for _ in 0..2 {
        let (request, payload) = conn.request().await.unwrap();
        rest.push((request.command, payload.first().copied()));
        conn.done(&request).await;
    }
    rest.sort();
    assert_eq!(rest, [(cmd::WRITE, Some(3)), (cmd::FLUSH, None)]);
    within(third).await.unwrap().unwrap();
    within(flush).await.unwrap().unwrap();
}

/// The write may have acted on the server that was lost, and somebody may have read it there. The replay puts
/// older bytes over it, which nobody may see.
#[tokio::test]
async fn a_read_waits_for_the_write_that_was_on_its_way_when_the_server_was_lost() {
    let fake = Fake::new(ReplyMode::Structured).await;
    let (client, mut conn) = pair(&fake, Client::builder(&fake.uri())).await;
    written(&client, &mut conn, 0, 1).await;
    // Gives the read below a place before the write's.
    let elsewhere = start_read(&client, 4096);
    let (request, _) = conn.request().await.unwrap();
    let writing = start_write(&client, 0, 2);
    assert_eq!(conn.request().await.unwrap().0.command, cmd::WRITE);
    conn.data(&request, &[0; 512]).await;
    within(elsewhere).await.unwrap().unwrap();
    let reading = start_read(&client, 0);
    assert_eq!(conn.request().await.unwrap().0.command, cmd::READ);
    drop(conn);

    let mut conn = fake.accept().await;
    for byte in [1, 2] {
        let (request, payload) = conn.request().await.unwrap();
        assert_eq!((request.command, payload), (cmd::WRITE, vec![byte; 512]));
        assert!(
            conn.is_quiet().await,
            "it did not wait for the write of {byte}"
        );
        conn.done(&request).await;
    }
    within(writing).await.unwrap().unwrap();
    let (request, _) = conn.request().await.unwrap();
    assert_eq!(request.command, cmd::READ);
    conn.data(&request, &[2; 512]).await;
    assert_eq!(within(reading).await.unwrap().unwrap(), [2; 512]);
}

#[tokio::test]
async fn what_completed_while_a_flush_ran_is_told_again() {
    let fake = Fake::new(ReplyMode::Structured).await;
    let (client, mut conn) = pair(&fake, Client::builder(&fake.uri())).await;
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
async fn without_a_journal_a_loss_ends_the_client_unless_all_was_flushed() {
    let fake = Fake::new(ReplyMode::Structured).await;
    let (client, mut conn) = pair(&fake, Client::builder(&fake.uri()).journal(0)).await;
    written(&client, &mut conn, 0, 1).await;
    let flush = start_flush(&client);
    let (request, _) = conn.request().await.unwrap();
    conn.done(&request).await;
    within(flush).await.unwrap().unwrap();
    drop(conn);
    // All was flushed: it goes on.
    let mut conn = fake.accept().await;
    written(&client, &mut conn, 0, 2).await;
    let flush = start_flush(&client);
    assert_eq!(conn.request().await.unwrap().0.command, cmd::FLUSH);
    drop(conn);
    drop(fake.accept().await);
    let error = within(flush).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("opened anew"), "{error}");
    for result in [
        read(&client, 0, 512).await.map(drop),
        write(&client, 0, &[1; 512], NONE).await,
        within(client.flush()).await,
        within(client.close()).await,
    ] {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Io);
    }
}

#[tokio::test]
async fn another_disk_in_its_place_is_refused_for_good() {
    type Change = fn(&mut Fake);
    let changes: [(Change, &str); 2] = [
        (
            |fake| fake.size = 2 << 20,
            "its size was 1048576 and is 2097152",
        ),
        (
            |fake| fake.flags -= TransmissionFlags::SEND_FUA,
            "its flags were",
        ),
    ];
    for (change, said) in changes {
        let mut fake = Fake::new(ReplyMode::Structured).await;
        let (client, conn) = pair(&fake, Client::builder(&fake.uri())).await;
        change(&mut fake);
        drop(conn);
        let reading = start_read(&client, 0);
        let _conn = fake.accept().await;
        let error = within(reading).await.unwrap().unwrap_err();
        assert!(error.to_string().contains(said), "{error}");
        let later = within(client.flush()).await.unwrap_err();
        assert!(later.to_string().contains("opened anew"), "{later}");
    }
}

#[tokio::test]
async fn requests_fail_after_the_limit_and_work_again_when_the_server_is_back() {
    let Some(mut peer) = Peer::nbdkit(&["memory", "1M"]) else {
        return;
    };
    let client = Client::builder(&peer.uri())
        .reconnect(Duration::from_millis(100))
        .connect()
        .await
        .unwrap();
    write(&client, 0, &[5; 4096], NONE).await.unwrap();
    peer.kill();
    for result in [
        read(&client, 0, 512).await.map(drop),
        within(client.flush()).await,
        write(&client, 8192, &[6; 512], NONE).await,
    ] {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains("not reachable"), "{error}");
    }
    peer.restart();
    let back = async {
        loop {
            match read(&client, 0, 12288).await {
                Ok(bytes) => return bytes,
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    };
    let bytes = within(back).await;
    assert!(bytes[..4096] == [5; 4096] && bytes[4096..] == [0; 8192]);
    within(client.flush()).await.unwrap();
    within(client.close()).await.unwrap();
}

#[tokio::test]
async fn a_write_that_may_still_act_ends_the_client() {
    let fake = Fake::new(ReplyMode::Structured).await;
    let (client, mut conn) = pair(&fake, Client::builder(&fake.uri())).await;
    let writing = start_write(&client, 0, 1);
    let (request, _) = conn.request().await.unwrap();
    // The server talks nonsense, and may be carrying out the write for all we know.
    conn.raw(&[0x5a; 64]).await;
    let error = within(writing).await.unwrap().unwrap_err();
    assert!(error.to_string().contains("no magic number"), "{error}");
    let later = read(&client, 0, 512).await.unwrap_err();
    assert!(later.to_string().contains("opened anew"), "{later}");
    assert!(within(client.flush()).await.is_err());
    drop((request, conn));
}

#[tokio::test]
async fn after_a_failed_flush_the_journal_is_written_again_before_the_next() {
    let fake = Fake::new(ReplyMode::Structured).await;
    let (client, mut conn) = pair(&fake, Client::builder(&fake.uri())).await;
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

#[tokio::test]
async fn a_server_that_shuts_down_is_left_and_its_successor_asked() {
    let fake = Fake::new(ReplyMode::Structured).await;
    let (client, mut conn) = pair(&fake, Client::builder(&fake.uri())).await;
    let reading = start_read(&client, 512);
    let (request, _) = conn.request().await.unwrap();
    conn.fail(&request, error::ESHUTDOWN).await;
    assert_eq!(conn.request().await.unwrap().0.command, cmd::DISC);
    drop(conn);
    let mut conn = fake.accept().await;
    let (request, _) = conn.request().await.unwrap();
    conn.data(&request, &[7; 512]).await;
    assert_eq!(within(reading).await.unwrap().unwrap(), [7; 512]);
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
    let fake = Fake::new(ReplyMode::Structured).await;
    let (client, mut conn) = pair(&fake, Client::builder(&fake.uri()).journal(1600)).await;
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
async fn when_one_connection_is_lost_the_others_finish_first() {
    let mut fake = Fake::new(ReplyMode::Structured).await;
    fake.flags |= TransmissionFlags::CAN_MULTI_CONN;
    let builder = Client::builder(&fake.uri()).connections(2);
    let (client, (mut a, mut b)) = tokio::join!(builder.connect(), async {
        let a = fake.accept().await;
        (a, fake.accept().await)
    });
    let client = Arc::new(client.unwrap());
    assert_eq!(client.connections(), 2);
    let writes: Vec<_> = [0, 512].map(|at| start_write(&client, at, 1)).into();
    let (on_a, _) = a.request().await.unwrap();
    let (on_b, _) = b.request().await.unwrap();
    assert_ne!(on_a.offset, on_b.offset);
    drop(a);
    // What is still on its way there is awaited, and only then is the connection left.
    assert!(b.is_quiet().await, "it did not wait for the last reply");
    b.done(&on_b).await;
    assert_eq!(b.request().await.unwrap().0.command, cmd::DISC);
    drop(b);
    let mut a = fake.accept().await;
    let mut b = fake.accept().await;
    // The write that completed, as the journal has it; then the one that did not.
    let (replayed, _) = a.request().await.unwrap();
    assert_eq!(replayed.offset, on_b.offset);
    a.done(&replayed).await;
    let again = tokio::select! {
        request = a.request() => { let r = request.unwrap().0; a.done(&r).await; r }
        request = b.request() => { let r = request.unwrap().0; b.done(&r).await; r }
    };
    assert_eq!(again.offset, on_a.offset);
    for write in writes {
        within(write).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_request_under_which_every_connection_breaks_fails_at_last() {
    let fake = Fake::new(ReplyMode::Structured).await;
    let (client, mut conn) = pair(&fake, Client::builder(&fake.uri())).await;
    let reading = start_read(&client, 0);
    let mut tries = 0;
    while !reading.is_finished() {
        if conn.request().await.is_some() {
            tries += 1;
        }
        drop(conn);
        conn = fake.accept().await;
    }
    assert_eq!(tries, 5);
    assert_eq!(
        within(reading).await.unwrap().unwrap_err().kind(),
        ErrorKind::Io
    );
    // That was its own fault; others are served.
    let next = start_read(&client, 512);
    let (request, _) = conn.request().await.unwrap();
    conn.data(&request, &[1; 512]).await;
    within(next).await.unwrap().unwrap();
}

#[tokio::test]
async fn closing_without_a_server_fails_after_the_limit() {
    let Some(mut peer) = Peer::nbdkit(&["memory", "1M"]) else {
        return;
    };
    let client = Client::builder(&peer.uri())
        .reconnect(Duration::from_millis(50))
        .connect()
        .await
        .unwrap();
    write(&client, 0, &[5; 4096], NONE).await.unwrap();
    peer.kill();
    assert_eq!(
        within(client.close()).await.unwrap_err().kind(),
        ErrorKind::Io
    );
    assert_eq!(
        read(&client, 0, 512).await.unwrap_err().kind(),
        ErrorKind::Shutdown
    );
}

/// The next request but for flushes, which are left without an answer.
async fn beside_flushes(conn: &mut FakeConn) -> Option<(Request, Vec<u8>)> {
    loop {
        let (request, payload) = conn.request().await?;
        if request.command != cmd::FLUSH {
            return Some((request, payload));
        }
    }
}

/// A write that the server fails.
async fn failed(client: &Arc<Client>, conn: &mut FakeConn, offset: u64, byte: u8) {
    let failing = start_write(client, offset, byte);
    let (request, _) = beside_flushes(conn).await.unwrap();
    assert_eq!((request.command, request.offset), (cmd::WRITE, offset));
    conn.fail(&request, error::EIO).await;
    within(failing).await.unwrap().unwrap_err();
}

/// A read that the server answers with these bytes.
async fn seen(client: &Arc<Client>, conn: &mut FakeConn, offset: u64, byte: u8) {
    let reading = start_read(client, offset);
    let (request, _) = beside_flushes(conn).await.unwrap();
    assert_eq!((request.command, request.offset), (cmd::READ, offset));
    conn.data(&request, &[byte; 512]).await;
    assert_eq!(within(reading).await.unwrap().unwrap(), [byte; 512]);
}

/// Nothing but flushes comes on the next connection, if there is one, and the client says that it has to be opened anew.
async fn ends_for_good(client: &Arc<Client>, fake: &Fake) {
    let reading = start_read(client, 0);
    let mut conn = fake.accept().await;
    let next = beside_flushes(&mut conn).await;
    assert!(
        next.is_none_or(|(request, _)| request.command == cmd::DISC),
        "it goes on"
    );
    let error = within(reading).await.unwrap().unwrap_err().to_string();
    assert!(
        error.contains("opened anew") && error.contains("failed") && error.contains("0..512"),
        "{error}"
    );
}

#[tokio::test]
async fn a_failed_write_that_was_seen_is_not_undone_by_the_replay() {
    let fake = Fake::new(ReplyMode::Structured).await;
    let (client, mut conn) = pair(&fake, Client::builder(&fake.uri())).await;
    written(&client, &mut conn, 0, 1).await;
    failed(&client, &mut conn, 0, 2).await;
    // It acted all the same.
    seen(&client, &mut conn, 0, 2).await;
    drop(conn);
    ends_for_good(&client, &fake).await;
}

#[tokio::test]
async fn a_write_that_was_seen_on_its_way_and_failed_is_not_undone_by_the_replay() {
    let fake = Fake::new(ReplyMode::Structured).await;
    let builder = Client::builder(&fake.uri()).reconnect(Duration::from_millis(50));
    let (client, mut conn) = pair(&fake, builder).await;
    written(&client, &mut conn, 0, 1).await;
    let writing = start_write(&client, 0, 2);
    assert_eq!(conn.request().await.unwrap().0.command, cmd::WRITE);
    seen(&client, &mut conn, 0, 2).await;
    drop(conn);
    // It takes too long, so the write fails.
    let error = within(writing).await.unwrap().unwrap_err();
    assert!(error.to_string().contains("not reachable"), "{error}");
    let mut conn = fake.accept().await;
    assert!(conn.request().await.is_none(), "it goes on");
    let error = read(&client, 0, 512).await.unwrap_err().to_string();
    assert!(error.contains("opened anew"), "{error}");
}

#[tokio::test]
async fn a_failed_write_that_nobody_saw_leaves_the_client_alone() {
    let fake = Fake::new(ReplyMode::Structured).await;
    let (client, mut conn) = pair(&fake, Client::builder(&fake.uri())).await;
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
    let fake = Fake::new(ReplyMode::Structured).await;
    let (client, mut conn) = pair(&fake, Client::builder(&fake.uri())).await;
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

#[tokio::test]
async fn a_server_that_shuts_down_during_the_replay_is_left_and_its_successor_told() {
    let fake = Fake::new(ReplyMode::Structured).await;
    let (client, mut conn) = pair(&fake, Client::builder(&fake.uri())).await;
    written(&client, &mut conn, 0, 1).await;
    drop(conn);
    let mut conn = fake.accept().await;
    let (request, _) = conn.request().await.unwrap();
    assert_eq!(request.command, cmd::WRITE);
    conn.fail(&request, error::ESHUTDOWN).await;
    let goodbye = conn.request().await.map(|(request, _)| request.command);
    assert_eq!(goodbye, Some(cmd::DISC));
    drop(conn);
    let mut conn = fake.accept().await;
    let (request, payload) = conn.request().await.unwrap();
    assert_eq!((request.command, payload), (cmd::WRITE, vec![1; 512]));
    conn.done(&request).await;
    seen(&client, &mut conn, 0, 1).await;
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
