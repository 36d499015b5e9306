//! Block devices by the kernel's NBD client: what is its own among the ways to attach a disk.
#![cfg(all(feature = "attach", target_os = "linux"))]

#[path = "common/need.rs"]
mod need;

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, fallocate};
use userland_io::attach::{Attached, Builder, DetachError, State, Via, list};
use userland_io::engines::Memory;
use userland_io::transports::kernel_nbd;
use userland_io::{
    AlignedBuf, CrashLevel, Device, Discard, Engine, Features, Geometry, ReadBuf, Result, WriteBuf,
    WriteFlags,
};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 16 * MIB;
const NONE: WriteFlags = WriteFlags::empty();

/// Tests look at what the driver has in all, so there is one at a time.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// A turn, if this kernel has what is tested here.
async fn turn() -> Option<tokio::sync::MutexGuard<'static, ()>> {
    if kernel_nbd::available().is_err() {
        need::guest("an NBD client in the kernel");
        return None;
    }
    Some(ALONE.lock().await)
}

fn builder<E: Engine>(disk: Device<E>) -> Builder<E> {
    Builder::new(disk).via(Via::Nbd)
}

async fn attach<E: Engine>(disk: Device<E>) -> Attached {
    builder(disk).attach().await.unwrap()
}

async fn memory(size: u64) -> Device<Memory> {
    Device::open(Memory::new(size)).await.unwrap()
}

fn open(path: &Path, flags: i32) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)
}

fn direct(path: &Path) -> File {
    open(path, libc::O_DIRECT).unwrap()
}

/// Memory as direct I/O wants it.
fn aligned(len: usize, byte: u8) -> AlignedBuf {
    let mut bytes = AlignedBuf::zeroed(len, 4096);
    bytes.fill(byte);
    bytes
}

/// A file of the device's in sysfs.
fn sysfs(path: &Path, name: &str) -> Option<String> {
    let device = Path::new("/sys/block").join(path.file_name().unwrap());
    let text = fs::read_to_string(device.join(name)).ok()?;
    Some(text.trim_end().to_owned())
}

/// The driver's devices: all there are, and those of them that are connected.
fn devices() -> (Vec<String>, Vec<String>) {
    let entries = fs::read_dir("/sys/block").unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut all: Vec<_> = names.filter(|name| name.starts_with("nbd")).collect();
    all.sort();
    let is_connected = |name: &&String| Path::new("/sys/block").join(name).join("pid").exists();
    let connected = all.iter().filter(is_connected).cloned().collect();
    (all, connected)
}

/// Waits for what another thread or the kernel is about to do.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < end, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
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
    /// How long the next write takes.
    delay: Mutex<Duration>,
    writing: AtomicUsize,
    most_writing: AtomicUsize,
}

