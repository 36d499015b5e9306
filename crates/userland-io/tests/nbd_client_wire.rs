//! The NBD client on the wire: replies in any order and shape, lies, and requests that nobody waits for.
#![cfg(feature = "nbd")]

mod nbd_peers;

use std::sync::Arc;
use std::time::Duration;

use nbd_peers::{Fake, within};
use userland_io::transports::nbd::Client;
use userland_io::transports::nbd::session::ReplyMode;
use userland_io::transports::nbd::wire::{
    CommandFlags, Request, SimpleReply, TransmissionFlags, chunk, cmd, error,
};
use userland_io::{CrashLevel, Engine, ErrorKind, Extents, ReadBuf, Result, WriteBuf, WriteFlags};

async fn read<E: Engine>(engine: &E, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0xee; len];
    within(engine.read(&mut ReadBuf::new(&mut bytes), offset)).await?;
    Ok(bytes)
}

async fn write<E: Engine>(engine: &E, offset: u64, bytes: &[u8], flags: WriteFlags) -> Result {
    within(engine.write(&WriteBuf::new(bytes), offset, flags)).await
}

#[tokio::test]
async fn errors_of_the_server_keep_their_meaning() {
    let fake = Fake::new(ReplyMode::Structured).await;
    let server = async {
        let mut conn = fake.accept().await;
        let mut asked = 0;
        while asked < 4 {
            let (request, _) = conn.request().await.unwrap();
            if request.command == cmd::FLUSH {
                // The client settles what failed.
                conn.done(&request).await;
                continue;
            }
            asked += 1;
            match request.command {
                cmd::WRITE => conn.fail(&request, error::ENOSPC).await,
                cmd::TRIM => conn.fail(&request, 9999).await,
                cmd::WRITE_ZEROES => {
                    assert_eq!(
                        request.flags,
                        CommandFlags::FAST_ZERO | CommandFlags::NO_HOLE
                    );
                    conn.fail(&request, error::ENOTSUP).await;
                }
                _ => {
                    // Some bytes first, then what went wrong with the others, and where.
                    let mut part = 4096u64.to_be_bytes().to_vec();
                    part.extend_from_slice(&[1; 100]);
                    conn.chunk(&request, chunk::OFFSET_DATA, false, &part).await;
                    let mut failure = error::EIO.to_be_bytes().to_vec();
                    failure.extend_from_slice(&8u16.to_be_bytes());
                    failure.extend_from_slice(b"bad disk");
                    failure.extend_from_slice(&4196u64.to_be_bytes());
                    conn.chunk(&request, chunk::ERROR_OFFSET, true, &failure)
                        .await;
                }
            }
        }
        conn
    };
    let uri = fake.uri();
    let client = async {
        let client = Client::connect(&uri).await.unwrap();
        let full = write(&client, 0, &[1; 512], WriteFlags::empty()).await;
        assert_eq!(full.unwrap_err().kind(), ErrorKind::NoSpace);
        let odd = within(client.discard(0..512)).await;
        assert_eq!(odd.unwrap_err().kind(), ErrorKind::Invalid);
        let slow = WriteFlags::FAST_ONLY | WriteFlags::NO_UNMAP;
        let slow = within(client.write_zeroes(0..512, slow)).await;
        assert_eq!(slow.unwrap_err().kind(), ErrorKind::Unsupported);
        let bad = read(&client, 4096, 512).await.unwrap_err();
        assert_eq!(bad.kind(), ErrorKind::Io);
        assert_eq!(
            bad.to_string(),
            "the server says: bad disk (at offset 4196)"
        );
        client
    };
    tokio::join!(server, client);
}

