//! The file engine when system calls fail, fall short, are interrupted, hang or panic.

use std::collections::{HashMap, VecDeque};
use std::fs::File as OsFile;
use std::future::Future;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::task::{Context, Waker};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::alone::Alone;
use super::sys::{Calls, Direction, Os};
use super::{Aio, File, OpenFile};
use crate::{Engine, ErrorKind, ExtentKind, Extents, ReadBuf, Result, WriteBuf, WriteFlags};

mod alone;
mod at_once;
mod flushes;
mod nowait;
mod ring;

const NONE: WriteFlags = WriteFlags::empty();
const EINTR: i32 = 4;
const EIO: i32 = 5;
const EAGAIN: i32 = 11;
const ENOSPC: i32 = 28;
const EOPNOTSUPP: i32 = 95;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Call {
    Read,
    Write,
    Sync,
    ReadCached,
    WriteCached,
    WriteDurable,
    Punch,
    Zero,
    NextData,
    NextHole,
    Prefetch,
}

/// What happens instead of a call, or before it.
#[derive(Debug)]
enum Fault {
    /// Nothing.
    Pass,
    Errno(i32),
    /// At most so many bytes.
    Short(usize),
    Panic,
    /// Says that it is there, waits, and fails with this errno unless that is 0.
    Hold(Sender<()>, Receiver<()>, i32),
}

/// The system's calls, with faults in front; when those of a call are used up it passes.
#[derive(Clone, Debug, Default)]
struct Faulty(Arc<Mutex<Script>>);

#[derive(Debug, Default)]
struct Script {
    faults: HashMap<Call, VecDeque<Fault>>,
    counts: HashMap<Call, usize>,
    /// Who made the last one.
    callers: HashMap<Call, ThreadId>,
    /// From here on every transfer is interrupted or cut short at random.
    chaos: Option<fastrand::Rng>,
    /// But never to less than this: the kernel does not stop a direct transfer inside a block.
    least: usize,
}

impl Faulty {
    fn inject(&self, call: Call, faults: impl IntoIterator<Item = Fault>) {
        let mut script = self.0.lock().unwrap();
        script.faults.entry(call).or_default().extend(faults);
    }

    fn count(&self, call: Call) -> usize {
        self.0
            .lock()
            .unwrap()
            .counts
            .get(&call)
            .copied()
            .unwrap_or(0)
    }

    /// True if the last call was made in the task that asks, not in the pool.
    fn was_made_here(&self, call: Call) -> bool {
        self.0.lock().unwrap().callers.get(&call) == Some(&thread::current().id())
    }

    /// How many bytes may pass.
    fn meet(&self, call: Call, len: usize) -> io::Result<usize> {
        let fault = {
            let mut script = self.0.lock().unwrap();
            *script.counts.entry(call).or_default() += 1;
            script.callers.insert(call, thread::current().id());
            let fault = script.faults.get_mut(&call).and_then(VecDeque::pop_front);
            let least = script.least.min(len);
            match (&mut script.chaos, fault) {
                (Some(rng), None) => match rng.u8(0..3) {
                    0 => Fault::Errno(EINTR),
                    1 if len > 0 => Fault::Short(rng.usize(least..=len)),
                    _ => Fault::Pass,
                },
                (_, fault) => fault.unwrap_or(Fault::Pass),
            }
        };
        match fault {
            Fault::Pass => Ok(len),
            Fault::Errno(errno) => Err(io::Error::from_raw_os_error(errno)),
            Fault::Short(most) => Ok(len.min(most)),
            Fault::Panic => panic!("a call that panics"),
            Fault::Hold(here, go, errno) => {
                here.send(()).unwrap();
                go.recv().unwrap();
                match errno {
                    0 => Ok(len),
                    errno => Err(io::Error::from_raw_os_error(errno)),
                }
            }
        }
    }
}

