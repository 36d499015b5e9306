//! A disk as a file: what programs do with the file is what the engine is asked for, and its answers are theirs.
#![cfg(all(feature = "fuse", target_os = "linux"))]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicI32, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use tempfile::TempDir;
use tokio::sync::Semaphore;
use userland_io::engines::Memory;
use userland_io::transports::fuse::{self, Error, Mounted};
use userland_io::{
    CrashLevel, Device, Engine, Extents, Features, Geometry, ReadBuf, Result, WriteBuf, WriteFlags,
};

#[path = "common/need.rs"]
mod need;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 4 * MIB + 700;
const NONE: WriteFlags = WriteFlags::empty();

/// What an engine is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Asked {
    Read(Range<u64>),
    Write(Range<u64>, WriteFlags),
    Zeroes(Range<u64>, WriteFlags),
    Flush,
}
use Asked::{Flush, Read, Write, Zeroes};

/// A memory that writes down what it is asked for. Reads at `GATE` wait to be let through; all fails while there is an errno.
#[derive(Clone)]
struct Recorder(Arc<State>);

struct State {
    memory: Memory,
    features: Features,
    asked: Mutex<Vec<Asked>>,
    errno: AtomicI32,
    gate: Semaphore,
}

const GATE: u64 = 3 * MIB;

impl Recorder {
    fn new() -> Self {
        Self::with(Features::FUA | Features::WRITE_ZEROES | Features::EXTENTS)
    }

    fn with(features: Features) -> Self {
        Recorder(Arc::new(State {
            memory: Memory::new(SIZE),
            features,
            asked: Mutex::default(),
            errno: AtomicI32::new(0),
            gate: Semaphore::new(0),
        }))
    }

    /// What it was asked for since the last call.
    fn taken(&self) -> Vec<Asked> {
        std::mem::take(&mut self.0.asked.lock().unwrap())
    }

    fn note(&self, asked: Asked) -> Result {
        self.0.asked.lock().unwrap().push(asked);
        match self.0.errno.load(Relaxed) {
            0 => Ok(()),
            errno => Err(userland_io::Error::from_errno(errno)),
        }
    }
}

impl Engine for Recorder {
    fn geometry(&self) -> Geometry {
        let mut geometry = Geometry::writable(self.0.memory.geometry().size, CrashLevel::Flush);
        geometry.features |= self.0.features;
        geometry
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        if offset == GATE {
            self.0.gate.acquire().await.unwrap().forget();
        }
        self.note(Read(offset..offset + buf.len() as u64))?;
        self.0.memory.read(buf, offset).await
    }
    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        self.note(Write(offset..offset + buf.len() as u64, flags))?;
        self.0.memory.write(buf, offset, NONE).await
    }
    async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        self.note(Zeroes(range.clone(), flags))?;
        self.0.memory.write_zeroes(range, NONE).await
    }
    async fn flush(&self) -> Result {
        self.note(Flush)
    }
    async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        self.0.memory.extents(range, out).await
    }
}

/// A file that is a disk.
struct Disk {
    mounted: Mounted,
    dir: TempDir,
}

impl Disk {
    fn path(&self) -> PathBuf {
        self.mounted.path().to_owned()
    }

    fn open(&self, flags: i32) -> File {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).custom_flags(flags);
        options.open(self.path()).unwrap()
    }

    async fn unmount(self) {
        let path = self.path();
        self.mounted.unmount().await.unwrap();
        assert!(!path.exists(), "it was made for the disk");
        self.dir.close().unwrap();
    }
}

