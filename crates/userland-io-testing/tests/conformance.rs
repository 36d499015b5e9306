//! The suite passes for engines that are in order, and says what is wrong with those that are not.

use std::sync::{Arc, Mutex};
use std::task::Waker;

use userland_io::engines::Memory;
use userland_io::{Engine, ErrorKind, Features, Geometry, ReadBuf, Result, WriteBuf, WriteFlags};
use userland_io_testing::check::Verdict;
use userland_io_testing::conformance::{self, block_on};
use userland_io_testing::reference::{LogDisk, MapDisk, SyncDisk};
use userland_io_testing::sim::{DiskConfig, SimDisk, World};

userland_io_testing::conformance!(memory, async || Ok(Memory::new(10 << 20)));

userland_io_testing::conformance!(an_odd_little_memory, async || Ok(Memory::new(777)));

fn disk(blocks: u64, change: impl Fn(&mut DiskConfig)) -> SimDisk {
    let mut config = DiskConfig::new(blocks * 512 + 77, 512);
    config.dirty = true;
    change(&mut config);
    SimDisk::new(&World::new(7), config)
}

userland_io_testing::conformance!(a_disk_that_holds_noise, async || Ok(disk(40, |_| {})));

userland_io_testing::conformance!(sync, async || SyncDisk::open(disk(40, |_| {})).await);

userland_io_testing::conformance!(map, async || MapDisk::open(disk(60, |config| config
    .dirty =
    false))
.await);

userland_io_testing::conformance!(log, async || LogDisk::open(disk(300, |config| config
    .dirty =
    false))
.await);

#[test]
fn what_is_kept_is_there_when_the_disk_is_opened_again() {
    // The engines above are new each time; this one is the same disk.
    let disk = Mutex::new(disk(40, |_| {}));
    let open = async || {
        let mut disk = disk.lock().unwrap();
        *disk = disk.reopen();
        Ok(disk.clone())
    };
    block_on(conformance::all(&open)).unwrap();
    block_on(conformance::close_keeps_what_was_written(&open)).unwrap();
}

#[test]
fn a_disk_that_is_another_each_time_keeps_nothing() {
    let open = async || Ok(disk(40, |_| {}));
    let verdict = block_on(conformance::close_keeps_what_was_written(open)).unwrap_err();
    assert!(
        verdict.what.contains("when the disk was closed"),
        "{verdict}"
    );
}

#[test]
fn a_disk_that_resizes_tells_so() {
    let resize = async |disk: &SimDisk, size: u64| {
        disk.resize(size);
        Ok(())
    };
    let open = async || Ok(disk(40, |_| {}));
    block_on(conformance::resizing_is_noticed(open, resize)).unwrap();
}

/// A memory with one thing wrong.
struct Wrong {
    memory: Mutex<Vec<u8>>,
    geometry: Mutex<Geometry>,
    what: What,
    watchers: Mutex<Vec<Waker>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Nothing,
    ForgetsTheLastByte,
    ReadsTooShort,
    RefusesFua,
    WritesThoughReadOnly,
    ShrinksWithoutAWord,
    OldSizeAtTheEnd,
}

impl Wrong {
    fn new(what: What) -> Arc<Self> {
        let mut geometry = Geometry::writable(8192, userland_io::CrashLevel::None);
        geometry.features |= Features::FUA;
        if what == What::WritesThoughReadOnly {
            geometry.features |= Features::READ_ONLY;
        }
        Arc::new(Wrong {
            memory: Mutex::new(vec![7; 8192]),
            geometry: Mutex::new(geometry),
            what,
            watchers: Mutex::default(),
        })
    }

    fn resize(&self, size: u64) {
        self.memory.lock().unwrap().resize(size as usize, 0);
        let mut geometry = self.geometry.lock().unwrap();
        let shrinks = size < geometry.size;
        geometry.size = size;
        drop(geometry);
        if !(shrinks && self.what == What::ShrinksWithoutAWord) {
            let waiting = std::mem::take(&mut *self.watchers.lock().unwrap());
            waiting.into_iter().for_each(Waker::wake);
        }
    }
}

struct Handle(Arc<Wrong>);

impl Engine for Handle {
    fn geometry(&self) -> Geometry {
        *self.0.geometry.lock().unwrap()
    }

    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        let memory = self.0.memory.lock().unwrap();
        let at = offset as usize;
        if at + buf.len() > memory.len() {
            if self.0.what == What::OldSizeAtTheEnd {
                buf.fill(0);
                return Ok(());
            }
            return Err(ErrorKind::OutOfRange.into());
        }
        let len = match self.0.what {
            What::ReadsTooShort if buf.len() > 4096 => 4096,
            _ => buf.len(),
        };
        buf.slice(0..len).copy_from(&memory[at..at + len]);
        Ok(())
    }

    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        if self.0.what == What::RefusesFua && flags.contains(WriteFlags::FUA) {
            return Err(ErrorKind::Unsupported.into());
        }
        let mut memory = self.0.memory.lock().unwrap();
        let at = offset as usize;
        if at + buf.len() > memory.len() {
            return Err(ErrorKind::OutOfRange.into());
        }
        let len = match self.0.what {
            What::ForgetsTheLastByte if at + buf.len() == memory.len() => buf.len() - 1,
            _ => buf.len(),
        };
        buf.slice(0..len).copy_to(&mut memory[at..at + len]);
        Ok(())
    }

    async fn changed(&self, seen: Geometry) -> Geometry {
        std::future::poll_fn(|cx| {
            let now = self.geometry();
            if now != seen {
                return std::task::Poll::Ready(now);
            }
            self.0.watchers.lock().unwrap().push(cx.waker().clone());
            std::task::Poll::Pending
        })
        .await
    }
}

fn verdict(what: What) -> Result<(), Verdict> {
    let disk = Wrong::new(what);
    block_on(conformance::all(async || Ok(Handle(disk.clone()))))?;
    let resize = async |disk: &Handle, size| {
        disk.0.resize(size);
        Ok(())
    };
    let disk = Wrong::new(what);
    let open = async || Ok(Handle(disk.clone()));
    block_on(conformance::resizing_is_noticed(open, resize))
}

#[test]
fn what_is_wrong_is_said() {
    verdict(What::Nothing).unwrap();
    for (what, said) in [
        (What::ForgetsTheLastByte, "where"),
        (What::ReadsTooShort, "did not fill its buffer: not at 4096"),
        (What::RefusesFua, "failed: not supported"),
        (What::ShrinksWithoutAWord, "says Pending to who waited"),
        (What::OldSizeAtTheEnd, "a read beyond the new end"),
    ] {
        let text = verdict(what).unwrap_err().to_string();
        assert!(text.contains(said), "{text}");
    }
    // Refused by the edge, whatever the engine would do.
    verdict_of_read_only();
}

fn verdict_of_read_only() {
    let disk = Wrong::new(What::WritesThoughReadOnly);
    block_on(conformance::geometry_is_truthful(async || {
        Ok(Handle(disk.clone()))
    }))
    .unwrap();
}
