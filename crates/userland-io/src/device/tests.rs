//! What a device adds to its edge: the check at open, counters, the panic guard, the order of closing.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use super::*;
use crate::Discard;
use crate::engines::Memory;

/// A disk that does what it is told, and counts flushes and closes.
struct Puppet {
    geometry: Geometry,
    flush: fn() -> Result,
    flushes: AtomicU32,
    closes: Arc<AtomicU32>,
    panic_in: Mutex<Option<Op>>,
}

impl Puppet {
    fn new(geometry: Geometry) -> Self {
        Puppet {
            geometry,
            flush: || Ok(()),
            flushes: AtomicU32::new(0),
            closes: Arc::default(),
            panic_in: Mutex::new(None),
        }
    }

    fn stumble(&self, op: Op) {
        let told = *self.panic_in.lock().unwrap();
        assert!(told != Some(op), "told to fall");
    }
}

impl Engine for Puppet {
    fn geometry(&self) -> Geometry {
        self.geometry
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, _: u64) -> Result {
        self.stumble(Op::Read);
        buf.fill(1);
        Ok(())
    }
    async fn write(&self, _: &WriteBuf<'_>, _: u64, _: WriteFlags) -> Result {
        tokio::task::yield_now().await;
        self.stumble(Op::Write);
        Ok(())
    }
    fn write_nowait(&self, buf: &WriteBuf<'_>, offset: u64, _: WriteFlags) -> Option<Result> {
        self.stumble(Op::Write);
        // The first block has to be waited for.
        (offset > 0).then(|| match buf.len() {
            1 => Err(ErrorKind::NoSpace.into()),
            _ => Ok(()),
        })
    }
    fn lend_mut(
        &self,
        range: Range<u64>,
        _: WriteFlags,
        from: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Result> {
        from(&mut vec![0; (range.end - range.start) as usize]);
        self.stumble(Op::Write);
        Some(Ok(()))
    }
    async fn flush(&self) -> Result {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        self.stumble(Op::Flush);
        (self.flush)()
    }
    async fn close(&self) -> Result {
        self.closes.fetch_add(1, Ordering::Relaxed);
        self.flush().await
    }
}

fn writable(crash: CrashLevel) -> Geometry {
    Geometry::writable(4096, crash)
}

async fn read(device: &Device<Puppet>) -> Result {
    device.read(&mut ReadBuf::new(&mut [0; 8]), 0).await
}

async fn write(device: &Device<Puppet>) -> Result {
    let buf = WriteBuf::new(&[0; 8]);
    device.write(&buf, 0, WriteFlags::empty()).await
}

#[tokio::test]
async fn an_engine_that_forgot_flush_is_refused_with_the_ways_out() {
    struct Forgot(Geometry);
    impl Engine for Forgot {
        fn geometry(&self) -> Geometry {
            self.0
        }
        async fn read(&self, _: &mut ReadBuf<'_>, _: u64) -> Result {
            Ok(())
        }
    }
    for crash in [CrashLevel::Flush, CrashLevel::Prefix] {
        let error = Device::open(Forgot(writable(crash))).await.unwrap_err();
        assert!(matches!(error, OpenError::NoFlush(level) if level == crash));
        assert!(error.to_string().contains("implement it, or claim"));
    }
    for crash in [CrashLevel::None, CrashLevel::Sync] {
        Device::open(Forgot(writable(crash))).await.unwrap();
    }
    Device::open(Forgot(Geometry::read_only(1))).await.unwrap();
}

#[tokio::test]
async fn a_first_flush_that_fails_refuses_the_disk() {
    let mut engine = Puppet::new(writable(CrashLevel::Flush));
    engine.flush = || Err(ErrorKind::NoSpace.into());
    let error = Device::open(engine).await.unwrap_err();
    assert_eq!(Error::from(error).kind(), ErrorKind::NoSpace);
    let mut geometry = writable(CrashLevel::Flush);
    geometry.logical_block_size = 3;
    let error = Device::open(Puppet::new(geometry)).await.unwrap_err();
    assert!(
        error.to_string().contains("logical_block_size is 3"),
        "{error}"
    );
}

#[tokio::test]
async fn only_the_last_handle_closes_and_it_reports() {
    let mut engine = Puppet::new(writable(CrashLevel::Sync));
    engine.flush = || Err(ErrorKind::NoSpace.into());
    let closes = engine.closes.clone();
    let device = Device::open(engine).await.unwrap();
    let other = device.read_only();
    device.close().await.unwrap();
    assert_eq!(closes.load(Ordering::Relaxed), 0);
    let failed = other.close().await.unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::NoSpace);
    assert_eq!(closes.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn what_is_lent_counts_as_read() {
    let device = Device::open(Memory::new(1 << 20)).await.unwrap();
    let page = [7; 4096];
    let page = WriteBuf::new(&page);
    device.write(&page, 0, WriteFlags::empty()).await.unwrap();
    let mut bytes = Vec::new();
    assert!(device.lend(0..512, &mut |lent| bytes.extend_from_slice(lent)));
    assert!(!device.lend(1 << 19..1 << 20, &mut |_| panic!("never written")));
    assert_eq!(bytes, [7; 512]);
    let stats = device.stats();
    let read = stats.of(Op::Read);
    assert_eq!((read.ops, read.bytes, read.errors), (1, 512, 0));
}

#[tokio::test]
async fn a_write_that_does_not_wait_counts_as_one() {
    let device = Device::open(Puppet::new(writable(CrashLevel::Flush)))
        .await
        .unwrap();
    let now = |device: &Device<Puppet>, offset, len| {
        let buf = WriteBuf::new(&[0; 8][..len]);
        device.write_nowait(&buf, offset, WriteFlags::empty())
    };
    assert!(now(&device, 0, 8).is_none());
    assert!(now(&device.read_only(), 8, 8).is_none());
    assert_eq!(device.stats().of(Op::Write).ops, 0, "nothing was done");
    now(&device, 8, 8).unwrap().unwrap();
    let full = now(&device, 8, 1).unwrap().unwrap_err();
    assert_eq!(full.kind(), ErrorKind::NoSpace);
    let stats = device.stats();
    let write = stats.of(Op::Write);
    assert_eq!((write.ops, write.bytes, write.errors), (2, 8, 1));
    *device.get_ref().panic_in.lock().unwrap() = Some(Op::Write);
    let fallen = now(&device, 8, 8).unwrap().unwrap_err();
    assert!(fallen.to_string().contains("told to fall"), "{fallen}");
    *device.get_ref().panic_in.lock().unwrap() = None;
    assert!(now(&device, 8, 8).is_none(), "what it left is not known");
    assert_eq!(write_error(&device).await, ErrorKind::Io);
}

#[tokio::test]
async fn what_is_written_to_lent_memory_counts_as_one_write() {
    let device = Device::open(Puppet::new(writable(CrashLevel::Flush)))
        .await
        .unwrap();
    let lend = |device: &Device<Puppet>| {
        let mut len = 0;
        let lent = device.lend_mut(8..16, WriteFlags::empty(), &mut |memory| {
            len += memory.len()
        });
        (lent, len)
    };
    assert!(matches!(lend(&device), (Some(Ok(())), 8)));
    assert!(matches!(lend(&device.read_only()), (None, 0)));
    let stats = device.stats();
    let write = stats.of(Op::Write);
    assert_eq!((write.ops, write.bytes, write.errors), (1, 8, 0));
    *device.get_ref().panic_in.lock().unwrap() = Some(Op::Write);
    let fallen = lend(&device).0.unwrap().unwrap_err();
    assert!(fallen.to_string().contains("told to fall"), "{fallen}");
    *device.get_ref().panic_in.lock().unwrap() = None;
    assert!(
        matches!(lend(&device), (None, 0)),
        "what it left is not known"
    );
}

async fn write_error(device: &Device<Puppet>) -> ErrorKind {
    write(device).await.unwrap_err().kind()
}

/// Panics when it has lent what lies behind the first byte, and before it lends that.
struct Lender;

impl Engine for Lender {
    fn geometry(&self) -> Geometry {
        Geometry::read_only(4096)
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, _: u64) -> Result {
        buf.fill(1);
        Ok(())
    }
    fn lend(&self, range: Range<u64>, to: &mut dyn FnMut(&[u8])) {
        if range.start > 0 {
            to(&[2; 8]);
        }
        panic!("after all");
    }
}

#[tokio::test]
async fn what_is_lent_before_a_panic_is_lent_and_not_read_again() {
    let device = Device::open(Lender).await.unwrap();
    let mut calls = 0;
    assert!(!device.lend(0..8, &mut |_| calls += 1));
    assert!(device.lend(8..16, &mut |_| calls += 1));
    assert_eq!(calls, 1);
    assert_eq!(device.stats().of(Op::Read).ops, 1);
    let own = catch_unwind(AssertUnwindSafe(|| {
        device.lend(8..16, &mut |_| panic!("the caller's"))
    }));
    let text = own.unwrap_err().downcast::<&str>().unwrap();
    assert_eq!(*text, "the caller's");
}

#[tokio::test]
async fn asking_for_a_loan_in_vain_does_not_change_what_is_sampled() {
    let device = Device::open(Memory::new(1 << 20)).await.unwrap();
    let count = |device: &Device<Memory>| -> u64 {
        let stats = device.stats();
        stats.of(Op::Read).latency.iter().map(|(_, n)| n).sum()
    };
    for _ in 0..320 {
        assert!(!device.lend(0..512, &mut |_| ()), "never written");
        let mut page = [0; 512];
        device.read(&mut ReadBuf::new(&mut page), 0).await.unwrap();
    }
    assert_eq!(count(&device), 320);
}

#[tokio::test]
async fn a_panic_in_a_read_fails_that_read_alone() {
    let device = Device::open(Puppet::new(writable(CrashLevel::Flush)))
        .await
        .unwrap();
    *device.get_ref().panic_in.lock().unwrap() = Some(Op::Read);
    let error = read(&device).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("told to fall"), "{error}");
    *device.get_ref().panic_in.lock().unwrap() = None;
    read(&device).await.unwrap();
    write(&device).await.unwrap();
    device.flush().await.unwrap();
}

#[tokio::test]
async fn after_a_panic_in_a_mutation_or_flush_nothing_is_written_or_vouched_for() {
    for op in [Op::Write, Op::Flush] {
        let device = Device::open(Puppet::new(writable(CrashLevel::Flush)))
            .await
            .unwrap();
        *device.get_ref().panic_in.lock().unwrap() = Some(op);
        let fallen = match op {
            Op::Write => write(&device).await,
            _ => device.flush().await,
        };
        assert_eq!(fallen.unwrap_err().kind(), ErrorKind::Io);
        *device.get_ref().panic_in.lock().unwrap() = None;
        let flushes = device.get_ref().flushes.load(Ordering::Relaxed);
        for result in [
            write(&device).await,
            device.flush().await,
            device.write_zeroes(0..8, WriteFlags::empty()).await,
        ] {
            assert!(result.unwrap_err().to_string().contains("reopen"), "{op:?}");
        }
        assert_eq!(device.get_ref().flushes.load(Ordering::Relaxed), flushes);
        read(&device).await.unwrap();
        assert_eq!(device.close().await.unwrap_err().kind(), ErrorKind::Io);
    }
}

#[tokio::test]
async fn a_read_only_handle_shows_and_refuses() {
    let device = Device::open(Memory::new(4096)).await.unwrap();
    let view = device.read_only();
    assert!(view.geometry().is_read_only() && !device.geometry().is_read_only());
    assert_eq!(view.geometry().discard, Discard::None);
    for result in [
        view.write(&WriteBuf::new(&[1]), 0, WriteFlags::empty())
            .await,
        view.discard(0..4096).await,
        view.write_zeroes(0..1, WriteFlags::empty()).await,
    ] {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnly);
    }
    view.flush().await.unwrap();
}

