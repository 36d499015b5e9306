//! Block devices by the kernel's NBD client: what is its own among the ways to attach a disk.
#![cfg(all(feature = "attach", target_os = "linux"))]

#[path = "common/attach.rs"]
mod attach;
#[path = "common/kernel_nbd.rs"]
mod driver;
#[path = "common/need.rs"]
mod need;

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use attach::{Aligned, buffered, direct, open, sysfs, told, until};
use driver::{SIZE, devices, memory, turn};
use rustix::fs::{FallocateFlags, fallocate};
use userland_io::attach::{Attached, Builder, DetachError, State, Via, list};
use userland_io::engines::Memory;
use userland_io::transports::kernel_nbd;
use userland_io::{
    CrashLevel, Device, Discard, Engine, Features, Geometry, ReadBuf, Result, WriteBuf, WriteFlags,
};

const MIB: u64 = 1 << 20;
const NONE: WriteFlags = WriteFlags::empty();

fn builder<E: Engine>(disk: Device<E>) -> Builder<E> {
    Builder::new(disk).via(Via::Nbd)
}

async fn by_nbd<E: Engine>(disk: Device<E>) -> Attached {
    builder(disk).attach().await.unwrap()
}

fn is_connected(path: &Path) -> bool {
    sysfs(path).join("pid").exists()
}

/// What changes a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Asked {
    Write(Range<u64>, WriteFlags),
    Zeroes(Range<u64>, WriteFlags),
    Discard(Range<u64>),
    Flush,
}

/// A memory with a cache to be flushed that writes down what it is asked for, and may be slow.
#[derive(Clone)]
struct Recorder(Arc<Shared>);

struct Shared {
    memory: Memory,
    rotational: bool,
    asked: Mutex<Vec<Asked>>,
    /// How long each of so many writes takes.
    slow: Mutex<(u32, Duration)>,
    writing: AtomicUsize,
    most_writing: AtomicUsize,
}

impl Recorder {
    fn new() -> Self {
        Recorder(Arc::new(Shared {
            memory: Memory::new(SIZE),
            rotational: true,
            asked: Mutex::default(),
            slow: Mutex::default(),
            writing: AtomicUsize::new(0),
            most_writing: AtomicUsize::new(0),
        }))
    }

    /// What it was asked for since the last call.
    fn taken(&self) -> Vec<Asked> {
        std::mem::take(&mut self.0.asked.lock().unwrap())
    }

    fn note(&self, asked: Asked) {
        self.0.asked.lock().unwrap().push(asked);
    }
}

impl Engine for Recorder {
    fn geometry(&self) -> Geometry {
        let mut geometry = Geometry::writable(SIZE, CrashLevel::Flush);
        geometry.features = Features::FUA | Features::WRITE_ZEROES;
        geometry
            .features
            .set(Features::ROTATIONAL, self.0.rotational);
        geometry.discard = Discard::Unspecified;
        geometry
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        self.0.memory.read(buf, offset).await
    }
    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        self.note(Asked::Write(offset..offset + buf.len() as u64, flags));
        let now = self.0.writing.fetch_add(1, Ordering::SeqCst) + 1;
        self.0.most_writing.fetch_max(now, Ordering::SeqCst);
        let delay = {
            let mut slow = self.0.slow.lock().unwrap();
            let left = slow.0.checked_sub(1);
            slow.0 = left.unwrap_or(0);
            left.map(|_| slow.1)
        };
        if let Some(delay) = delay {
            tokio::time::sleep(delay).await;
        }
        let result = self.0.memory.write(buf, offset, NONE).await;
        self.0.writing.fetch_sub(1, Ordering::SeqCst);
        result
    }
    async fn flush(&self) -> Result {
        self.note(Asked::Flush);
        Ok(())
    }
    async fn discard(&self, range: Range<u64>) -> Result {
        self.note(Asked::Discard(range));
        Ok(())
    }
    async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        self.note(Asked::Zeroes(range.clone(), flags));
        self.0.memory.write_zeroes(range, NONE).await
    }
}