impl Recorder {
    fn new() -> Self {
        Recorder(Arc::new(Shared {
            memory: Memory::new(SIZE),
            rotational: true,
            asked: Mutex::default(),
            delay: Mutex::default(),
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
        let delay = std::mem::take(&mut *self.0.delay.lock().unwrap());
        if !delay.is_zero() {
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
    let mut attached = attach(Device::open(recorder.clone()).await.unwrap()).await;
    let path = attached.path().to_owned();
    for (name, value) in [
        ("queue/write_cache", "write back"),
        ("queue/fua", "1"),
        ("queue/rotational", "1"),
        ("queue/logical_block_size", "512"),
        ("size", "32768"),
        ("ro", "0"),
    ] {
        assert_eq!(sysfs(&path, name).as_deref(), Some(value), "{name}");
    }
    let file = direct(&path);
    let synchronous = open(&path, libc::O_DIRECT | libc::O_DSYNC).unwrap();
    recorder.taken();
    // This runtime has one thread, which waits for the device here: nothing of the device's needs it.
    file.write_all_at(&aligned(4096, 1), 8192).unwrap();
    file.write_all_at(&aligned(512, 2), 512).unwrap();
    // The kernel's direct writes flush once more after FUA.
    synchronous.write_all_at(&aligned(4096, 3), MIB).unwrap();
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
    let mut back = aligned(4096, 9);
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
    assert_eq!(sysfs(attached.path(), "ro").as_deref(), Some("1"));
    let file = direct(attached.path());
    let error = file.write_all_at(&aligned(4096, 1), 0).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error}");
    drop(file);
    attached.detach().await.unwrap();
    // The next one at the same place is not.
    let mut attached = attach(memory(SIZE).await).await;
    assert_eq!(sysfs(attached.path(), "ro").as_deref(), Some("0"));
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
    let mut attached = attach(disk).await;
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
    let mut attached = attach(disk.clone()).await;
    for size in [2 * SIZE, SIZE / 2 + 100] {
        let before = attached.size();
        disk.get_ref().resize(size);
        let now = attached.resized(before).await;
        assert_eq!(now, size / 512 * 512);
        let sectors = (now / 512).to_string();
        assert_eq!(sysfs(attached.path(), "size"), Some(sectors));
        let file = direct(attached.path());
        file.write_all_at(&aligned(512, 5), now - 512).unwrap();
        let mut back = aligned(512, 0);
        file.read_exact_at(&mut back, now - 512).unwrap();
        assert_eq!(back[0], 5);
    }
    attached.detach().await.unwrap();
    disk.close().await.unwrap();
}

#[tokio::test]
async fn what_is_claimed_is_not_detached() {
    let Some(_turn) = turn().await else { return };
    let mut attached = attach(memory(SIZE).await).await;
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
    assert_eq!(sysfs(&path, "pid"), None);
}

#[tokio::test]
async fn what_was_written_and_not_flushed_is_not_lost_with_the_device() {
    let Some(_turn) = turn().await else { return };
    let disk = memory(SIZE).await;
    let mut attached = attach(disk.clone()).await;
    // Plainly open is no claim; its writes are in the page cache.
    let file = open(attached.path(), 0).unwrap();
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
    let attached = attach(memory(SIZE).await).await;
    let name = attached.path().to_owned();
    let index = name.to_str().unwrap().trim_start_matches("/dev/nbd");
    // Another one's device is not touched.
    let other = kernel_nbd::Identity {
        index: index.parse().unwrap(),
        identifier: "some other".to_owned(),
        thread: 0,
    };
    kernel_nbd::remove(&other).unwrap();
    assert!(sysfs(&name, "pid").is_some());
    let own = kernel_nbd::Identity::find(&sysfs(&name, "backend").unwrap());
    kernel_nbd::remove(&own.unwrap()).unwrap();
    let why = attached.ended().await;
    assert_eq!(why.as_deref(), Some("somebody has disconnected it"));
    assert_eq!(sysfs(&name, "pid"), None);
    assert!(
        list()
            .unwrap()
            .iter()
            .all(|listed| listed.path() != Some(&name))
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
    attach(memory(SIZE).await).await.detach().await.unwrap();
    let (files, tasks) = (open_files(), threads());
    for round in 0..20 {
        let mut attached = attach(memory(SIZE).await).await;
        direct(attached.path())
            .write_all_at(&aligned(4096, 1), 0)
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
        all.push(attach(memory(SIZE).await).await);
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

/// How long the kernel waits in the tests where it does.
const PATIENCE: Duration = Duration::from_secs(2);

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
    file.write_all_at(&aligned(4096, 1), 0).unwrap();
    // Reads without a pause, so that one is under way when the daemon dies.
    let reader = thread::spawn(move || {
        let mut back = aligned(4096, 0);
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
    let most = 2 * PATIENCE + Duration::from_secs(2);
    assert!(waited < most, "an error after {waited:?}");
    // One in use stays.
    let claimed = open(&path, libc::O_EXCL).unwrap();
    let refused = stale().unwrap().detach();
    assert!(
        matches!(refused, Err(DetachError::InUse { .. })),
        "{refused:?}"
    );
    assert!(sysfs(&path, "pid").is_some());
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
        let mut back = aligned(4096, 0);
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
    let (mut child, _) = daemon();
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
        *recorder.0.delay.lock().unwrap() = PATIENCE + Duration::from_millis(1500);
        recorder.taken();
        file.write_all_at(&aligned(4096, 1), 0).unwrap();
        // It was asked again after that, and not beside it.
        assert_eq!(recorder.taken(), vec![Asked::Write(0..4096, NONE); 2]);
        assert_eq!(recorder.0.most_writing.load(Ordering::SeqCst), 1);
        // All is as before.
        for n in 0..50 {
            file.write_all_at(&aligned(4096, 2), n * 4096).unwrap();
        }
        file.sync_all().unwrap();
        drop(file);
        attached.detach().await.unwrap();
    }
}

/// A server of somebody else's, which ends with this.
struct Server {
    process: Child,
    uri: String,
    _directory: tempfile::TempDir,
}

impl Server {
    /// nbdkit, serving 16 MiB of memory through `filters` with `more` parameters.
    fn nbdkit(filters: &[&str], more: &[&str]) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let mut nbdkit = Command::new(need::program("nbdkit")?);
        nbdkit
            .args(["--foreground", "--exit-with-parent", "--unix"])
            .arg(&socket);
        nbdkit.args(filters).args(["memory", "16M"]).args(more);
        let mut process = nbdkit.spawn().unwrap();
        until("nbdkit listens", || {
            assert_eq!(process.try_wait().unwrap(), None, "nbdkit has ended");
            socket.exists()
        });
        Some(Server {
            process,
            uri: format!("nbd+unix:///?socket={}", socket.display()),
            _directory: directory,
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

#[tokio::test]
async fn an_export_is_handed_to_the_kernel() {
    let Some(_turn) = turn().await else { return };
    let Some(server) = Server::nbdkit(&[], &[]) else {
        return;
    };
    let before = devices();
    let mut attached = Builder::export(&server.uri)
        .queues(2)
        .attach()
        .await
        .unwrap();
    let path = attached.path().to_owned();
    assert_eq!((attached.via(), attached.size()), (Via::Nbd, SIZE));
    assert!(attached.passed_over().is_empty());
    let queues = Path::new("/sys/block")
        .join(path.file_name().unwrap())
        .join("mq");
    assert_eq!(fs::read_dir(queues).unwrap().count(), 2, "connections");
    let all = list().unwrap();
    let listed = all
        .iter()
        .find(|listed| listed.path() == Some(&path))
        .unwrap();
    assert_eq!(listed.server(), Some(server.uri.as_str()));
    assert_eq!(listed.label(), server.uri);
    assert_eq!(listed.counters(), None);
    let file = direct(&path);
    file.write_all_at(&aligned(65536, 4), MIB).unwrap();
    file.sync_all().unwrap();
    drop(file);
    attached.detach().await.unwrap();
    assert_eq!(devices(), before);
    // The server has gone on, and has what was written.
    let mut attached = Builder::export(&server.uri)
        .read_only(true)
        .attach()
        .await
        .unwrap();
    assert_eq!(sysfs(attached.path(), "ro").as_deref(), Some("1"));
    let all = list().unwrap();
    let listed = all
        .iter()
        .find(|listed| listed.path() == Some(attached.path()))
        .unwrap();
    assert!(listed.is_read_only());
    let mut back = aligned(65536, 0);
    direct(attached.path())
        .read_exact_at(&mut back, MIB)
        .unwrap();
    assert!(back.iter().all(|byte| *byte == 4));
    attached.detach().await.unwrap();
}

#[tokio::test]
async fn an_export_has_ended_when_its_server_has() {
    let Some(_turn) = turn().await else { return };
    let Some(mut server) = Server::nbdkit(&[], &[]) else {
        return;
    };
    let before = devices();
    let attached = Builder::export(&server.uri).attach().await.unwrap();
    let file = direct(attached.path());
    server.process.kill().unwrap();
    let why = attached.ended().await.unwrap();
    assert!(why.contains("ended its connections"), "{why}");
    assert!(file.read_exact_at(&mut aligned(4096, 0), 0).is_err());
    drop(file);
    until("the device is gone", || devices() == before);
}

#[tokio::test]
async fn an_export_that_the_kernel_cannot_use_is_attached_by_our_client() {
    let Some(_turn) = turn().await else { return };
    let policy = [
        "blocksize-minimum=65536",
        "blocksize-preferred=65536",
        "blocksize-error-policy=error",
    ];
    let Some(server) = Server::nbdkit(&["--filter=blocksize-policy"], &policy) else {
        return;
    };
    let attaching = Builder::export(&server.uri).via(Via::Nbd);
    let mut attached = attaching.attach().await.unwrap();
    let passed = attached.passed_over();
    assert!(
        passed[0].reason.ends_with("longer than a page"),
        "{passed:?}"
    );
    let file = direct(attached.path());
    file.write_all_at(&aligned(4096, 6), 4096).unwrap();
    let mut back = aligned(4096, 0);
    file.read_exact_at(&mut back, 4096).unwrap();
    assert_eq!(back[0], 6);
    drop(file);
    let all = list().unwrap();
    let listed = all
        .iter()
        .find(|listed| listed.path() == Some(attached.path()))
        .unwrap();
    assert_eq!(listed.server(), None);
    assert!(listed.counters().is_some());
    attached.detach().await.unwrap();
}

#[tokio::test]
async fn an_export_that_cannot_zero_is_never_asked_to() {
    let Some(_turn) = turn().await else { return };
    let Some(server) = Server::nbdkit(&["--filter=nozero"], &[]) else {
        return;
    };
    let before = devices();
    // Leaves a device behind that could.
    attach(memory(SIZE).await).await.detach().await.unwrap();
    let mut attached = Builder::export(&server.uri).attach().await.unwrap();
    let limit = sysfs(attached.path(), "queue/write_zeroes_max_bytes");
    assert_eq!(limit.as_deref(), Some("0"));
    let file = direct(attached.path());
    file.write_all_at(&aligned(4096, 6), 0).unwrap();
    fallocate(&file, FallocateFlags::ZERO_RANGE, 0, MIB).unwrap();
    let mut back = aligned(4096, 1);
    file.read_exact_at(&mut back, 0).unwrap();
    assert_eq!(back[0], 0);
    drop(file);
    attached.detach().await.unwrap();
    until("the device is gone", || devices() == before);
}

#[tokio::test]
async fn a_server_that_is_not_there_is_said_to_be_so() {
    let Some(_turn) = turn().await else { return };
    let refused = Builder::export("nbd+unix:///?socket=/nowhere")
        .attach()
        .await;
    let error = refused.unwrap_err().to_string();
    assert!(error.contains("cannot connect to"), "{error}");
    assert!(
        list()
            .unwrap()
            .iter()
            .all(|listed| !listed.label().contains("nowhere"))
    );
}
