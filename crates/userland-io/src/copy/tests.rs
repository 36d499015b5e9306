//! Copies between small disks of this file, which log what they are asked.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::*;
use crate::{
    CrashLevel, ErrorKind, ExtentKind, Extents, Features, Geometry, ReadBuf, Result, WriteBuf,
    WriteFlags,
};

const BLOCK: u64 = 4096;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Op {
    Read(Range<u64>),
    Write(Range<u64>),
    Zero(Range<u64>),
    Flush,
}

/// A disk of bytes, with a map of which blocks are holes.
#[derive(Clone)]
struct Disk(Arc<State>);

struct State {
    geometry: Geometry,
    bytes: Mutex<Vec<u8>>,
    hole: Mutex<Vec<bool>>,
    log: Mutex<Vec<Op>>,
    /// What happens to a request, beside what it asks for.
    quirk: Box<dyn Fn(&Op) -> Quirk + Send + Sync>,
    running: AtomicUsize,
    most: AtomicUsize,
    /// Held by each write, and taken by `extents`.
    lock: tokio::sync::RwLock<()>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Quirk {
    None,
    /// Takes a few polls.
    Slow,
    Fail,
    /// Stores other bytes than it was given.
    Corrupt,
}

impl Disk {
    fn new(bytes: Vec<u8>) -> Self {
        Self::with(bytes, |_| (), |_| Quirk::None)
    }

    fn with(
        bytes: Vec<u8>,
        change: impl FnOnce(&mut Geometry),
        quirk: impl Fn(&Op) -> Quirk + Send + Sync + 'static,
    ) -> Self {
        let mut geometry = Geometry::writable(bytes.len() as u64, CrashLevel::Flush);
        geometry.features |= Features::EXTENTS | Features::WRITE_ZEROES;
        change(&mut geometry);
        let hole = bytes
            .chunks(BLOCK as usize)
            .map(|block| block.iter().all(|&b| b == 0))
            .collect();
        Disk(Arc::new(State {
            geometry,
            bytes: Mutex::new(bytes),
            hole: Mutex::new(hole),
            log: Mutex::default(),
            quirk: Box::new(quirk),
            running: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
            lock: tokio::sync::RwLock::new(()),
        }))
    }

    async fn open(&self) -> Device<Disk> {
        let device = Device::open(self.clone()).await.unwrap();
        self.log().clear();
        device
    }

    fn log(&self) -> MutexGuard<'_, Vec<Op>> {
        self.0.log.lock().unwrap()
    }

    fn bytes(&self) -> Vec<u8> {
        self.0.bytes.lock().unwrap().clone()
    }

    fn writes(&self) -> Vec<Op> {
        let log = self.log();
        log.iter()
            .filter(|op| matches!(op, Op::Write(_) | Op::Zero(_)))
            .cloned()
            .collect()
    }

    async fn begin(&self, op: Op) -> Result<Quirk> {
        let quirk = (self.0.quirk)(&op);
        self.log().push(op);
        let running = self.0.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.0.most.fetch_max(running, Ordering::SeqCst);
        if quirk == Quirk::Slow {
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
        }
        self.0.running.fetch_sub(1, Ordering::SeqCst);
        match quirk {
            Quirk::Fail => Err(ErrorKind::NoSpace.into()),
            quirk => Ok(quirk),
        }
    }

    fn set_holes(&self, range: Range<u64>, hole: bool) {
        let blocks = (range.start / BLOCK) as usize..range.end.div_ceil(BLOCK) as usize;
        self.0.hole.lock().unwrap()[blocks].fill(hole);
    }
}

fn span(range: &Range<u64>) -> Range<usize> {
    range.start as usize..range.end as usize
}

