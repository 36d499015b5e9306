//! What the edge guarantees, seen from an engine that writes down what reaches it.

use std::collections::VecDeque;
use std::future::Future;
use std::ops::Range;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use proptest::prelude::*;
use tokio::sync::Semaphore;

use super::*;
use crate::{CrashLevel, Error, ExtentKind};

#[derive(Clone, Debug, PartialEq, Eq)]
enum Call {
    Read(u64, usize),
    Write(u64, usize, WriteFlags),
    WriteNow(u64, usize, WriteFlags),
    Flush,
    Trim(Range<u64>),
    Zeroes(Range<u64>, WriteFlags),
    Map(Range<u64>),
    Close,
}
use Call::*;

/// A disk in a vector that notes each call, and may hold writes back or refuse operations.
struct Recorder {
    geometry: Mutex<Geometry>,
    bytes: Mutex<Vec<u8>>,
    calls: Mutex<Vec<Call>>,
    /// Where there is one, a write waits for a permit between its call and its effect.
    gate: Option<Semaphore>,
    refuse: Mutex<VecDeque<Error>>,
}

#[derive(Clone)]
struct Handle(Arc<Recorder>);

impl Handle {
    fn new(geometry: Geometry) -> Self {
        Handle::gated(geometry, None)
    }

    fn gated(geometry: Geometry, gate: Option<Semaphore>) -> Self {
        Handle(Arc::new(Recorder {
            bytes: Mutex::new(vec![0xaa; geometry.size as usize]),
            geometry: Mutex::new(geometry),
            calls: Mutex::default(),
            gate,
            refuse: Mutex::default(),
        }))
    }

    fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.0.calls.lock().unwrap())
    }

    fn bytes(&self) -> Vec<u8> {
        self.0.bytes.lock().unwrap().clone()
    }

    fn note(&self, call: Call) {
        self.0.calls.lock().unwrap().push(call);
    }

    fn place(&self, offset: u64, len: usize) -> Range<usize> {
        let geometry = *self.0.geometry.lock().unwrap();
        let block = u64::from(geometry.logical_block_size);
        let end = offset + len as u64;
        assert!(len > 0 && end <= geometry.size, "{offset}+{len}");
        assert!(offset.is_multiple_of(block), "{offset}");
        assert!(end.is_multiple_of(block) || end == geometry.size, "{end}");
        offset as usize..end as usize
    }
}

impl Engine for Handle {
    fn geometry(&self) -> Geometry {
        *self.0.geometry.lock().unwrap()
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        self.note(Read(offset, buf.len()));
        let place = self.place(offset, buf.len());
        buf.copy_from(&self.0.bytes.lock().unwrap()[place]);
        Ok(())
    }
    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        self.note(Write(offset, buf.len(), flags));
        let place = self.place(offset, buf.len());
        if let Some(gate) = &self.0.gate {
            gate.acquire().await.unwrap().forget();
        }
        buf.copy_to(&mut self.0.bytes.lock().unwrap()[place]);
        Ok(())
    }
    fn write_nowait(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Option<Result> {
        self.note(WriteNow(offset, buf.len(), flags));
        let place = self.place(offset, buf.len());
        buf.copy_to(&mut self.0.bytes.lock().unwrap()[place]);
        Some(Ok(()))
    }
    fn lend_mut(
        &self,
        range: Range<u64>,
        flags: WriteFlags,
        from: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Result> {
        let len = (range.end - range.start) as usize;
        self.note(WriteNow(range.start, len, flags));
        let place = self.place(range.start, len);
        from(&mut self.0.bytes.lock().unwrap()[place]);
        Some(Ok(()))
    }
    async fn flush(&self) -> Result {
        self.note(Flush);
        Ok(())
    }
    async fn discard(&self, range: Range<u64>) -> Result {
        let place = self.place(range.start, (range.end - range.start) as usize);
        self.note(Trim(range));
        self.0.bytes.lock().unwrap()[place].fill(0);
        Ok(())
    }
    async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        let place = self.place(range.start, (range.end - range.start) as usize);
        self.note(Zeroes(range, flags));
        if let Some(error) = self.0.refuse.lock().unwrap().pop_front() {
            return Err(error);
        }
        self.0.bytes.lock().unwrap()[place].fill(0);
        Ok(())
    }
    async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        self.place(range.start, (range.end - range.start) as usize);
        for at in (range.start..range.end).step_by(8) {
            let kind = [ExtentKind::Data, ExtentKind::Hole][(at / 8 % 2) as usize];
            out.push(8.min(range.end - at), kind);
        }
        self.note(Map(range));
        Ok(())
    }
    async fn close(&self) -> Result {
        self.note(Close);
        Ok(())
    }
}