#[tokio::test]
async fn a_resize_is_told_to_every_handle() {
    let device = Device::open(Memory::new(4096)).await.unwrap();
    let view = device.read_only();
    let waits = {
        let (device, view) = (device.clone(), view.clone());
        let (seen, view_seen) = (device.geometry(), view.geometry());
        tokio::spawn(async move { tokio::join!(device.changed(seen), view.changed(view_seen)) })
    };
    tokio::task::yield_now().await;
    device.get_ref().resize(8192);
    let (told, view_told) = waits.await.unwrap();
    assert_eq!((told.size, view_told.size), (8192, 8192));
    assert!(view_told.is_read_only());
    let buf = WriteBuf::new(&[1; 4096]);
    device.write(&buf, 4096, WriteFlags::empty()).await.unwrap();
}

#[tokio::test]
async fn requests_are_counted_by_operation() {
    let device = Device::open(Puppet::new(writable(CrashLevel::Flush)))
        .await
        .unwrap();
    for _ in 0..3 {
        write(&device).await.unwrap();
    }
    read(&device).await.unwrap();
    device
        .read(&mut ReadBuf::new(&mut [0; 8]), 4090)
        .await
        .unwrap_err();
    device.flush().await.unwrap();
    let stats = device.stats();
    let counts = |op| {
        let of = stats.of(op);
        (of.ops, of.bytes, of.errors)
    };
    assert_eq!(counts(Op::Write), (3, 24, 0));
    assert_eq!(counts(Op::Read), (2, 8, 1));
    assert_eq!(counts(Op::Flush), (1, 0, 0));
    assert_eq!(counts(Op::Discard), (0, 0, 0));
    // Each write waited once, so each is in the histogram.
    let timed: u64 = stats.of(Op::Write).latency.iter().map(|(_, n)| n).sum();
    assert_eq!(timed, 3);
    assert!(stats.of(Op::Write).latency.quantile(1.0) > Some(Duration::ZERO));
}