impl Engine for Disk {
    fn geometry(&self) -> Geometry {
        self.0.geometry
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        let range = offset..offset + buf.len() as u64;
        self.begin(Op::Read(range.clone())).await?;
        buf.copy_from(&self.0.bytes.lock().unwrap()[span(&range)]);
        Ok(())
    }
    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, _: WriteFlags) -> Result {
        let _held = self.0.lock.read().await;
        let range = offset..offset + buf.len() as u64;
        let quirk = self.begin(Op::Write(range.clone())).await?;
        let mut bytes = self.0.bytes.lock().unwrap();
        buf.copy_to(&mut bytes[span(&range)]);
        if quirk == Quirk::Corrupt {
            bytes[range.end as usize - 1] ^= 0x80;
        }
        self.set_holes(range, false);
        Ok(())
    }
    async fn write_zeroes(&self, range: Range<u64>, _: WriteFlags) -> Result {
        self.begin(Op::Zero(range.clone())).await?;
        self.0.bytes.lock().unwrap()[span(&range)].fill(0);
        if range.start.is_multiple_of(BLOCK) {
            self.set_holes(range, true);
        }
        Ok(())
    }
    async fn flush(&self) -> Result {
        self.begin(Op::Flush).await.map(|_| ())
    }
    async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        let _alone = self.0.lock.write().await;
        let hole = self.0.hole.lock().unwrap();
        let mut at = range.start;
        while at < range.end && out.room() > 0 {
            let end = ((at / BLOCK + 1) * BLOCK).min(range.end);
            out.push(
                end - at,
                match hole[(at / BLOCK) as usize] {
                    true => ExtentKind::Hole,
                    false => ExtentKind::Data,
                },
            );
            at = end;
        }
        Ok(())
    }
}

fn options(in_flight: usize, request_size: u32) -> CopyOptions {
    CopyOptions {
        in_flight,
        request_size,
        verify: true,
    }
}

async fn copied(source: &Disk, target: &Disk, options: &CopyOptions) -> Result<Copied, CopyError> {
    copy(&source.open().await, &target.open().await, options, |_| ()).await
}

