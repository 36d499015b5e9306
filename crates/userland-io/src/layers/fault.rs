//! A layer that makes operations fail.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::Operation;
use crate::{
    Checked, Engine, Error, Extents, Filter, Layer, ReadBuf, Result, WriteBuf, WriteFlags,
};

/// Puts a [`FaultEngine`] over an engine: operations that match are answered with an error.
///
/// Without further words every operation matches, always. Each word narrows that down; several
/// rules are several layers. The error comes before anything below is touched, or, with
/// [`late`](Self::late), after the engine below has done all of it (as when a reply is lost).
///
/// What fails follows from the seed and the order in which matching requests arrive, and from nothing else.
///
/// The edge above reads some answers its own way: a `write_zeroes` that is not supported (`EOPNOTSUPP`) is
/// written out instead. [`close`](Engine::close) never fails here.
///
/// ```
/// use userland_io::layers::{Fault, Operation};
/// use userland_io::{EngineExt, engines::Memory, errno};
///
/// // One write in a hundred into the first MiB finds no space, but never the first thousand.
/// let fault = Fault::new(errno::ENOSPC)
///     .on(Operation::Write)
///     .range(0..1 << 20)
///     .after(1000)
///     .probability(0.01)
///     .seed(42);
/// let handle = fault.handle();
/// let disk = Memory::new(1 << 30).layer(fault)?;
/// assert_eq!(handle.injected(), 0);
/// # let _ = disk;
/// # Ok::<(), userland_io::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Fault {
    errno: i32,
    /// A bit per operation; 0 is all.
    operations: u16,
    range: Option<Range<u64>>,
    probability: f64,
    after: u64,
    times: u64,
    seed: u64,
    late: bool,
    handle: FaultHandle,
}

impl Fault {
    /// Everything fails with this Linux errno (see [`errno`](crate::errno)).
    pub fn new(errno: i32) -> Self {
        Fault {
            errno,
            operations: 0,
            range: None,
            probability: 1.0,
            after: 0,
            times: u64::MAX,
            seed: 0,
            late: false,
            handle: FaultHandle::default(),
        }
    }

    /// Only this operation fails; said again, that one too.
    pub fn on(mut self, operation: Operation) -> Self {
        self.operations |= 1 << operation as u16;
        self
    }

    /// Only requests that touch these bytes fail. A flush touches none.
    pub fn range(mut self, range: Range<u64>) -> Self {
        self.range = Some(range);
        self
    }

    /// Each matching request fails with this probability, from 0 to 1, drawn from the [`seed`](Self::seed).
    pub fn probability(mut self, probability: f64) -> Self {
        self.probability = probability;
        self
    }

    /// The first `count` matching requests pass.
    pub fn after(mut self, count: u64) -> Self {
        self.after = count;
        self
    }

    /// No more than `count` requests fail.
    pub fn times(mut self, count: u64) -> Self {
        self.times = count;
        self
    }

    /// One request fails, and no more.
    pub fn once(self) -> Self {
        self.times(1)
    }

    /// Decides which requests fail where the [`probability`](Self::probability) is below 1.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// The request is carried out below, and then answered with the error all the same.
    pub fn late(mut self) -> Self {
        self.late = true;
        self
    }

    /// What switches the faults off and on while the disk is in use, and counts them.
    pub fn handle(&self) -> FaultHandle {
        self.handle.clone()
    }
}

/// A switch for a [`Fault`] layer, and its count.
#[derive(Clone, Debug, Default)]
pub struct FaultHandle(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    off: AtomicBool,
    /// Matching requests so far.
    seen: AtomicU64,
    injected: AtomicU64,
}

impl FaultHandle {
    /// Lets everything pass from here on, or not. What passes while it is off does not count as seen.
    pub fn set_enabled(&self, enabled: bool) {
        self.0.off.store(!enabled, Ordering::Release);
    }

    /// How many requests were answered with the error.
    pub fn injected(&self) -> u64 {
        self.0.injected.load(Ordering::Acquire)
    }
}

impl<E: Engine> Layer<E> for Fault {
    type Engine = FaultEngine<E>;

    fn layer(self, lower: Checked<E>) -> Result<Self::Engine> {
        Ok(FaultEngine { lower, fault: self })
    }
}

/// What [`Fault`] makes.
#[derive(Debug)]
pub struct FaultEngine<E> {
    lower: Checked<E>,
    fault: Fault,
}

impl Fault {
    /// True if this request is one that fails.
    fn strikes(&self, operation: Operation, range: Option<&Range<u64>>) -> bool {
        if self.operations != 0 && self.operations & (1 << operation as u16) == 0 {
            return false;
        }
        if let Some(rule) = &self.range {
            let touches = |r: &Range<u64>| r.start < rule.end && rule.start < r.end;
            if !range.is_some_and(touches) {
                return false;
            }
        }
        let shared = &self.handle.0;
        if shared.off.load(Ordering::Acquire) {
            return false;
        }
        let index = shared.seen.fetch_add(1, Ordering::Relaxed);
        if index < self.after || !self.drawn(index) {
            return false;
        }
        let one_more = |injected| (injected < self.times).then_some(injected + 1);
        shared
            .injected
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, one_more)
            .is_ok()
    }

    /// The draw of the `index`th matching request. It depends on nothing else, so no state is shared.
    fn drawn(&self, index: u64) -> bool {
        self.probability >= 1.0 || {
            let mixed = self.seed ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            fastrand::Rng::with_seed(mixed).f64() < self.probability
        }
    }
}