#[tokio::test]
async fn requests_arrive_as_they_were_asked() {
    let Some(_turn) = turn().await else { return };
    let recorder = Recorder::new();
    let mut attached = by_nbd(Device::open(recorder.clone()).await.unwrap()).await;
    let path = attached.path().to_owned();
    for (name, value) in [
        ("queue/write_cache", "write back"),
        ("queue/fua", "1"),
        ("queue/rotational", "1"),
        ("queue/logical_block_size", "512"),
        ("size", "32768"),
        ("ro", "0"),
    ] {
        assert_eq!(told(&path, name), value, "{name}");
    }
    let file = direct(&path);
    let synchronous = open(&path, libc::O_DIRECT | libc::O_DSYNC).unwrap();
    recorder.taken();
    // This runtime has one thread, which waits for the device here: nothing of the device's needs it.
    file.write_all_at(&Aligned::filled(4096, 1), 8192).unwrap();
    file.write_all_at(&Aligned::filled(512, 2), 512).unwrap();
    // The kernel's direct writes flush once more after FUA.
    synchronous
        .write_all_at(&Aligned::filled(4096, 3), MIB)
        .unwrap();
    file.sync_all().unwrap();
    assert_eq!(
        recorder.taken(),
        [
            Asked::Write(8192..12288, NONE),
            Asked::Write(512..1024, NONE),
            Asked::Write(MIB..MIB + 4096, WriteFlags::FUA),
            Asked::Flush,
            Asked::Flush,
        ]
    );
    let zero = |mode, range: Range<u64>| {
        fallocate(&file, mode, range.start, range.end - range.start).unwrap();
    };
    zero(FallocateFlags::ZERO_RANGE, MIB..2 * MIB);
    zero(
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        2 * MIB..3 * MIB + 512,
    );
    let mut expected = vec![
        Asked::Zeroes(MIB..2 * MIB, WriteFlags::NO_UNMAP),
        Asked::Zeroes(2 * MIB..3 * MIB + 512, NONE),
    ];
    if let Some(blkdiscard) = need::program("blkdiscard") {
        let range = ["--offset", "4194304", "--length", "1049088"];
        let status = Command::new(blkdiscard).args(range).arg(&path).status();
        assert!(status.unwrap().success());
        expected.push(Asked::Discard(4 * MIB..5 * MIB + 512));
    }
    assert_eq!(recorder.taken(), expected);
    let mut back = Aligned::filled(4096, 9);
    file.read_exact_at(&mut back, 8192).unwrap();
    assert!(back.iter().all(|byte| *byte == 1));
    drop((file, synchronous));
    attached.detach().await.unwrap();
}

#[tokio::test]
async fn a_disk_that_is_read_only_is_so_in_the_kernel() {
    let Some(_turn) = turn().await else { return };
    let attaching = builder(memory(SIZE).await).read_only(true);
    let mut attached = attaching.attach().await.unwrap();
    assert_eq!(told(attached.path(), "ro"), "1");
    let file = direct(attached.path());
    let error = file.write_all_at(&Aligned::filled(4096, 1), 0).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error}");
    drop(file);
    attached.detach().await.unwrap();
    // The next one at the same place is not.
    let mut attached = by_nbd(memory(SIZE).await).await;
    assert_eq!(told(attached.path(), "ro"), "0");
    attached.detach().await.unwrap();
}

#[tokio::test]
async fn partitions_are_there_when_it_is() {
    let Some(_turn) = turn().await else { return };
    let disk = memory(SIZE).await;
    // One of a DOS table: active, type Linux, 8 MiB from the first MiB on.
    let mut sector = [0; 512];
    sector[446] = 0x80;
    sector[450] = 0x83;
    sector[454..458].copy_from_slice(&2048_u32.to_le_bytes());
    sector[458..462].copy_from_slice(&16384_u32.to_le_bytes());
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    disk.write(&WriteBuf::new(&sector), 0, NONE).await.unwrap();
    let mut attached = by_nbd(disk).await;
    let name = attached.path().file_name().unwrap().to_str().unwrap();
    let part = Path::new("/sys/block").join(name).join(format!("{name}p1"));
    assert_eq!(fs::read_to_string(part.join("size")).unwrap(), "16384\n");
    attached.detach().await.unwrap();
    assert!(!part.exists());
}

