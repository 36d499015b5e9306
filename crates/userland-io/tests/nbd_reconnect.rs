//! The NBD client and servers that go away: nothing that was answered is lost, and no flush lies.
#![cfg(feature = "nbd")]

use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;
use userland_io::transports::nbd::Client;
use userland_io::transports::nbd::session::ReplyMode;
use userland_io::transports::nbd::wire::{TransmissionFlags, cmd, error};
use userland_io::{Engine, ErrorKind, Result, WriteFlags};
mod nbd_peers;
use nbd_peers::requests::{
    NONE, connected, read, seen, start_flush, start_read, start_write, write, written,
};
use nbd_peers::{Fake, FakeConn, Peer, within};

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
    let (fake, client, mut conn) = connected(|plain| plain).await;
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

/// Takes the write that is told again and then the one that is sent again, each alone, and only then the read.
async fn takes_writes_before_the_read(conn: &mut FakeConn, writing: JoinHandle<Result>) {
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
}

/// The write may have acted on the server that was lost, and somebody may have read it there. The replay puts
/// older bytes over it, which nobody may see.
#[tokio::test]
async fn a_read_waits_for_the_write_that_was_on_its_way_when_the_server_was_lost() {
    let (fake, client, mut conn) = connected(|plain| plain).await;
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
    takes_writes_before_the_read(&mut conn, writing).await;
    assert_eq!(within(reading).await.unwrap().unwrap(), [2; 512]);
}

#[tokio::test]
async fn without_a_journal_a_loss_ends_the_client_unless_all_was_flushed() {
    let (fake, client, mut conn) = connected(|to| to.journal(0)).await;
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
        let (mut fake, client, conn) = connected(|plain| plain).await;
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
    let (_fake, client, mut conn) = connected(|plain| plain).await;
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
async fn a_server_that_shuts_down_is_left_and_its_successor_asked() {
    let (fake, client, mut conn) = connected(|plain| plain).await;
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

/// It may have acted in part, and somebody may have read it: the replay puts older bytes there, which nobody may see.
#[tokio::test]
async fn what_a_server_that_shuts_down_refused_comes_before_all_else_at_its_successor() {
    let (fake, client, mut conn) = connected(|plain| plain).await;
    written(&client, &mut conn, 0, 1).await;
    let writing = start_write(&client, 0, 2);
    let (request, _) = conn.request().await.unwrap();
    seen(&client, &mut conn, 0, 2).await;
    conn.fail(&request, error::ESHUTDOWN).await;
    assert_eq!(conn.request().await.unwrap().0.command, cmd::DISC);
    drop(conn);
    let reading = start_read(&client, 0);
    let mut conn = fake.accept().await;
    takes_writes_before_the_read(&mut conn, writing).await;
    within(reading).await.unwrap().unwrap();
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
    let (fake, client, mut conn) = connected(|plain| plain).await;
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

#[tokio::test]
async fn a_server_that_shuts_down_during_the_replay_is_left_and_its_successor_told() {
    let (fake, client, mut conn) = connected(|plain| plain).await;
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