impl<E: Engine> FaultEngine<E> {
    async fn inject(
        &self,
        operation: Operation,
        range: Option<Range<u64>>,
        below: impl Future<Output = Result> + Send,
    ) -> Result {
        match self.fault.strikes(operation, range.as_ref()) {
            false => below.await,
            true => {
                if self.fault.late {
                    below.await?;
                }
                Err(Error::from_errno(self.fault.errno))
            }
        }
    }
}

fn place(offset: u64, len: usize) -> Option<Range<u64>> {
    Some(offset..offset.saturating_add(len as u64))
}

impl<E: Engine> Filter for FaultEngine<E> {
    type Lower = E;

    fn lower(&self) -> &Checked<E> {
        &self.lower
    }

    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        let range = place(offset, buf.len());
        let below = self.lower.read(buf, offset);
        self.inject(Operation::Read, range, below).await
    }

    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        let below = self.lower.write(buf, offset, flags);
        let range = place(offset, buf.len());
        self.inject(Operation::Write, range, below).await
    }

    async fn flush(&self) -> Result {
        self.inject(Operation::Flush, None, self.lower.flush())
            .await
    }

    async fn discard(&self, range: Range<u64>) -> Result {
        let below = self.lower.discard(range.clone());
        self.inject(Operation::Discard, Some(range), below).await
    }

    async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        let below = self.lower.write_zeroes(range.clone(), flags);
        self.inject(Operation::WriteZeroes, Some(range), below)
            .await
    }

    async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        let below = self.lower.extents(range.clone(), out);
        self.inject(Operation::Extents, Some(range), below).await
    }

    async fn status(&self, context: &str, range: Range<u64>, out: &mut Extents<u64>) -> Result {
        let below = self.lower.status(context, range.clone(), out);
        self.inject(Operation::Status, Some(range), below).await
    }

    async fn prefetch(&self, range: Range<u64>) -> Result {
        let below = self.lower.prefetch(range.clone());
        self.inject(Operation::Prefetch, Some(range), below).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engines::Memory;
    use crate::{EngineExt, errno};

    async fn write(disk: &impl Engine, at: u64) -> Result {
        disk.write(&WriteBuf::new(&[7; 512]), at, WriteFlags::empty())
            .await
    }

    async fn byte(disk: &impl Engine, at: u64) -> u8 {
        let mut byte = [0xee];
        disk.read(&mut ReadBuf::new(&mut byte), at).await.unwrap();
        byte[0]
    }

    fn disk(fault: Fault) -> FaultEngine<Memory> {
        Memory::new(1 << 20).layer(fault).unwrap()
    }

    #[tokio::test]
    async fn the_error_comes_before_anything_below_or_late_after_all_of_it() {
        for (late, left) in [(false, 0), (true, 7)] {
            let mut fault = Fault::new(errno::ENOSPC).on(Operation::Write);
            if late {
                fault = fault.late();
            }
            let disk = disk(fault);
            assert_eq!(write(&disk, 0).await.unwrap_err().errno(), errno::ENOSPC);
            assert_eq!(byte(&disk, 0).await, left);
        }
    }

    #[tokio::test]
    async fn only_requests_that_touch_the_range_fail() {
        let disk = disk(Fault::new(errno::EIO).range(4096..8192));
        for (at, ok) in [(3584, true), (3585, false), (8191, false), (8192, true)] {
            assert_eq!(write(&disk, at).await.is_ok(), ok, "{at}");
        }
        assert!(Engine::flush(&disk).await.is_ok());
        assert!(Engine::discard(&disk, 0..1 << 20).await.is_err());
    }

    #[tokio::test]
    async fn the_first_pass_and_no_more_than_so_many_fail() {
        let fault = Fault::new(errno::EIO)
            .on(Operation::Write)
            .after(2)
            .times(3);
        let handle = fault.handle();
        let disk = disk(fault);
        let mut failed = Vec::new();
        for _ in 0..7 {
            byte(&disk, 0).await;
            failed.push(write(&disk, 0).await.is_err());
        }
        assert_eq!(failed, [false, false, true, true, true, false, false]);
        assert_eq!(handle.injected(), 3);
    }

    #[tokio::test]
    async fn a_seed_fails_the_same_requests_again() {
        let run = |seed| async move {
            let disk = disk(Fault::new(errno::EIO).probability(0.3).seed(seed));
            let mut failed = Vec::new();
            for _ in 0..2000 {
                failed.push(write(&disk, 0).await.is_err());
            }
            failed
        };
        let first = run(1).await;
        assert_eq!(first, run(1).await);
        assert_ne!(first, run(2).await);
        let share = first.iter().filter(|&&failed| failed).count();
        assert!((500..700).contains(&share), "{share} of 2000");
    }

    #[tokio::test]
    async fn it_can_be_switched_off_and_on() {
        let fault = Fault::new(errno::EIO);
        let handle = fault.handle();
        let disk = disk(fault);
        handle.set_enabled(false);
        assert!(write(&disk, 0).await.is_ok());
        handle.set_enabled(true);
        assert!(write(&disk, 0).await.is_err());
        assert_eq!(handle.injected(), 1);
    }

    #[test]
    fn two_operations_and_no_third() {
        let fault = Fault::new(errno::EIO)
            .on(Operation::Read)
            .on(Operation::Flush);
        let struck: Vec<_> = Operation::ALL
            .into_iter()
            .filter(|&op| fault.strikes(op, Some(&(0..1))))
            .collect();
        assert_eq!(struck, [Operation::Read, Operation::Flush]);
    }
}
