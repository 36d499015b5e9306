//! A layer that counts what goes through it.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Operation;
use crate::{Checked, Engine, Extents, Filter, Layer, ReadBuf, Result, WriteBuf, WriteFlags};

/// Counters, and the layer that feeds them: a clone goes into the stack, and the other one is read.
///
/// Several layers may share the counters; they then add up. What counts is a request that was answered, when it
/// is: one that was dropped half-way does not. There are no locks, so a look at several counters is no
/// snapshot of one moment.
///
/// ```
/// use userland_io::layers::{Operation, Stats};
/// use userland_io::{Device, EngineExt, ReadBuf, engines::Null};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> userland_io::Result {
/// let stats = Stats::new();
/// let disk = Device::open(Null::new(1 << 20).layer(stats.clone())?).await?;
/// disk.read(&mut ReadBuf::new(&mut [0; 512]), 0).await?;
/// let reads = stats.get(Operation::Read);
/// assert_eq!((reads.requests, reads.bytes, reads.errors), (1, 512, 0));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Stats {
    counters: Arc<[Counter; Operation::ALL.len()]>,
    name: Option<Arc<str>>,
}

/// Each on a cache line of its own: reads and writes often run on different cores.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Counter {
    requests: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
}

/// What one operation came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// The requests that were answered.
    pub requests: u64,
    /// The bytes of those that succeeded.
    pub bytes: u64,
    /// The requests among them that failed.
    pub errors: u64,
}

impl Stats {
    /// Counters at zero.
    pub fn new() -> Self {
        Stats::default()
    }

    /// The counts go to the log under `name` when the layer is closed (target `userland_io::stats`, level INFO).
    pub fn log(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// What `operation` came to so far.
    pub fn get(&self, operation: Operation) -> Count {
        let counter = &self.counters[operation as usize];
        Count {
            requests: counter.requests.load(Ordering::Relaxed),
            bytes: counter.bytes.load(Ordering::Relaxed),
            errors: counter.errors.load(Ordering::Relaxed),
        }
    }

    fn note(&self, operation: Operation, bytes: u64, result: Result) -> Result {
        let counter = &self.counters[operation as usize];
        match &result {
            Ok(()) => counter.bytes.fetch_add(bytes, Ordering::Relaxed),
            Err(_) => counter.errors.fetch_add(1, Ordering::Relaxed),
        };
        counter.requests.fetch_add(1, Ordering::Relaxed);
        result
    }
}

/// One line with each operation that happened: `read 3 (1536 bytes), flush 1 (1 failed)`.
impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        for op in Operation::ALL {
            let Count {
                requests,
                bytes,
                errors,
            } = self.get(op);
            if requests == 0 {
                continue;
            }
            if !first {
                f.write_str(", ")?;
            }
            first = false;
            write!(f, "{op} {requests}")?;
            match (bytes, errors) {
                (0, 0) => {}
                (bytes, 0) => write!(f, " ({bytes} bytes)")?,
                (0, errors) => write!(f, " ({errors} failed)")?,
                (bytes, errors) => write!(f, " ({bytes} bytes, {errors} failed)")?,
            }
        }
        match first {
            true => f.write_str("no requests"),
            false => Ok(()),
        }
    }
}

impl<E: Engine> Layer<E> for Stats {
    type Engine = StatsEngine<E>;

    fn layer(self, lower: Checked<E>) -> Result<Self::Engine> {
        Ok(StatsEngine { lower, stats: self })
    }
}

/// What [`Stats`] makes.
#[derive(Debug)]
pub struct StatsEngine<E> {
    lower: Checked<E>,
    stats: Stats,
}

