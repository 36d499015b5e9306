//! Clients that mean harm, or have lost their way: each is answered or closed within a
//! second, in bounded memory, without a panic, and the others do not notice.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout};
use userland_io::engines::Memory;
use userland_io::transports::nbd::Limits;
use userland_io::transports::nbd::limits::Environment;
use userland_io::transports::nbd::session::ReplyMode;
use userland_io::transports::nbd::transmission;
use userland_io::transports::nbd::wire::{CommandFlags, Request, cmd};
use userland_io::{Device, Engine};

#[path = "common/nbd_peer.rs"]
mod nbd_peer;
use nbd_peer::{MIB, MODES, Peer, environment, pattern, session};

/// Counts the bytes that are allocated, and the most that ever were.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
/// What is counted is the whole process's, so the tests take turns.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

// SAFETY: everything is handed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(now, Relaxed);
        // SAFETY: as the caller vouches for.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(now, Relaxed);
        // SAFETY: as the caller vouches for.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as the caller vouches for.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const SIZE: u64 = 16 << 20;
/// The bytes that a connection may have in flight, in these tests.
const CAP: usize = 32 << 20;
/// What a connection may need beside: input, gathered replies, idle buffers; and the tests themselves.
const BESIDE: usize = 12 << 20;

fn limits() -> Environment {
    let mut limits = Limits::default();
    limits.max_request = 8 << 20;
    limits.max_connection_bytes = CAP;
    limits.max_payload_drain = 64 << 20;
    let (sender, environment) = environment(limits);
    // No shutdown in these tests: a sender that is gone would count as one.
    std::mem::forget(sender);
    environment
}

/// A whole valid session: a few of each command, and a disconnect.
fn valid(mode: ReplyMode, random: &mut fastrand::Rng) -> Vec<u8> {
    let mut bytes = Vec::new();
    for cookie in 0..random.u64(1..40) {
        let command = random.choice([0, 1, 1, 3, 4, 5, 6, 7]).unwrap();
        let length = random.u64(1..20_000);
        let request = Request {
            flags: match command {
                cmd::WRITE if mode == ReplyMode::Extended => CommandFlags::PAYLOAD_LEN,
                _ => CommandFlags::empty(),
            },
            command,
            cookie,
            offset: if command == cmd::FLUSH {
                0
            } else {
                random.u64(..SIZE - length)
            },
            length: if command == cmd::FLUSH { 0 } else { length },
        };
        push(&mut bytes, mode, &request);
        if command == cmd::WRITE {
            bytes.extend(pattern(7, request.offset, length as usize));
        }
    }
    let request = Request {
        flags: CommandFlags::empty(),
        command: cmd::DISC,
        cookie: 1,
        offset: 0,
        length: 0,
    };
    push(&mut bytes, mode, &request);
    bytes
}

fn push(bytes: &mut Vec<u8>, mode: ReplyMode, request: &Request) {
    match mode {
        ReplyMode::Extended => bytes.extend(request.encode_extended()),
        _ => bytes.extend(request.encode_compact()),
    }
}

