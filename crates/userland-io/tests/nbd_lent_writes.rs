//! Long writes to an engine that lends memory to be written to: received there from a socket, in whole units.
#![cfg(all(feature = "nbd", unix))]

use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

#[cfg(target_os = "linux")]
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use userland_io::transports::nbd::Limits;
use userland_io::transports::nbd::socket::Socket;
use userland_io::transports::nbd::transmission;
use userland_io::transports::nbd::wire::{CommandFlags, Request, cmd, error};
use userland_io::{
    CrashLevel, Device, Engine, ErrorKind, Geometry, ReadBuf, Result, WriteBuf, WriteFlags,
};

#[path = "common/nbd_peer.rs"]
mod nbd_peer;
#[cfg(target_os = "linux")]
#[path = "common/need.rs"]
mod need;
use nbd_peer::{MIB, MODES, Peer, environment, pattern, session};

const NONE: CommandFlags = CommandFlags::empty();
/// What the engine writes whole.
const UNIT: u64 = 8192;
const SIZE: u64 = 4 * MIB as u64;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Lent,
    Now,
    Waited,
}

/// Lends what lies before `waits`, stores that at once, too, and is full from `full` on. Notes each write.
struct Lender {
    bytes: Mutex<Vec<u8>>,
    waits: u64,
    full: u64,
    unit: u32,
    writes: Mutex<Vec<(Range<u64>, Way)>>,
}

impl Lender {
    fn new(waits: u64, full: u64) -> Self {
        Lender {
            bytes: Mutex::new(vec![0; SIZE as usize]),
            waits,
            full,
            unit: UNIT as u32,
            writes: Mutex::default(),
        }
    }

    fn put(&self, range: Range<u64>, way: Way, put: impl FnOnce(&mut [u8])) -> Result {
        self.writes.lock().unwrap().push((range.clone(), way));
        let end = range.end.min(self.full);
        if range.start < end {
            put(&mut self.bytes.lock().unwrap()[range.start as usize..end as usize]);
        }
        match end == range.end {
            true => Ok(()),
            false => Err(ErrorKind::NoSpace.into()),
        }
    }

    fn store(&self, buf: &WriteBuf<'_>, offset: u64, way: Way) -> Result {
        let range = offset..offset + buf.len() as u64;
        self.put(range, way, |to| buf.slice(0..to.len()).copy_to(to))
    }

    fn taken(&self) -> Vec<(Range<u64>, Way)> {
        std::mem::take(&mut self.writes.lock().unwrap())
    }
}

impl Engine for Lender {
    fn geometry(&self) -> Geometry {
        let mut geometry = Geometry::writable(SIZE, CrashLevel::None);
        geometry.atomic_write_unit = self.unit;
        geometry
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        buf.copy_from(&self.bytes.lock().unwrap()[offset as usize..][..buf.len()]);
        Ok(())
    }
    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, _: WriteFlags) -> Result {
        self.store(buf, offset, Way::Waited)
    }
    fn write_nowait(&self, buf: &WriteBuf<'_>, offset: u64, _: WriteFlags) -> Option<Result> {
        (offset + buf.len() as u64 <= self.waits).then(|| self.store(buf, offset, Way::Now))
    }
    fn lend_mut(
        &self,
        range: Range<u64>,
        _: WriteFlags,
        from: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Result> {
        // In two pieces.
        let lend = |memory: &mut [u8]| {
            let (head, tail) = memory.split_at_mut(memory.len() / 3);
            from(head);
            from(tail);
        };
        (range.end <= self.waits).then(|| self.put(range, Way::Lent, lend))
    }
}

