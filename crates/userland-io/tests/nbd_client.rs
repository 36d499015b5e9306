//! The NBD client against servers that are not ours, against lies, and under cancellation.
#![cfg(feature = "nbd")]

mod nbd_peers;

use std::sync::Arc;
use std::time::Duration;

use nbd_peers::{Fake, Peer, within};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use userland_io::engines::Memory;
use userland_io::transports::nbd::session::ReplyMode;
use userland_io::transports::nbd::wire::{
    CommandFlags, Request, SimpleReply, TransmissionFlags, chunk, cmd, error,
};
use userland_io::transports::nbd::{Client, ConnectError, Server};
use userland_io::{
    CrashLevel, Device, Discard, Engine, ErrorKind, ExtentKind, Extents, Features, ReadBuf, Result,
    WriteBuf, WriteFlags,
};

async fn read<E: Engine>(engine: &E, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0xee; len];
    within(engine.read(&mut ReadBuf::new(&mut bytes), offset)).await?;
    Ok(bytes)
}

async fn write<E: Engine>(engine: &E, offset: u64, bytes: &[u8], flags: WriteFlags) -> Result {
    within(engine.write(&WriteBuf::new(bytes), offset, flags)).await
}

/// Random operations, eight at a time on disjoint ranges, held against an array.
async fn matches_a_model(client: Client, seed: u64) {
    const PART: u64 = 256 << 10;
    let device = within(Device::open(client)).await.unwrap();
    let geometry = device.geometry();
    let tasks: Vec<_> = (0..8u64)
        .map(|part| {
            let device = device.clone();
            tokio::spawn(async move {
                let mut random = fastrand::Rng::with_seed(seed * 8 + part);
                let mut model = vec![0u8; PART as usize];
                let base = part * PART;
                for _ in 0..60 {
                    let start = random.u64(0..PART - 1);
                    let end = (start + random.u64(1..40_000)).min(PART);
                    let mine = start as usize..end as usize;
                    let range = base + start..base + end;
                    match random.u8(0..8) {
                        0..=2 => {
                            let mut bytes = vec![1; mine.len()];
                            device
                                .read(&mut ReadBuf::new(&mut bytes), range.start)
                                .await
                                .unwrap();
                            assert!(bytes == model[mine], "{range:?} differs");
                        }
                        3..=5 => {
                            let bytes: Vec<u8> = mine.clone().map(|_| random.u8(..)).collect();
                            let flags = match random.u8(0..4) {
                                0 => WriteFlags::FUA,
                                _ => WriteFlags::empty(),
                            };
                            device
                                .write(&WriteBuf::new(&bytes), range.start, flags)
                                .await
                                .unwrap();
                            model[mine].copy_from_slice(&bytes);
                        }
                        6 => {
                            let flags = match random.bool() {
                                true => WriteFlags::NO_UNMAP,
                                false => WriteFlags::empty(),
                            };
                            device.write_zeroes(range, flags).await.unwrap();
                            model[mine].fill(0);
                        }
                        _ => device.flush().await.unwrap(),
                    }
                }
                let mut bytes = vec![1; PART as usize];
                device
                    .read(&mut ReadBuf::new(&mut bytes), base)
                    .await
                    .unwrap();
                assert!(bytes == model, "part {part} differs at the end");
            })
        })
        .collect();
    for task in tasks {
        within(task).await.unwrap();
    }
    if geometry.features.contains(Features::EXTENTS) {
        let mut extents = Extents::new(10_000);
        device
            .extents(0..geometry.size, &mut extents)
            .await
            .unwrap();
        assert!(extents.covered() > 0);
        assert!(extents.iter().any(|e| e.kind == ExtentKind::Data));
    }
    within(device.close()).await.unwrap();
}

#[tokio::test]
async fn nbdkit_holds_what_a_model_holds() {
    let Some(peer) = Peer::nbdkit(&["memory", "64M"]) else {
        return;
    };
    matches_a_model(Client::connect(&peer.uri()).await.unwrap(), 1).await;
}