/// `runs` of so many bytes: data that is nowhere zero, or zeroes.
fn bytes(runs: &[(usize, bool)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for &(len, data) in runs {
        let start = bytes.len();
        bytes.extend((start..start + len).map(|at| if data { (at % 255) as u8 + 1 } else { 0 }));
    }
    bytes
}

fn some_bytes(random: &mut fastrand::Rng) -> Vec<u8> {
    let runs: Vec<_> = (0..random.usize(1..30))
        .map(|_| (random.usize(1..100_000), random.bool()))
        .collect();
    bytes(&runs)
}

#[tokio::test]
async fn any_source_arrives_whole_on_any_target() {
    for seed in 0..60 {
        let mut random = fastrand::Rng::with_seed(seed);
        let from = some_bytes(&mut random);
        let mut to = some_bytes(&mut random);
        to.resize(from.len() + random.usize(0..10_000), 7);
        let block = *random.choice(&[1, 512, 4096, 16384]).unwrap();
        let change = |extents: bool| {
            move |geometry: &mut Geometry| {
                geometry.physical_block_size = block;
                geometry.features.set(Features::EXTENTS, extents);
            }
        };
        let source = Disk::with(from.clone(), change(random.bool()), |_| Quirk::None);
        let target = Disk::with(to.clone(), change(random.bool()), |op| match op {
            Op::Write(range) if range.start % 3 == 0 => Quirk::Slow,
            _ => Quirk::None,
        });
        let options = options(random.usize(1..9), random.u32(1..200_000));
        let done = copied(&source, &target, &options).await.unwrap();
        let now = target.bytes();
        assert!(now[..from.len()] == from, "seed {seed}");
        assert!(now[from.len()..] == to[from.len()..], "seed {seed}: tail");
        assert_eq!(
            done.size,
            done.data + done.zeroed + done.skipped,
            "seed {seed}"
        );
        assert_eq!(done.tail as usize, to.len() - from.len());
        assert!(source.writes().is_empty());
        // Each byte once, and nothing between whole blocks.
        let mut parts: Vec<_> = target
            .writes()
            .into_iter()
            .map(|op| match op {
                Op::Write(range) | Op::Zero(range) => range,
                other => panic!("{other:?}"),
            })
            .collect();
        parts.sort_by_key(|range| range.start);
        assert!(parts.windows(2).all(|pair| pair[0].end <= pair[1].start));
        assert!(parts.iter().all(|part| part.start % u64::from(block) == 0));
    }
}

#[tokio::test]
async fn holes_over_a_clear_target_cost_no_request() {
    let mib = 1 << 20;
    let source = Disk::new(bytes(&[(mib, false), (mib, true), (8 * mib, false)]));
    let target = Disk::new(vec![0; 10 * mib]);
    let options = CopyOptions {
        request_size: 1 << 19,
        ..CopyOptions::default()
    };
    let done = copied(&source, &target, &options).await.unwrap();
    let half = 1 << 19;
    let (a, b) = (2 * half..3 * half, 3 * half..4 * half);
    assert_eq!(*source.log(), [Op::Read(a.clone()), Op::Read(b.clone())]);
    assert_eq!(*target.log(), [Op::Write(a), Op::Write(b), Op::Flush]);
    assert_eq!(
        (done.data, done.zeroed, done.skipped),
        (1 << 20, 0, 9 << 20)
    );
}

#[tokio::test]
async fn old_content_under_holes_is_zeroed_not_written() {
    let source = Disk::new(bytes(&[(8192, true), (1 << 20, false)]));
    let target = Disk::new(bytes(&[(400_000, true), (648_576 + 8192, false)]));
    let done = copied(&source, &target, &CopyOptions::default())
        .await
        .unwrap();
    assert_eq!(target.bytes(), source.bytes());
    // To the end of the block in which the old content ends, and not further.
    assert_eq!(
        target.writes(),
        [Op::Write(0..8192), Op::Zero(8192..401_408)]
    );
    assert_eq!((done.data, done.zeroed), (8192, 401_408 - 8192));
}

#[tokio::test]
async fn a_target_that_cannot_tell_is_zeroed() {
    let source = Disk::new(vec![0; 1 << 20]);
    let mute = |g: &mut Geometry| g.features.remove(Features::EXTENTS);
    let target = Disk::with(vec![0; 1 << 20], mute, |_| Quirk::None);
    let done = copied(&source, &target, &CopyOptions::default())
        .await
        .unwrap();
    assert_eq!(target.writes(), [Op::Zero(0..1 << 20)]);
    assert_eq!(done.zeroed, 1 << 20);
}

#[tokio::test]
async fn zeroes_that_the_source_calls_data_stay_sparse() {
    let content = bytes(&[(1 << 16, true), (5 << 16, false), (100, true)]);
    let mute = |g: &mut Geometry| g.features.remove(Features::EXTENTS);
    let source = Disk::with(content.clone(), mute, |_| Quirk::None);
    for (before, expected) in [
        (
            0,
            vec![Op::Write(0..1 << 16), Op::Write(6 << 16..(6 << 16) + 100)],
        ),
        (
            9,
            vec![
                Op::Write(0..1 << 16),
                Op::Zero(1 << 16..6 << 16),
                Op::Write(6 << 16..(6 << 16) + 100),
            ],
        ),
    ] {
        let target = Disk::new(vec![before; content.len()]);
        copied(&source, &target, &CopyOptions::default())
            .await
            .unwrap();
        assert_eq!(target.writes(), expected);
        assert_eq!(target.bytes(), content);
    }
}

#[tokio::test]
async fn a_short_or_read_only_target_is_refused_before_anything() {
    let source = Disk::new(vec![1; 10_000]);
    let short = Disk::new(vec![2; 9_999]);
    let error = copied(&source, &short, &CopyOptions::default())
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "the target has 9999 bytes, 1 fewer than the source's 10000"
    );
    let fixed = Disk::new(vec![2; 10_000]);
    let (from, to) = (source.open().await, fixed.open().await.read_only());
    let error = copy(&from, &to, &CopyOptions::default(), |_| ())
        .await
        .unwrap_err();
    assert!(matches!(error, CopyError::ReadOnly));
    for disk in [source, short, fixed] {
        assert_eq!(*disk.log(), []);
    }
}

