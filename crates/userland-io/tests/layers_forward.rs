//! Each operation, with each of its flags, goes through each layer: none is swallowed, none is
//! changed, and the ranges are exact.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;
use userland_io::layers::{Delay, Fault, Offset, ReadOnly, Stats};
use userland_io::{
    AnyEngine, CrashLevel, Discard, Engine, EngineExt, ExtentKind, Extents, Features, Geometry,
    ReadBuf, Result, WriteBuf, WriteFlags, errno,
};

const SIZE: u64 = 1 << 20;

#[derive(Clone, Debug, PartialEq)]
enum Call {
    Read(Range<u64>),
    Lend(Range<u64>),
    Write(Vec<u8>, u64, WriteFlags),
    WriteNow(Vec<u8>, u64, WriteFlags),
    LendMut(Vec<u8>, u64, WriteFlags),
    Flush,
    Discard(Range<u64>),
    WriteZeroes(Range<u64>, WriteFlags),
    Extents(Range<u64>),
    Status(String, Range<u64>),
    Prefetch(Range<u64>),
    Close,
}

/// Notes what arrives. Claims everything, so that the edges below a layer change nothing.
#[derive(Clone, Default)]
struct Recorder {
    calls: Arc<Mutex<Vec<Call>>>,
    /// By how much the disk has grown.
    more: Arc<AtomicU64>,
    resized: Arc<Notify>,
}

impl Recorder {
    fn note(&self, call: Call) -> Result {
        self.calls.lock().unwrap().push(call);
        Ok(())
    }

    fn take(&self) -> Vec<Call> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

fn geometry(size: u64) -> Geometry {
    let mut geometry = Geometry::writable(size, CrashLevel::Flush);
    geometry.logical_block_size = 512;
    geometry.physical_block_size = 4096;
    geometry.io_min = 4096;
    geometry.io_opt = 8192;
    geometry.max_transfer = 65536;
    geometry.memory_alignment = 16;
    geometry.discard_granularity = 4096;
    geometry.max_discard = 65536;
    geometry.max_write_zeroes = 65536;
    geometry.atomic_write_unit = 4096;
    geometry.features = Features::all() - Features::READ_ONLY;
    geometry.discard = Discard::Zeroes;
    geometry
}

impl Engine for Recorder {
    fn geometry(&self) -> Geometry {
        geometry(SIZE + self.more.load(Ordering::Acquire))
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        buf.fill(offset as u8 ^ 0x5a);
        self.note(Call::Read(offset..offset + buf.len() as u64))
    }
    fn lend(&self, range: Range<u64>, to: &mut dyn FnMut(&[u8])) {
        to(&vec![
            range.start as u8 ^ 0x5a;
            (range.end - range.start) as usize
        ]);
        let _ = self.note(Call::Lend(range));
    }
    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        let bytes = buf.as_slice().unwrap_or_default().to_vec();
        self.note(Call::Write(bytes, offset, flags))
    }
    fn write_nowait(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Option<Result> {
        let bytes = buf.as_slice().unwrap_or_default().to_vec();
        Some(self.note(Call::WriteNow(bytes, offset, flags)))
    }
    fn lend_mut(
        &self,
        range: Range<u64>,
        flags: WriteFlags,
        from: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Result> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        bytes.chunks_mut(512).for_each(from);
        Some(self.note(Call::LendMut(bytes, range.start, flags)))
    }
    async fn flush(&self) -> Result {
        self.note(Call::Flush)
    }
    async fn discard(&self, range: Range<u64>) -> Result {
        self.note(Call::Discard(range))
    }
    async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        self.note(Call::WriteZeroes(range, flags))
    }
    async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        out.push(512, ExtentKind::Zero);
        out.push(range.end - range.start - 512, ExtentKind::Hole);
        self.note(Call::Extents(range))
    }
    fn contexts(&self) -> Vec<String> {
        vec!["test:context".to_owned()]
    }
    async fn status(&self, context: &str, range: Range<u64>, out: &mut Extents<u64>) -> Result {
        out.push(range.end - range.start, 77);
        self.note(Call::Status(context.to_owned(), range))
    }
    async fn prefetch(&self, range: Range<u64>) -> Result {
        self.note(Call::Prefetch(range))
    }
    async fn changed(&self, seen: Geometry) -> Geometry {
        loop {
            let resized = self.resized.notified();
            if self.geometry() != seen {
                return self.geometry();
            }
            resized.await;
        }
    }
    async fn close(&self) -> Result {
        self.note(Call::Close)
    }
}