impl Calls for Faulty {
    fn read(&self, file: &OsFile, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let len = self.meet(Call::Read, buf.len())?;
        // Direct I/O takes whole blocks only: read all, tell less.
        Os.read(file, buf, offset).map(|got| got.min(len))
    }
    fn write(&self, file: &OsFile, buf: &[u8], offset: u64) -> io::Result<usize> {
        let len = self.meet(Call::Write, buf.len())?;
        Os.write(file, buf, offset).map(|put| put.min(len))
    }
    fn transferred(&self, direction: Direction, result: io::Result<usize>) -> io::Result<usize> {
        let call = match direction {
            Direction::Read => Call::Read,
            Direction::Write => Call::Write,
        };
        let moved = result?;
        Ok(moved.min(self.meet(call, moved)?))
    }
    fn sync(&self, file: &OsFile) -> io::Result<()> {
        self.meet(Call::Sync, 0)?;
        Os.sync(file)
    }
    fn read_cached(&self, file: &OsFile, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let len = self.meet(Call::ReadCached, buf.len())?;
        Os.read_cached(file, &mut buf[..len], offset)
    }
    // As a file system that takes writes without waiting would.
    fn write_cached(&self, file: &OsFile, buf: &[u8], offset: u64) -> io::Result<usize> {
        let len = self.meet(Call::WriteCached, buf.len())?;
        Os.write(file, &buf[..len], offset)
    }
    fn write_durable(&self, file: &OsFile, buf: &[u8], offset: u64) -> io::Result<usize> {
        let len = self.meet(Call::WriteDurable, buf.len())?;
        Os.write(file, buf, offset).map(|put| put.min(len))
    }
    fn prefetch(&self, file: &OsFile, offset: u64, len: u64) -> io::Result<()> {
        self.meet(Call::Prefetch, 0)?;
        Os.prefetch(file, offset, len)
    }
    fn punch(&self, file: &OsFile, offset: u64, len: u64) -> io::Result<()> {
        self.meet(Call::Punch, 0)?;
        Os.punch(file, offset, len)
    }
    fn zero(&self, file: &OsFile, offset: u64, len: u64) -> io::Result<()> {
        self.meet(Call::Zero, 0)?;
        Os.zero(file, offset, len)
    }
    fn next_data(&self, file: &OsFile, from: u64) -> io::Result<Option<u64>> {
        self.meet(Call::NextData, 0)?;
        Os.next_data(file, from)
    }
    fn next_hole(&self, file: &OsFile, from: u64) -> io::Result<Option<u64>> {
        self.meet(Call::NextHole, 0)?;
        Os.next_hole(file, from)
    }
}

/// A new disk of `size` bytes behind faulty calls.
async fn disk(size: u64) -> (TempDir, Faulty, File) {
    let place = tempfile::tempdir().unwrap();
    let faulty = Faulty::default();
    let open = File::open(place.path().join("disk.img")).size(size);
    let mut disk = open.open_with(Box::new(faulty.clone())).await.unwrap();
    // Also where temporary files are in memory.
    Arc::get_mut(&mut disk.image).unwrap().never_waits = false;
    never_here(&mut disk);
    (place, faulty, disk)
}

/// What waits for the disk is not done by this thread, which has to let go what it holds.
fn never_here(disk: &mut File) {
    Arc::get_mut(&mut disk.image).unwrap().alone = Alone::new(false);
}

/// What can wait for the disk here.
fn modes() -> Vec<Aio> {
    match super::ring::Ring::new(None) {
        Ok(_) => vec![Aio::Threads, Aio::Uring],
        Err(error) => {
            println!("SKIP: no io_uring here ({error})");
            vec![Aio::Threads]
        }
    }
}

fn same_file(place: &TempDir) -> OpenFile {
    File::open(place.path().join("disk.img"))
}

async fn read(disk: &File, at: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0xaa; len];
    disk.read(&mut ReadBuf::new(&mut bytes), at).await?;
    Ok(bytes)
}

async fn write(disk: &File, at: u64, bytes: &[u8], flags: WriteFlags) -> Result {
    disk.write(&WriteBuf::new(bytes), at, flags).await
}

fn is_pending<F: Future + ?Sized>(future: Pin<&mut F>) -> bool {
    future
        .poll(&mut Context::from_waker(Waker::noop()))
        .is_pending()
}

/// A fault that waits, with where it says that it does, and what lets it go.
fn hold(errno: i32) -> (Fault, Receiver<()>, Sender<()>) {
    let ((here, is_here), (go, may_go)) = (channel(), channel());
    (Fault::Hold(here, may_go, errno), is_here, go)
}