#[tokio::test]
async fn the_device_follows_the_disks_size() {
    let Some(_turn) = turn().await else { return };
    let disk = memory(SIZE).await;
    let mut attached = by_nbd(disk.clone()).await;
    for size in [2 * SIZE, SIZE / 2 + 100] {
        let before = attached.size();
        disk.get_ref().resize(size);
        let now = attached.resized(before).await;
        assert_eq!(now, size / 512 * 512);
        let sectors = (now / 512).to_string();
        assert_eq!(told(attached.path(), "size"), sectors);
        let file = direct(attached.path());
        file.write_all_at(&Aligned::filled(512, 5), now - 512)
            .unwrap();
        let mut back = Aligned::new(512);
        file.read_exact_at(&mut back, now - 512).unwrap();
        assert_eq!(back[0], 5);
    }
    attached.detach().await.unwrap();
    disk.close().await.unwrap();
}

/// A memory that only reads and writes, as a first engine does.
struct Plain(Memory);

impl Engine for Plain {
    fn geometry(&self) -> Geometry {
        Geometry::writable(SIZE, CrashLevel::Flush)
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        self.0.read(buf, offset).await
    }
    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        self.0.write(buf, offset, flags).await
    }
    async fn flush(&self) -> Result {
        Ok(())
    }
}

/// Such a device gets an index that was not used before, which it chooses itself.
#[tokio::test]
async fn disks_without_zeroes_that_come_at_once_do_not_take_each_others_place() {
    let Some(_turn) = turn().await else { return };
    let coming: Vec<_> = (0..16)
        .map(|_| {
            tokio::spawn(async {
                let disk = Device::open(Plain(Memory::new(SIZE))).await.unwrap();
                builder(disk).queues(1).attach().await
            })
        })
        .collect();
    let mut all = Vec::new();
    for attached in coming {
        all.push(attached.await.unwrap().unwrap());
    }
    let paths: BTreeSet<_> = all.iter().map(|one| one.path().to_owned()).collect();
    assert_eq!(paths.len(), all.len());
    for attached in &mut all {
        attached.detach().await.unwrap();
    }
    assert!(!paths.iter().any(|path| is_connected(path)));
}

#[tokio::test]
async fn what_is_claimed_is_not_detached() {
    let Some(_turn) = turn().await else { return };
    let mut attached = by_nbd(memory(SIZE).await).await;
    let path = attached.path().to_owned();
    let claimed = open(&path, libc::O_EXCL).unwrap();
    let refused = attached.detach().await;
    assert!(
        matches!(refused, Err(DetachError::InUse { .. })),
        "{refused:?}"
    );
    claimed.write_all_at(b"still there", 0).unwrap();
    claimed.sync_all().unwrap();
    drop(claimed);
    attached.detach().await.unwrap();
    assert!(!is_connected(&path));
}

#[tokio::test]
async fn what_was_written_and_not_flushed_is_not_lost_with_the_device() {
    let Some(_turn) = turn().await else { return };
    let disk = memory(SIZE).await;
    let mut attached = by_nbd(disk.clone()).await;
    // Plainly open is no claim; its writes are in the page cache.
    let file = buffered(attached.path());
    file.write_all_at(b"written", 4096).unwrap();
    attached.detach().await.unwrap();
    let mut back = [0; 7];
    disk.read(&mut ReadBuf::new(&mut back), 4096).await.unwrap();
    assert_eq!(&back, b"written");
    assert!(
        file.write_all_at(b"more", 0)
            .and_then(|()| file.sync_all())
            .is_err()
    );
    disk.close().await.unwrap();
}

#[tokio::test]
async fn one_that_somebody_else_disconnects_has_ended() {
    let Some(_turn) = turn().await else { return };
    let attached = by_nbd(memory(SIZE).await).await;
    let path = attached.path().to_owned();
    let index = path.to_str().unwrap().trim_start_matches("/dev/nbd");
    // Another one's device is not touched.
    let other = kernel_nbd::Identity {
        index: index.parse().unwrap(),
        identifier: "some other".to_owned(),
        thread: 0,
    };
    kernel_nbd::remove(&other).unwrap();
    assert!(is_connected(&path));
    let own = kernel_nbd::Identity::find(&told(&path, "backend"));
    kernel_nbd::remove(&own.unwrap()).unwrap();
    let why = attached.ended().await;
    assert_eq!(why.as_deref(), Some("somebody has disconnected it"));
    assert!(!is_connected(&path));
    assert!(
        list()
            .unwrap()
            .iter()
            .all(|listed| listed.path() != Some(&path))
    );
}