/// Every layer of the library, set so that it lets everything pass, and how far it moves offsets.
fn transparent() -> Vec<(&'static str, u64, Recorder, AnyEngine)> {
    let mut list = Vec::new();
    macro_rules! layer {
        ($shift:expr, $layer:expr) => {
            let below = Recorder::default();
            let above = below.clone().layer($layer).unwrap().erase();
            list.push((stringify!($layer), $shift, below, above));
        };
    }
    layer!(0, Delay::new());
    layer!(0, Delay::all(Duration::from_millis(1)));
    layer!(0, Fault::new(errno::EIO).probability(0.0));
    layer!(0, Fault::new(errno::EIO).after(u64::MAX));
    layer!(0, Stats::new());
    layer!(0, Offset::new(0));
    layer!(8192, Offset::new(8192));
    layer!(65536, Offset::new(65536).size(65536 * 4));
    list
}

/// True for layers that do nothing to bytes on their way but say where they lie, or count them.
fn changes_nothing(name: &str) -> bool {
    ["Offset", "ReadOnly", "Stats"]
        .iter()
        .any(|layer| name.starts_with(layer))
}

#[tokio::test]
async fn every_mutation_arrives_with_its_flags() {
    let bytes: Vec<u8> = (0..1024u32).map(|n| n as u8).collect();
    for (name, shift, below, above) in transparent() {
        for flags in [WriteFlags::empty(), WriteFlags::FUA] {
            let buf = WriteBuf::new(&bytes);
            above.write(&buf, 4096, flags).await.unwrap();
            let expected = Call::Write(bytes.clone(), shift + 4096, flags);
            assert_eq!(below.take(), [expected], "{name}");

            let written = above.write_nowait(&buf, 4096, flags);
            let mut from = &bytes[..];
            let lent = above.lend_mut(4096..5120, flags, &mut |memory| {
                memory.copy_from_slice(from.split_off(..memory.len()).unwrap());
            });
            // The others' own writes would be passed by.
            if changes_nothing(name) {
                written.unwrap().unwrap();
                lent.unwrap().unwrap();
                let at = shift + 4096;
                let expected = [
                    Call::WriteNow(bytes.clone(), at, flags),
                    Call::LendMut(bytes.clone(), at, flags),
                ];
                assert_eq!(below.take(), expected, "{name}");
            } else {
                assert!(written.is_none() && lent.is_none(), "{name}");
                assert_eq!(below.take(), [], "{name}");
            }
        }
        for bits in 0..=WriteFlags::all().bits() {
            let flags = WriteFlags::from_bits(bits).unwrap();
            above.write_zeroes(512..2048, flags).await.unwrap();
            let expected = Call::WriteZeroes(shift + 512..shift + 2048, flags);
            assert_eq!(below.take(), [expected], "{name}");
        }
        above.discard(8192..16384).await.unwrap();
        let expected = Call::Discard(shift + 8192..shift + 16384);
        assert_eq!(below.take(), [expected], "{name}");
        above.flush().await.unwrap();
        assert_eq!(below.take(), [Call::Flush], "{name}");
    }
}

