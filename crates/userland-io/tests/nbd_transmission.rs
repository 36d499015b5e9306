//! The request loop of the NBD server: what requests do, in each mode of replies.

use std::ops::Range;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;
use userland_io::transports::nbd::wire::{CommandFlags, cmd, error};
use userland_io::{
    AnyEngine, CrashLevel, Device, Engine, ErrorKind, Features, Geometry, ReadBuf, Result,
    WriteBuf, WriteFlags,
};

#[path = "common/nbd_peer.rs"]
mod nbd_peer;
use nbd_peer::{MIB, MODES, Peer, Rig, pattern, session};

const NONE: CommandFlags = CommandFlags::empty();

async fn rig(size: u64) -> (Rig, Device<Rig>) {
    let rig = Rig::new(size);
    let device = Device::open(rig.clone()).await.unwrap();
    rig.taken();
    (rig, device)
}

#[tokio::test]
async fn what_is_written_is_read_in_every_mode() {
    for mode in MODES {
        let (_, device) = rig(MIB as u64 + 77).await;
        let mut peer = Peer::new(&device, session(mode, MIB as u64 + 77));
        for (offset, len) in [
            (0, 1),
            (1, 4096),
            (5000, 2047),
            (8192, 65_536),
            (100_001, 500_000),
        ] {
            let data = pattern(len as u8, offset, len);
            let answer = peer.write(offset, &data).await;
            assert_eq!((answer.error, answer.data.len()), (0, 0));
            let answer = peer.read(offset, len).await;
            assert_eq!(answer.error, 0);
            assert!(answer.data == data, "{mode:?} {offset}+{len}");
        }
        // To the last byte of an odd size.
        assert_eq!(peer.write(MIB as u64, &[7; 77]).await.error, 0);
        assert_eq!(peer.read(MIB as u64 + 70, 7).await.data, [7; 7]);
        assert_eq!(peer.call(cmd::FLUSH, NONE, 0, 0, &[]).await.error, 0);
        peer.leave().await;
    }
}