/// Mounts `device`, or tells why that cannot be.
async fn mount<E: Engine>(device: Device<E>) -> Option<Disk> {
    let dir = tempfile::tempdir().unwrap();
    match fuse::File::new(device).mount(dir.path().join("disk")).await {
        Ok(mounted) => Some(Disk { mounted, dir }),
        Err(error @ Error::Mount { .. }) => {
            need::impossible(&error.to_string());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

async fn recorded(recorder: &Recorder) -> Option<Disk> {
    let disk = mount(Device::open(recorder.clone()).await.unwrap()).await;
    recorder.taken();
    disk
}

fn errno<T: std::fmt::Debug>(result: impl Into<io::Result<T>>) -> i32 {
    result.into().unwrap_err().raw_os_error().unwrap()
}

#[tokio::test]
async fn each_call_arrives_as_what_it_is_and_where_it_is() {
    let recorder = Recorder::new();
    let Some(disk) = recorded(&recorder).await else {
        return;
    };
    let file = disk.open(0);
    assert_eq!(recorder.taken(), [], "opening asks for nothing");
    for range in [0..1, 511..1025, 4096..8192, 100..MIB - 9000, SIZE - 3..SIZE] {
        let bytes: Vec<u8> = range.clone().map(|at| at as u8).collect();
        file.write_all_at(&bytes, range.start).unwrap();
        let mut read = vec![0; bytes.len()];
        file.read_exact_at(&mut read, range.start).unwrap();
        assert_eq!(read, bytes);
        let asked = [Write(range.clone(), NONE), Read(range)];
        assert_eq!(recorder.taken(), asked);
    }
    file.sync_data().unwrap();
    assert_eq!(recorder.taken(), [Flush]);
    let durable = disk.open(libc::O_DSYNC);
    durable.write_all_at(b"now", 77).unwrap();
    assert_eq!(recorder.taken(), [Write(77..80, WriteFlags::FUA)]);

    let zero = FallocateFlags::ZERO_RANGE;
    let punch = FallocateFlags::PUNCH_HOLE;
    let keep = FallocateFlags::KEEP_SIZE;
    fallocate(&file, punch | keep, 1000, 5000).unwrap();
    fallocate(&file, punch | keep, SIZE - 10, 5000).unwrap();
    fallocate(&file, zero | keep, MIB, MIB).unwrap();
    fallocate(&file, zero, 5, 6).unwrap();
    let asked = [
        Zeroes(1000..6000, NONE),
        Zeroes(SIZE - 10..SIZE, NONE),
        Zeroes(MIB..2 * MIB, WriteFlags::NO_UNMAP),
        Zeroes(5..11, WriteFlags::NO_UNMAP),
    ];
    assert_eq!(recorder.taken(), asked);

    drop(durable);
    assert_eq!(
        recorder.taken(),
        [Flush],
        "closing what was open for writing"
    );
    drop(File::open(disk.path()).unwrap());
    assert_eq!(recorder.taken(), [], "and nothing for what was not");
    drop(file);
    disk.unmount().await;
}

#[tokio::test]
async fn long_requests_come_in_few_pieces() {
    let recorder = Recorder::new();
    let Some(disk) = recorded(&recorder).await else {
        return;
    };
    let file = disk.open(0);
    file.write_all_at(&vec![7; 2 * MIB as usize], 0).unwrap();
    let asked = recorder.taken();
    assert!(asked.len() <= 3, "{asked:?}");
    let mut read = vec![0; 2 * MIB as usize];
    file.read_exact_at(&mut read, 0).unwrap();
    assert!(read.iter().all(|byte| *byte == 7));
    assert!(recorder.taken().len() <= 3);
    drop(file);
    disk.unmount().await;
}

#[tokio::test]
async fn the_end_is_a_block_devices() {
    let recorder = Recorder::new();
    let Some(disk) = recorded(&recorder).await else {
        return;
    };
    let file = disk.open(0);
    assert_eq!(file.write_at(&[1; 100], SIZE - 10).unwrap(), 10);
    assert_eq!(errno(file.write_at(&[1], SIZE)), libc::ENOSPC);
    let mut bytes = [0; 100];
    assert_eq!(file.read_at(&mut bytes, SIZE - 10).unwrap(), 10);
    assert_eq!(file.read_at(&mut bytes, SIZE).unwrap(), 0);
    // To empty it, or to make it another size, is not to be had; to open it as if changes nothing.
    assert_eq!(errno(file.set_len(0)), libc::EPERM);
    file.set_len(SIZE).unwrap();
    drop(File::create(disk.path()).unwrap());
    assert_eq!(fs::metadata(disk.path()).unwrap().len(), SIZE);
    drop(file);
    disk.unmount().await;
}

#[tokio::test]
async fn an_error_is_the_callers_and_the_file_lives_on() {
    let recorder = Recorder::new();
    let Some(disk) = recorded(&recorder).await else {
        return;
    };
    let file = disk.open(0);
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    // What the last three stand for would make the kernel stop asking, or never answer.
    for (failure, heard) in [(5, 5), (28, 28), (38, 5), (512, 5), (100_000, 5)] {
        recorder.0.errno.store(failure, Relaxed);
        assert_eq!(errno(file.read_at(&mut [0; 10], 0)), heard);
        assert_eq!(errno(file.write_at(&[0; 10], 0)), heard);
        assert_eq!(errno(file.sync_all()), heard);
        let punched = fallocate(&file, punch, 0, 10).map_err(io::Error::from);
        assert_eq!(errno(punched), heard);
        recorder.0.errno.store(0, Relaxed);
        recorder.taken();
        file.write_all_at(b"lives", 0).unwrap();
        file.sync_all().unwrap();
        fallocate(&file, punch, 100, 10).unwrap();
        let asked = [Write(0..5, NONE), Flush, Zeroes(100..110, NONE)];
        assert_eq!(recorder.taken(), asked);
    }
    drop(file);
    disk.unmount().await;
}

#[tokio::test]
async fn requests_that_wait_hold_up_no_others() {
    let recorder = Recorder::new();
    let Some(disk) = recorded(&recorder).await else {
        return;
    };
    // More than there are threads.
    let waiting: Vec<_> = (0..40)
        .map(|_| {
            let file = disk.open(0);
            thread::spawn(move || file.read_exact_at(&mut [0; 512], GATE))
        })
        .collect();
    let file = disk.open(0);
    for at in 0..200 {
        file.write_all_at(&[1; 512], at * 512).unwrap();
        file.read_exact_at(&mut [0; 512], at * 512).unwrap();
    }
    file.sync_all().unwrap();
    let is_waiting = |asked: &Asked| *asked == Read(GATE..GATE + 512);
    assert!(!recorder.taken().iter().any(is_waiting));
    recorder.0.gate.add_permits(40);
    for thread in waiting {
        thread.join().unwrap().unwrap();
    }
    let asked = recorder.taken();
    assert_eq!(asked.iter().filter(|asked| is_waiting(asked)).count(), 40);
    drop(file);
    disk.unmount().await;
}

#[tokio::test]
async fn no_more_are_served_at_once_than_asked_for() {
    let recorder = Recorder::new();
    let device = Device::open(recorder.clone()).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = fuse::File::new(device.clone()).depth(3).threads(2);
    let mounted = match file.mount(dir.path().join("disk")).await {
        Ok(mounted) => mounted,
        Err(error) => return need::impossible(&error.to_string()),
    };
    // Opened before: when all tasks are taken, nothing is answered.
    let files = (0..8).map(|_| File::open(mounted.path()).unwrap());
    let files: Vec<_> = files.collect();
    let readers: Vec<_> = files
        .into_iter()
        .map(|file| thread::spawn(move || file.read_exact_at(&mut [0; 512], GATE)))
        .collect();
    for _ in 0..8 {
        recorder.0.gate.add_permits(1);
    }
    for reader in readers {
        reader.join().unwrap().unwrap();
    }
    mounted.unmount().await.unwrap();
    device.close().await.unwrap();
}

#[tokio::test]
async fn the_size_is_the_disks() {
    let Some(disk) = mount(Device::open(Memory::new(SIZE)).await.unwrap()).await else {
        return;
    };
    let about = fs::metadata(disk.path()).unwrap();
    assert_eq!((about.len(), about.blocks()), (SIZE, SIZE.div_ceil(512)));
    assert_eq!(about.permissions().mode() & 0o777, 0o600);
    disk.unmount().await;

    let memory = Device::open(Memory::new(MIB)).await.unwrap();
    let Some(disk) = mount(memory.clone()).await else {
        return;
    };
    let file = disk.open(0);
    for size in [3 * MIB, 2 * MIB + 1] {
        memory.get_ref().resize(size);
        assert_eq!(file.metadata().unwrap().len(), size);
        assert_eq!(seek(&file, SeekFrom::End(0)).unwrap(), size);
        file.write_all_at(&[1], size - 1).unwrap();
        assert_eq!(errno(file.write_at(&[1], size)), libc::ENOSPC);
    }
    drop(file);
    disk.unmount().await;
    memory.close().await.unwrap();
}

#[tokio::test]
async fn a_read_only_disk_is_a_read_only_file() {
    let device = Device::open(Memory::new(MIB)).await.unwrap();
    let Some(disk) = mount(device.read_only()).await else {
        return;
    };
    let about = fs::metadata(disk.path()).unwrap();
    assert_eq!(about.permissions().mode() & 0o777, 0o400);
    let opened = OpenOptions::new().write(true).open(disk.path());
    assert_eq!(errno(opened), libc::EROFS);
    let mut bytes = [1; 10];
    let file = File::open(disk.path()).unwrap();
    file.read_exact_at(&mut bytes, 5).unwrap();
    assert_eq!(bytes, [0; 10]);
    drop(file);
    disk.unmount().await;
    device.close().await.unwrap();
}

#[tokio::test]
async fn holes_are_found_and_made() {
    let memory = Device::open(Memory::new(4 * MIB)).await.unwrap();
    let Some(disk) = mount(memory.clone()).await else {
        return;
    };
    let file = disk.open(0);
    file.write_all_at(&vec![1; MIB as usize], 2 * MIB).unwrap();
    assert_eq!(seek(&file, SeekFrom::Data(0)).unwrap(), 2 * MIB);
    assert_eq!(seek(&file, SeekFrom::Hole(0)).unwrap(), 0);
    assert_eq!(seek(&file, SeekFrom::Hole(2 * MIB)).unwrap(), 3 * MIB);
    let beyond = seek(&file, SeekFrom::Data(3 * MIB)).map_err(io::Error::from);
    assert_eq!(errno(beyond), libc::ENXIO);
    let before = memory.get_ref().allocated();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, punch, 2 * MIB, MIB).unwrap();
    assert!(memory.get_ref().allocated() + MIB <= before);
    drop(file);
    disk.unmount().await;
    memory.close().await.unwrap();

    // Whoever trims a disk that would have to write zeroes out is told so.
    let recorder = Recorder::with(Features::empty());
    let Some(disk) = recorded(&recorder).await else {
        return;
    };
    let file = disk.open(0);
    let punched = fallocate(&file, punch, 0, MIB).map_err(io::Error::from);
    assert_eq!(errno(punched), libc::EOPNOTSUPP);
    assert_eq!(recorder.taken(), []);
    assert_eq!(seek(&file, SeekFrom::Data(5)).unwrap(), 5);
    assert_eq!(seek(&file, SeekFrom::Hole(5)).unwrap(), SIZE);
    drop(file);
    disk.unmount().await;
}

#[tokio::test]
async fn who_has_it_open_gets_errors_when_it_goes() {
    let recorder = Recorder::new();
    let Some(disk) = recorded(&recorder).await else {
        return;
    };
    let file = disk.open(0);
    file.write_all_at(b"x", 0).unwrap();
    disk.unmount().await;
    assert!(file.write_all_at(b"x", 0).is_err());
    assert_eq!(recorder.taken().first(), Some(&Write(0..1, NONE)));
}

#[tokio::test]
async fn somebody_else_may_unmount_it() {
    let Some(disk) = mount(Device::open(Memory::new(MIB)).await.unwrap()).await else {
        return;
    };
    rustix::mount::unmount(disk.path(), rustix::mount::UnmountFlags::empty()).unwrap();
    disk.mounted.ended().await;
    disk.unmount().await;
}

/// What a killed process of our own left is taken away; this may be mounted anew by its owner.
#[tokio::test]
async fn a_dead_mount_of_another_program_stays() {
    if need::program("nbdfuse").is_none() || need::program("nbdkit").is_none() {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        return need::impossible("only root can clean up for sure");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    File::create(&path).unwrap();
    let mut other = Command::new("nbdfuse");
    other
        .arg(&path)
        .args(["--command", "nbdkit", "-s", "memory", "1M"]);
    let mut other = other.spawn().unwrap();
    let is_mounted = || fs::metadata(&path).is_ok_and(|file| file.len() == MIB);
    while !is_mounted() {
        assert!(other.try_wait().unwrap().is_none(), "nbdfuse has ended");
        thread::sleep(Duration::from_millis(5));
    }
    other.kill().unwrap();
    other.wait().unwrap();
    // The kernel remembers for a second what it was told of the file.
    let is_dead =
        || fs::metadata(&path).is_err_and(|error| error.raw_os_error() == Some(libc::ENOTCONN));
    while !is_dead() {
        thread::sleep(Duration::from_millis(5));
    }
    let device = Device::open(Memory::new(MIB)).await.unwrap();
    let refused = fuse::File::new(device.clone()).mount(&path).await;
    let is_there = is_dead();
    rustix::mount::unmount(&path, rustix::mount::UnmountFlags::DETACH).unwrap();
    let error = refused.map(drop).unwrap_err().to_string();
    assert!(error.contains("of another program"), "{error}");
    assert!(is_there);
    device.close().await.unwrap();
}

#[tokio::test]
async fn what_is_there_is_not_hidden_and_stays() {
    let device = Device::open(Memory::new(MIB)).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let refused = async |path: PathBuf, part: &str| {
        let error = fuse::File::new(device.clone())
            .mount(&path)
            .await
            .unwrap_err();
        assert!(matches!(error, Error::Place { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains(part) && text.lines().count() == 1, "{text}");
    };
    refused(dir.path().to_owned(), "is a directory").await;
    refused(dir.path().join("no/such"), "No such file").await;
    let full = dir.path().join("full");
    fs::write(&full, "mine").unwrap();
    refused(full.clone(), "would hide").await;
    assert_eq!(fs::read(&full).unwrap(), b"mine");

    let empty = dir.path().join("empty");
    File::create(&empty).unwrap();
    match fuse::File::new(device.clone()).mount(&empty).await {
        Ok(mounted) => {
            assert_eq!(fs::metadata(&empty).unwrap().len(), MIB);
            mounted.unmount().await.unwrap();
        }
        Err(error) => return need::impossible(&error.to_string()),
    }
    assert_eq!(fs::metadata(&empty).unwrap().len(), 0);
    device.close().await.unwrap();
}
