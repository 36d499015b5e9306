//! What applications ask of an attached device is what its engine is asked for, and what the engine says is
//! what they hear.
#![cfg(all(feature = "attach", target_os = "linux"))]

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use rustix::fs::{FallocateFlags, fallocate};
use userland_io::attach::Via;
use userland_io::engines::Memory;
use userland_io::{
    CrashLevel, Discard, Engine, ErrorKind, Extents, Features, Geometry, ReadBuf, Result, WriteBuf,
    WriteFlags,
};

#[path = "common/attach.rs"]
mod attach;
#[path = "common/clients.rs"]
mod clients;
#[path = "common/need.rs"]
mod need;
use attach::{
    Aligned, attached, attached_as, buffered, detach, direct, open, opened, told, until, via,
};
use clients::succeed;

const SIZE: u64 = 16 << 20;
const MIB: u64 = 1 << 20;
const NONE: WriteFlags = WriteFlags::empty();

/// What changes a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Asked {
    Write(Range<u64>, WriteFlags),
    Zeroes(Range<u64>, WriteFlags),
    Discard(Range<u64>),
    Flush,
}

/// A memory with a cache to be flushed, that writes down what it is asked for and fails where it is told to.
#[derive(Clone)]
struct Recorder(Arc<State>);

struct State {
    memory: Memory,
    block: u32,
    asked: Mutex<Vec<Asked>>,
    /// Requests that touch it fail, and flushes if it is not empty.
    bad: Mutex<Range<u64>>,
}

impl Recorder {
    fn new(block: u32) -> Self {
        Recorder(Arc::new(State {
            memory: Memory::new(SIZE),
            block,
            asked: Mutex::default(),
            bad: Mutex::new(0..0),
        }))
    }

    /// What it was asked for since the last call.
    fn taken(&self) -> Vec<Asked> {
        std::mem::take(&mut self.0.asked.lock().unwrap())
    }

    fn set_bad(&self, range: Range<u64>) {
        *self.0.bad.lock().unwrap() = range;
    }

    fn check(&self, range: Range<u64>) -> Result {
        let bad = self.0.bad.lock().unwrap();
        match range.start < bad.end && bad.start < range.end {
            true => Err(ErrorKind::Io.into()),
            false => Ok(()),
        }
    }

    fn note(&self, asked: Asked, range: Range<u64>) -> Result {
        self.0.asked.lock().unwrap().push(asked);
        self.check(range)
    }
}

impl Engine for Recorder {
    fn geometry(&self) -> Geometry {
        let mut geometry = Geometry::writable(SIZE, CrashLevel::Flush);
        geometry.logical_block_size = self.0.block;
        geometry.discard = Discard::Zeroes;
        geometry.features |= Features::FUA | Features::WRITE_ZEROES;
        geometry
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        self.check(offset..offset + buf.len() as u64)?;
        self.0.memory.read(buf, offset).await
    }
    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        let range = offset..offset + buf.len() as u64;
        self.note(Asked::Write(range.clone(), flags), range)?;
        self.0.memory.write(buf, offset, NONE).await
    }
    async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        self.note(Asked::Zeroes(range.clone(), flags), range.clone())?;
        self.0.memory.write_zeroes(range, NONE).await
    }
    async fn discard(&self, range: Range<u64>) -> Result {
        self.note(Asked::Discard(range.clone()), range.clone())?;
        self.0.memory.discard(range).await
    }
    async fn flush(&self) -> Result {
        self.note(Asked::Flush, 0..SIZE)
    }
    async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        self.0.memory.extents(range, out).await
    }
}

