//! A layer that makes operations take longer.

use std::ops::Range;
use std::time::Duration;

use super::Operation;
use crate::{Checked, Engine, Extents, Filter, Layer, ReadBuf, Result, WriteBuf, WriteFlags};

/// Puts a [`DelayEngine`] over an engine: each operation first waits as long as is said here, then goes through.
///
/// Requests wait side by side: at depth 10 a read delay of 5 ms gives 2000 reads a second. An operation of
/// which nothing is said does not wait. The waiting is [`tokio::time::sleep`]'s: it needs a tokio runtime with
/// its timer enabled, and is rounded up to its millisecond.
///
/// ```
/// use std::time::Duration;
/// use userland_io::{EngineExt, engines::Memory, layers::{Delay, Operation}};
///
/// let disk = Memory::new(1 << 20).layer(
///     Delay::new()
///         .read(Duration::from_millis(5))
///         .on(Operation::Flush, Duration::from_millis(20)),
/// )?;
/// # let _ = disk;
/// # Ok::<(), userland_io::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Delay {
    times: [Duration; Operation::ALL.len()],
}

impl Delay {
    /// Nothing waits yet.
    pub const fn new() -> Self {
        Delay {
            times: [Duration::ZERO; Operation::ALL.len()],
        }
    }

    /// How long every operation waits.
    pub const fn all(time: Duration) -> Self {
        Delay {
            times: [time; Operation::ALL.len()],
        }
    }

    /// How long `operation` waits.
    pub const fn on(mut self, operation: Operation, time: Duration) -> Self {
        self.times[operation as usize] = time;
        self
    }

    /// How long reads wait.
    pub const fn read(self, time: Duration) -> Self {
        self.on(Operation::Read, time)
    }

    /// How long writes wait.
    pub const fn write(self, time: Duration) -> Self {
        self.on(Operation::Write, time)
    }

    /// How long flushes wait.
    pub const fn flush(self, time: Duration) -> Self {
        self.on(Operation::Flush, time)
    }
}

impl<E: Engine> Layer<E> for Delay {
    type Engine = DelayEngine<E>;

    fn layer(self, lower: Checked<E>) -> Result<Self::Engine> {
        Ok(DelayEngine { lower, delay: self })
    }
}

/// What [`Delay`] makes.
#[derive(Debug)]
pub struct DelayEngine<E> {
    lower: Checked<E>,
    delay: Delay,
}

impl<E> DelayEngine<E> {
    async fn wait(&self, operation: Operation) {
        let time = self.delay.times[operation as usize];
        if !time.is_zero() {
            tokio::time::sleep(time).await;
        }
    }
}

impl<E: Engine> Filter for DelayEngine<E> {
    type Lower = E;

    fn lower(&self) -> &Checked<E> {
        &self.lower
    }

    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        self.wait(Operation::Read).await;
        self.lower.read(buf, offset).await
    }

    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        self.wait(Operation::Write).await;
        self.lower.write(buf, offset, flags).await
    }

    async fn flush(&self) -> Result {
        self.wait(Operation::Flush).await;
        self.lower.flush().await
    }

    async fn discard(&self, range: Range<u64>) -> Result {
        self.wait(Operation::Discard).await;
        self.lower.discard(range).await
    }

    async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        self.wait(Operation::WriteZeroes).await;
        self.lower.write_zeroes(range, flags).await
    }

    async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        self.wait(Operation::Extents).await;
        self.lower.extents(range, out).await
    }

    async fn status(&self, context: &str, range: Range<u64>, out: &mut Extents<u64>) -> Result {
        self.wait(Operation::Status).await;
        self.lower.status(context, range, out).await
    }

    async fn prefetch(&self, range: Range<u64>) -> Result {
        self.wait(Operation::Prefetch).await;
        self.lower.prefetch(range).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{EngineExt, engines::Memory};
    use tokio::time::Instant;

    #[tokio::test(start_paused = true)]
    async fn each_operation_waits_its_own_time() {
        let time = |n: u64| Duration::from_millis(10 * n);
        let mut delay = Delay::new();
        for op in Operation::ALL {
            delay = delay.on(op, time(1 + op as u64));
        }
        let disk = Memory::new(4096).layer(delay).unwrap();
        let disk = &disk;
        let mut page = [0; 512];
        for op in Operation::ALL {
            let start = Instant::now();
            let flags = WriteFlags::empty();
            match op {
                Operation::Read => Engine::read(disk, &mut ReadBuf::new(&mut page), 0).await,
                Operation::Write => Engine::write(disk, &WriteBuf::new(&page), 0, flags).await,
                Operation::Flush => Engine::flush(disk).await,
                Operation::Discard => Engine::discard(disk, 0..4096).await,
                Operation::WriteZeroes => Engine::write_zeroes(disk, 0..512, flags).await,
                Operation::Extents => Engine::extents(disk, 0..512, &mut Extents::new(1)).await,
                Operation::Status => {
                    let _ = Engine::status(disk, "x:y", 0..512, &mut Extents::new(1)).await;
                    Ok(())
                }
                Operation::Prefetch => Engine::prefetch(disk, 0..512).await,
            }
            .unwrap();
            let took = start.elapsed();
            let wanted = time(1 + op as u64);
            assert!(took >= wanted && took < wanted + time(1), "{op}: {took:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn requests_wait_side_by_side() {
        let delay = Delay::new().read(Duration::from_millis(100));
        let disk = Memory::new(4096).layer(delay).unwrap();
        let start = Instant::now();
        let read = || async {
            let mut page = [0; 512];
            Engine::read(&disk, &mut ReadBuf::new(&mut page), 0).await
        };
        let (a, b, c) = tokio::join!(read(), read(), read());
        a.and(b).and(c).unwrap();
        assert!(start.elapsed() < Duration::from_millis(150));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_named_does_not_wait() {
        let disk = Memory::new(4096)
            .layer(Delay::new().write(Duration::from_secs(9)))
            .unwrap();
        let start = Instant::now();
        let mut page = [0; 512];
        Engine::read(&disk, &mut ReadBuf::new(&mut page), 0)
            .await
            .unwrap();
        assert_eq!(start.elapsed(), Duration::ZERO);
    }
}