/// A disk of 100 bytes in blocks of 8, the last of which has 4.
fn blocks() -> Geometry {
    let mut geometry = Geometry::writable(100, CrashLevel::Flush);
    geometry.logical_block_size = 8;
    geometry
}

fn edge(geometry: Geometry) -> (Handle, Checked<Handle>) {
    let engine = Handle::new(geometry);
    (engine.clone(), Checked::new(engine).unwrap())
}

async fn write(disk: &Checked<Handle>, bytes: &[u8], offset: u64, flags: WriteFlags) -> Result {
    disk.write(&WriteBuf::new(bytes), offset, flags).await
}

fn poll<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

const PLAIN: WriteFlags = WriteFlags::empty();

#[tokio::test]
async fn what_lies_outside_never_arrives() {
    let (engine, disk) = edge(blocks());
    for (offset, len) in [
        (100, 1),
        (99, 2),
        (u64::MAX, 1),
        (u64::MAX - 1, 2),
        (101, 0),
    ] {
        let mut bytes = vec![0; len];
        let read = disk.read(&mut ReadBuf::new(&mut bytes), offset).await;
        assert_eq!(read.unwrap_err().kind(), ErrorKind::OutOfRange);
        let written = write(&disk, &bytes, offset, PLAIN).await;
        assert_eq!(written.unwrap_err().kind(), ErrorKind::OutOfRange);
    }
    let backwards = Range { start: 9, end: 8 };
    assert_eq!(
        disk.write_zeroes(backwards, PLAIN)
            .await
            .unwrap_err()
            .kind(),
        ErrorKind::Invalid
    );
    assert_eq!(engine.calls(), []);
}