#[tokio::test]
async fn nbdkit_with_simple_replies_holds_what_a_model_holds() {
    let Some(peer) = Peer::nbdkit(&["--no-sr", "memory", "64M"]) else {
        return;
    };
    let client = Client::connect(&peer.uri()).await.unwrap();
    assert!(!client.geometry().features.contains(Features::EXTENTS));
    matches_a_model(client, 2).await;
}

#[tokio::test]
async fn a_server_without_options_is_asked_by_export_name() {
    let Some(peer) = Peer::nbdkit(&["--mask-handshake=0", "memory", "64M"]) else {
        return;
    };
    matches_a_model(Client::connect(&peer.uri()).await.unwrap(), 3).await;
    let refused = Client::list(&peer.uri()).await;
    assert!(
        matches!(refused, Err(ConnectError::NotNbd(_))),
        "{refused:?}"
    );
}

#[tokio::test]
async fn qemu_nbd_holds_what_a_model_holds() {
    let Some(peer) = Peer::qemu_nbd(&["-f", "raw", "--discard=unmap", "{dir}/disk"]) else {
        return;
    };
    matches_a_model(Client::connect(&peer.uri()).await.unwrap(), 4).await;
}

#[tokio::test]
async fn several_connections_hold_what_a_model_holds() {
    let Some(peer) = Peer::nbdkit(&["memory", "64M"]) else {
        return;
    };
    let client = Client::builder(&peer.uri())
        .connections(4)
        .connect()
        .await
        .unwrap();
    assert_eq!(client.connections(), 4);
    matches_a_model(client, 5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_own_server_holds_what_a_model_holds() {
    for connections in [1, 4] {
        let disk = Device::open(Memory::new(64 << 20)).await.unwrap();
        let server = Server::new()
            .export("disk", disk)
            .bind(["nbd://127.0.0.1:0"])
            .await
            .unwrap();
        let uri = server.uri("disk").to_string();
        let listed = Client::list(&uri).await.unwrap();
        assert_eq!(listed[0].name, "disk");
        let client = Client::builder(&uri)
            .connections(connections)
            .connect()
            .await
            .unwrap();
        // A flush there covers all connections, always.
        assert_eq!(client.connections(), connections);
        assert!(client.geometry().features.contains(Features::EXTENTS));
        matches_a_model(client, 7).await;
        let unknown = Client::connect(&server.uri("other").to_string()).await;
        assert!(
            matches!(unknown, Err(ConnectError::UnknownExport { .. })),
            "{unknown:?}"
        );
        within(server.shutdown()).await.unwrap();
    }
}

#[tokio::test]
async fn one_connection_is_made_where_a_flush_covers_no_more() {
    let Some(peer) = Peer::nbdkit(&[
        "--filter=multi-conn",
        "memory",
        "64M",
        "multi-conn-mode=disable",
    ]) else {
        return;
    };
    let client = Client::builder(&peer.uri())
        .connections(4)
        .connect()
        .await
        .unwrap();
    assert_eq!(client.connections(), 1);
    matches_a_model(client, 6).await;
}

#[tokio::test]
async fn geometry_is_what_the_server_says() {
    let Some(peer) = Peer::nbdkit(&[
        "--filter=blocksize-policy",
        "memory",
        "10000000",
        "blocksize-minimum=512",
        "blocksize-preferred=8192",
        "blocksize-maximum=3M",
    ]) else {
        return;
    };
    let client = Client::connect(&peer.uri()).await.unwrap();
    let geometry = client.geometry();
    assert_eq!(geometry.size, 10_000_000 / 512 * 512);
    assert_eq!(geometry.logical_block_size, 512);
    assert_eq!((geometry.io_min, geometry.io_opt), (8192, 8192));
    assert_eq!(geometry.max_transfer, 3 << 20);
    assert_eq!(geometry.discard, Discard::Unspecified);
    assert_eq!(geometry.crash, CrashLevel::Flush);
    for feature in [
        Features::FUA,
        Features::EXTENTS,
        Features::WRITE_ZEROES,
        Features::SURVIVES_KILL,
    ] {
        assert!(geometry.features.contains(feature), "{feature:?}");
    }
    assert!(!geometry.features.contains(Features::ROTATIONAL));
    // Longer than one request may be, and on no block's edge: the edge splits and rounds.
    let device = Device::open(client).await.unwrap();
    let bytes: Vec<u8> = (0..8_000_001u32).map(|i| (i >> 8) as u8).collect();
    device
        .write(&WriteBuf::new(&bytes), 777, WriteFlags::empty())
        .await
        .unwrap();
    let mut back = vec![0; bytes.len()];
    device
        .read(&mut ReadBuf::new(&mut back), 777)
        .await
        .unwrap();
    assert!(back == bytes);

    let Some(peer) = Peer::nbdkit(&["-r", "memory", "1M"]) else {
        return;
    };
    let client = Client::connect(&peer.uri()).await.unwrap();
    let geometry = client.geometry();
    assert!(geometry.is_read_only());
    assert_eq!(geometry.discard, Discard::None);
}

#[tokio::test]
async fn extents_are_told_across_replies() {
    for mode in ["nbdkit", "qemu"] {
        let peer = match mode {
            "nbdkit" => Peer::nbdkit(&["file", "{dir}/disk"]),
            _ => Peer::qemu_nbd(&["-f", "raw", "--discard=unmap", "{dir}/disk"]),
        };
        let Some(peer) = peer else { continue };
        let client = Client::connect(&peer.uri()).await.unwrap();
        for at in [1u64, 5, 9] {
            write(
                &client,
                at << 20,
                &vec![at as u8; 1 << 20],
                WriteFlags::empty(),
            )
            .await
            .unwrap();
        }
        let mut extents = Extents::new(100);
        within(client.extents(512 << 10..32 << 20, &mut extents))
            .await
            .unwrap();
        // The sum is the whole range, and data is where it was written.
        assert_eq!(extents.covered(), (32 << 20) - (512 << 10), "{mode}");
        let mut at = 512u64 << 10;
        for extent in &extents {
            for mib in at >> 20..=(at + extent.len - 1) >> 20 {
                let data = [1, 5, 9].contains(&mib);
                assert_eq!(extent.kind == ExtentKind::Data, data, "{mode} {mib} MiB");
            }
            at += extent.len;
        }
        // A full list ends the search.
        let mut first = Extents::new(1);
        within(client.extents(0..32 << 20, &mut first))
            .await
            .unwrap();
        assert_eq!((first.len(), first.covered()), (1, 1 << 20), "{mode}");
        within(client.close()).await.unwrap();
    }
}

#[tokio::test]
async fn further_contexts_are_offered_when_asked_for() {
    let Some(peer) = Peer::qemu_nbd(&["-A", "-f", "raw", "{dir}/disk"]) else {
        return;
    };
    let plain = Client::connect(&peer.uri()).await.unwrap();
    assert_eq!(plain.contexts(), Vec::<String>::new());
    within(plain.close()).await.unwrap();
    let client = Client::builder(&peer.uri())
        .all_contexts(true)
        .connect()
        .await
        .unwrap();
    assert_eq!(client.contexts(), ["qemu:allocation-depth"]);
    write(&client, 0, &[7; 1 << 20], WriteFlags::empty())
        .await
        .unwrap();
    let mut status = Extents::new(8);
    within(client.status("qemu:allocation-depth", 0..2 << 20, &mut status))
        .await
        .unwrap();
    assert_eq!(status.covered(), 2 << 20);
    // Depth 1: the top image holds it.
    assert_eq!(status.iter().next().map(|run| run.kind), Some(1));
    let mut extents = Extents::new(8);
    within(client.extents(0..2 << 20, &mut extents))
        .await
        .unwrap();
    assert_eq!(extents.covered(), 2 << 20);
    let unknown = within(client.status("x:y", 0..512, &mut status)).await;
    assert_eq!(unknown.unwrap_err().kind(), ErrorKind::Unsupported);
}

#[tokio::test]
async fn exports_are_listed() {
    let Some(peer) = Peer::qemu_nbd(&[
        "-f",
        "raw",
        "-x",
        "the disk",
        "-D",
        "described",
        "{dir}/disk",
    ]) else {
        return;
    };
    let exports = Client::list(&peer.uri()).await.unwrap();
    assert_eq!(exports.len(), 1);
    assert_eq!(
        (exports[0].name.as_str(), exports[0].description.as_str()),
        ("the disk", "described")
    );
    Client::connect(&peer.uri_of("the%20disk")).await.unwrap();
    let unknown = Client::connect(&peer.uri_of("another")).await.unwrap_err();
    assert!(
        matches!(&unknown, ConnectError::UnknownExport { name, .. } if name == "another"),
        "{unknown}"
    );
}

#[tokio::test]
async fn a_server_that_requires_tls_is_told_apart() {
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(keys.path(), "user:0123456789abcdef0123456789abcdef\n").unwrap();
    let psk = format!("--tls-psk={}", keys.path().display());
    let Some(peer) = Peer::nbdkit(&["--tls=require", &psk, "memory", "1M"]) else {
        return;
    };
    for refused in [
        Client::connect(&peer.uri()).await.map(drop),
        Client::list(&peer.uri()).await.map(drop),
    ] {
        assert!(
            matches!(refused, Err(ConnectError::TlsRequired)),
            "{refused:?}"
        );
    }
}

#[tokio::test]
async fn connecting_says_what_went_wrong() {
    let nobody = {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        format!("nbd://{}/", listener.local_addr().unwrap())
    };
    let error = Client::connect(&nobody).await.unwrap_err();
    assert!(matches!(error, ConnectError::Unreachable { .. }), "{error}");

    let error = Client::connect("http://localhost/").await.unwrap_err();
    assert!(matches!(error, ConnectError::Uri(_)), "{error}");

    let fake = Fake::new(ReplyMode::Simple).await;
    for (says, wanted) in [
        (&b"SSH-2.0-OpenSSH_9.2\r\n"[..], "begins with \"SSH-2.0-\""),
        (b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53", "oldstyle"),
        (b"NBDMAGICIHAVEOPX\x00\x03", "instead of IHAVEOPT"),
        (b"NBDMAGIC", "ended during the handshake (the greeting)"),
        (
            b"NBDMAGICIHAVEOPT\x00\x03hello world, this is no reply",
            "wrong magic number",
        ),
    ] {
        let server = async {
            let mut stream = fake.accept_raw().await;
            let _ = stream.write_all(says).await;
            let _ = stream.shutdown().await;
            // Until the client hangs up: else what it sends meets a closed socket.
            let _ = within(stream.read_to_end(&mut Vec::new())).await;
        };
        let uri = fake.uri();
        let (error, ()) = tokio::join!(Client::connect(&uri), server);
        let error = error.unwrap_err().to_string();
        // Oldstyle greetings are longer than what was sent here; either way it is no newstyle server.
        assert!(
            error.contains(wanted) || says.len() == 16 && error.contains("ended"),
            "{error}"
        );
    }

    let uri = fake.uri();
    let silent = Client::builder(&uri).timeout(Duration::from_millis(100));
    let (error, _stream) = tokio::join!(silent.connect(), fake.accept_raw());
    let error = error.unwrap_err();
    assert!(matches!(error, ConnectError::Timeout { .. }), "{error}");
}

#[tokio::test]
async fn errors_of_the_server_keep_their_meaning() {
    let fake = Fake::new(ReplyMode::Structured).await;
    let server = async {
        let mut conn = fake.accept().await;
        for _ in 0..4 {
            let (request, _) = conn.request().await.unwrap();
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
