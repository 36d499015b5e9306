//! The NBD client against real servers: what it negotiates, shows and refuses.
#![cfg(feature = "nbd")]

mod nbd_peers;

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nbd_peers::{Fake, Peer, within};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use userland_io::engines::Memory;
use userland_io::transports::nbd::session::ReplyMode;
use userland_io::transports::nbd::wire::{
    Greeting, HandshakeFlags, OptionHeader, OptionReply, opt, rep,
};
use userland_io::transports::nbd::{Client, ConnectError, Server};
use userland_io::{
    CrashLevel, Device, Discard, Engine, ErrorKind, ExtentKind, Extents, Features, Geometry,
    ReadBuf, Result, WriteBuf, WriteFlags,
};

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

/// A memory disk that notes what it is asked.
#[derive(Clone)]
struct Recorder(Arc<(Memory, Mutex<Vec<String>>)>);

impl Recorder {
    fn note(&self, call: String) {
        self.0.1.lock().unwrap().push(call);
    }
    fn taken(&self) -> Vec<String> {
        std::mem::take(&mut self.0.1.lock().unwrap())
    }
}

impl Engine for Recorder {
    fn geometry(&self) -> Geometry {
        let mut geometry = self.0.0.geometry();
        geometry.features = Features::FUA | Features::WRITE_ZEROES;
        geometry
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        self.note(format!("read {offset}+{}", buf.len()));
        self.0.0.read(buf, offset).await
    }
    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        self.note(format!("write {offset}+{} {flags:?}", buf.len()));
        self.0.0.write(buf, offset, WriteFlags::empty()).await
    }
    async fn flush(&self) -> Result {
        self.note("flush".into());
        Ok(())
    }
    async fn discard(&self, range: Range<u64>) -> Result {
        self.note(format!("discard {range:?}"));
        self.0.0.discard(range).await
    }
    async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        self.note(format!("zeroes {range:?} {flags:?}"));
        Ok(())
    }
    fn contexts(&self) -> Vec<String> {
        vec!["test:colour".into()]
    }
    async fn status(&self, context: &str, range: Range<u64>, out: &mut Extents<u64>) -> Result {
        self.note(format!("{context} of {range:?}"));
        out.push(range.end - range.start, 1 << 40);
        Ok(())
    }
    async fn prefetch(&self, range: Range<u64>) -> Result {
        self.note(format!("prefetch {range:?}"));
        Ok(())
    }
}

#[tokio::test]
async fn every_operation_arrives_with_its_flags() {
    let recorder = Recorder(Arc::new((Memory::new(1 << 20), Mutex::default())));
    let disk = Device::open(recorder.clone()).await.unwrap();
    let server = Server::new().export("disk", disk);
    let server = server.bind(["nbd://127.0.0.1:0"]).await.unwrap();
    let client = Client::builder(&server.uri("disk").to_string())
        .all_contexts(true)
        .connect()
        .await
        .unwrap();
    recorder.taken();

    let none = WriteFlags::empty();
    write(&client, 512, &[1; 512], none).await.unwrap();
    write(&client, 0, &[1; 512], WriteFlags::FUA).await.unwrap();
    within(client.flush()).await.unwrap();
    within(client.discard(4096..8192)).await.unwrap();
    for flags in [none, WriteFlags::NO_UNMAP, WriteFlags::FAST_ONLY] {
        within(client.write_zeroes(8192..12288, flags))
            .await
            .unwrap();
    }
    within(client.prefetch(0..65536)).await.unwrap();
    let mut bytes = [0; 512];
    within(client.read(&mut ReadBuf::new(&mut bytes), 512))
        .await
        .unwrap();
    assert_eq!(bytes, [1; 512]);
    assert_eq!(
        recorder.taken(),
        [
            format!("write 512+512 {none:?}"),
            format!("write 0+512 {:?}", WriteFlags::FUA),
            "flush".into(),
            "discard 4096..8192".into(),
            format!("zeroes 8192..12288 {none:?}"),
            format!("zeroes 8192..12288 {:?}", WriteFlags::NO_UNMAP),
            format!("zeroes 8192..12288 {:?}", WriteFlags::FAST_ONLY),
            "prefetch 0..65536".into(),
            "read 512+512".into(),
        ]
    );

    // What an engine tells of a context goes from it to the client, with all its bits if headers are extended.
    assert_eq!(client.contexts(), ["test:colour"]);
    let mut words = Extents::new(4);
    within(client.status("test:colour", 4096..8192, &mut words))
        .await
        .unwrap();
    let words: Vec<_> = words.iter().map(|run| run.kind).collect();
    assert_eq!(words, [1 << 40]);
    assert_eq!(recorder.taken(), ["test:colour of 4096..8192"]);
    within(client.close()).await.unwrap();
    within(server.shutdown()).await.unwrap();
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
    for feature in [Features::FUA, Features::EXTENTS, Features::WRITE_ZEROES] {
        assert!(geometry.features.contains(feature), "{feature:?}");
    }
    assert!(!geometry.features.contains(Features::SURVIVES_KILL));
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

/// A server that lists whatever `entry` is, without end.
async fn lists_without_end(fake: &Fake, entry: &[u8]) {
    let mut stream = fake.accept_raw().await;
    let flags = HandshakeFlags::all();
    stream
        .write_all(&Greeting { flags }.encode())
        .await
        .unwrap();
    let mut asked = [0; 4 + OptionHeader::LEN];
    within(stream.read_exact(&mut asked)).await.unwrap();
    let reply = OptionReply {
        option: opt::LIST,
        kind: rep::SERVER,
        length: entry.len() as u32,
    };
    let mut bytes = reply.encode().to_vec();
    bytes.extend_from_slice(entry);
    while stream.write_all(&bytes).await.is_ok() {}
}

#[tokio::test]
async fn lists_that_are_too_long_are_refused() {
    let entry = |name: usize, description: usize| {
        let mut entry = (name as u32).to_be_bytes().to_vec();
        entry.resize(4 + name + description, b'x');
        entry
    };
    let fake = Fake::new(ReplyMode::Simple).await;
    let uri = fake.uri();
    for (entry, wanted) in [
        (entry(4097, 0), "of 4097 bytes"),
        (entry(1, 4097), "of 4097 bytes"),
        (entry(1, 0), "more than 10000 exports"),
        (entry(4096, 4096), "in all"),
    ] {
        let (listed, ()) =
            tokio::join!(within(Client::list(&uri)), lists_without_end(&fake, &entry));
        let error = listed.unwrap_err();
        assert!(matches!(error, ConnectError::Protocol(_)), "{error}");
        assert!(error.to_string().contains(wanted), "{error}");
    }
}

#[tokio::test]
async fn contexts_that_were_not_asked_for_or_have_long_names_are_refused() {
    for (contexts, wanted) in [
        (
            vec!["base:allocation", "x-test:more"],
            "more metadata contexts than the 1",
        ),
        (vec!["x".repeat(4097).leak() as &str], "of 4097 bytes"),
    ] {
        let mut fake = Fake::new(ReplyMode::Structured).await;
        fake.contexts = contexts;
        let uri = fake.uri();
        let error = tokio::select! {
            connected = within(Client::connect(&uri)) => connected.unwrap_err(),
            _ = fake.accept() => panic!("the handshake went on"),
        };
        assert!(matches!(error, ConnectError::Protocol(_)), "{error}");
        assert!(error.to_string().contains(wanted), "{error}");
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