#[tokio::test]
async fn zeroes_that_are_too_many_for_the_server_are_told_so_whatever_it_says_beside() {
    for text in [&b""[..], b"too long"] {
        let fake = Fake::new(ReplyMode::Structured).await;
        let uri = fake.uri();
        let (client, mut conn) = tokio::join!(Client::connect(&uri), fake.accept());
        let client = client.unwrap();
        let (zeroed, ()) = tokio::join!(
            within(client.write_zeroes(0..512, WriteFlags::empty())),
            async {
                let (request, _) = conn.request().await.unwrap();
                let mut failure = error::EOVERFLOW.to_be_bytes().to_vec();
                failure.extend_from_slice(&(text.len() as u16).to_be_bytes());
                failure.extend_from_slice(text);
                conn.chunk(&request, chunk::ERROR, true, &failure).await;
            }
        );
        // Then the edge writes them.
        assert_eq!(zeroed.unwrap_err().kind(), ErrorKind::Unsupported);
    }
}

#[tokio::test]
async fn replies_in_any_order_and_in_pieces_reach_their_requests() {
    for mode in [
        ReplyMode::Simple,
        ReplyMode::Structured,
        ReplyMode::Extended,
    ] {
        let fake = Fake::new(mode).await;
        let server = async {
            let mut conn = fake.accept().await;
            let mut requests = Vec::new();
            for _ in 0..16 {
                requests.push(conn.request().await.unwrap().0);
            }
            for request in requests.iter().rev() {
                let byte = (request.offset >> 10) as u8;
                if mode == ReplyMode::Simple {
                    conn.data(request, &[byte; 1024]).await;
                    continue;
                }
                // The second half, a hole, the first half but for the hole.
                let piece = |at: u64, len: usize| {
                    let mut piece = (request.offset + at).to_be_bytes().to_vec();
                    piece.resize(8 + len, byte);
                    piece
                };
                conn.chunk(request, chunk::OFFSET_DATA, false, &piece(512, 512))
                    .await;
                let mut hole = request.offset.to_be_bytes().to_vec();
                hole.extend_from_slice(&100u32.to_be_bytes());
                conn.chunk(request, chunk::OFFSET_HOLE, false, &hole).await;
                conn.chunk(request, chunk::OFFSET_DATA, true, &piece(100, 412))
                    .await;
            }
            conn
        };
        let uri = fake.uri();
        let client = async {
            let client = Arc::new(Client::connect(&uri).await.unwrap());
            let reads: Vec<_> = (0..16u64)
                .map(|i| {
                    let client = client.clone();
                    tokio::spawn(async move { read(&*client, i << 10, 1024).await.unwrap() })
                })
                .collect();
            for (i, read) in reads.into_iter().enumerate() {
                let bytes = within(read).await.unwrap();
                let hole = if mode == ReplyMode::Simple { 0 } else { 100 };
                assert!(bytes[..hole].iter().all(|&b| b == 0));
                assert!(bytes[hole..].iter().all(|&b| b == i as u8), "{mode:?} {i}");
            }
            client
        };
        tokio::join!(server, client);
    }
}

/// What a server says wrongly to a read of 4096 bytes at 4096.
type Lie = fn(&Request) -> Vec<u8>;