#[tokio::test]
async fn interrupted_and_short_transfers_move_every_byte_once() {
    for (direct, aio) in modes()
        .into_iter()
        .flat_map(|aio| [(false, aio), (true, aio)])
    {
        let size = (1_u64 << 20) + 70_000;
        let place = tempfile::tempdir().unwrap();
        let faulty = Faulty::default();
        let open = same_file(&place).size(size).direct(direct).aio(aio);
        let disk = open.open_with(Box::new(faulty.clone())).await.unwrap();
        let block = u64::from(disk.geometry().logical_block_size);
        let mut model = vec![0_u8; size as usize];
        let mut rng = fastrand::Rng::with_seed(5);
        {
            let mut script = faulty.0.lock().unwrap();
            script.chaos = Some(fastrand::Rng::with_seed(6));
            script.least = block as usize;
        }
        for step in 0..200_u8 {
            let start = rng.u64(0..size / block) * block;
            let longest = (size - start).div_ceil(block).min(300_000 / block);
            let end = (start + rng.u64(1..=longest) * block).min(size);
            let part = start as usize..end as usize;
            if rng.bool() {
                let bytes: Vec<u8> = part.clone().map(|at| at as u8 ^ step).collect();
                let flags = [NONE, WriteFlags::FUA][usize::from(rng.u8(0..5) == 0)];
                write(&disk, start, &bytes, flags).await.unwrap();
                model[part].copy_from_slice(&bytes);
            } else {
                let bytes = read(&disk, start, part.len()).await.unwrap();
                assert!(bytes == model[part], "step {step}");
            }
        }
        disk.flush().await.unwrap();
        assert!(std::fs::read(place.path().join("disk.img")).unwrap() == model);
    }
}

#[tokio::test]
async fn after_a_failed_flush_mutations_fail_and_reads_go_on() {
    let (place, faulty, disk) = disk(1 << 20).await;
    write(&disk, 0, &[1; 4096], NONE).await.unwrap();
    faulty.inject(Call::Sync, [Fault::Errno(EIO)]);
    assert_eq!(disk.flush().await.unwrap_err().errno(), EIO);
    let before = faulty.count(Call::Sync);
    let all = [
        write(&disk, 0, &[2; 4096], NONE).await,
        write(&disk, 0, &[2; 4096], WriteFlags::FUA).await,
        disk.write_zeroes(0..4096, NONE).await,
        disk.discard(0..4096).await,
        disk.flush().await,
        disk.close().await,
    ];
    for result in all {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains("open the disk again"), "{error}");
    }
    assert_eq!(
        faulty.count(Call::Sync),
        before,
        "the kernel was asked again"
    );
    assert_eq!(read(&disk, 0, 4096).await.unwrap(), [1; 4096]);
    drop(disk);
    let disk = same_file(&place).await.unwrap();
    write(&disk, 0, &[2; 4096], NONE).await.unwrap();
    disk.flush().await.unwrap();
}

#[tokio::test]
async fn a_flush_beside_a_failing_one_is_not_believed() {
    for durable_write in [false, true] {
        let (_place, faulty, disk) = disk(1 << 20).await;
        let (fault, is_here, go) = hold(EIO);
        faulty.inject(Call::Sync, [fault]);
        let mut first = Box::pin(disk.flush());
        assert!(is_pending(first.as_mut()));
        is_here.recv().unwrap();
        // The kernel has no error to report to this one: the first one has it.
        let before = faulty.count(Call::WriteDurable);
        let mut second: Pin<Box<dyn Future<Output = Result> + Send>> = match durable_write {
            false => Box::pin(disk.flush()),
            true => Box::pin(write(&disk, 0, &[1; 512], WriteFlags::FUA)),
        };
        let patience = Instant::now();
        while (durable_write && faulty.count(Call::WriteDurable) == before)
            || patience.elapsed() < Duration::from_millis(20)
        {
            assert!(is_pending(second.as_mut()));
            tokio::task::yield_now().await;
        }
        go.send(()).unwrap();
        assert_eq!(first.await.unwrap_err().errno(), EIO);
        assert_eq!(second.await.unwrap_err().kind(), ErrorKind::Io);
    }
}