#[tokio::test]
async fn the_flush_decides_and_comes_last() {
    let source = Disk::new(vec![1; 100_000]);
    let armed = Arc::new(AtomicUsize::new(0));
    let flag = armed.clone();
    let target = Disk::with(
        vec![0; 100_000],
        |_| (),
        move |op| match op {
            Op::Flush if flag.load(Ordering::SeqCst) == 1 => Quirk::Fail,
            _ => Quirk::None,
        },
    );
    let (from, to) = (source.open().await, target.open().await);
    armed.store(1, Ordering::SeqCst);
    let error = copy(&from, &to, &options(4, 4096), |_| ())
        .await
        .unwrap_err();
    assert!(matches!(error, CopyError::Flush(_)), "{error}");
    assert_eq!(error.to_string(), "flushing the target: no space left");
    let log = target.log();
    assert_eq!(
        log.iter().position(|op| *op == Op::Flush),
        Some(log.len() - 1)
    );
}

#[tokio::test]
async fn a_failed_request_ends_the_copy_and_is_named() {
    let content = vec![1; 1 << 20];
    let fail = |wanted: Op| {
        move |op: &Op| {
            if *op == wanted {
                Quirk::Fail
            } else {
                Quirk::Slow
            }
        }
    };
    let range = 40_960..45_056;

    let source = Disk::new(content.clone());
    let target = Disk::with(vec![0; 1 << 20], |_| (), fail(Op::Write(range.clone())));
    let error = copied(&source, &target, &options(4, 4096))
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "writing 4096 bytes of the target at offset 40960: no space left"
    );
    let writes = target.writes().len();
    assert!(writes <= 10 + 4, "{writes} were started");
    assert_eq!(target.0.running.load(Ordering::SeqCst), 0);
    assert!(!target.log().contains(&Op::Flush));

    let source = Disk::with(content, |_| (), fail(Op::Read(range)));
    let target = Disk::new(vec![0; 1 << 20]);
    let error = copied(&source, &target, &options(4, 4096))
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            CopyError::Read {
                offset: 40_960,
                len: 4096,
                ..
            }
        ),
        "{error}"
    );
}

#[tokio::test]
async fn verify_finds_a_byte_that_did_not_arrive() {
    let source = Disk::new(vec![1; 1 << 20]);
    let corrupt = |op: &Op| match op {
        Op::Write(range) if range.start == 8192 => Quirk::Corrupt,
        _ => Quirk::None,
    };
    let target = Disk::with(vec![0; 1 << 20], |_| (), corrupt);
    let error = copied(&source, &target, &options(3, 4096))
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "the target differs from the source at offset 12287: 0x81 where the source has 0x01"
    );
    let mut blind = options(3, 4096);
    blind.verify = false;
    copied(&source, &target, &blind).await.unwrap();
}

#[tokio::test]
async fn as_many_requests_run_at_once_as_asked() {
    for depth in [1, 7] {
        let source = Disk::with(vec![1; 1 << 20], |_| (), |_| Quirk::Slow);
        let target = Disk::new(vec![0; 1 << 20]);
        copied(&source, &target, &options(depth, 4096))
            .await
            .unwrap();
        assert_eq!(source.0.most.load(Ordering::SeqCst), depth);
    }
}

#[tokio::test]
async fn requests_keep_to_what_both_disks_take() {
    let limit = |max| move |g: &mut Geometry| g.max_transfer = max;
    let source = Disk::with(vec![1; 1 << 20], limit(65_536), |_| Quirk::None);
    let target = Disk::with(vec![0; 1 << 20], limit(40_000), |_| Quirk::None);
    copied(&source, &target, &CopyOptions::default())
        .await
        .unwrap();
    // Whole blocks of 4096 in 40,000 bytes.
    let log = source.log();
    let longest = log.iter().map(|op| match op {
        Op::Read(range) => range.end - range.start,
        other => panic!("{other:?}"),
    });
    assert_eq!(longest.max(), Some(36_864));
}