fn lying_chunk(request: &Request, kind: u16, done: bool, length: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = 0x668e_33efu32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&u16::from(done).to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&request.cookie.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

fn lying_data(request: &Request, done: bool, offset: u64, len: usize) -> Vec<u8> {
    let mut payload = offset.to_be_bytes().to_vec();
    payload.resize(8 + len, 7);
    lying_chunk(
        request,
        chunk::OFFSET_DATA,
        done,
        payload.len() as u32,
        &payload,
    )
}

#[tokio::test]
async fn a_lie_ends_its_connection_with_a_clear_error_and_the_next_one_works() {
    let lies: [(&str, Lie); 19] = [
        ("no magic number", |_| vec![0x5a; 64]),
        ("which no request in flight has", |r| {
            let stranger = Request {
                cookie: r.cookie ^ 1,
                ..*r
            };
            lying_data(&stranger, true, 4096, 4096)
        }),
        ("which no request in flight has", |r| {
            // The right slot, but of an earlier request.
            let stranger = Request {
                cookie: r.cookie ^ (1 << 40),
                ..*r
            };
            lying_data(&stranger, true, 4096, 4096)
        }),
        ("left some out", |r| lying_data(r, true, 4096, 4095)),
        ("left some out", |r| {
            lying_chunk(r, chunk::NONE, true, 0, &[])
        }),
        ("in reply to a read of", |r| lying_data(r, true, 4095, 4096)),
        ("in reply to a read of", |r| {
            lying_data(r, true, u64::MAX - 5, 4096)
        }),
        ("of 4105 bytes", |r| lying_data(r, true, 4096, 4097)),
        ("of 4294967295 bytes", |r| {
            lying_chunk(r, chunk::OFFSET_DATA, true, u32::MAX, &[0; 64])
        }),
        ("of 8 bytes", |r| lying_data(r, true, 4096, 0)),
        ("twice in one reply", |r| {
            let mut bytes = lying_data(r, false, 4096, 2048);
            bytes.extend(lying_data(r, true, 6000, 2192));
            bytes
        }),
        ("in reply to a read of", |r| {
            let mut payload = 4096u64.to_be_bytes().to_vec();
            payload.extend_from_slice(&u32::MAX.to_be_bytes());
            lying_chunk(r, chunk::OFFSET_HOLE, true, 12, &payload)
        }),
        ("of 13 bytes", |r| {
            lying_chunk(r, chunk::OFFSET_HOLE, true, 13, &[0; 13])
        }),
        ("NONE chunk", |r| lying_chunk(r, chunk::NONE, false, 0, &[])),
        ("chunk of type 5", |r| {
            lying_chunk(r, chunk::BLOCK_STATUS, true, 12, &[0; 12])
        }),
        ("chunk of type 77", |r| lying_chunk(r, 77, true, 0, &[])),
        ("whose error is 0", |r| {
            lying_chunk(r, chunk::ERROR, true, 6, &[0; 6])
        }),
        ("does not fit into it", |r| {
            lying_chunk(r, chunk::ERROR, true, 6, &[0, 0, 0, 5, 0xff, 0xff])
        }),
        ("simple reply without bytes", |r| {
            SimpleReply {
                error: 0,
                cookie: r.cookie,
            }
            .encode()
            .to_vec()
        }),
    ];
    let fake = Fake::new(ReplyMode::Structured).await;
    let uri = fake.uri();
    for (wanted, lie) in lies {
        let server = async {
            let mut conn = fake.accept().await;
            let (request, _) = conn.request().await.unwrap();
            conn.raw(&lie(&request)).await;
            // The client hangs up, and comes again.
            assert!(conn.request().await.is_none());
            fake.accept().await.serve(&mut vec![3; 1 << 20]).await
        };
        let client = async {
            let client = Client::connect(&uri).await.unwrap();
            let error = read(&client, 4096, 4096).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Io);
            assert!(error.to_string().contains(wanted), "{wanted}: {error}");
            assert_eq!(read(&client, 4096, 4096).await.unwrap(), [3; 4096]);
            within(client.close()).await.unwrap();
        };
        tokio::join!(server, client);
    }
}

#[tokio::test]
async fn lies_about_extents_end_the_connection() {
    let lies: [(&str, Vec<u8>); 6] = [
        (
            "not negotiated",
            [2u32, 4096, 0].map(u32::to_be_bytes).concat(),
        ),
        ("of no bytes", [1u32, 0, 0].map(u32::to_be_bytes).concat()),
        ("of 4 bytes", 1u32.to_be_bytes().to_vec()),
        ("of 14 bytes", vec![0; 14]),
        ("no status", vec![]),
        (
            "twice in one reply",
            [1u32, 4096, 0].map(u32::to_be_bytes).concat(),
        ),
    ];
    for (wanted, payload) in lies {
        let fake = Fake::new(ReplyMode::Structured).await;
        let uri = fake.uri();
        let server = async {
            let mut conn = fake.accept().await;
            let (request, _) = conn.request().await.unwrap();
            if wanted.starts_with("twice") {
                conn.chunk(&request, chunk::BLOCK_STATUS, false, &payload)
                    .await;
            }
            let kind = match payload.is_empty() {
                true => chunk::NONE,
                false => chunk::BLOCK_STATUS,
            };
            conn.chunk(&request, kind, true, &payload).await;
            assert!(conn.request().await.is_none());
        };
        let client = async {
            let client = Client::connect(&uri).await.unwrap();
            let mut extents = Extents::new(4);
            let error = within(client.extents(0..8192, &mut extents))
                .await
                .unwrap_err();
            assert!(error.to_string().contains(wanted), "{wanted}: {error}");
            client
        };
        tokio::join!(server, client);
    }
}