#[tokio::test]
async fn a_durable_write_that_fails_is_told_from_a_failed_sync() {
    // No space, and nothing lost: the second handle's sync succeeds.
    let (_place, faulty, disk) = disk(1 << 20).await;
    faulty.inject(Call::WriteDurable, [Fault::Errno(ENOSPC)]);
    let error = write(&disk, 0, &[1; 512], WriteFlags::FUA)
        .await
        .unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::NoSpace, ENOSPC));
    assert_eq!(faulty.count(Call::Sync), 1);
    write(&disk, 0, &[1; 512], WriteFlags::FUA).await.unwrap();
    disk.flush().await.unwrap();
    // The same answer, but data was lost.
    faulty.inject(Call::WriteDurable, [Fault::Errno(ENOSPC)]);
    faulty.inject(Call::Sync, [Fault::Errno(EIO)]);
    let error = write(&disk, 0, &[1; 512], WriteFlags::FUA)
        .await
        .unwrap_err();
    assert_eq!(error.errno(), ENOSPC);
    assert!(disk.flush().await.is_err());
    assert!(write(&disk, 0, &[1; 512], NONE).await.is_err());
}

#[tokio::test]
async fn what_is_not_supported_is_asked_for_once_and_done_otherwise() {
    let (_place, faulty, disk) = disk(4 << 20).await;
    for call in [
        Call::WriteDurable,
        Call::WriteCached,
        Call::ReadCached,
        Call::Punch,
    ] {
        faulty.inject(call, [Fault::Errno(EOPNOTSUPP)]);
    }
    let punched = faulty.count(Call::Punch);
    for round in 1..=3 {
        let syncs = faulty.count(Call::Sync);
        write(&disk, 0, &[round; 8192], WriteFlags::FUA)
            .await
            .unwrap();
        assert_eq!(faulty.count(Call::Sync), syncs + 1, "durable all the same");
        write(&disk, 4096, &[round + 1; 4096], NONE).await.unwrap();
        assert_eq!(read(&disk, 4095, 2).await.unwrap(), [round, round + 1]);
        disk.write_zeroes(0..4096, NONE).await.unwrap();
        assert_eq!(read(&disk, 0, 4096).await.unwrap(), [0; 4096]);
    }
    for call in [Call::WriteDurable, Call::WriteCached, Call::ReadCached] {
        assert_eq!(faulty.count(call), 1, "{call:?}");
    }
    assert_eq!(faulty.count(Call::Punch), punched + 1);
    assert_eq!(faulty.count(Call::Zero), 3);
    faulty.inject(Call::Zero, [Fault::Errno(EOPNOTSUPP)]);
    for _ in 0..3 {
        let error = disk.write_zeroes(0..4096, NONE).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }
    assert_eq!(faulty.count(Call::Zero), 4);
}

#[tokio::test]
async fn the_page_cache_serves_what_it_can_and_the_pool_the_rest() {
    let (_place, faulty, disk) = disk(4 << 20).await;
    let bytes: Vec<u8> = (0..100_000_u32).map(|at| at as u8).collect();
    faulty.inject(
        Call::WriteCached,
        [Fault::Short(30_000), Fault::Errno(EAGAIN), Fault::Pass],
    );
    faulty.inject(
        Call::ReadCached,
        [Fault::Short(70_000), Fault::Errno(EAGAIN), Fault::Pass],
    );
    for pooled in [1, 2, 2] {
        write(&disk, 10, &bytes, NONE).await.unwrap();
        assert!(read(&disk, 10, bytes.len()).await.unwrap() == bytes);
        // No call writes past a multiple of 64 KiB.
        assert_eq!(
            (faulty.count(Call::Write), faulty.count(Call::Read)),
            (2 * pooled, pooled)
        );
    }
    assert_eq!(
        faulty.count(Call::WriteCached),
        3,
        "EAGAIN is no reason to stop asking"
    );
}

