//! Long writes to an engine that lends memory to be written to: received there from a socket, in whole units.
#![cfg(all(feature = "nbd", unix))]

use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::task::{Context, Poll};

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
    writes: Mutex<Vec<(Range<u64>, Way)>>,
}

impl Lender {
    fn new(waits: u64, full: u64) -> Self {
        Lender {
            bytes: Mutex::new(vec![0; SIZE as usize]),
            waits,
            full,
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
        geometry.atomic_write_unit = UNIT as u32;
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
        let stored = (came - came % UNIT) as usize;
        let bytes = device.get_ref().bytes.lock().unwrap();
        assert!(bytes[..stored] == data[..stored], "{came}");
        assert!(bytes[stored..].iter().all(|byte| *byte == 0), "{came}");
    }
}

/// An urgent byte is none of the stream's, but may count as if it were there to be received.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn less_than_the_system_says_is_no_end_of_a_write() {
    let device = Device::open(Lender::new(SIZE, SIZE)).await.unwrap();
    let (mut peer, socket) = Peer::with_socket(&device, session(MODES[0], SIZE));
    let data = pattern(4, 0, 160_000);
    for _ in 0..3 {
        let (cookie, head) = peer.head(cmd::WRITE, NONE, 0, data.len() as u64);
        let (first, second) = data.split_at(100_000);
        peer.writer
            .write_all(&[&head, first].concat())
            .await
            .unwrap();
        SockRef::from(&socket).send_out_of_band(b"!").unwrap();
        peer.writer.write_all(second).await.unwrap();
        let (answered, answer) = peer.receive().await;
        assert_eq!((answered, answer.error), (cookie, 0));
        assert!(peer.read(0, data.len()).await.data == data);
    }
    peer.leave().await;
}

/// A stream that always has more, says that all of it is at hand, and gives `most` bytes at a time past the runtime, but nothing each
/// `pause`th time.
struct Torrent {
    bytes: Vec<u8>,
    at: AtomicUsize,
    asked: AtomicUsize,
    most: usize,
    pause: usize,
}

impl Torrent {
    fn take(&self, to: &mut [u8], most: usize) -> usize {
        let rest = &self.bytes[self.at.load(SeqCst)..];
        let len = rest.len().min(to.len()).min(most);
        to[..len].copy_from_slice(&rest[..len]);
        self.at.fetch_add(len, SeqCst);
        len
    }
}

impl Socket for Torrent {
    fn receive_now(&self, to: &mut [u8]) -> Option<usize> {
        let asked = self.asked.fetch_add(1, SeqCst) + 1;
        (!asked.is_multiple_of(self.pause)).then(|| self.take(to, self.most))
    }
    fn at_hand(&self) -> Option<u64> {
        Some((self.bytes.len() - self.at.load(SeqCst)) as u64)
    }
}

impl AsyncRead for Torrent {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
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
        Poll::Ready(Ok(bytes.len()))
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Serves a client that sends nothing but `count` writes of all of the disk. Answers how often others had a turn meanwhile.
async fn serve_torrent(
    device: &Device<Lender>,
    data: &[u8],
    count: usize,
    most: usize,
    pause: usize,
) -> usize {
    let request = Request {
        flags: NONE,
        command: cmd::WRITE,
        cookie: 1,
        offset: 0,
        length: SIZE,
    };
    let stream = Torrent {
        bytes: [&request.encode_compact()[..], data].concat().repeat(count),
        at: 0.into(),
        asked: 0.into(),
        most,
        pause,
    };
    let (_shutdown, environment) = environment(Limits::default());
    let session = session(MODES[0], SIZE);
    let served = transmission::run(stream, Vec::new(), session, device.clone(), environment);
    let mut served = tokio::spawn(served);
    let mut turns = 0;
    loop {
        tokio::select! {
            biased;
            ended = &mut served => {
                ended.unwrap().unwrap();
                return turns;
            }
            () = tokio::task::yield_now() => turns += 1,
        }
    }
}

#[tokio::test]
async fn a_receive_that_ends_early_puts_nothing_in_a_wrong_place() {
    let data = pattern(5, 0, SIZE as usize);
    for (most, pause) in [(1000, 3), (5000, 7), (70_000, 2), (1 << 20, 5)] {
        let device = Device::open(Lender::new(SIZE, SIZE)).await.unwrap();
        serve_torrent(&device, &data, 1, most, pause).await;
        assert!(*device.get_ref().bytes.lock().unwrap() == data, "{most}");
    }
}

#[tokio::test]
async fn a_client_that_never_stops_sending_leaves_others_their_turn() {
    let data = pattern(6, 0, SIZE as usize);
    let device = Device::open(Lender::new(SIZE, SIZE)).await.unwrap();
    let turns = serve_torrent(&device, &data, 8, usize::MAX, usize::MAX).await;
    let writes = device.get_ref().taken();
    let lent: u64 = writes
        .iter()
        .filter(|(_, way)| *way == Way::Lent)
        .map(|(range, _)| range.end - range.start)
        .sum();
    assert!(lent > 7 * SIZE, "{lent}");
    assert!(turns >= 7, "{turns}");
}