#[tokio::test]
async fn a_server_that_tells_extents_byte_by_byte_is_not_asked_without_end() {
    let fake = Fake::new(ReplyMode::Structured).await;
    let uri = fake.uri();
    let server = async {
        let mut conn = fake.accept().await;
        let mut asked = 0u64;
        while let Some((request, _)) = conn.request().await {
            if request.command != cmd::BLOCK_STATUS {
                break;
            }
            asked += 1;
            let one = [1u32, 1, 0].map(u32::to_be_bytes).concat();
            conn.chunk(&request, chunk::BLOCK_STATUS, true, &one).await;
        }
        asked
    };
    let client = async {
        let client = Client::connect(&uri).await.unwrap();
        // All of one kind, so the list is never full.
        let mut extents = Extents::new(4);
        within(client.extents(0..8192, &mut extents)).await.unwrap();
        drop(client);
        extents.covered()
    };
    let (asked, covered) = tokio::join!(server, client);
    assert_eq!(asked, covered);
    assert!(covered > 0 && covered <= 256, "{covered} round trips");
}

#[tokio::test]
async fn a_dropped_read_leaves_the_connection_and_the_buffer_alone() {
    let fake = Fake::new(ReplyMode::Structured).await;
    let uri = fake.uri();
    let (client, mut conn) = tokio::join!(Client::connect(&uri), fake.accept());
    let client = client.unwrap();
    let mut buffer = vec![0xaa; 4096];
    let request = {
        let mut buf = ReadBuf::new(&mut buffer);
        let mut reading = Box::pin(client.read(&mut buf, 0));
        tokio::select! {
            biased;
            _ = &mut reading => panic!("nobody answered"),
            request = conn.request() => request.unwrap().0,
        }
    };
    conn.data(&request, &[0xbb; 4096]).await;
    // The reply has been taken once a later one has.
    let (bytes, ()) = tokio::join!(read(&client, 4096, 512), async {
        let (request, _) = conn.request().await.unwrap();
        conn.data(&request, &[0xcc; 512]).await;
    });
    assert_eq!(bytes.unwrap(), [0xcc; 512]);
    assert_eq!(buffer, [0xaa; 4096]);
}

#[tokio::test]
async fn a_flush_waits_for_writes_that_were_dropped_or_forgotten() {
    for forget in [false, true] {
        let fake = Fake::new(ReplyMode::Structured).await;
        let uri = fake.uri();
        let (client, mut conn) = tokio::join!(Client::connect(&uri), fake.accept());
        let client = Arc::new(client.unwrap());
        let (client_too, bytes) = (client.clone(), vec![9; 512]);
        let mut writing = Box::pin(async move {
            client_too
                .write(&WriteBuf::new(&bytes), 0, WriteFlags::empty())
                .await
        });
        let wrote = tokio::select! {
            biased;
            _ = &mut writing => panic!("nobody answered"),
            request = conn.request() => request.unwrap().0,
        };
        match forget {
            true => std::mem::forget(writing),
            false => drop(writing),
        }
        let mut flushing = Box::pin(client.flush());
        let flush = tokio::select! {
            biased;
            _ = &mut flushing => panic!("nobody answered"),
            request = conn.request() => request.unwrap().0,
        };
        assert_eq!(flush.command, cmd::FLUSH);
        conn.done(&flush).await;
        // The server has flushed; the write may still act, so the flush is not done.
        let early = tokio::time::timeout(Duration::from_millis(100), &mut flushing).await;
        assert!(early.is_err(), "the flush did not wait");
        conn.done(&wrote).await;
        within(flushing).await.unwrap();
    }
}

