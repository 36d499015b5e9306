//! A disk that changes its size while it is open.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use userland_io::{Engine, ErrorKind, ReadBuf, Result, WriteBuf, WriteFlags};

use super::{broken, is, must, opened, read, require, write};
use crate::check::Verdict;

/// For an engine whose size can change: `resize` is to give it a size. Growing and shrinking is
/// told to whoever waits in `changed`; bytes that stay keep their content; new ones can be written;
/// what lies beyond the end answers `OutOfRange`, also to a caller who has not heard of it yet.
///
/// # Errors
/// What is not so.
pub async fn resizing_is_noticed<E: Engine>(
    open: impl AsyncFn() -> Result<E>,
    resize: impl AsyncFn(&E, u64) -> Result,
) -> Result<(), Verdict> {
    let disk = opened(&open).await?;
    let geometry = disk.geometry();
    let block = u64::from(geometry.logical_block_size).max(512);
    let none = WriteFlags::empty();
    let first = (geometry.size / block * block).max(4 * block);
    let mut now = geometry;
    for (round, size) in [first + 4 * block, first - 2 * block, first, first + block]
        .into_iter()
        .enumerate()
    {
        let before_size = now.size;
        let kept = now.size.min(size).min(1 << 20) as usize;
        let before = read(&disk, 0, kept).await?;
        {
            let woken = Arc::new(Woken::default());
            let waker = Waker::from(woken.clone());
            let mut cx = Context::from_waker(&waker);
            let mut changed = pin!(disk.changed(now));
            require(changed.as_mut().poll(&mut cx).is_pending(), || {
                "`changed` answers before anything has changed".into()
            })?;
            must("a resize", resize(disk.get_ref(), size).await)?;
            // Whoever waited is woken and told; whoever asks only now is told, too.
            let waited = match woken.wait().await {
                true => changed.as_mut().poll(&mut cx),
                false => Poll::Pending,
            };
            let asked = pin!(disk.changed(now)).poll(&mut cx);
            now = match (waited, asked) {
                (Poll::Ready(waited), Poll::Ready(asked)) if waited == asked => waited,
                (waited, asked) => {
                    return Err(broken(format!(
                        "the disk was resized from {} to {size}, and `changed` says {waited:?} to who waited and {asked:?} to who asks",
                        now.size
                    )));
                }
            };
        }
        require(now.size == size, || {
            format!("the disk was resized to {size}, and says {}", now.size)
        })?;
        require(read(&disk, 0, kept).await? == before, || {
            format!("the bytes 0..{kept} changed when the disk was resized to {size}")
        })?;
        if size < before_size {
            // The engine itself, as a caller reaches it who read the geometry before.
            let mut bytes = vec![0; block as usize];
            let mut buf = ReadBuf::new(&mut bytes);
            let beyond = disk.get_ref().read(&mut buf, size).await;
            require(is(&beyond, ErrorKind::OutOfRange), || {
                format!("a read beyond the new end {size} answers {beyond:?}, not OutOfRange")
            })?;
            let buf = WriteBuf::new(&bytes);
            let beyond = disk.get_ref().write(&buf, size, none).await;
            require(is(&beyond, ErrorKind::OutOfRange), || {
                format!("a write beyond the new end {size} answers {beyond:?}, not OutOfRange")
            })?;
        }
        let bytes = vec![round as u8 + 1; block as usize];
        let last = size - block;
        let last_block = write(&disk, last, &bytes).await;
        must("a write of the last block", last_block)?;
        require(read(&disk, last, block as usize).await? == bytes, || {
            format!("the last block of {size} bytes does not keep what is written")
        })?;
    }
    must("close", disk.close().await)
}

/// A waker that says whether it was used.
#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

impl Woken {
    /// Gives the others some time, two seconds at least.
    async fn wait(&self) -> bool {
        for _ in 0..200 {
            let mut turns = 0;
            poll_fn(|cx| {
                turns += 1;
                cx.waker().wake_by_ref();
                match turns > 10 || self.0.load(Ordering::Acquire) {
                    true => Poll::Ready(()),
                    false => Poll::Pending,
                }
            })
            .await;
            if self.0.load(Ordering::Acquire) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        false
    }
}