#[tokio::test]
async fn a_long_write_is_received_where_the_engine_keeps_it() {
    const HALF: u64 = SIZE / 2;
    for (waits, full, expected) in [
        (SIZE, SIZE, 0),
        (HALF, SIZE, 0),
        (SIZE, HALF, error::ENOSPC),
    ] {
        for mode in MODES {
            let device = Device::open(Lender::new(waits, full)).await.unwrap();
            let mut peer = Peer::through_unix(&device, session(mode, SIZE));
            let (offset, len) = (512, SIZE as usize - 1024);
            let data = pattern(1, offset, len);
            assert_eq!(peer.write(offset, &data).await.error, expected, "{mode:?}");
            let (mut at, mut lent) = (offset, 0);
            let writes = device.get_ref().taken();
            for (range, way) in &writes {
                assert_eq!(range.start, at);
                at = range.end;
                let is_last = at == SIZE - 512;
                assert!(is_last || at % UNIT == 0, "{writes:?}");
                assert_eq!(*way == Way::Waited, at > waits, "{writes:?}");
                if *way == Way::Lent {
                    lent += range.end - range.start;
                }
            }
            let stored = waits.min(full).min(SIZE - 1024);
            assert!(lent > stored / 2, "{lent} of {writes:?}");
            // What follows is not taken for what was to be written, and vice versa.
            let back = peer.read(offset, len).await.data;
            match full == SIZE {
                true => assert!(at == SIZE - 512 && back == data),
                false => {
                    let (here, beyond) = back.split_at((HALF - offset) as usize);
                    assert!(data.starts_with(here) && beyond.iter().all(|byte| *byte == 0));
                }
            }
            peer.leave().await;
        }
    }
}

#[tokio::test]
async fn writes_that_come_in_parts_of_any_length_are_whole() {
    for mode in MODES {
        let device = Device::open(Lender::new(SIZE, SIZE)).await.unwrap();
        let mut peer = Peer::through_unix(&device, session(mode, SIZE));
        let mut random = fastrand::Rng::with_seed(7);
        let mut expected = vec![0; SIZE as usize];
        for round in 0..60 {
            let (mut sent, mut waiting) = (Vec::new(), Vec::new());
            for _ in 0..random.usize(1..4) {
                let len = random.usize(1..600_000);
                let mut offset = random.u64(0..=SIZE - len as u64);
                if random.bool() {
                    offset -= offset % 4096;
                }
                let data = pattern(round, offset, len);
                let (cookie, head) = peer.head(cmd::WRITE, NONE, offset, len as u64);
                sent.extend(head);
                sent.extend(&data);
                waiting.push(cookie);
                expected[offset as usize..][..len].copy_from_slice(&data);
            }
            let most = [100, 5000, 70_000, 1 << 20][random.usize(..4)];
            let mut rest = &sent[..];
            while !rest.is_empty() {
                let (part, more) = rest.split_at(random.usize(1..=most).min(rest.len()));
                peer.writer.write_all(part).await.unwrap();
                rest = more;
                if random.u8(..4) == 0 {
                    tokio::task::yield_now().await;
                }
            }
            for cookie in waiting {
                let (answered, answer) = peer.receive().await;
                assert_eq!((answered, answer.error), (cookie, 0));
            }
        }
        let lent = |(_, way): &(_, Way)| *way == Way::Lent;
        assert!(device.get_ref().taken().iter().any(lent));
        for at in (0..SIZE).step_by(MIB) {
            let data = peer.read(at, MIB).await.data;
            assert!(data == expected[at as usize..][..MIB], "{at}");
        }
        peer.leave().await;
    }
}

#[tokio::test]
async fn of_a_write_whose_client_vanishes_whole_units_are_stored() {
    for came in [UNIT, UNIT + 1, 150_000, 199_999] {
        let device = Device::open(Lender::new(SIZE, SIZE)).await.unwrap();
        let mut peer = Peer::through_unix(&device, session(MODES[0], SIZE));
        let data = pattern(3, 0, 1 << 20);
        let (_, head) = peer.head(cmd::WRITE, NONE, 0, 1 << 20);
        peer.writer.write_all(&head).await.unwrap();
        peer.writer.write_all(&data[..came as usize]).await.unwrap();
        let server = peer.server;
        drop((peer.reader, peer.writer));
        assert!(server.await.unwrap().is_err());
        let bytes = device.get_ref().bytes.lock().unwrap();
        let stored = bytes.iter().zip(&data).take_while(|(a, b)| a == b).count() as u64;
        assert!(
            stored.is_multiple_of(UNIT) && stored <= came,
            "{stored} of {came}"
        );
        assert!(came - stored < 40 << 10, "{stored} of {came}");
        let rest = &bytes[stored as usize..];
        assert!(rest.iter().all(|byte| *byte == 0), "{stored} of {came}");
    }
}