#[tokio::test]
async fn overlapping_writes_are_never_on_their_way_together() {
    let fake = Fake::new(ReplyMode::Structured).await;
    let uri = fake.uri();
    let (client, mut conn) = tokio::join!(Client::connect(&uri), fake.accept());
    let client = Arc::new(client.unwrap());
    let start = |offset: u64, byte: u8| {
        let client = client.clone();
        tokio::spawn(
            async move { write(&*client, offset, &[byte; 1024], WriteFlags::empty()).await },
        )
    };
    let first = start(0, 1);
    let (one, _) = conn.request().await.unwrap();
    let second = start(512, 2);
    // An unrelated one is not held up.
    let third = start(4096, 3);
    let (three, _) = conn.request().await.unwrap();
    assert_eq!((one.offset, three.offset), (0, 4096));
    conn.done(&three).await;
    within(third).await.unwrap().unwrap();
    conn.done(&one).await;
    within(first).await.unwrap().unwrap();
    let (two, _) = conn.request().await.unwrap();
    assert_eq!(two.offset, 512);
    conn.done(&two).await;
    within(second).await.unwrap().unwrap();
}

#[tokio::test]
async fn close_flushes_and_then_says_goodbye() {
    let fake = Fake::new(ReplyMode::Structured).await;
    let uri = fake.uri();
    let mut disk = vec![0; 1 << 20];
    let server = async { fake.accept().await.serve(&mut disk).await };
    let client = async {
        let client = Client::connect(&uri).await.unwrap();
        write(&client, 0, &[1; 512], WriteFlags::empty())
            .await
            .unwrap();
        within(client.close()).await.unwrap();
        let late = read(&client, 0, 512).await;
        assert_eq!(late.unwrap_err().kind(), ErrorKind::Shutdown);
    };
    let (log, ()) = tokio::join!(server, client);
    let commands: Vec<u16> = log.iter().map(|request| request.command).collect();
    assert_eq!(commands, [cmd::WRITE, cmd::FLUSH, cmd::DISC]);
}

#[tokio::test]
async fn a_server_with_fua_alone_gets_it_on_every_mutation() {
    let mut fake = Fake::new(ReplyMode::Structured).await;
    fake.flags = TransmissionFlags::HAS_FLAGS
        | TransmissionFlags::SEND_FUA
        | TransmissionFlags::SEND_TRIM
        | TransmissionFlags::SEND_WRITE_ZEROES;
    let uri = fake.uri();
    let mut disk = vec![0; 1 << 20];
    let server = async { fake.accept().await.serve(&mut disk).await };
    let client = async {
        let client = Client::connect(&uri).await.unwrap();
        assert_eq!(client.geometry().crash, CrashLevel::Sync);
        write(&client, 0, &[1; 512], WriteFlags::empty())
            .await
            .unwrap();
        within(client.discard(0..512)).await.unwrap();
        within(client.write_zeroes(0..512, WriteFlags::empty()))
            .await
            .unwrap();
        within(client.flush()).await.unwrap();
        // Not claimed, so not even tried.
        let fast = within(client.write_zeroes(0..512, WriteFlags::FAST_ONLY)).await;
        assert_eq!(fast.unwrap_err().kind(), ErrorKind::Unsupported);
        within(client.close()).await.unwrap();
    };
    let (log, ()) = tokio::join!(server, client);
    let seen: Vec<_> = log.iter().map(|r| (r.command, r.flags)).collect();
    let fua = CommandFlags::FUA;
    assert_eq!(
        seen,
        [
            (cmd::WRITE, fua),
            (cmd::TRIM, fua),
            (cmd::WRITE_ZEROES, fua),
            (cmd::DISC, CommandFlags::empty()),
        ]
    );
}