/// What this process has open.
fn open_files() -> Vec<PathBuf> {
    let files = fs::read_dir("/proc/self/fd").unwrap();
    let names = files.filter_map(|file| fs::read_link(file.unwrap().path()).ok());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

fn threads() -> usize {
    fs::read_dir("/proc/self/task").unwrap().count()
}

/// Alone in a process, whose threads and files it counts.
#[tokio::test]
#[ignore = "a process of its own: see twenty_cycles_leave_nothing_behind"]
async fn child_cycles() {
    let before = devices();
    // Whatever is made once and for all.
    by_nbd(memory(SIZE).await).await.detach().await.unwrap();
    let (files, tasks) = (open_files(), threads());
    for round in 0..20 {
        let mut attached = by_nbd(memory(SIZE).await).await;
        direct(attached.path())
            .write_all_at(&Aligned::filled(4096, 1), 0)
            .unwrap();
        attached.detach().await.unwrap();
        assert_eq!(devices(), before, "round {round}");
        // The thread that told of the end has some steps to its own.
        until("a device that is gone has threads", || threads() <= tasks);
        until("a device that is gone has files open", || {
            open_files() == files
        });
    }
    // More than the driver has made by itself: those that were made for us go, the others stay.
    let mut all = Vec::new();
    for _ in 0..before.0.len() + 2 {
        all.push(by_nbd(memory(SIZE).await).await);
    }
    assert_eq!(devices().1.len(), all.len());
    for attached in &mut all {
        attached.detach().await.unwrap();
    }
    until("the driver has devices that it had not", || {
        devices() == before
    });
}

fn child(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--include-ignored", "--nocapture"]);
    command
}

#[tokio::test]
async fn twenty_cycles_leave_nothing_behind() {
    let Some(_turn) = turn().await else { return };
    let status = child("child_cycles").status().unwrap();
    assert!(status.success());
}

/// How long the kernel waits in the tests where it does: a second for an answer, then two for a new connection.
const PATIENCE: Duration = Duration::from_secs(3);
/// Longer than it waits for an answer, whenever in a second it looks, and not as long as it waits in all.
const SLOW: Duration = Duration::from_millis(2500);

/// Attaches a disk, tells where, and goes on until it is killed.
#[tokio::test]
#[ignore = "a process of its own, to be killed"]
async fn child_daemon() {
    let attaching = builder(memory(SIZE).await).timeout(PATIENCE);
    let attached = attaching.attach().await.unwrap();
    println!("\nattached {}", attached.path().display());
    std::future::pending::<()>().await;
}

/// A child and the device that it serves.
fn daemon() -> (Child, PathBuf) {
    let mut command = child("child_daemon");
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let path = |line: io::Result<String>| Some(line.ok()?.strip_prefix("attached ")?.into());
    let path = lines.into_iter().find_map(path).unwrap();
    (child, path)
}

#[tokio::test]
async fn a_daemon_that_is_killed_leaves_errors_and_what_can_be_removed() {
    let Some(_turn) = turn().await else { return };
    let before = devices();
    let (mut child, path) = daemon();
    let file = direct(&path);
    file.write_all_at(&Aligned::filled(4096, 1), 0).unwrap();
    // Reads without a pause, so that one is under way when the daemon dies.
    let reader = thread::spawn(move || {
        let mut back = Aligned::new(4096);
        loop {
            let asked = Instant::now();
            if let Err(error) = file.read_exact_at(&mut back, 0) {
                return (error, asked.elapsed());
            }
        }
    });
    child.kill().unwrap();
    child.wait().unwrap();
    let stale = || {
        let all = list().unwrap();
        all.into_iter().find(|listed| listed.path() == Some(&path))
    };
    assert_eq!(stale().unwrap().state(), State::Stale);
    let (error, waited) = reader.join().unwrap();
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    // The driver looks at its requests once a second.
    let most = PATIENCE + Duration::from_secs(2);
    assert!(waited < most, "an error after {waited:?}");
    // One in use stays.
    let claimed = open(&path, libc::O_EXCL).unwrap();
    let refused = stale().unwrap().detach();
    assert!(
        matches!(refused, Err(DetachError::InUse { .. })),
        "{refused:?}"
    );
    assert!(is_connected(&path));
    drop(claimed);
    stale().unwrap().detach().unwrap();
    assert!(stale().is_none());
    assert_eq!(devices(), before);
}

#[tokio::test]
async fn stale_devices_fail_what_waits_for_them_when_they_are_removed() {
    let Some(_turn) = turn().await else { return };
    let (mut child, path) = daemon();
    let file = direct(&path);
    child.kill().unwrap();
    child.wait().unwrap();
    let asked = Instant::now();
    let reader = thread::spawn(move || {
        let mut back = Aligned::new(4096);
        file.read_exact_at(&mut back, 0)
    });
    let all = list().unwrap().into_iter();
    for listed in all.filter(|listed| listed.path() == Some(&path)) {
        listed.detach().unwrap();
    }
    reader.join().unwrap().unwrap_err();
    assert!(asked.elapsed() < PATIENCE, "{:?}", asked.elapsed());
}

#[tokio::test]
async fn one_that_was_not_noted_yet_is_found() {
    let Some(_turn) = turn().await else { return };
    let before = devices();
    let (mut child, path) = daemon();
    let claimed = open(&path, libc::O_EXCL).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    // As if it had died as soon as the driver had the device.
    let record = format!("/run/ulio/{}-0.device", child.id());
    let text = fs::read_to_string(&record).unwrap();
    let early = |line: &&str| !line.starts_with("way-") && !line.starts_with("device ");
    let text: String = text
        .lines()
        .filter(early)
        .map(|line| format!("{line}\n"))
        .collect();
    fs::write(&record, text).unwrap();
    let all = list().unwrap();
    let listed = all
        .iter()
        .find(|listed| listed.pid() == child.id())
        .unwrap();
    assert_eq!(listed.path(), None);
    // One in use stays, noted or not.
    let refused = listed.detach();
    assert!(
        matches!(refused, Err(DetachError::InUse { .. })),
        "{refused:?}"
    );
    assert!(is_connected(&path));
    drop(claimed);
    listed.detach().unwrap();
    assert_eq!(devices(), before);
}

#[tokio::test]
async fn a_disk_slower_than_the_time_out_is_waited_for_and_not_asked_twice_at_once() {
    let Some(_turn) = turn().await else { return };
    for queues in [1, 3] {
        let recorder = Recorder::new();
        let disk = Device::open(recorder.clone()).await.unwrap();
        let attaching = builder(disk).queues(queues).timeout(PATIENCE);
        let mut attached = attaching.attach().await.unwrap();
        let file = direct(attached.path());
        *recorder.0.slow.lock().unwrap() = (1, SLOW);
        recorder.taken();
        file.write_all_at(&Aligned::filled(4096, 1), 0).unwrap();
        // It was asked again after that, and not beside it.
        assert_eq!(recorder.taken(), vec![Asked::Write(0..4096, NONE); 2]);
        assert_eq!(recorder.0.most_writing.load(Ordering::SeqCst), 1);
        // All is as before.
        for n in 0..50 {
            file.write_all_at(&Aligned::filled(4096, 2), n * 4096)
                .unwrap();
        }
        file.sync_all().unwrap();
        drop(file);
        attached.detach().await.unwrap();
    }
}

#[tokio::test]
async fn a_disk_that_is_always_slower_than_the_time_out_is_not_asked_without_end() {
    let Some(_turn) = turn().await else { return };
    let recorder = Recorder::new();
    let disk = Device::open(recorder.clone()).await.unwrap();
    let attaching = builder(disk).queues(1).timeout(PATIENCE);
    let attached = attaching.attach().await.unwrap();
    let file = direct(attached.path());
    *recorder.0.slow.lock().unwrap() = (u32::MAX, SLOW);
    recorder.taken();
    let error = file.write_all_at(&Aligned::filled(4096, 1), 0).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    let asked = recorder.taken();
    assert_eq!(asked, vec![Asked::Write(0..4096, NONE); asked.len()]);
    let most = 4 * PATIENCE.as_millis() / SLOW.as_millis() + 3;
    assert!((3..=most).contains(&(asked.len() as u128)), "{asked:?}");
    let why = attached.ended().await.unwrap();
    assert!(why.contains("slower than the time-out"), "{why}");
}