#[tokio::test]
async fn each_request_arrives_as_what_it_is_and_where_it_is() {
    let Some(blkdiscard) = need::program("blkdiscard") else {
        return;
    };
    let recorder = Recorder::new(512);
    let Some(disk) = attached(recorder.clone()).await else {
        return;
    };
    let (path, file) = (disk.path(), direct(disk.path()));
    let is_flush = |asked: &Asked| *asked == Asked::Flush;
    let asked = recorder.taken();
    assert!(
        asked.iter().all(is_flush),
        "attaching changes nothing: {asked:?}"
    );

    for range in [0..512, 512..9 * 512, MIB..MIB + 65536, SIZE - 4096..SIZE] {
        let bytes = Aligned::filled((range.end - range.start) as usize, 1);
        file.write_all_at(&bytes, range.start).unwrap();
        assert_eq!(recorder.taken(), [Asked::Write(range, NONE)]);
    }
    file.sync_all().unwrap();
    assert_eq!(recorder.taken(), [Asked::Flush]);

    let durable = open(path, libc::O_DIRECT | libc::O_DSYNC).unwrap();
    durable
        .write_all_at(&Aligned::filled(8192, 2), 8192)
        .unwrap();
    let asked = recorder.taken();
    // A loop device has no FUA: the kernel flushes behind the write.
    let flags = match via() {
        Via::Fuse => NONE,
        _ => WriteFlags::FUA,
    };
    assert_eq!(asked[0], Asked::Write(8192..16384, flags));
    assert!(asked.len() > 1, "{asked:?}");
    assert!(asked[1..].iter().all(is_flush), "{asked:?}");

    // Written in order, so that merged requests would be seen too.
    for at in 0..16 {
        let bytes = Aligned::filled(4096, 3);
        file.write_all_at(&bytes, 2 * MIB + at * 4096).unwrap();
    }
    let each = (0..16)
        .map(|at| 2 * MIB + at * 4096)
        .map(|at| Asked::Write(at..at + 4096, NONE));
    assert_eq!(recorder.taken(), each.collect::<Vec<_>>());

    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, punch, 3 * MIB, MIB).unwrap();
    assert_eq!(recorder.taken(), [Asked::Zeroes(3 * MIB..4 * MIB, NONE)]);
    let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, zero, 5 * MIB + 4096, 12288).unwrap();
    let range = 5 * MIB + 4096..5 * MIB + 16384;
    assert_eq!(
        recorder.taken(),
        [Asked::Zeroes(range, WriteFlags::NO_UNMAP)]
    );

    drop((file, durable));
    let name = path.to_str().unwrap();
    succeed(&blkdiscard, &["-o", "7M", "-l", "1M", name]);
    let range = 7 * MIB..8 * MIB;
    // A loop device tells a discard by the same call as zeroes that may unmap.
    let discarded = match via() {
        Via::Fuse => Asked::Zeroes(range, NONE),
        _ => Asked::Discard(range),
    };
    assert_eq!(recorder.taken(), [discarded]);
    detach(disk).await;
    // Closing flushes once more.
    let asked = recorder.taken();
    assert!(!asked.is_empty() && asked.iter().all(is_flush), "{asked:?}");
}

#[tokio::test]
async fn an_engines_error_is_the_applications_and_the_device_lives_on() {
    let recorder = Recorder::new(512);
    let Some(disk) = attached(recorder.clone()).await else {
        return;
    };
    let file = direct(disk.path());
    let mut block = Aligned::filled(4096, 9);
    let is_eio = |result: io::Result<()>| {
        let errno = result.unwrap_err().raw_os_error();
        assert_eq!(errno, Some(libc::EIO));
    };
    for _ in 0..3 {
        recorder.set_bad(MIB..2 * MIB);
        is_eio(file.read_exact_at(&mut block, MIB + 4096));
        is_eio(file.write_all_at(&block, MIB));
        is_eio(file.sync_all());
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        assert!(fallocate(&file, punch, MIB, 65536).is_err());
        // Elsewhere all is well meanwhile, and there as well, later.
        file.read_exact_at(&mut block, 0).unwrap();
        recorder.set_bad(0..0);
        block.fill(9);
        file.write_all_at(&block, MIB).unwrap();
        file.sync_all().unwrap();
        block.fill(0);
        file.read_exact_at(&mut block, MIB).unwrap();
        assert!(block.iter().all(|byte| *byte == 9));
    }
    // What is written back later fails where it is synced.
    recorder.set_bad(4 * MIB..5 * MIB);
    let cached = buffered(disk.path());
    cached.write_all_at(&[5; 8192], 4 * MIB).unwrap();
    is_eio(cached.sync_all());
    recorder.set_bad(0..0);
    cached.write_all_at(&[5; 8192], 4 * MIB).unwrap();
    cached.sync_all().unwrap();
    drop((file, cached));
    detach(disk).await;
}