#[tokio::test]
async fn an_error_is_answered_with_its_number_and_the_disk_goes_on() {
    for errno in [EIO, ENOSPC] {
        let (_place, faulty, disk) = disk(4 << 20).await;
        for call in [
            Call::Write,
            Call::Read,
            Call::Punch,
            Call::Zero,
            Call::NextData,
        ] {
            faulty.inject(call, [Fault::Errno(errno)]);
        }
        for call in [Call::ReadCached, Call::WriteCached] {
            faulty.inject(call, [Fault::Errno(EAGAIN)]);
        }
        let zero = WriteFlags::NO_UNMAP;
        let mut runs = Extents::new(9);
        let all = [
            write(&disk, 0, &[1; 512], NONE).await,
            read(&disk, 0, 512).await.map(drop),
            disk.discard(0..4096).await,
            disk.write_zeroes(0..4096, zero).await,
            disk.extents(0..4096, &mut runs).await,
        ];
        for result in all {
            assert_eq!(result.unwrap_err().errno(), errno);
        }
        write(&disk, 0, &[1; 512], NONE).await.unwrap();
        assert_eq!(read(&disk, 0, 512).await.unwrap(), [1; 512]);
        disk.discard(0..4096).await.unwrap();
        disk.write_zeroes(0..4096, zero).await.unwrap();
        disk.extents(0..4096, &mut runs).await.unwrap();
        disk.flush().await.unwrap();
    }
}

#[tokio::test]
async fn a_write_that_gets_nowhere_is_an_error_and_no_endless_loop() {
    let (_place, faulty, disk) = disk(1 << 20).await;
    faulty.inject(Call::WriteCached, [Fault::Errno(EAGAIN)]);
    faulty.inject(Call::Write, [Fault::Short(100), Fault::Short(0)]);
    let error = write(&disk, 1000, &[1; 512], NONE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("at 1100"), "{error}");
}

#[tokio::test]
async fn without_such_seeks_everything_is_data() {
    let (_place, faulty, disk) = disk(1 << 20).await;
    faulty.inject(
        Call::NextData,
        [Fault::Errno(EINTR), Fault::Errno(EOPNOTSUPP)],
    );
    for _ in 0..3 {
        let mut runs = Extents::new(9);
        disk.extents(4096..9000, &mut runs).await.unwrap();
        let runs: Vec<_> = runs.iter().map(|run| (run.len, run.kind)).collect();
        assert_eq!(runs, [(9000 - 4096, ExtentKind::Data)]);
    }
    assert_eq!(faulty.count(Call::NextData), 2);
}

#[tokio::test]
async fn data_that_was_found_is_not_looked_for_again_until_it_may_be_a_hole() {
    const SIZE: u64 = 1 << 20;
    const HALF: u64 = SIZE / 2;
    let (_place, faulty, disk) = disk(SIZE).await;
    let runs = async |range: Range<u64>| {
        let mut runs = Extents::new(9);
        disk.extents(range, &mut runs).await.unwrap();
        let runs = runs.iter().map(|run| (run.len, run.kind));
        runs.collect::<Vec<_>>()
    };
    use ExtentKind::{Data, Hole};
    write(&disk, 0, &vec![1; HALF as usize], NONE)
        .await
        .unwrap();
    assert_eq!(runs(0..SIZE).await, [(HALF, Data), (HALF, Hole)]);
    let asked = faulty.count(Call::NextHole);
    assert_eq!(runs(4096..HALF).await, [(HALF - 4096, Data)]);
    assert_eq!(runs(4096..HALF + 1).await, [(HALF - 4096, Data), (1, Hole)]);
    assert_eq!(faulty.count(Call::NextHole), asked);
    disk.discard(0..4096).await.unwrap();
    assert_eq!(runs(0..8192).await, [(4096, Hole), (4096, Data)]);
    disk.write_zeroes(4096..8192, NONE).await.unwrap();
    assert_eq!(runs(0..8192).await, [(8192, Hole)]);
    // What was a hole is data, once it is written.
    write(&disk, HALF, &[1; 4096], NONE).await.unwrap();
    assert_eq!(runs(HALF..SIZE).await[0], (4096, Data));
}

