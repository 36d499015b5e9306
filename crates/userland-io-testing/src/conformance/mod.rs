//! The suite for any engine, wherever it keeps its bytes.
//!
//! One line makes a test of each check:
//!
//! ```
//! # use userland_io::{CrashLevel, Engine, Geometry, ReadBuf, Result};
//! # struct Ramp;
//! # impl Engine for Ramp {
//! #     fn geometry(&self) -> Geometry { Geometry::read_only(100) }
//! #     async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
//! #         let bytes: Vec<u8> = (offset..).take(buf.len()).map(|at| at as u8).collect();
//! #         buf.copy_from(&bytes);
//! #         Ok(())
//! #     }
//! # }
//! userland_io_testing::conformance!(ramp, async || Ok(Ramp));
//! ```
//!
//! Each check opens the engine by that expression. It starts from whatever the disk holds, not from zeroes, and
//! overwrites it. An engine that needs a runtime calls [`all`] in a test of that runtime instead.
//! Crashes are not simulated here: for an engine that keeps its bytes on another one, [`Torture`](crate::Torture) does that.

mod claims;
mod clients;
mod model;
mod resize;

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;

use userland_io::{Checked, Engine, ErrorKind, ReadBuf, Result, WriteBuf, WriteFlags};

use crate::check::{Clause, Verdict};

pub use claims::{discard_follows_its_claim, extents_agree_with_content, zeroes_read_as_zeroes};
pub use clients::{abandoned_requests_never_act_late, concurrent_clients_see_registers};
pub use model::every_operation_reaches_its_bytes;
pub use resize::resizing_is_noticed;

/// Makes a test of each check of the suite, in a module of this name. The expression is an async closure, or a
/// function, that opens the engine: `async || Ok(MyEngine::new())`.
#[macro_export]
macro_rules! conformance {
    ($name:ident, $open:expr) => {
        mod $name {
            #[allow(unused_imports)]
            use super::*;
            $crate::conformance!(@ $open,
                geometry_is_truthful every_operation_reaches_its_bytes concurrent_clients_see_registers
                abandoned_requests_never_act_late extents_agree_with_content zeroes_read_as_zeroes
                discard_follows_its_claim);
        }
    };
    (@ $open:expr, $($check:ident)*) => {
        $(
            #[test]
            fn $check() {
                $crate::conformance::block_on($crate::conformance::$check($open))
                    .unwrap_or_else(|verdict| panic!("{verdict}"));
            }
        )*
    };
}

/// The whole suite, for an engine that needs a runtime of its own.
///
/// # Errors
/// The first check's verdict that is not in order.
pub async fn all<E: Engine>(open: impl AsyncFn() -> Result<E>) -> Result<(), Verdict> {
    geometry_is_truthful(&open).await?;
    every_operation_reaches_its_bytes(&open).await?;
    concurrent_clients_see_registers(&open).await?;
    abandoned_requests_never_act_late(&open).await?;
    extents_agree_with_content(&open).await?;
    zeroes_read_as_zeroes(&open).await?;
    discard_follows_its_claim(&open).await
}

/// The geometry is in order and stays as it is; both ends of the disk can be read; a disk that says it is read-only
/// refuses every mutation, and one that does not accepts them; what is claimed is there.
///
/// # Errors
/// What is not so.
pub async fn geometry_is_truthful<E: Engine>(
    open: impl AsyncFn() -> Result<E>,
) -> Result<(), Verdict> {
    let disk = opened(&open).await?;
    let geometry = disk.get_ref().geometry();
    require(disk.get_ref().geometry() == geometry, || {
        "the geometry differs from one call to the next".into()
    })?;
    if geometry.size == 0 {
        return Ok(());
    }
    let block = u64::from(geometry.logical_block_size);
    let last = (geometry.size - 1) / block * block;
    for (at, end) in [(0, block.min(geometry.size)), (last, geometry.size)] {
        let bytes = read(&disk, at, (end - at) as usize).await?;
        let write = write(&disk, at, &bytes).await;
        match geometry.is_read_only() {
            true => require(is(&write, ErrorKind::ReadOnly), || {
                format!("the disk is read-only, but a write answers {write:?}")
            })?,
            false => must(&format!("a write of {at}..{end}"), write)?,
        }
        must("a flush", disk.flush().await)?;
        must("a prefetch", disk.prefetch(at..end).await)?;
    }
    let beyond = disk
        .read(&mut ReadBuf::new(&mut [0; 2]), geometry.size - 1)
        .await;
    require(is(&beyond, ErrorKind::OutOfRange), || {
        format!("a read beyond the end answers {beyond:?}")
    })?;
    finish(disk).await
}