/// `extents` of this disk waits for the writes in flight, as one with a lock on its map does.
#[tokio::test]
async fn writes_go_on_while_extents_wait_for_them() {
    let blocks = 4 * 1024;
    // More runs than are asked for at once.
    let from: Vec<u8> = (0..blocks * 4096)
        .map(|at| u8::from(at / 4096 % 2 == 0))
        .collect();
    let source = Disk::new(from.clone());
    let target = Disk::with(
        (0..blocks * 4096)
            .map(|at| u8::from(at / 4096 % 3 == 0))
            .collect(),
        |_| (),
        |op| match op {
            Op::Write(_) => Quirk::Slow,
            _ => Quirk::None,
        },
    );
    let options = CopyOptions::default();
    let copy = copied(&source, &target, &options);
    let limit = std::time::Duration::from_secs(60);
    tokio::time::timeout(limit, copy)
        .await
        .expect("no deadlock")
        .unwrap();
    assert!(target.bytes() == from);
}

#[tokio::test]
async fn progress_rises_to_the_total_in_each_phase() {
    let source = Disk::new(bytes(&[(50_000, true), (50_000, false), (123, true)]));
    let target = Disk::new(vec![3; 200_000]);
    let (from, to) = (source.open().await, target.open().await);
    let mut told: Vec<CopyProgress> = Vec::new();
    copy(&from, &to, &options(2, 8192), |step| told.push(step))
        .await
        .unwrap();
    for phase in [
        CopyPhase::Copying,
        CopyPhase::Flushing,
        CopyPhase::Verifying,
    ] {
        let steps: Vec<_> = told.iter().filter(|step| step.phase == phase).collect();
        assert_eq!(steps.first().unwrap().done, 0, "{phase:?}");
        assert_eq!(steps.last().unwrap().done, 100_123, "{phase:?}");
        assert!(steps.windows(2).all(|pair| pair[0].done <= pair[1].done));
        assert!(steps.iter().all(|step| step.total == 100_123));
    }
}

#[tokio::test]
async fn an_empty_source_copies_nothing_and_flushes() {
    let (source, target) = (Disk::new(Vec::new()), Disk::new(vec![5; 10]));
    let done = copied(&source, &target, &CopyOptions::default())
        .await
        .unwrap();
    assert_eq!((done.size, done.tail), (0, 10));
    assert_eq!(*target.log(), [Op::Flush]);
}

#[tokio::test]
async fn a_copy_may_move_between_threads() {
    fn is_send<T: Send>(value: T) -> T {
        value
    }
    let (source, target) = (Disk::new(vec![1; 5000]), Disk::new(vec![0; 5000]));
    let (from, to) = (source.open().await, target.open().await);
    let task = tokio::spawn(is_send(async move {
        copy(&from, &to, &CopyOptions::default(), |_| ()).await
    }));
    assert_eq!(task.await.unwrap().unwrap().data, 5000);
}

#[tokio::test]
async fn disks_that_never_wait_let_others_run_and_a_dropped_copy_ends() {
    let (source, target) = (Disk::new(vec![1; 160 << 10]), Disk::new(vec![0; 160 << 10]));
    let (from, to) = (source.open().await, target.open().await);
    let options = options(4, 4096);
    let mut copy = Box::pin(copy(&from, &to, &options, |_| ()));
    let waits =
        std::future::poll_fn(|cx| std::task::Poll::Ready(copy.as_mut().poll(cx).is_pending()));
    assert!(waits.await);
    assert_eq!(target.writes().len(), 16);
    drop(copy);
    tokio::task::yield_now().await;
    assert_eq!(target.writes().len(), 16);
}
