//! Blocking engines behind their pool: same bytes, same promises, whatever becomes of the futures.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::task::{Context, Waker};

use userland_io::{
    Blocking, BlockingEngine, CrashLevel, Engine, ErrorKind, ExtentKind, Extents, Features,
    Geometry, ReadBuf, Result, WriteBuf, WriteFlags,
};

/// A disk in memory that notes what it is asked, and can be told to stop in a write or to panic.
#[derive(Default)]
struct Noting {
    bytes: Mutex<Vec<u8>>,
    writes: AtomicUsize,
    flushed_after: Mutex<Vec<usize>>,
    gate: Mutex<Option<(Sender<()>, Receiver<()>)>>,
    panics: AtomicBool,
    closed: AtomicBool,
}

impl Noting {
    fn new(size: usize) -> Self {
        Noting {
            bytes: Mutex::new(vec![0; size]),
            ..Noting::default()
        }
    }
}

impl BlockingEngine for Noting {
    fn geometry(&self) -> Geometry {
        let size = self.bytes.lock().unwrap().len() as u64;
        let mut geometry = Geometry::writable(size, CrashLevel::Flush);
        geometry.features |= Features::EXTENTS;
        geometry
    }
    fn read(&self, buf: &mut [u8], offset: u64) -> Result {
        assert!(!self.panics.load(Ordering::SeqCst), "told to panic");
        buf.copy_from_slice(&self.bytes.lock().unwrap()[offset as usize..][..buf.len()]);
        Ok(())
    }
    fn write(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result {
        if flags.contains(WriteFlags::FUA) {
            return Err(ErrorKind::Invalid.into());
        }
        let gate = self.gate.lock().unwrap().take();
        if let Some((entered, leave)) = gate {
            entered.send(()).unwrap();
            leave.recv().unwrap();
        }
        self.bytes.lock().unwrap()[offset as usize..][..buf.len()].copy_from_slice(buf);
        self.writes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn flush(&self) -> Result {
        let writes = self.writes.load(Ordering::SeqCst);
        self.flushed_after.lock().unwrap().push(writes);
        Ok(())
    }
    fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        for at in range {
            let kind = match self.bytes.lock().unwrap()[at as usize] {
                0 => ExtentKind::Zero,
                _ => ExtentKind::Data,
            };
            out.push(1, kind);
        }
        Ok(())
    }
    fn close(&self) -> Result {
        self.flush()?;
        self.closed.store(true, Ordering::SeqCst);
        Ok(())
    }
}

async fn read(engine: &impl Engine, range: Range<usize>) -> Result<Vec<u8>> {
    let mut bytes = vec![0xaa; range.len()];
    let mut buf = ReadBuf::new(&mut bytes);
    engine.read(&mut buf, range.start as u64).await?;
    Ok(bytes)
}

fn is_pending<F: Future + ?Sized>(future: Pin<&mut F>) -> bool {
    future
        .poll(&mut Context::from_waker(Waker::noop()))
        .is_pending()
}

#[tokio::test]
async fn every_operation_reaches_the_engine_and_answers() {
    let disk = Blocking::new(Noting::new(64), 2).unwrap();
    let buf = WriteBuf::new(b"abc");
    disk.write(&buf, 10, WriteFlags::empty()).await.unwrap();
    assert_eq!(read(&disk, 9..14).await.unwrap(), b"\0abc\0");
    // Flags arrive: this engine refuses FUA.
    let refused = disk.write(&buf, 10, WriteFlags::FUA).await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Invalid);
    // What the engine leaves out is refused as the trait says.
    let zeroes = disk.write_zeroes(0..4, WriteFlags::empty()).await;
    assert_eq!(zeroes.unwrap_err().kind(), ErrorKind::Unsupported);
    let discard = disk.discard(0..4).await;
    assert_eq!(discard.unwrap_err().kind(), ErrorKind::Unsupported);
    // The cap of the list is kept.
    let mut out = Extents::new(2);
    disk.extents(0..64, &mut out).await.unwrap();
    let runs: Vec<_> = out.iter().map(|run| (run.len, run.kind)).collect();
    assert_eq!(runs, [(10, ExtentKind::Zero), (3, ExtentKind::Data)]);
    disk.close().await.unwrap();
    assert!(disk.get_ref().closed.load(Ordering::SeqCst));
}

#[tokio::test]
async fn flush_and_close_wait_for_a_write_whose_future_was_dropped() {
    for close in [false, true] {
        let engine = Noting::new(64);
        let ((entered, has_entered), (leave, may_leave)) = (channel(), channel());
        *engine.gate.lock().unwrap() = Some((entered, may_leave));
        let disk = Blocking::new(engine, 4).unwrap();
        {
            let buf = WriteBuf::new(b"late");
            let mut write = Box::pin(disk.write(&buf, 0, WriteFlags::empty()));
            assert!(is_pending(write.as_mut()));
            has_entered.recv().unwrap();
        }
        let mut ending: Pin<Box<dyn Future<Output = Result> + Send>> = match close {
            true => Box::pin(disk.close()),
            false => Box::pin(disk.flush()),
        };
        assert!(is_pending(ending.as_mut()));
        leave.send(()).unwrap();
        ending.await.unwrap();
        assert_eq!(*disk.get_ref().flushed_after.lock().unwrap(), [1]);
        assert_eq!(read(&disk, 0..4).await.unwrap(), b"late");
    }
}

#[tokio::test]
async fn a_panic_is_raised_where_the_request_is_awaited_and_the_next_is_served() {
    let disk = Arc::new(Blocking::new(Noting::new(64), 1).unwrap());
    disk.get_ref().panics.store(true, Ordering::SeqCst);
    for _ in 0..3 {
        let disk = disk.clone();
        let outcome = tokio::spawn(async move { read(&*disk, 0..4).await }).await;
        assert!(outcome.unwrap_err().is_panic());
    }
    disk.get_ref().panics.store(false, Ordering::SeqCst);
    assert_eq!(read(&*disk, 0..4).await.unwrap(), [0; 4]);
}

/// Eight tasks, each with 32 bytes of its own, write, drop requests at random points, flush and read.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn after_drops_at_random_points_each_byte_is_one_that_may_be() {
    let disk = Arc::new(Blocking::new(Noting::new(8 * 32), 3).unwrap());
    let mut tasks = Vec::new();
    for task in 0..8_usize {
        let disk = disk.clone();
        tasks.push(tokio::spawn(async move {
            let mut rng = fastrand::Rng::with_seed(task as u64);
            let at = task * 32;
            let mut may_be = vec![0_u8];
            for round in 1..=200_u8 {
                let bytes = [round; 32];
                let buf = WriteBuf::new(&bytes);
                if rng.bool() {
                    // Half-way dropped: old or new, and either until the next flush.
                    let mut write = Box::pin(disk.write(&buf, at as u64, WriteFlags::empty()));
                    for _ in 0..rng.u8(0..4) {
                        if !is_pending(write.as_mut()) {
                            break;
                        }
                        tokio::task::yield_now().await;
                    }
                    may_be.push(round);
                } else {
                    // A flush ends the dropped ones, so that the write after it is the last word.
                    disk.flush().await.unwrap();
                    disk.write(&buf, at as u64, WriteFlags::empty())
                        .await
                        .unwrap();
                    may_be = vec![round];
                }
                for byte in read(&*disk, at..at + 32).await.unwrap() {
                    assert!(may_be.contains(&byte), "{byte} is none of {may_be:?}");
                }
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
}