/// Lends what it was told to, whatever it is asked for.
struct Lender(Geometry, Vec<&'static [u8]>);

impl Engine for Lender {
    fn geometry(&self) -> Geometry {
        self.0
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, _: u64) -> Result {
        buf.fill(0);
        Ok(())
    }
    fn lend(&self, _: Range<u64>, to: &mut dyn FnMut(&[u8])) {
        self.1.iter().for_each(|bytes| to(bytes));
    }
}

#[tokio::test]
async fn what_is_lent_is_what_was_asked_for_and_comes_once() {
    let mut geometry = Geometry::read_only(100);
    geometry.max_transfer = 8;
    let lent = |disk: &Checked<Lender>, range| {
        let mut lent = Vec::new();
        disk.lend(range, &mut |bytes| lent.push(bytes.to_vec()));
        lent
    };
    let disk = Checked::new(Lender(geometry, vec![b"a", b"four", b"more"])).unwrap();
    assert_eq!(lent(&disk, 96..100), [b"four"]);
    for range in [97..101, 90..99, 4..4, Range { start: 5, end: 1 }] {
        assert!(lent(&disk, range.clone()).is_empty(), "{range:?}");
    }
    geometry.logical_block_size = 4;
    let disk = Checked::new(Lender(geometry, vec![b"four"])).unwrap();
    assert!(lent(&disk, 2..6).is_empty(), "of two blocks");
    assert_eq!(lent(&disk, 8..12), [b"four"]);
    disk.close().await.unwrap();
    assert!(lent(&disk, 8..12).is_empty(), "closed");
}

#[tokio::test]
async fn what_does_not_wait_arrives_as_it_is_or_not_at_all() {
    let mut geometry = blocks();
    geometry.max_transfer = 4 * geometry.logical_block_size;
    let block = geometry.logical_block_size as usize;
    let bytes = vec![7; 5 * block];
    // Both in the same way.
    let now = |disk: &Checked<Handle>, len, offset, flags| {
        let engine = disk.get_ref();
        engine.calls();
        let lent = disk.lend_mut(offset..offset + len as u64, flags, &mut |_| ());
        let calls = engine.calls();
        let written = disk.write_nowait(&WriteBuf::new(&bytes[..len]), offset, flags);
        assert_eq!(*engine.0.calls.lock().unwrap(), calls);
        assert_eq!(lent.is_some(), written.is_some());
        written.is_some()
    };
    let fua = WriteFlags::FUA;
    let (engine, disk) = edge(geometry);
    let size = geometry.size;
    assert!(now(&disk, 2 * block, block as u64, PLAIN));
    assert_eq!(engine.calls(), [WriteNow(block as u64, 2 * block, PLAIN)]);
    for (len, offset, flags, why) in [
        (0, 0, PLAIN, "empty"),
        (block, size, PLAIN, "outside"),
        (block, 1, PLAIN, "a part of a block"),
        (5 * block, 0, PLAIN, "too long"),
        (block, 0, fua, "a flush would have to follow"),
    ] {
        assert!(!now(&disk, len, offset, flags), "{why}");
        assert_eq!(engine.calls(), [], "{why}");
    }
    disk.close().await.unwrap();
    assert!(!now(&disk, block, 0, PLAIN), "closed");
    let (engine, disk) = edge(geometry.into_read_only());
    assert!(!now(&disk, block, 0, PLAIN), "read-only");
    assert_eq!(engine.calls(), []);
    geometry.features |= Features::FUA;
    let (engine, disk) = edge(geometry);
    assert!(now(&disk, block, 0, fua));
    assert_eq!(engine.calls(), [WriteNow(0, block, fua)]);
}

/// Lends these pieces to be written to, and answers.
struct Borrower(Vec<usize>, fn() -> Option<Result>);

impl Engine for Borrower {
    fn geometry(&self) -> Geometry {
        Geometry::writable(100, CrashLevel::None)
    }
    async fn read(&self, _: &mut ReadBuf<'_>, _: u64) -> Result {
        Ok(())
    }
    fn lend_mut(
        &self,
        _: Range<u64>,
        _: WriteFlags,
        from: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Result> {
        self.0.iter().for_each(|&len| from(&mut vec![0; len]));
        self.1()
    }
}

#[test]
fn nobody_is_told_of_a_write_for_which_too_little_was_lent() {
    let lend = |pieces: &[usize], answer| {
        let disk = Checked::new(Borrower(pieces.to_vec(), answer)).unwrap();
        let mut came = 0;
        let lent = disk.lend_mut(10..18, PLAIN, &mut |memory| came += memory.len());
        (lent.map(|lent| lent.map_err(|error| error.kind())), came)
    };
    let (fine, busy) = (|| Some(Ok(())), || None);
    assert_eq!(lend(&[3, 5], fine), (Some(Ok(())), 8));
    assert_eq!(lend(&[], busy), (None, 0));
    let broken = Some(Err(ErrorKind::Io));
    assert_eq!(lend(&[3, 4], fine), (broken, 7));
    assert_eq!(lend(&[3, 9], fine), (broken, 8), "no more is taken");
    assert_eq!(lend(&[3], busy), (broken, 3), "which is gone");
    let full = || Some(Err(ErrorKind::NoSpace.into()));
    assert_eq!(lend(&[3], full), (Some(Err(ErrorKind::NoSpace)), 3));
}

#[tokio::test]
async fn nothing_overtakes_a_read_modify_write() {
    let disk = Checked::new(Handle::gated(blocks(), Some(Semaphore::new(0)))).unwrap();
    let block = u64::from(blocks().logical_block_size);
    let now = |offset| {
        let bytes = vec![7; block as usize];
        let written = disk.write_nowait(&WriteBuf::new(&bytes), offset, PLAIN);
        let lent = disk.lend_mut(offset..offset + block, PLAIN, &mut |_| ());
        assert_eq!(lent.is_some(), written.is_some());
        written.is_some()
    };
    let part = WriteBuf::new(&[1]);
    let mut modify = Box::pin(disk.write(&part, 1, PLAIN));
    assert!(poll(modify.as_mut()).is_pending());
    assert!(!now(0), "the same block");
    assert!(now(block), "another");
    drop(modify);
    assert!(!now(0), "it may still act");
    disk.flush().await.unwrap();
    assert!(now(0), "and now no more");
}

#[tokio::test]
async fn what_is_empty_is_answered_at_the_edge() {
    let mut geometry = blocks();
    geometry.discard = Discard::Zeroes;
    geometry.features |= Features::WRITE_ZEROES | Features::EXTENTS;
    let (engine, disk) = edge(geometry);
    disk.read(&mut ReadBuf::new(&mut []), 100).await.unwrap();
    write(&disk, &[], 3, WriteFlags::FUA).await.unwrap();
    disk.discard(5..5).await.unwrap();
    disk.write_zeroes(5..5, PLAIN).await.unwrap();
    disk.extents(5..5, &mut Extents::new(1)).await.unwrap();
    disk.prefetch(5..5).await.unwrap();
    assert_eq!(engine.calls(), []);
}

#[tokio::test]
async fn a_grown_disk_is_noticed_and_a_read_only_one_left_alone() {
    let (engine, disk) = edge(blocks());
    engine.0.geometry.lock().unwrap().size = 200;
    engine.0.bytes.lock().unwrap().resize(200, 0);
    write(&disk, &[1; 8], 192, PLAIN).await.unwrap();
    assert_eq!(engine.calls(), [Write(192, 8, PLAIN)]);

    let (engine, disk) = edge(blocks().into_read_only());
    for result in [
        write(&disk, &[1; 8], 0, PLAIN).await,
        disk.discard(0..8).await,
        disk.write_zeroes(0..8, PLAIN).await,
    ] {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnly);
    }
    disk.flush().await.unwrap();
    assert_eq!(engine.calls(), []);
}

#[tokio::test]
async fn where_a_disk_ended_before_it_grew_a_block_is_whole_again() {
    let grow = |engine: &Handle| {
        engine.0.geometry.lock().unwrap().size = 200;
        engine.0.bytes.lock().unwrap().resize(200, 0xbb);
    };
    let mut geometry = blocks();
    geometry.discard = Discard::Zeroes;
    geometry.features |= Features::WRITE_ZEROES;
    for request in 0..4 {
        // Nobody has asked for the geometry since.
        let (engine, disk) = edge(geometry);
        grow(&engine);
        match request {
            0 => disk.read(&mut ReadBuf::new(&mut [0; 4]), 96).await,
            1 => write(&disk, &[1; 4], 96, PLAIN).await,
            2 => disk.write_zeroes(96..100, PLAIN).await,
            _ => disk.discard(88..100).await,
        }
        .unwrap();
        let whole = [Read(96, 8), Write(96, 8, PLAIN)];
        match request {
            0 => assert_eq!(engine.calls(), whole[..1]),
            1 | 2 => assert_eq!(engine.calls(), whole),
            _ => assert_eq!(engine.calls(), [Trim(88..96)]),
        }
        assert_eq!(engine.bytes()[100..], [0xbb; 100]);
    }
}

#[tokio::test]
async fn long_requests_are_split_at_the_limits() {
    let mut geometry = blocks();
    geometry.max_transfer = 16;
    geometry.max_discard = 24;
    geometry.max_write_zeroes = 32;
    geometry.discard = Discard::Zeroes;
    geometry.features |= Features::WRITE_ZEROES | Features::FUA;
    let (engine, disk) = edge(geometry);
    let mut bytes = [0; 40];
    disk.read(&mut ReadBuf::new(&mut bytes), 8).await.unwrap();
    write(&disk, &[1; 36], 64, WriteFlags::FUA).await.unwrap();
    disk.discard(0..48).await.unwrap();
    disk.write_zeroes(0..64, WriteFlags::NO_UNMAP)
        .await
        .unwrap();
    let fua = WriteFlags::FUA;
    assert_eq!(
        engine.calls(),
        [
            Read(8, 16),
            Read(24, 16),
            Read(40, 8),
            Write(64, 16, fua),
            Write(80, 16, fua),
            Write(96, 4, fua),
            Trim(0..24),
            Trim(24..48),
            Zeroes(0..32, WriteFlags::NO_UNMAP),
            Zeroes(32..64, WriteFlags::NO_UNMAP),
        ]
    );
}

#[tokio::test]
async fn no_atomic_unit_is_split() {
    let mut geometry = blocks();
    geometry.atomic_write_unit = 16;
    geometry.max_transfer = 24;
    geometry.max_write_zeroes = 24;
    for native in [true, false] {
        geometry.features.set(Features::WRITE_ZEROES, native);
        let (engine, disk) = edge(geometry);
        let pieces = [(8, 24), (32, 16), (48, 16), (64, 16)];
        write(&disk, &[1; 72], 8, PLAIN).await.unwrap();
        disk.write_zeroes(8..80, PLAIN).await.unwrap();
        let written = pieces.map(|(at, len)| Write(at, len, PLAIN));
        let zeroed = match native {
            true => pieces.map(|(at, len)| Zeroes(at..at + len as u64, PLAIN)),
            false => written.clone(),
        };
        assert_eq!(engine.calls(), [written.clone(), zeroed].concat());
        // Blocks at the ends are read first, and written with what is between.
        write(&disk, &[1; 70], 9, PLAIN).await.unwrap();
        let mut calls = engine.calls();
        calls.retain(|call| !matches!(call, Read(..)));
        assert_eq!(calls, written);
    }
}

#[tokio::test]
async fn fua_without_the_claim_is_a_flush_after_the_write() {
    let (engine, disk) = edge(blocks());
    write(&disk, &[1; 8], 0, WriteFlags::FUA).await.unwrap();
    write(&disk, &[1; 4], 1, WriteFlags::FUA).await.unwrap();
    disk.write_zeroes(8..16, WriteFlags::FUA).await.unwrap();
    let expected = [
        Write(0, 8, PLAIN),
        Flush,
        Read(0, 8),
        Write(0, 8, PLAIN),
        Flush,
        Write(8, 8, PLAIN),
        Flush,
    ];
    assert_eq!(engine.calls(), expected);
    // Nothing to be durable for: no flush.
    let (engine, disk) = edge(Geometry::writable(100, CrashLevel::None));
    write(&disk, &[1; 8], 0, WriteFlags::FUA).await.unwrap();
    assert_eq!(engine.calls(), [Write(0, 8, PLAIN)]);
}

#[tokio::test]
async fn a_flush_where_the_claims_leave_nothing_to_do_may_be_missing() {
    struct NoFlush(Geometry);
    impl Engine for NoFlush {
        fn geometry(&self) -> Geometry {
            self.0
        }
        async fn read(&self, _: &mut ReadBuf<'_>, _: u64) -> Result {
            Ok(())
        }
    }
    for (crash, answer) in [
        (CrashLevel::None, None),
        (CrashLevel::Sync, None),
        (CrashLevel::Flush, Some(ErrorKind::Unsupported)),
        (CrashLevel::Prefix, Some(ErrorKind::Unsupported)),
    ] {
        let disk = Checked::new(NoFlush(Geometry::writable(8, crash))).unwrap();
        let kind = disk.flush().await.map_err(|error| error.kind()).err();
        assert_eq!(kind, answer, "{crash:?}");
    }
}

#[tokio::test]
async fn zeroes_are_written_where_the_engine_has_none() {
    for claimed in [false, true] {
        let mut geometry = blocks();
        geometry.max_transfer = 16;
        if claimed {
            geometry.features |= Features::WRITE_ZEROES;
        }
        let (engine, disk) = edge(geometry);
        let refuse = || Error::from(ErrorKind::Unsupported);
        engine.0.refuse.lock().unwrap().push_back(refuse());
        disk.write_zeroes(6..41, PLAIN).await.unwrap();
        let mut expected = vec![0xaa; 100];
        expected[6..41].fill(0);
        assert_eq!(engine.bytes(), expected);
        // Asked to be fast, it says so and touches nothing.
        engine.calls();
        engine.0.refuse.lock().unwrap().push_back(refuse());
        let slow = disk.write_zeroes(50..90, WriteFlags::FAST_ONLY).await;
        assert_eq!(slow.unwrap_err().kind(), ErrorKind::Unsupported);
        let asked = vec![Zeroes(56..88, WriteFlags::FAST_ONLY)];
        assert_eq!(engine.calls(), if claimed { asked } else { vec![] });
        let within = disk.write_zeroes(50..55, WriteFlags::FAST_ONLY).await;
        assert_eq!(within.unwrap_err().kind(), ErrorKind::Unsupported);
        assert_eq!(engine.bytes(), expected);
    }
}

#[tokio::test]
async fn zeroes_that_are_written_out_leave_others_their_turn() {
    let (engine, disk) = edge(Geometry::writable(1 << 20, CrashLevel::None));
    let mut zeroing = pin!(disk.write_zeroes(0..1 << 20, PLAIN));
    for turn in 1..4 {
        assert!(poll(zeroing.as_mut()).is_pending());
        assert_eq!(engine.calls().len(), 1, "turn {turn}");
    }
    assert!(poll(zeroing.as_mut()).is_ready());
    assert_eq!(engine.bytes(), [0; 1 << 20]);
}

#[tokio::test]
async fn a_failed_write_zeroes_is_not_papered_over() {
    let mut geometry = blocks();
    geometry.features |= Features::WRITE_ZEROES;
    let (engine, disk) = edge(geometry);
    let failure = Error::from(ErrorKind::NoSpace);
    engine.0.refuse.lock().unwrap().push_back(failure);
    let failed = disk.write_zeroes(0..16, PLAIN).await;
    assert_eq!(failed.unwrap_err().kind(), ErrorKind::NoSpace);
    assert_eq!(engine.calls(), [Zeroes(0..16, PLAIN)]);
}

#[tokio::test]
async fn a_discard_is_trimmed_to_whole_granules() {
    let mut geometry = blocks();
    geometry.discard_granularity = 16;
    let (engine, disk) = edge(geometry);
    let unclaimed = disk.discard(0..100).await;
    assert_eq!(unclaimed.unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(engine.calls(), []);
    geometry.discard = Discard::Zeroes;
    let (engine, disk) = edge(geometry);
    for range in [1..100, 1..33, 17..31, 15..17] {
        disk.discard(range).await.unwrap();
    }
    assert_eq!(engine.calls(), [Trim(16..100), Trim(16..32)]);
}

#[tokio::test]
async fn extents_are_rounded_trimmed_and_never_silent() {
    let (engine, disk) = edge(blocks());
    let mut out = Extents::new(8);
    disk.extents(3..77, &mut out).await.unwrap();
    let runs = |out: &Extents| out.iter().map(|e| (e.len, e.kind)).collect::<Vec<_>>();
    assert_eq!(runs(&out), [(74, ExtentKind::Data)]);
    assert_eq!(engine.calls(), []);

    let mut geometry = blocks();
    geometry.features |= Features::EXTENTS;
    let (engine, disk) = edge(geometry);
    let mut out = Extents::new(8);
    disk.extents(3..21, &mut out).await.unwrap();
    let expected = [
        (5, ExtentKind::Data),
        (8, ExtentKind::Hole),
        (5, ExtentKind::Data),
    ];
    assert_eq!(runs(&out), expected);
    assert_eq!(engine.calls(), [Map(0..24)]);
}

#[tokio::test]
async fn after_close_nothing_arrives() {
    let (engine, disk) = edge(blocks());
    disk.close().await.unwrap();
    disk.close().await.unwrap();
    assert_eq!(engine.calls(), [Close]);
    for result in [
        disk.read(&mut ReadBuf::new(&mut [0]), 0).await,
        write(&disk, &[1], 0, PLAIN).await,
        disk.flush().await,
        disk.discard(0..8).await,
        disk.write_zeroes(0..8, PLAIN).await,
        disk.extents(0..8, &mut Extents::new(1)).await,
        disk.prefetch(0..8).await,
    ] {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Shutdown);
    }
    assert_eq!(engine.calls(), []);
}

#[tokio::test]
async fn writes_into_one_block_do_not_undo_each_other() {
    let engine = Handle::gated(blocks(), Some(Semaphore::new(0)));
    let disk = Checked::new(engine.clone()).unwrap();
    let mut first = pin!(write(&disk, &[1; 4], 0, PLAIN));
    let mut second = pin!(write(&disk, &[2; 4], 4, PLAIN));
    let mut whole = pin!(write(&disk, &[3; 8], 0, PLAIN));
    let mut beside = pin!(write(&disk, &[4; 8], 8, PLAIN));
    assert!(poll(first.as_mut()).is_pending());
    assert!(poll(second.as_mut()).is_pending());
    assert!(poll(whole.as_mut()).is_pending());
    assert!(poll(beside.as_mut()).is_pending());
    // The second and the whole-block write wait for the first; the one beside does not.
    assert_eq!(
        engine.calls(),
        [Read(0, 8), Write(0, 8, PLAIN), Write(8, 8, PLAIN)]
    );
    engine.0.gate.as_ref().unwrap().add_permits(10);
    let all = async { tokio::join!(first, second, whole, beside) };
    let (a, b, c, d) = all.await;
    a.and(b).and(c).and(d).unwrap();
    assert_eq!(
        engine.calls(),
        [Read(0, 8), Write(0, 8, PLAIN), Write(0, 8, PLAIN)]
    );
    assert_eq!(
        engine.bytes()[..16],
        [3, 3, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4]
    );
}

#[tokio::test]
async fn behind_a_write_dropped_half_way_comes_a_flush() {
    for dropped in [&[1_u8; 4][..], &[1; 8]] {
        let engine = Handle::gated(blocks(), Some(Semaphore::new(0)));
        let disk = Checked::new(engine.clone()).unwrap();
        {
            let mut half_way = pin!(write(&disk, dropped, 0, PLAIN));
            assert!(poll(half_way.as_mut()).is_pending());
        }
        engine.calls();
        engine.0.gate.as_ref().unwrap().add_permits(10);
        write(&disk, &[2; 4], 4, PLAIN).await.unwrap();
        write(&disk, &[2; 4], 4, PLAIN).await.unwrap();
        let again = [Read(0, 8), Write(0, 8, PLAIN)];
        assert_eq!(engine.calls(), [&[Flush][..], &again, &again].concat());
    }
}

#[tokio::test]
async fn writes_dropped_half_way_do_not_pile_up() {
    let mut geometry = blocks();
    geometry.size = 8000;
    let engine = Handle::gated(geometry, Some(Semaphore::new(0)));
    let disk = Checked::new(engine.clone()).unwrap();
    for n in 0..1000 {
        let mut half_way = pin!(write(&disk, &[1; 8], n * 8, PLAIN));
        assert!(poll(half_way.as_mut()).is_pending());
    }
    let flushes = engine.calls().iter().filter(|call| **call == Flush).count();
    assert_eq!(flushes, 1000 / 64);
}

#[tokio::test]
async fn a_write_dropped_while_it_waits_leaves_no_trace() {
    let engine = Handle::gated(blocks(), Some(Semaphore::new(0)));
    let disk = Checked::new(engine.clone()).unwrap();
    let mut first = pin!(write(&disk, &[1; 4], 0, PLAIN));
    assert!(poll(first.as_mut()).is_pending());
    {
        let mut waiting = pin!(write(&disk, &[2; 4], 4, PLAIN));
        assert!(poll(waiting.as_mut()).is_pending());
    }
    engine.calls();
    engine.0.gate.as_ref().unwrap().add_permits(10);
    first.await.unwrap();
    write(&disk, &[3; 4], 4, PLAIN).await.unwrap();
    assert_eq!(engine.calls(), [Read(0, 8), Write(0, 8, PLAIN)]);
}

proptest! {
    /// Any requests, on any block size and limits, are those of an array of bytes.
    #[test]
    fn any_byte_range_works_on_any_block_size(
        block in 0_u32..7,
        size in 1_u64..3000,
        max_transfer in 0_u32..8,
        shifts in proptest::collection::vec((0_u8..4, any::<u64>(), 0_usize..700), 1..40),
    ) {
        let mut geometry = Geometry::writable(size, CrashLevel::Flush);
        geometry.logical_block_size = 1 << block;
        geometry.max_transfer = max_transfer << block;
        geometry.discard = Discard::Zeroes;
        geometry.features |= Features::WRITE_ZEROES;
        let (engine, disk) = edge(geometry);
        let mut model = engine.bytes();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            for (step, (kind, place, len)) in shifts.into_iter().enumerate() {
                let offset = place % size;
                let len = len.min((size - offset) as usize);
                let range = offset as usize..offset as usize + len;
                let bytes: Vec<u8> = (0..len).map(|i| (step * 31 + i) as u8).collect();
                match kind {
                    0 => {
                        write(&disk, &bytes, offset, PLAIN).await.unwrap();
                        model[range].copy_from_slice(&bytes);
                    }
                    1 => {
                        disk.write_zeroes(offset..offset + len as u64, PLAIN).await.unwrap();
                        model[range].fill(0);
                    }
                    2 => {
                        let granule = 1 << block;
                        disk.discard(offset..offset + len as u64).await.unwrap();
                        for (at, byte) in model.iter_mut().enumerate() {
                            let start = at / granule * granule;
                            let end = (start + granule).min(size as usize);
                            if range.start <= start && end <= range.end {
                                *byte = 0;
                            }
                        }
                    }
                    _ => {
                        let mut back = vec![0; len];
                        disk.read(&mut ReadBuf::new(&mut back), offset).await.unwrap();
                        assert_eq!(back, model[range]);
                    }
                }
                assert_eq!(engine.bytes(), model);
            }
        });
    }
}