/// An urgent byte is none of the stream's, but counts as if it were there to be received.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_client_that_sends_less_than_the_system_says_is_cut_off() {
    let device = Device::open(Lender::new(SIZE, SIZE)).await.unwrap();
    let (mut peer, socket) = Peer::with_socket(&device, session(MODES[0], SIZE));
    // All of it must be there at a time.
    let socket = SockRef::from(&socket);
    socket.set_send_buffer_size(512 << 10).unwrap();
    let data = pattern(4, 0, 400_000);
    let (_, head) = peer.head(cmd::WRITE, NONE, 0, data.len() as u64);
    peer.writer.write_all(&head).await.unwrap();
    // Nothing else is at hand when the rest comes.
    settle().await;
    let last = 16 * UNIT as usize - 1;
    peer.writer.write_all(&data[..last]).await.unwrap();
    if let Err(error) = socket.send_out_of_band(b"!") {
        return need::impossible(&format!("urgent bytes through a Unix socket: {error}"));
    }
    let served = tokio::time::timeout(Duration::from_secs(60), peer.server).await;
    let error = served.unwrap().unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
    let bytes = device.get_ref().bytes.lock().unwrap();
    assert!(bytes[..last] == data[..last]);
    assert!(bytes[last..].iter().all(|byte| *byte == 0));
}

async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

/// A stream of so many bytes as are sent at a time, which gives `most` of them at a time past the runtime, but nothing each
/// `pause`th time, and says that all are at hand.
struct Torrent {
    bytes: Vec<u8>,
    burst: usize,
    most: usize,
    pause: usize,
    at: AtomicUsize,
    /// Where the last burst began that has come.
    came: AtomicUsize,
    asked: AtomicUsize,
    /// How much had been taken when the first answer left.
    answered: Arc<AtomicUsize>,
}

impl Torrent {
    fn new(bytes: Vec<u8>) -> Self {
        Torrent {
            bytes,
            burst: usize::MAX,
            most: usize::MAX,
            pause: usize::MAX,
            at: 0.into(),
            came: usize::MAX.into(),
            asked: 0.into(),
            answered: Arc::default(),
        }
    }

    /// What is left of the burst, if that has come.
    fn here(&self) -> usize {
        let at = self.at.load(SeqCst);
        let inside = at % self.burst;
        let here = (self.burst - inside).min(self.bytes.len() - at);
        match inside == 0 && self.came.load(SeqCst) != at {
            true => 0,
            false => here,
        }
    }

    fn take(&self, to: &mut [u8], most: usize) -> usize {
        let at = self.at.load(SeqCst);
        let len = self.here().min(to.len()).min(most);
        to[..len].copy_from_slice(&self.bytes[at..at + len]);
        self.at.store(at + len, SeqCst);
        len
    }
}

impl Socket for Torrent {
    fn receive_now(&self, to: &mut [u8]) -> Option<usize> {
        let asked = self.asked.fetch_add(1, SeqCst) + 1;
        let gives = self.here() > 0 && !asked.is_multiple_of(self.pause);
        gives.then(|| self.take(to, self.most))
    }
    fn at_hand(&self) -> Option<u64> {
        Some(self.here() as u64)
    }
}