#[tokio::test]
async fn the_kernel_is_told_what_the_engine_claims() {
    let device = opened(Recorder::new(4096)).await;
    let Some(disk) = attached_as(&device, |builder| builder).await else {
        return;
    };
    let queue = |file: &str| told(disk.path(), &format!("queue/{file}"));
    assert_eq!(queue("logical_block_size"), "4096");
    assert_eq!(queue("write_cache"), "write back");
    assert_eq!(queue("rotational"), "0");
    assert_ne!(queue("discard_max_bytes"), "0");
    assert_ne!(queue("write_zeroes_max_bytes"), "0");
    assert_eq!(queue("fua"), if via() == Via::Fuse { "0" } else { "1" });
    assert_eq!(told(disk.path(), "size"), (SIZE / 512).to_string());
    assert_eq!(told(disk.path(), "ro"), "0");
    let half = direct(disk.path()).write_all_at(&Aligned::new(512), 0);
    assert_eq!(half.unwrap_err().raw_os_error(), Some(libc::EINVAL));
    detach(disk).await;

    let disk = attached_as(&device, |builder| builder.read_only(true))
        .await
        .unwrap();
    assert_eq!(told(disk.path(), "ro"), "1");
    let refused = open(disk.path(), 0).map(|file| file.write_all_at(&[1; 4096], 0));
    assert!(!matches!(refused, Ok(Ok(()))), "{refused:?}");
    let recorder = device.get_ref();
    assert!(recorder.taken().iter().all(|asked| *asked == Asked::Flush));
    detach(disk).await;
}

/// A memory that claims what it is told to.
struct Claims(Memory, Geometry);

impl Engine for Claims {
    fn geometry(&self) -> Geometry {
        self.1
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        self.0.read(buf, offset).await
    }
    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, _: WriteFlags) -> Result {
        self.0.write(buf, offset, NONE).await
    }
    async fn write_zeroes(&self, range: Range<u64>, _: WriteFlags) -> Result {
        self.0.write_zeroes(range, NONE).await
    }
    async fn discard(&self, range: Range<u64>) -> Result {
        self.0.discard(range).await
    }
    async fn flush(&self) -> Result {
        Ok(())
    }
}

/// The other ways tell it less: a loop device has no FUA, and the kernel's NBD client no granularity.
#[tokio::test]
async fn the_kernel_has_every_claim_of_a_ublk_device() {
    if via() != Via::Ublk {
        return;
    }
    let mut all = Geometry::writable(SIZE, CrashLevel::Flush);
    all.physical_block_size = 4096;
    all.io_opt = 64 << 10;
    all.discard = Discard::Unspecified;
    all.discard_granularity = 64 << 10;
    all.max_discard = 1 << 20;
    all.max_write_zeroes = 2 << 20;
    all.features |= Features::FUA | Features::WRITE_ZEROES | Features::ROTATIONAL;
    let mut none = Geometry::writable(SIZE, CrashLevel::None);
    none.logical_block_size = 4096;
    let names = [
        "queue/logical_block_size",
        "queue/physical_block_size",
        "queue/minimum_io_size",
        "queue/optimal_io_size",
        "queue/write_cache",
        "queue/fua",
        "queue/rotational",
        "queue/discard_max_bytes",
        "queue/write_zeroes_max_bytes",
        "ro",
    ];
    let cases = [
        (all, "512 4096 4096 65536 write back 1 1 1048576 2097152 0"),
        (
            all.into_read_only(),
            "512 4096 4096 65536 write through 0 1 0 0 1",
        ),
        (none, "4096 4096 4096 0 write through 0 0 0 0 0"),
    ];
    for (geometry, expected) in cases {
        let engine = Claims(Memory::new(SIZE), geometry);
        let Some(disk) = attached(engine).await else {
            return;
        };
        let has = names.map(|name| told(disk.path(), name)).join(" ");
        assert_eq!(has, expected, "{geometry:?}");
        // Where there is no discard, kernels differ in what its granularity is.
        if geometry.discard != Discard::None {
            assert_eq!(told(disk.path(), "queue/discard_granularity"), "65536");
        }
        detach(disk).await;
    }
}

#[tokio::test]
async fn partitions_appear() {
    if std::env::var_os("ULIO_GUEST").is_none() {
        return need::guest("a kernel that reads partition tables");
    }
    let device = opened(Memory::new(SIZE)).await;
    // A master boot record with one partition, from 1 MiB on, of 2 MiB.
    let mut record = [0; 512];
    record[446..462].copy_from_slice(&[0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 16, 0, 0]);
    record[510..].copy_from_slice(&[0x55, 0xaa]);
    device
        .write(&WriteBuf::new(&record), 0, NONE)
        .await
        .unwrap();
    let Some(disk) = attached_as(&device, |builder| builder).await else {
        return;
    };
    let name = format!("{}p1", disk.path().file_name().unwrap().display());
    let partition = Path::new("/sys/class/block").join(name);
    until("a partition", || partition.exists());
    assert_eq!(told(&partition, "start"), "2048");
    assert_eq!(told(&partition, "size"), "4096");
    detach(disk).await;
}