#[tokio::test]
async fn every_question_arrives_and_its_answer_comes_back() {
    let mut layers = transparent();
    let below = Recorder::default();
    let above = below.clone().layer(ReadOnly).unwrap().erase();
    layers.push(("ReadOnly", 0, below, above));
    for (name, shift, below, above) in layers {
        let mut bytes = [0; 1024];
        above
            .read(&mut ReadBuf::new(&mut bytes), 1536)
            .await
            .unwrap();
        let expected = Call::Read(shift + 1536..shift + 2560);
        assert_eq!(below.take(), [expected], "{name}");
        assert_eq!(bytes, [(shift + 1536) as u8 ^ 0x5a; 1024], "{name}");

        let mut lent = Vec::new();
        above.lend(1536..2560, &mut |bytes| lent.extend_from_slice(bytes));
        // The others' own reads would be passed by.
        if changes_nothing(name) {
            let expected = Call::Lend(shift + 1536..shift + 2560);
            assert_eq!(below.take(), [expected], "{name}");
            assert_eq!(lent, bytes, "{name}");
        } else {
            assert_eq!((below.take(), lent), (vec![], vec![]), "{name}");
        }

        let mut runs = Extents::new(8);
        above.extents(512..4096, &mut runs).await.unwrap();
        let expected = Call::Extents(shift + 512..shift + 4096);
        assert_eq!(below.take(), [expected], "{name}");
        let runs: Vec<_> = runs.iter().map(|run| (run.len, run.kind)).collect();
        let expected = [(512, ExtentKind::Zero), (3072, ExtentKind::Hole)];
        assert_eq!(runs, expected, "{name}");

        assert_eq!(above.contexts(), ["test:context"], "{name}");
        let mut words = Extents::new(8);
        above
            .status("test:context", 512..1024, &mut words)
            .await
            .unwrap();
        let expected = Call::Status("test:context".to_owned(), shift + 512..shift + 1024);
        assert_eq!(below.take(), [expected], "{name}");
        let words: Vec<_> = words.iter().map(|run| (run.len, run.kind)).collect();
        assert_eq!(words, [(512, 77)], "{name}");

        above.prefetch(0..8192).await.unwrap();
        let expected = Call::Prefetch(shift..shift + 8192);
        assert_eq!(below.take(), [expected], "{name}");
        above.close().await.unwrap();
        assert_eq!(below.take(), [Call::Close], "{name}");
    }
}

#[test]
fn the_claims_come_through_whole() {
    for (name, _, _, above) in transparent() {
        let size = above.geometry().size;
        assert_eq!(above.geometry(), geometry(size), "{name}");
    }
}

#[tokio::test]
async fn a_disk_that_grows_is_noticed_above() {
    for (name, shift, below, above) in transparent() {
        let seen = above.geometry();
        if shift + seen.size != SIZE {
            continue; // A window with a size of its own.
        }
        let grow = async {
            below.more.store(8192, Ordering::Release);
            below.resized.notify_waiters();
        };
        let (now, ()) = tokio::join!(above.changed(seen), grow);
        assert_eq!(now.size, seen.size + 8192, "{name}");
    }
}

#[tokio::test]
async fn a_mutation_never_passes_read_only() {
    let below = Recorder::default();
    let above = below.clone().layer(ReadOnly).unwrap();
    let none = WriteFlags::empty();
    let errors = [
        above.write(&WriteBuf::new(&[0; 512]), 0, none).await,
        above.discard(0..4096).await,
        above.write_zeroes(0..4096, none).await,
    ];
    assert!(
        above
            .write_nowait(&WriteBuf::new(&[0; 512]), 0, none)
            .is_none()
    );
    assert!(above.lend_mut(0..512, none, &mut |_| ()).is_none());
    for error in errors {
        assert_eq!(error.unwrap_err().errno(), errno::EROFS);
    }
    assert_eq!(below.take(), []);
}

#[tokio::test]
async fn every_operation_can_be_made_to_fail_before_it_arrives() {
    let below = Recorder::default();
    let above = below.clone().layer(Fault::new(errno::ENOSPC)).unwrap();
    let none = WriteFlags::empty();
    let results = [
        above.read(&mut ReadBuf::new(&mut [0; 512]), 0).await,
        above.write(&WriteBuf::new(&[0; 512]), 0, none).await,
        above.flush().await,
        above.discard(0..4096).await,
        above.write_zeroes(0..4096, none).await,
        above.extents(0..4096, &mut Extents::new(1)).await,
        above
            .status("test:context", 0..4096, &mut Extents::new(1))
            .await,
        above.prefetch(0..4096).await,
    ];
    for (n, result) in results.into_iter().enumerate() {
        assert_eq!(result.unwrap_err().errno(), errno::ENOSPC, "{n}");
    }
    assert_eq!(below.take(), []);
}