impl AsyncRead for Torrent {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let at = self.at.load(SeqCst);
        if self.here() == 0 && at < self.bytes.len() {
            self.came.store(at, SeqCst);
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let came = self.take(buf.initialize_unfilled(), usize::MAX);
        buf.advance(came);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Torrent {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let at = self.at.load(SeqCst);
        let _ = self.answered.compare_exchange(0, at, SeqCst, SeqCst);
        Poll::Ready(Ok(bytes.len()))
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

fn write(offset: u64, data: &[u8]) -> Vec<u8> {
    let request = Request {
        flags: NONE,
        command: cmd::WRITE,
        cookie: 1,
        offset,
        length: data.len() as u64,
    };
    [&request.encode_compact()[..], data].concat()
}

/// Serves a client until it ends. Answers how often others had a turn meanwhile.
async fn serve(device: &Device<Lender>, stream: Torrent) -> (io::Result<()>, usize) {
    let (_shutdown, environment) = environment(Limits::default());
    let session = session(MODES[0], SIZE);
    let served = transmission::run(stream, Vec::new(), session, device.clone(), environment);
    let mut served = tokio::spawn(served);
    let mut turns = 0;
    loop {
        tokio::select! {
            biased;
            ended = &mut served => return (ended.unwrap(), turns),
            () = tokio::task::yield_now() => turns += 1,
        }
    }
}

#[tokio::test]
async fn a_piece_ends_where_a_unit_does_wherever_it_begins() {
    for (unit, offset) in [(UNIT, 512), (UNIT, 0), (16384, 0), (16384, 20_000)] {
        let mut lender = Lender::new(SIZE, SIZE);
        lender.unit = unit as u32;
        let device = Device::open(lender).await.unwrap();
        let end = SIZE - 512;
        let data = pattern(8, offset, (end - offset) as usize);
        let stream = Torrent::new(write(offset, &data));
        serve(&device, stream).await.0.unwrap();
        let writes = device.get_ref().taken();
        for (range, _) in &writes {
            assert!(
                range.end == end || range.end % unit == 0,
                "{unit}: {writes:?}"
            );
        }
        assert!(writes.len() > 10, "{writes:?}");
        let bytes = device.get_ref().bytes.lock().unwrap();
        assert!(bytes[offset as usize..end as usize] == data);
    }
}

#[tokio::test]
async fn what_comes_in_small_bursts_is_stored_in_pieces_that_are_worth_a_call() {
    for burst in [1448, 5000, 20_000, 65_000] {
        let device = Device::open(Lender::new(SIZE, SIZE)).await.unwrap();
        let data = pattern(9, 0, SIZE as usize);
        let mut stream = Torrent::new(write(0, &data));
        stream.burst = burst;
        serve(&device, stream).await.0.unwrap();
        let writes = device.get_ref().taken().len() as u64;
        assert!(
            writes <= SIZE / (32 << 10) + SIZE / (64 << 10),
            "{burst}: {writes}"
        );
        assert!(*device.get_ref().bytes.lock().unwrap() == data);
    }
}

#[tokio::test]
async fn a_receive_that_ends_early_puts_nothing_in_a_wrong_place() {
    let data = pattern(5, 0, SIZE as usize);
    for (most, pause) in [
        (1000, usize::MAX),
        (70_000, usize::MAX),
        (1000, 300),
        (70_000, 3),
    ] {
        let device = Device::open(Lender::new(SIZE, SIZE)).await.unwrap();
        let mut stream = Torrent::new(write(0, &data));
        (stream.most, stream.pause) = (most, pause);
        let served = serve(&device, stream).await.0;
        let bytes = device.get_ref().bytes.lock().unwrap();
        if pause == usize::MAX {
            served.unwrap();
            assert!(*bytes == data, "{most}");
            continue;
        }
        assert_eq!(served.unwrap_err().kind(), io::ErrorKind::InvalidData);
        let stored = bytes.iter().zip(&data).take_while(|(a, b)| a == b).count();
        assert!(stored > most && stored < data.len(), "{stored}");
        assert!(bytes[stored..].iter().all(|byte| *byte == 0), "{stored}");
    }
}

#[tokio::test]
async fn a_client_that_never_stops_sending_leaves_others_their_turn() {
    let data = pattern(6, 0, SIZE as usize);
    let device = Device::open(Lender::new(SIZE, SIZE)).await.unwrap();
    let stream = Torrent::new(write(0, &data).repeat(8));
    let (served, turns) = serve(&device, stream).await;
    served.unwrap();
    let writes = device.get_ref().taken();
    let lent = writes.iter().filter(|(_, way)| *way == Way::Lent);
    let lent: u64 = lent.map(|(range, _)| range.end - range.start).sum();
    assert!(lent > 7 * SIZE, "{lent}");
    assert!(turns >= 6, "{turns}");
}

#[tokio::test]
async fn a_reply_does_not_wait_for_all_of_the_write_behind_it() {
    let device = Device::open(Lender::new(SIZE, SIZE)).await.unwrap();
    let data = pattern(7, 0, SIZE as usize);
    // The first receive ends where a unit does, so that the next one is to the engine's memory.
    let first = [1; UNIT as usize - 2 * Request::COMPACT_LEN];
    let stream = Torrent::new([write(0, &first), write(0, &data)].concat());
    let answered = stream.answered.clone();
    serve(&device, stream).await.0.unwrap();
    let answered = answered.load(SeqCst);
    assert!(0 < answered && answered <= MIB, "{answered}");
}