/// What was written is there after the disk was closed, if its claim says that anything stays. Not part of
/// [`all`]: `open` must open the same disk each time.
///
/// # Errors
/// What is not so.
pub async fn close_keeps_what_was_written<E: Engine>(
    open: impl AsyncFn() -> Result<E>,
) -> Result<(), Verdict> {
    let disk = opened(&open).await?;
    let geometry = disk.geometry();
    let len = geometry.size.min(64 << 10) as usize;
    let before = read(&disk, 0, len).await?;
    if geometry.is_read_only() || geometry.crash == userland_io::CrashLevel::None {
        return finish(disk).await;
    }
    let after: Vec<u8> = before.iter().map(|byte| !byte).collect();
    must("a write", write(&disk, 0, &after).await)?;
    finish(disk).await?;
    let disk = opened(&open).await?;
    let now = read(&disk, 0, len).await?;
    if let Some(at) = (0..len).find(|&at| now[at] != after[at]) {
        let what = format!(
            "byte {at} was {:#04x} when the disk was closed, and is {:#04x} when it is opened again",
            after[at], now[at]
        );
        return Err(Verdict::new(Clause::Flush, what));
    }
    finish(disk).await
}

/// Runs a future to its end on this thread.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut cx = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut cx) {
            Poll::Ready(out) => return out,
            Poll::Pending => std::thread::park(),
        }
    }
}

async fn opened<E: Engine>(open: &impl AsyncFn() -> Result<E>) -> Result<Checked<E>, Verdict> {
    let engine = open().await;
    let engine = engine.map_err(|e| broken(format!("the disk cannot be opened: {e}")))?;
    Checked::new(engine).map_err(|error| broken(error.to_string()))
}

async fn finish<E: Engine>(disk: Checked<E>) -> Result<(), Verdict> {
    must("close", disk.close().await)
}

async fn write<E: Engine>(disk: &Checked<E>, at: u64, bytes: &[u8]) -> Result {
    let none = WriteFlags::empty();
    disk.write(&WriteBuf::new(bytes), at, none).await
}

/// Reads, and sees to it that all of the buffer was filled.
async fn read<E: Engine>(disk: &Checked<E>, at: u64, len: usize) -> Result<Vec<u8>, Verdict> {
    let world = crate::sim::World::new(at ^ len as u64);
    let (mut bytes, pattern) = crate::torture::desk::unread(&world, len);
    let result = disk.read(&mut ReadBuf::new(&mut bytes), at).await;
    must(&format!("a read of {at}..{}", at + len as u64), result)?;
    match crate::torture::desk::left_alone(&bytes, pattern) {
        None => Ok(bytes),
        Some(hole) => Err(broken(format!(
            "a read of {len} bytes from {at} did not fill its buffer: not at {}",
            at + hole as u64
        ))),
    }
}

fn is(result: &Result, kind: ErrorKind) -> bool {
    matches!(result, Err(error) if error.kind() == kind)
}

fn must(what: &str, result: Result) -> Result<(), Verdict> {
    result.map_err(|error| broken(format!("{what} failed: {error}")))
}

fn require(holds: bool, what: impl FnOnce() -> String) -> Result<(), Verdict> {
    match holds {
        true => Ok(()),
        false => Err(broken(what())),
    }
}

fn broken(what: String) -> Verdict {
    Verdict::new(Clause::Operation, what)
}