#[tokio::test]
async fn a_panic_below_is_raised_above_and_nobody_waits_for_it() {
    let (_place, faulty, disk) = disk(1 << 20).await;
    let disk = Arc::new(disk);
    faulty.inject(Call::Sync, [Fault::Panic]);
    faulty.inject(Call::WriteDurable, [Fault::Panic]);
    for flush in [true, false] {
        let disk = disk.clone();
        let task = tokio::spawn(async move {
            match flush {
                true => disk.flush().await,
                false => write(&disk, 0, &[1; 512], WriteFlags::FUA).await,
            }
        });
        assert!(task.await.unwrap_err().is_panic());
    }
    let next = async {
        disk.flush().await.unwrap();
        write(&disk, 0, &[1; 512], WriteFlags::FUA).await.unwrap();
    };
    tokio::time::timeout(Duration::from_secs(30), next)
        .await
        .unwrap();
}

#[tokio::test]
async fn flush_and_close_wait_for_a_write_whose_future_was_dropped() {
    for close in [false, true] {
        let (_place, faulty, disk) = disk(1 << 20).await;
        let (fault, is_here, go) = hold(0);
        faulty.inject(Call::WriteCached, [Fault::Errno(EAGAIN)]);
        faulty.inject(Call::Write, [fault]);
        let mut write = Box::pin(write(&disk, 0, &[1; 512], NONE));
        assert!(is_pending(write.as_mut()));
        is_here.recv().unwrap();
        drop(write);
        let mut end: Pin<Box<dyn Future<Output = Result> + Send>> = match close {
            true => Box::pin(disk.close()),
            false => Box::pin(disk.flush()),
        };
        assert!(is_pending(end.as_mut()));
        assert_eq!(faulty.count(Call::Sync), 0);
        go.send(()).unwrap();
        end.await.unwrap();
        assert_eq!(faulty.count(Call::Sync), 1);
        assert_eq!(read(&disk, 0, 512).await.unwrap(), [1; 512]);
    }
}

#[tokio::test]
async fn the_lock_outlives_the_disk_until_the_last_write_has_ended() {
    let (place, faulty, disk) = disk(1 << 20).await;
    let (fault, is_here, go) = hold(0);
    faulty.inject(Call::WriteCached, [Fault::Errno(EAGAIN)]);
    faulty.inject(Call::Write, [fault]);
    let mut write = Box::pin(write(&disk, 0, &[1; 512], NONE));
    assert!(is_pending(write.as_mut()));
    is_here.recv().unwrap();
    drop(write);
    drop(disk);
    let error = same_file(&place).await.unwrap_err();
    assert!(
        error.to_string().contains("is in use by this process"),
        "{error}"
    );
    go.send(()).unwrap();
    let patience = Instant::now();
    let disk = loop {
        match same_file(&place).await {
            Ok(disk) => break disk,
            Err(error) => assert!(patience.elapsed() < Duration::from_secs(30), "{error}"),
        }
    };
    assert_eq!(read(&disk, 0, 512).await.unwrap(), [1; 512]);
}

#[tokio::test]
async fn a_prefetch_is_a_hint_that_never_fails() {
    for direct in [false, true] {
        let place = tempfile::tempdir().unwrap();
        let faulty = Faulty::default();
        faulty.inject(Call::Prefetch, [Fault::Errno(EIO)]);
        let open = same_file(&place).size(1 << 20).direct(direct);
        let disk = open.open_with(Box::new(faulty.clone())).await.unwrap();
        for range in [0..4096, 4096..1 << 20, 0..0, 0..2 << 20] {
            disk.prefetch(range).await.unwrap();
        }
        // There is no cache to read into behind direct I/O.
        let asked = if direct { 0 } else { 2 };
        assert_eq!(faulty.count(Call::Prefetch), asked);
    }
}

#[tokio::test]
async fn a_file_without_holes_claims_no_discard() {
    let place = tempfile::tempdir().unwrap();
    let faulty = Faulty::default();
    faulty.inject(Call::Punch, [Fault::Errno(EOPNOTSUPP)]);
    let open = same_file(&place).size(1 << 20);
    let disk = open.open_with(Box::new(faulty)).await.unwrap();
    assert_eq!(disk.geometry().discard, crate::Discard::None);
}