fn len(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

impl<E: Engine> Filter for StatsEngine<E> {
    type Lower = E;

    fn lower(&self) -> &Checked<E> {
        &self.lower
    }

    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        let len = buf.len() as u64;
        let result = self.lower.read(buf, offset).await;
        self.stats.note(Operation::Read, len, result)
    }

    fn lend(&self, range: Range<u64>, to: &mut dyn FnMut(&[u8])) {
        let len = len(&range);
        let mut lent = false;
        self.lower.lend(range, &mut |bytes| {
            lent = true;
            to(bytes);
        });
        if lent {
            let _ = self.stats.note(Operation::Read, len, Ok(()));
        }
    }

    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        let len = buf.len() as u64;
        let result = self.lower.write(buf, offset, flags).await;
        self.stats.note(Operation::Write, len, result)
    }

    fn write_nowait(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Option<Result> {
        let result = self.lower.write_nowait(buf, offset, flags)?;
        Some(self.stats.note(Operation::Write, buf.len() as u64, result))
    }

    fn lend_mut(
        &self,
        range: Range<u64>,
        flags: WriteFlags,
        from: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Result> {
        let len = len(&range);
        let result = self.lower.lend_mut(range, flags, from)?;
        Some(self.stats.note(Operation::Write, len, result))
    }

    async fn flush(&self) -> Result {
        let result = self.lower.flush().await;
        self.stats.note(Operation::Flush, 0, result)
    }

    async fn discard(&self, range: Range<u64>) -> Result {
        let len = len(&range);
        let result = self.lower.discard(range).await;
        self.stats.note(Operation::Discard, len, result)
    }

    async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        let len = len(&range);
        let result = self.lower.write_zeroes(range, flags).await;
        self.stats.note(Operation::WriteZeroes, len, result)
    }

    async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        let len = len(&range);
        let result = self.lower.extents(range, out).await;
        self.stats.note(Operation::Extents, len, result)
    }

    async fn status(&self, context: &str, range: Range<u64>, out: &mut Extents<u64>) -> Result {
        let len = len(&range);
        let result = self.lower.status(context, range, out).await;
        self.stats.note(Operation::Status, len, result)
    }

    async fn prefetch(&self, range: Range<u64>) -> Result {
        let len = len(&range);
        let result = self.lower.prefetch(range).await;
        self.stats.note(Operation::Prefetch, len, result)
    }

    async fn close(&self) -> Result {
        let result = self.lower.close().await;
        if let Some(name) = &self.stats.name {
            tracing::info!(target: "userland_io::stats", "{name}: {}", self.stats);
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::EngineExt;
    use crate::engines::Memory;
    use crate::layers::Fault;

    #[tokio::test]
    async fn requests_bytes_and_errors_are_told_apart() {
        let stats = Stats::new();
        assert_eq!(stats.to_string(), "no requests");
        let disk = Memory::new(8192)
            .layer(Fault::new(crate::errno::EIO).on(Operation::Write).after(2))
            .unwrap()
            .layer(stats.clone())
            .unwrap();
        let flags = WriteFlags::empty();
        for _ in 0..3 {
            let _ = Engine::write(&disk, &WriteBuf::new(&[1; 100]), 0, flags).await;
        }
        Engine::read(&disk, &mut ReadBuf::new(&mut [0; 512]), 0)
            .await
            .unwrap();
        Engine::discard(&disk, 0..4096).await.unwrap();
        Engine::write_zeroes(&disk, 0..10, flags).await.unwrap();
        Engine::extents(&disk, 0..7, &mut Extents::new(1))
            .await
            .unwrap();
        Engine::prefetch(&disk, 0..9).await.unwrap();
        Engine::flush(&disk).await.unwrap();
        assert_eq!(
            stats.to_string(),
            "read 1 (512 bytes), write 3 (200 bytes, 1 failed), flush 1, discard 1 (4096 bytes), \
             write_zeroes 1 (10 bytes), extents 1 (7 bytes), prefetch 1 (9 bytes)"
        );
    }

    #[tokio::test]
    async fn what_does_not_wait_counts_if_it_was_done() {
        let stats = Stats::new();
        let disk = Memory::new(8192).layer(stats.clone()).unwrap();
        let lend = || Engine::lend(&disk, 0..512, &mut |_| ());
        lend();
        let page = WriteBuf::new(&[1; 512]);
        let written = Engine::write_nowait(&disk, &page, 0, WriteFlags::empty());
        written.unwrap().unwrap();
        let outside = Engine::write_nowait(&disk, &page, 8000, WriteFlags::empty());
        assert!(outside.is_none());
        lend();
        let lend_mut = |range| Engine::lend_mut(&disk, range, WriteFlags::empty(), &mut |_| ());
        lend_mut(0..1024).unwrap().unwrap();
        assert!(lend_mut(8000..9024).is_none());
        assert_eq!(
            stats.to_string(),
            "read 1 (512 bytes), write 2 (1536 bytes)"
        );
    }

    #[tokio::test]
    async fn shared_counters_add_up() {
        let stats = Stats::new();
        for _ in 0..2 {
            let disk = Memory::new(512).layer(stats.clone()).unwrap();
            Engine::flush(&disk).await.unwrap();
        }
        assert_eq!(stats.get(Operation::Flush).requests, 2);
    }
}