/// Breaks `bytes` in one to four places.
fn mutate(bytes: &mut Vec<u8>, random: &mut fastrand::Rng) {
    for _ in 0..random.usize(1..5) {
        if bytes.is_empty() {
            return;
        }
        // Headers are hit more often than the payloads between them.
        let reach = match random.bool() {
            true => bytes.len(),
            false => bytes.len().min(64),
        };
        let at = random.usize(..reach);
        match random.u8(..6) {
            0 => bytes[at] ^= 1 << random.u8(..8),
            1 => bytes[at] = random.u8(..),
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..(at + random.usize(1..9)).min(bytes.len()))),
            4 => {
                let more: Vec<u8> = (0..random.usize(1..9)).map(|_| random.u8(..)).collect();
                drop(bytes.splice(at..at, more));
            }
            _ => {
                let end = (at + 8).min(bytes.len());
                bytes[at..end].fill(random.choice([0x00, 0x7f, 0xff]).unwrap());
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn mutated_sessions_end_within_a_second_and_disturb_nobody() {
    let _alone = ALONE.lock().await;
    let environment = limits();
    let victim = Device::open(Memory::new(SIZE)).await.unwrap();
    let bystander = Device::open(Memory::new(SIZE)).await.unwrap();
    let mut other = Peer::with(
        &bystander,
        session(MODES[1], SIZE),
        tokio::sync::watch::channel(false).0,
        environment.clone(),
    );
    let data = pattern(1, 0, 100_000);
    assert_eq!(other.write(0, &data).await.error, 0);
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    for seed in 0..600_u64 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mode = MODES[seed as usize % 3];
        let mut bytes = valid(mode, &mut random);
        mutate(&mut bytes, &mut random);
        let mut terms = session(mode, SIZE);
        terms.blocks.minimum = random.choice([1, 512]).unwrap();
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        let server = tokio::spawn(transmission::run(
            theirs,
            Vec::new(),
            terms,
            victim.clone(),
            environment.clone(),
        ));
        let (mut reader, mut writer) = tokio::io::split(ours);
        let sender = tokio::spawn(async move {
            // Broken off where the server closes first.
            let _ = writer.write_all(&bytes).await;
            let _ = writer.shutdown().await;
            Instant::now()
        });
        let mut received = 0;
        let mut sink = vec![0; 64 << 10];
        while let Ok(came) = reader.read(&mut sink).await {
            match came {
                0 => break,
                _ => received += came,
            }
        }
        assert!(received < 1 << 30, "seed {seed}: {received} bytes");
        // A panic would come out here.
        let _ = server.await.expect("no panic");
        let ended = Instant::now();
        drop(reader);
        let sent = sender.await.unwrap();
        let late = ended.saturating_duration_since(sent);
        assert!(late < Duration::from_secs(1), "seed {seed}: {late:?}");
        assert!(other.read(0, 100_000).await.data == data, "seed {seed}");
    }
    let peak = PEAK.load(Relaxed) - before;
    // The disk itself may have filled.
    let most = CAP + BESIDE + SIZE as usize;
    assert!(peak < most, "{} MiB at most", peak / MIB);
    other.leave().await;
}

#[tokio::test(start_paused = true)]
async fn a_wrong_magic_number_closes_at_once() {
    let _alone = ALONE.lock().await;
    for mode in MODES {
        let device = Device::open(Memory::new(SIZE)).await.unwrap();
        let mut peer = Peer::new(&device, session(mode, SIZE));
        peer.writer.write_all(&[0x55; 64]).await.unwrap();
        let start = Instant::now();
        assert!(peer.try_receive().await.is_err());
        let error = peer.server.await.unwrap().unwrap_err();
        assert!(error.to_string().contains("0x55555555"), "{error}");
        assert!(start.elapsed() < Duration::from_millis(1));
    }
}

#[tokio::test(start_paused = true)]
async fn a_header_of_the_other_kind_closes() {
    let _alone = ALONE.lock().await;
    let device = Device::open(Memory::new(SIZE)).await.unwrap();
    for (mode, sent) in [(MODES[1], MODES[2]), (MODES[2], MODES[1])] {
        let mut peer = Peer::new(&device, session(mode, SIZE));
        let mut bytes = Vec::new();
        let request = Request {
            flags: CommandFlags::empty(),
            command: cmd::READ,
            cookie: 1,
            offset: 0,
            length: 512,
        };
        push(&mut bytes, sent, &request);
        bytes.extend([0; 8]);
        peer.writer.write_all(&bytes).await.unwrap();
        assert!(peer.try_receive().await.is_err());
        assert!(peer.server.await.unwrap().is_err());
    }
}

#[tokio::test(start_paused = true)]
async fn a_payload_that_never_comes_holds_nothing_up() {
    let _alone = ALONE.lock().await;
    let environment = limits();
    let device = Device::open(Memory::new(SIZE)).await.unwrap();
    let (sender, _) = tokio::sync::watch::channel(false);
    let mut half = Peer::with(
        &device,
        session(MODES[0], SIZE),
        sender.clone(),
        environment.clone(),
    );
    let (_, head) = half.head(cmd::WRITE, CommandFlags::empty(), 0, 8 << 20);
    half.writer.write_all(&head).await.unwrap();
    half.writer.write_all(&[1; 1000]).await.unwrap();
    let mut other = Peer::with(&device, session(MODES[1], SIZE), sender, environment);
    for _ in 0..100 {
        assert_eq!(other.write(0, &[2; 4096]).await.error, 0);
    }
    // It closes in the middle: what has come of the payload is not written.
    let start = Instant::now();
    half.writer.shutdown().await.unwrap();
    let error = half.server.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
    assert!(start.elapsed() < Duration::from_secs(1));
    assert_eq!(other.read(0, 4096).await.data, [2; 4096]);
    other.leave().await;
}

#[tokio::test(start_paused = true)]
async fn clients_that_never_read_cost_no_more_than_their_caps() {
    let _alone = ALONE.lock().await;
    const CLIENTS: usize = 4;
    let environment = limits();
    let device = Device::open(Memory::new(SIZE)).await.unwrap();
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    let mut hostile = Vec::new();
    for i in 0..CLIENTS {
        let (sender, _) = tokio::sync::watch::channel(false);
        let terms = session(MODES[i % 3], SIZE);
        let mut peer = Peer::with(&device, terms, sender, environment.clone());
        // As many long reads as it can get rid of.
        for _ in 0..20_000 {
            let (_, head) = peer.head(cmd::READ, CommandFlags::empty(), 0, 8 << 20);
            let wait = Duration::from_millis(10);
            if timeout(wait, peer.writer.write_all(&head)).await.is_err() {
                break;
            }
        }
        hostile.push(peer);
    }
    let device = Device::open(Memory::new(SIZE)).await.unwrap();
    let (sender, _) = tokio::sync::watch::channel(false);
    let mut other = Peer::with(&device, session(MODES[1], SIZE), sender, environment);
    let data = pattern(1, 0, 4 << 20);
    assert_eq!(other.write(0, &data).await.error, 0);
    assert!(other.read(0, 4 << 20).await.data == data);
    let peak = PEAK.load(Relaxed) - before;
    let most = CLIENTS * (CAP + BESIDE) + 64 * MIB;
    assert!(peak < most, "{} MiB at most", peak / MIB);
    for peer in hostile {
        let server = peer.server;
        drop((peer.reader, peer.writer));
        let start = Instant::now();
        let _ = server.await.unwrap();
        assert!(start.elapsed() < Duration::from_secs(1));
    }
    other.leave().await;
}

#[tokio::test]
async fn an_engine_without_claims_survives_every_request() {
    let _alone = ALONE.lock().await;
    struct Plain;
    impl Engine for Plain {
        fn geometry(&self) -> userland_io::Geometry {
            userland_io::Geometry::read_only(4096)
        }
        async fn read(&self, buf: &mut userland_io::ReadBuf<'_>, _: u64) -> userland_io::Result {
            buf.fill(1);
            Ok(())
        }
    }
    let device = Device::open(Plain).await.unwrap();
    for mode in MODES {
        // Everything is said to be offered, though the device has none of it.
        let mut peer = Peer::new(&device, session(mode, 4096));
        for command in 1..9 {
            let length = if command == cmd::FLUSH { 0 } else { 512 };
            let payload = if command == cmd::WRITE { 512 } else { 0 };
            if command == cmd::DISC {
                continue;
            }
            let flags = CommandFlags::empty();
            peer.call(command, flags, 0, length, &vec![0; payload])
                .await;
        }
        assert_eq!(peer.read(0, 4096).await.data, [1; 4096]);
        peer.leave().await;
    }
}