#[tokio::test]
async fn many_requests_in_one_packet_are_all_answered() {
    for mode in MODES {
        let (_, device) = rig(MIB as u64).await;
        let mut peer = Peer::new(&device, session(mode, MIB as u64));
        let mut packet = Vec::new();
        let mut cookies = Vec::new();
        for i in 0..200_u64 {
            let (cookie, head) = peer.head(cmd::WRITE, NONE, i * 4096, 1000 + i);
            packet.extend(head);
            packet.extend(pattern(i as u8, i * 4096, 1000 + i as usize));
            cookies.push(cookie);
        }
        // Cut where it hurts: bytes first, then large pieces.
        let (first, rest) = packet.split_at(40);
        for byte in first {
            peer.writer.write_all(&[*byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
        for piece in rest.chunks(70_001) {
            peer.writer.write_all(piece).await.unwrap();
            tokio::task::yield_now().await;
        }
        for _ in 0..200 {
            let (cookie, answer) = peer.receive().await;
            assert_eq!(answer.error, 0);
            cookies.retain(|open| *open != cookie);
        }
        assert!(cookies.is_empty());
        for i in 0..200_u64 {
            let len = 1000 + i as usize;
            let data = peer.read(i * 4096, len).await.data;
            assert!(data == pattern(i as u8, i * 4096, len));
        }
        peer.leave().await;
    }
}

#[tokio::test]
async fn sixty_four_mebibytes_go_through_at_once_each_way() {
    for mode in MODES {
        let (_, device) = rig(80 << 20).await;
        let mut peer = Peer::new(&device, session(mode, 80 << 20));
        let data = pattern(3, 12_345, 64 << 20);
        assert_eq!(peer.write(12_345, &data).await.error, 0);
        let answer = peer.read(12_345, 64 << 20).await;
        assert_eq!(answer.error, 0);
        assert!(answer.data == data, "{mode:?}");
        peer.leave().await;
    }
}

#[tokio::test]
async fn commands_without_payload_reach_the_device() {
    for mode in MODES {
        let (rig, device) = rig(MIB as u64).await;
        // Only what is claimed arrives with its flags.
        let mut peer = Peer::new(&device, session(mode, MIB as u64));
        peer.write(0, &[1; 65_536]).await;
        rig.taken();
        let zeroes = CommandFlags::FUA | CommandFlags::NO_HOLE;
        for (command, flags) in [
            (cmd::WRITE_ZEROES, zeroes),
            (cmd::CACHE, NONE),
            (cmd::TRIM, NONE),
        ] {
            let answer = peer.call(command, flags, 4096, 8192, &[]).await;
            assert_eq!((answer.error, answer.text.as_str()), (0, ""));
        }
        let log = rig.taken().join(", ");
        for part in [
            "zeroes 4096..12288",
            "prefetch 4096..12288",
            "discard 4096..12288",
        ] {
            assert!(log.contains(part), "{log}");
        }
        let data = peer.read(0, 16_384).await.data;
        assert!(data[..4096].iter().all(|&b| b == 1) && data[4096..12_288].iter().all(|&b| b == 0));
        peer.leave().await;
    }
}

#[tokio::test]
async fn a_trim_with_fua_is_a_discard_then_a_flush() {
    let (rig, device) = rig(MIB as u64).await;
    let mut peer = Peer::new(&device, session(MODES[1], MIB as u64));
    let answer = peer
        .call(cmd::TRIM, CommandFlags::FUA, 0, 65_536, &[])
        .await;
    assert_eq!(answer.error, 0);
    assert_eq!(rig.taken(), ["discard 0..65536", "flush"]);
    peer.call(cmd::TRIM, NONE, 0, 65_536, &[]).await;
    assert_eq!(rig.taken(), ["discard 0..65536"]);
    peer.leave().await;
}

#[tokio::test]
async fn fua_reaches_the_write() {
    let (rig, device) = {
        let rig = Rig::new(MIB as u64);
        rig.geometry.lock().unwrap().features |= Features::FUA;
        let device = Device::open(rig.clone()).await.unwrap();
        (rig, device)
    };
    let mut peer = Peer::new(&device, session(MODES[0], MIB as u64));
    rig.taken();
    peer.call(cmd::WRITE, CommandFlags::FUA, 0, 512, &[1; 512])
        .await;
    peer.write(0, &[1; 512]).await;
    assert_eq!(rig.taken(), ["write 0+512 1", "write 0+512 0"]);
    peer.leave().await;
}

#[tokio::test(start_paused = true)]
async fn requests_overlap_up_to_the_depth() {
    // In paused time a sleep ends exactly when nothing else can run, so the ratio is exact
    // on a machine under any load.
    let (rig, device) = rig(MIB as u64).await;
    *rig.delay.lock().unwrap() = Duration::from_millis(5);
    let mut peer = Peer::new(&device, session(MODES[0], MIB as u64));
    let rate = |count: u32, took: Duration| f64::from(count) / took.as_secs_f64();

    let start = tokio::time::Instant::now();
    for i in 0..50 {
        peer.read(i * 4096, 4096).await;
    }
    let alone = rate(50, start.elapsed());

    let start = tokio::time::Instant::now();
    for i in 0..64 {
        peer.send(cmd::READ, NONE, i % 200 * 4096, 4096, &[]).await;
    }
    for i in 64..6400 {
        peer.receive().await;
        peer.send(cmd::READ, NONE, i % 200 * 4096, 4096, &[]).await;
    }
    for _ in 0..64 {
        peer.receive().await;
    }
    let deep = rate(6400, start.elapsed());
    assert!(deep >= 0.95 * 64.0 * alone, "{deep} against {alone}");
    assert_eq!(rig.most_in_flight.load(SeqCst), 64);
    peer.leave().await;
}

#[tokio::test(start_paused = true)]
async fn what_finishes_first_is_answered_first() {
    let (rig, device) = rig(MIB as u64).await;
    let mut peer = Peer::new(&device, session(MODES[1], MIB as u64));
    let gate = Arc::new(Semaphore::new(0));
    *rig.gate.lock().unwrap() = Some(gate.clone());
    let slow = peer.send(cmd::WRITE, NONE, 0, 512, &[1; 512]).await;
    let fast = peer.send(cmd::READ, NONE, 4096, 512, &[]).await;
    assert_eq!(peer.receive().await.0, fast);
    gate.add_permits(1);
    assert_eq!(peer.receive().await.0, slow);
    peer.leave().await;
}

#[tokio::test(start_paused = true)]
async fn writes_that_wait_keep_their_bytes_while_others_come() {
    const COUNT: u64 = 200;
    let (rig, device) = rig(MIB as u64).await;
    let gate = Arc::new(Semaphore::new(0));
    *rig.gate.lock().unwrap() = Some(gate.clone());
    let mut peer = Peer::new(&device, session(MODES[0], MIB as u64));
    // Several times what is received at once, and twice, so that what was held is received into again.
    for round in 0..2_u8 {
        let data = |i: u64| pattern(i as u8 ^ round, i, 4000);
        for i in 0..COUNT {
            let offset = i * 4096;
            peer.send(cmd::WRITE, NONE, offset, 4000, &data(i)).await;
        }
        while rig.in_flight.load(SeqCst) < COUNT as usize {
            tokio::task::yield_now().await;
        }
        gate.add_permits(COUNT as usize);
        for _ in 0..COUNT {
            assert_eq!(peer.receive().await.1.error, 0);
        }
        for i in 0..COUNT {
            assert!(peer.read(i * 4096, 4000).await.data == data(i), "{i}");
        }
    }
    peer.leave().await;
}

/// Reads as ones, and lends twos.
struct Lender;

impl Engine for Lender {
    fn geometry(&self) -> Geometry {
        Geometry::read_only(MIB as u64)
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, _: u64) -> Result {
        buf.fill(1);
        Ok(())
    }
    fn lend(&self, range: Range<u64>, to: &mut dyn FnMut(&[u8])) {
        if range.start > 0 {
            to(&vec![2; (range.end - range.start) as usize]);
        }
    }
}

#[tokio::test]
async fn short_reads_are_answered_with_what_is_lent() {
    for mode in MODES {
        let device = Device::open(AnyEngine::new(Lender)).await.unwrap();
        let mut peer = Peer::new(&device, session(mode, MIB as u64));
        assert_eq!(peer.read(1, 4096).await.data, [2; 4096]);
        assert_eq!(peer.read(1, 4097).await.data, [1; 4097], "not short");
        assert_eq!(peer.read(0, 4096).await.data, [1; 4096], "not lent");
        assert_eq!(peer.read(1, 1).await.data, [1], "not asked for");
        assert_eq!(peer.read(MIB as u64 - 1, 1).await.data, [2]);
        peer.leave().await;
    }
}

/// Lends a pattern, but for what begins in every tenth MiB, which has to be read.
#[cfg(unix)]
struct LongLender;

#[cfg(unix)]
impl LongLender {
    const SIZE: u64 = 64 * MIB as u64;

    fn lends(offset: u64) -> bool {
        !(offset / MIB as u64).is_multiple_of(10)
    }
}

#[cfg(unix)]
impl Engine for LongLender {
    fn geometry(&self) -> Geometry {
        Geometry::read_only(Self::SIZE)
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        buf.copy_from(&pattern(1, offset, buf.len()));
        Ok(())
    }
    fn lend(&self, range: Range<u64>, to: &mut dyn FnMut(&[u8])) {
        if Self::lends(range.start) {
            to(&pattern(2, range.start, (range.end - range.start) as usize));
        }
    }
}

/// A client that takes nothing before it has asked for everything: sockets take some replies whole, one in part, and then none.
#[cfg(unix)]
#[tokio::test]
async fn long_reads_are_sent_from_where_they_are_as_far_as_the_socket_takes_them() {
    for mode in MODES {
        let device = Device::open(AnyEngine::new(LongLender)).await.unwrap();
        let mut peer = Peer::through_unix(&device, session(mode, LongLender::SIZE));
        let (mut asked, mut lent) = (std::collections::HashMap::new(), 0);
        for index in 0..60_u64 {
            let (offset, len) = (index * MIB as u64 + 13, (32 << 10) + 7919 * index);
            let cookie = peer.send(cmd::READ, NONE, offset, len, &[]).await;
            asked.insert(cookie, (offset, len as usize));
        }
        // Until it can do no more.
        tokio::time::sleep(Duration::from_millis(50)).await;
        while !asked.is_empty() {
            let (cookie, answer) = peer.receive().await;
            let (offset, len) = asked.remove(&cookie).unwrap();
            assert_eq!(answer.error, 0);
            // It need not have been asked to lend.
            let is_lent = answer.data == pattern(2, offset, len);
            assert!(is_lent || answer.data == pattern(1, offset, len));
            assert!(!is_lent || LongLender::lends(offset));
            lent += u32::from(is_lent);
        }
        assert!(lent > 10, "{mode:?}: {lent}");
        let count = device.stats().of(userland_io::Op::Read).ops;
        assert_eq!(count, 60);
        peer.leave().await;
    }
}

/// Writes twos where it does not wait, which it does in the first block, and is full in the last.
struct Hasty(Mutex<Vec<u8>>);

impl Engine for Hasty {
    fn geometry(&self) -> Geometry {
        Geometry::writable(MIB as u64, CrashLevel::None)
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        buf.copy_from(&self.0.lock().unwrap()[offset as usize..][..buf.len()]);
        Ok(())
    }
    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, _: WriteFlags) -> Result {
        self.0.lock().unwrap()[offset as usize..][..buf.len()].fill(1);
        Ok(())
    }
    fn write_nowait(&self, buf: &WriteBuf<'_>, offset: u64, _: WriteFlags) -> Option<Result> {
        if offset < 4096 {
            return None;
        }
        if offset >= MIB as u64 - 4096 {
            return Some(Err(ErrorKind::NoSpace.into()));
        }
        buf.copy_to(&mut self.0.lock().unwrap()[offset as usize..][..buf.len()]);
        Some(Ok(()))
    }
}

#[tokio::test]
async fn a_write_that_is_at_hand_is_done_without_waiting() {
    for mode in MODES {
        let device = Device::open(AnyEngine::new(Hasty(Mutex::new(vec![0; MIB])))).await;
        let mut peer = Peer::new(&device.unwrap(), session(mode, MIB as u64));
        let last = MIB as u64 - 4096;
        for (offset, expected) in [
            (8192, 0),
            (last, error::ENOSPC),
            (0, 0),
            (4096, 0),
            (4096, 0),
        ] {
            let write = peer.send(cmd::WRITE, NONE, offset, 4096, &[2; 4096]).await;
            let (cookie, reply) = peer.receive().await;
            assert_eq!((cookie, reply.error), (write, expected), "{offset}");
        }
        assert_eq!(peer.read(8192, 4096).await.data, [2; 4096]);
        assert_eq!(peer.read(0, 4096).await.data, [1; 4096], "it waits");
        assert_eq!(peer.read(4096, 4096).await.data, [2; 4096], "asked again");
        peer.leave().await;
    }
}

/// Stores at once what lies before `waits`, is full from `full` on, and notes each write: where, how long, and whether at once.
struct Wavering {
    bytes: Mutex<Vec<u8>>,
    waits: u64,
    full: u64,
    writes: Mutex<Vec<(u64, usize, bool)>>,
}

impl Wavering {
    fn store(&self, buf: &WriteBuf<'_>, offset: u64, at_once: bool) -> Result {
        let note = (offset, buf.len(), at_once);
        self.writes.lock().unwrap().push(note);
        if offset + buf.len() as u64 > self.full {
            return Err(ErrorKind::NoSpace.into());
        }
        buf.copy_to(&mut self.bytes.lock().unwrap()[offset as usize..][..buf.len()]);
        Ok(())
    }
}

impl Engine for Wavering {
    fn geometry(&self) -> Geometry {
        let mut geometry = Geometry::writable(4 * MIB as u64, CrashLevel::None);
        geometry.atomic_write_unit = 8192;
        geometry
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        buf.copy_from(&self.bytes.lock().unwrap()[offset as usize..][..buf.len()]);
        Ok(())
    }
    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, _: WriteFlags) -> Result {
        self.store(buf, offset, false)
    }
    fn write_nowait(&self, buf: &WriteBuf<'_>, offset: u64, _: WriteFlags) -> Option<Result> {
        (offset + (buf.len() as u64) <= self.waits).then(|| self.store(buf, offset, true))
    }
}

#[tokio::test]
async fn a_long_write_is_stored_in_pieces_for_as_long_as_that_need_not_wait() {
    const END: u64 = 4 * MIB as u64;
    const HALF: u64 = END / 2;
    for (waits, full, expected) in [(END, END, 0), (HALF, END, 0), (END, HALF, error::ENOSPC)] {
        for mode in MODES {
            let device = Device::open(Wavering {
                bytes: Mutex::new(vec![0; END as usize]),
                waits,
                full,
                writes: Mutex::default(),
            });
            let device = device.await.unwrap();
            let mut peer = Peer::new(&device, session(mode, END));
            let (offset, len) = (512, END as usize - 1024);
            let data = pattern(1, offset, len);
            let answer = peer.write(offset, &data).await;
            assert_eq!(answer.error, expected, "{mode:?}");
            let writes = std::mem::take(&mut *device.get_ref().writes.lock().unwrap());
            let (mut at, mut short) = (offset, 0);
            for (offset, len, at_once) in &writes {
                assert_eq!(*offset, at);
                at += *len as u64;
                let is_last = at == END - 512;
                assert!(is_last || at % 8192 == 0, "{writes:?}");
                short += usize::from(!is_last && *len < 32 << 10);
                assert_eq!(*at_once, at <= waits, "{writes:?}");
            }
            assert!(writes.len() > 4, "{writes:?}");
            // Until it is known that this engine lends no memory to be written to.
            assert!(short <= 2, "{writes:?}");
            // What follows is not taken for what was to be written, and vice versa.
            let stored = peer.read(offset, len).await.data;
            match full == END {
                true => {
                    assert_eq!(at, END - 512);
                    assert!(stored == data);
                }
                false => {
                    let (failed_at, ..) = writes[writes.len() - 1];
                    assert!(failed_at <= HALF && at > HALF, "{writes:?}");
                    let (here, beyond) = stored.split_at((failed_at - offset) as usize);
                    assert!(data.starts_with(here) && beyond.iter().all(|byte| *byte == 0));
                }
            }
            peer.leave().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn disc_finishes_what_is_in_flight_and_answers_it() {
    for mode in MODES {
        let (rig, device) = rig(MIB as u64).await;
        *rig.delay.lock().unwrap() = Duration::from_secs(3);
        let mut peer = Peer::new(&device, session(mode, MIB as u64));
        let write = peer.send(cmd::WRITE, NONE, 0, 4096, &[9; 4096]).await;
        let read = peer.send(cmd::READ, NONE, 8192, 4096, &[]).await;
        peer.send(cmd::DISC, NONE, 0, 0, &[]).await;
        let mut answered = [peer.receive().await.0, peer.receive().await.0];
        answered.sort_unstable();
        assert_eq!(answered, [write, read]);
        assert!(peer.try_receive().await.is_err(), "closed");
        peer.server.await.unwrap().unwrap();
        assert_eq!(device.get_ref().finished.load(SeqCst), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_vanishes_loses_replies_not_writes() {
    let (rig, device) = rig(MIB as u64).await;
    *rig.delay.lock().unwrap() = Duration::from_secs(60);
    let mut peer = Peer::new(&device, session(MODES[0], MIB as u64));
    for i in 0..10 {
        peer.send(cmd::WRITE, NONE, i * 4096, 4096, &[5; 4096])
            .await;
    }
    while rig.in_flight.load(SeqCst) < 10 {
        tokio::task::yield_now().await;
    }
    let server = peer.server;
    drop((peer.reader, peer.writer));
    let _ = server.await.unwrap();
    assert_eq!(rig.finished.load(SeqCst), 10, "before the task ended");
    *rig.delay.lock().unwrap() = Duration::ZERO;
    let mut peer = Peer::new(&device, session(MODES[0], MIB as u64));
    assert!(peer.read(0, 40_960).await.data.iter().all(|&b| b == 5));
    peer.leave().await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_only_stops_sending_gets_its_replies() {
    let (rig, device) = rig(MIB as u64).await;
    *rig.delay.lock().unwrap() = Duration::from_secs(60);
    let mut peer = Peer::new(&device, session(MODES[1], MIB as u64));
    let cookie = peer.send(cmd::READ, NONE, 0, 4096, &[]).await;
    peer.writer.shutdown().await.unwrap();
    assert_eq!(peer.receive().await.0, cookie);
    peer.server.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn shutdown_finishes_what_is_in_flight_and_takes_no_more() {
    let (rig, device) = rig(MIB as u64).await;
    *rig.delay.lock().unwrap() = Duration::from_secs(5);
    let mut peer = Peer::new(&device, session(MODES[1], MIB as u64));
    let cookie = peer.send(cmd::WRITE, NONE, 0, 4096, &[9; 4096]).await;
    while rig.in_flight.load(SeqCst) < 1 {
        tokio::task::yield_now().await;
    }
    peer.shutdown.send(true).unwrap();
    tokio::task::yield_now().await;
    peer.send(cmd::WRITE, NONE, 8192, 4096, &[9; 4096]).await;
    let (answered, answer) = peer.receive().await;
    assert_eq!((answered, answer.error), (cookie, 0));
    assert!(peer.try_receive().await.is_err());
    peer.server.await.unwrap().unwrap();
    assert_eq!(rig.taken(), ["write 0+4096 0"]);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_pauses_at_shutdown_still_gets_its_replies() {
    let (_, device) = rig(16 << 20).await;
    let mut peer = Peer::new(&device, session(MODES[1], 16 << 20));
    peer.send(cmd::READ, CommandFlags::DF, 0, 4 << 20, &[])
        .await;
    // More than the stream between them takes is waiting to be sent.
    tokio::time::sleep(Duration::from_millis(100)).await;
    peer.shutdown.send(true).unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(peer.receive().await.1.data.len(), 4 * MIB);
    peer.server.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_grace_period_ends_a_shutdown() {
    let (rig, device) = rig(MIB as u64).await;
    *rig.gate.lock().unwrap() = Some(Arc::new(Semaphore::new(0)));
    let mut peer = Peer::new(&device, session(MODES[1], MIB as u64));
    peer.send(cmd::WRITE, NONE, 0, 4096, &[9; 4096]).await;
    while rig.in_flight.load(SeqCst) < 1 {
        tokio::task::yield_now().await;
    }
    let start = tokio::time::Instant::now();
    peer.shutdown.send(true).unwrap();
    let error = peer.server.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
    assert_eq!(start.elapsed().as_secs(), 10);
}

#[tokio::test]
async fn requests_of_no_bytes_succeed_where_they_mean_something() {
    for mode in MODES {
        let (rig, device) = rig(MIB as u64).await;
        let mut peer = Peer::new(&device, session(mode, MIB as u64));
        for command in [
            cmd::READ,
            cmd::WRITE,
            cmd::TRIM,
            cmd::CACHE,
            cmd::WRITE_ZEROES,
        ] {
            let answer = peer.call(command, NONE, MIB as u64, 0, &[]).await;
            assert_eq!((answer.error, answer.data.len()), (0, 0), "{command}");
        }
        assert_eq!(rig.taken().concat(), "", "nothing to do");
        peer.leave().await;
    }
}

#[tokio::test]
async fn a_flush_on_one_connection_covers_what_another_wrote() {
    let (rig, device) = rig(MIB as u64).await;
    let mut writer = Peer::new(&device, session(MODES[1], MIB as u64));
    let mut flusher = Peer::new(&device, session(MODES[2], MIB as u64));
    assert_eq!(writer.write(512, &[1; 512]).await.error, 0);
    assert_eq!(flusher.call(cmd::FLUSH, NONE, 0, 0, &[]).await.error, 0);
    assert_eq!(rig.taken(), ["write 512+512 0", "flush"]);
    assert_eq!(flusher.read(512, 512).await.data, [1; 512]);
    writer.leave().await;
    flusher.leave().await;
}

#[tokio::test(start_paused = true)]
async fn a_client_may_be_silent_for_a_week() {
    for mode in MODES {
        let (_, device) = rig(MIB as u64).await;
        let mut peer = Peer::new(&device, session(mode, MIB as u64));
        assert_eq!(peer.write(0, &[1; 512]).await.error, 0);
        tokio::time::sleep(Duration::from_secs(7 * 24 * 3600)).await;
        assert_eq!(peer.read(0, 512).await.data, [1; 512]);
        peer.leave().await;
    }
}
