//! Transfers that must wait for the disk, in an io_uring ring instead of a thread each.
//!
//! A transfer goes into the inbox with memory of the engine's own. The ring's driver ([`driver`](super::driver)) takes it,
//! repeats what falls short, and answers with the memory. If nobody waits for the answer any more, it ends all the same, before
//! [`Ring::settle`] resolves.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::driver::Driver;
use super::image::{Image, Lane};
use super::sys::Direction;
use crate::threads::Epochs;
use crate::{AlignedBuf, Error, ErrorKind, Result};

/// The ring of one disk. Its driver ends, with the inbox empty, when this is dropped.
#[derive(Debug)]
pub(super) struct Ring {
    inbox: Arc<Inbox>,
    mutations: Arc<Epochs>,
}

/// What waits for the driver.
#[derive(Debug, Default)]
pub(super) struct Inbox(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    transfers: VecDeque<Transfer>,
    /// The driver's, if it has found nothing here.
    driver: Option<Waker>,
    closed: bool,
}

/// What is asked of the ring.
#[derive(Debug)]
pub(super) struct Transfer {
    pub(super) image: Arc<Image>,
    pub(super) direction: Direction,
    pub(super) lane: Lane,
    pub(super) memory: AlignedBuf,
    pub(super) len: usize,
    pub(super) offset: u64,
    /// Counts a write until it can act no more.
    pub(super) mutation: Option<Mutation>,
    pub(super) reply: oneshot::Sender<Result<AlignedBuf>>,
}

#[derive(Debug)]
pub(super) struct Mutation(Arc<Epochs>, u64);

impl Drop for Mutation {
    fn drop(&mut self) {
        self.0.leave(self.1);
    }
}

impl Ring {
    /// Starts the driver: as a task of `runtime` if that is given, else as a thread.
    ///
    /// # Errors
    /// If the kernel has no io_uring, has one that is too old, or forbids it to this process.
    pub(super) fn new(runtime: Option<&Handle>) -> io::Result<Self> {
        let inbox = Arc::new(Inbox::default());
        Driver::new(inbox.clone())?.start(runtime)?;
        Ok(Ring {
            inbox,
            mutations: Arc::new(Epochs::new()),
        })
    }

    /// Reads `len` bytes into `memory`, and gives it back.
    pub(super) async fn read(
        &self,
        image: &Arc<Image>,
        lane: Lane,
        memory: AlignedBuf,
        len: usize,
        offset: u64,
    ) -> Result<AlignedBuf> {
        self.transfer(image, Direction::Read, lane, memory, len, offset)
            .await
    }

    /// Writes the first `len` bytes of `memory`, and gives it back.
    pub(super) async fn write(
        &self,
        image: &Arc<Image>,
        lane: Lane,
        memory: AlignedBuf,
        len: usize,
        offset: u64,
    ) -> Result<AlignedBuf> {
        self.transfer(image, Direction::Write, lane, memory, len, offset)
            .await
    }

    /// Resolves when no write handed in before this call can act any more.
    pub(super) async fn settle(&self) {
        self.mutations.settled().await;
    }

    async fn transfer(
        &self,
        image: &Arc<Image>,
        direction: Direction,
        lane: Lane,
        memory: AlignedBuf,
        len: usize,
        offset: u64,
    ) -> Result<AlignedBuf> {
        let (reply, answer) = oneshot::channel();
        let mutation = (direction == Direction::Write)
            .then(|| Mutation(self.mutations.clone(), self.mutations.enter()));
        self.inbox.push(Transfer {
            image: image.clone(),
            direction,
            lane,
            memory,
            len,
            offset,
            mutation,
            reply,
        });
        answer.await.unwrap_or_else(|_| {
            let text =
                "the ring that the disk was read and written by has failed: open the disk again";
            Err(Error::new(ErrorKind::Io, text))
        })
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.inbox.close();
    }
}

impl Inbox {
    /// A transfer that comes after the ring has failed is dropped, which its waiter hears.
    fn push(&self, transfer: Transfer) {
        let mut waiting = self.lock();
        if waiting.closed {
            return;
        }
        waiting.transfers.push_back(transfer);
        let driver = waiting.driver.take();
        drop(waiting);
        if let Some(driver) = driver {
            driver.wake();
        }
    }

    /// The next transfer; `None` once there will be no more.
    pub(super) fn poll_next(&self, cx: &Context<'_>) -> Poll<Option<Transfer>> {
        let mut waiting = self.lock();
        match waiting.transfers.pop_front() {
            Some(transfer) => Poll::Ready(Some(transfer)),
            None if waiting.closed => Poll::Ready(None),
            None => {
                match &mut waiting.driver {
                    Some(known) => known.clone_from(cx.waker()),
                    none => *none = Some(cx.waker().clone()),
                }
                Poll::Pending
            }
        }
    }

    /// Takes no more, and lets the driver know.
    fn close(&self) {
        let mut waiting = self.lock();
        waiting.closed = true;
        let driver = waiting.driver.take();
        drop(waiting);
        if let Some(driver) = driver {
            driver.wake();
        }
    }

    /// Takes no more, nor keeps what is here.
    pub(super) fn fail(&self) {
        self.close();
        let left = std::mem::take(&mut self.lock().transfers);
        drop(left);
    }

    /// No code of others runs under this lock, so a poisoned one is in order.
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
