//! Transfers that must wait for the disk, in an io_uring ring instead of a thread each.
//!
//! One thread has the ring, and as many tasks as transfers can be under way ([`crate::uring`]). A transfer goes into
//! the inbox with memory of the engine's own; a task takes it, repeats what falls short, and answers
//! with the memory. If nobody waits for the answer any more, it ends all the same, before
//! [`Ring::settle`] resolves.
//!
//! Who may touch what: a transfer's memory belongs to its task, and to the kernel while an operation is in
//! the ring. Should the ring fail meanwhile, the memory is leaked, and the disk latches as after a failed sync.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::task::{Poll, Waker};
use std::thread;

use io_uring::{opcode, types};
use rustix::fd::AsRawFd;
use tokio::sync::oneshot;

use super::image::{Image, Lane};
use super::sys::Direction;
use crate::threads::Epochs;
use crate::uring::{self, Executor};
use crate::{AlignedBuf, Error, ErrorKind, Result};

/// How many transfers can be under way; more wait in the inbox.
const MOST: usize = 128;

/// The ring of one disk. Its thread ends, with the inbox empty, when this is dropped.
#[derive(Debug)]
pub(super) struct Ring {
    inbox: Arc<Inbox>,
    mutations: Arc<Epochs>,
}

#[derive(Debug, Default)]
struct Inbox(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    transfers: VecDeque<Transfer>,
    /// Of the tasks that have nothing to do.
    idle: Vec<Waker>,
    closed: bool,
}

/// What is asked of the ring.
#[derive(Debug)]
struct Transfer {
    image: Arc<Image>,
    direction: Direction,
    lane: Lane,
    memory: AlignedBuf,
    len: usize,
    offset: u64,
    /// Counts a write until it can act no more.
    mutation: Option<Mutation>,
    reply: oneshot::Sender<Result<AlignedBuf>>,
}

#[derive(Debug)]
struct Mutation(Arc<Epochs>, u64);

impl Drop for Mutation {
    fn drop(&mut self) {
        self.0.leave(self.1);
    }
}

impl Ring {
    /// Starts the thread.
    ///
    /// # Errors
    /// If the kernel has no io_uring, has one that is too old, or forbids it to this process.
    pub(super) fn new() -> io::Result<Self> {
        let inbox = Arc::new(Inbox::default());
        let (tell, told) = mpsc::channel();
        thread::Builder::new()
            .name("ulio-file-ring".into())
            .spawn({
                let inbox = inbox.clone();
                move || run(&inbox, &tell)
            })?;
        told.recv().map_err(io::Error::other)??;
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
        let idle = waiting.idle.pop();
        drop(waiting);
        if let Some(idle) = idle {
            idle.wake();
        }
    }

    /// The next transfer; `None` once there will be no more.
    async fn next(&self) -> Option<Transfer> {
        poll_fn(|cx| {
            let mut waiting = self.lock();
            match waiting.transfers.pop_front() {
                Some(transfer) => Poll::Ready(Some(transfer)),
                None if waiting.closed => Poll::Ready(None),
                // A task is polled again only because its waker was taken from here.
                None => {
                    waiting.idle.push(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }

    fn close(&self) {
        let mut waiting = self.lock();
        waiting.closed = true;
        let idle = std::mem::take(&mut waiting.idle);
        drop(waiting);
        idle.into_iter().for_each(Waker::wake);
    }

    /// No code of others runs under this lock, so a poisoned one is in order.
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread's work.
fn run(inbox: &Arc<Inbox>, tell: &mpsc::Sender<io::Result<()>>) {
    let executor = match Executor::new(MOST) {
        Ok(executor) => executor,
        Err(error) => return drop(tell.send(Err(error))),
    };
    let ring = executor.ring();
    let tasks = (0..MOST).map(|task| serve(task, ring.clone(), inbox.clone()));
    let _ = tell.send(Ok(()));
    if let Err(error) = executor.run(tasks, |_| {}) {
        tracing::error!(%error, "a ring has failed");
    }
    inbox.close();
    let left = std::mem::take(&mut inbox.lock().transfers);
    drop(left);
}

async fn serve(task: usize, ring: Rc<uring::Ring>, inbox: Arc<Inbox>) {
    while let Some(transfer) = inbox.next().await {
        // Dropped while it waited for a task: then it need not begin.
        if !transfer.reply.is_closed() {
            transfer.carry_out(task, &ring).await;
        }
    }
}

/// A transfer's memory. Dropped while the kernel uses it, it is leaked.
struct Lent {
    memory: Option<AlignedBuf>,
    image: Arc<Image>,
    in_ring: bool,
    /// Last: it is not over before what `drop` does.
    _mutation: Option<Mutation>,
}

impl Drop for Lent {
    fn drop(&mut self) {
        if self.in_ring {
            std::mem::forget((self.memory.take(), self.image.clone()));
            self.image.latch.store(true, Ordering::SeqCst);
        }
    }
}

impl Transfer {
    async fn carry_out(self, task: usize, ring: &uring::Ring) {
        let mut lent = Lent {
            memory: Some(self.memory),
            image: self.image,
            in_ring: false,
            _mutation: self.mutation,
        };
        let part = (self.direction, self.lane, self.len, self.offset);
        let result = lent.move_all(task, ring, part).await;
        let memory = lent.memory.take();
        // Nobody must hear of its end before it counts as ended.
        drop(lent);
        let answer = match (result, memory) {
            (Ok(()), Some(memory)) => Ok(memory),
            (Ok(()), None) => Err(ErrorKind::Io.into()),
            (Err(error), _) => Err(error),
        };
        // Wakers are foreign code, which must not take the thread along.
        drop(catch_unwind(AssertUnwindSafe(|| self.reply.send(answer))));
    }
}

impl Lent {
    async fn move_all(
        &mut self,
        task: usize,
        ring: &uring::Ring,
        (direction, lane, len, offset): (Direction, Lane, usize, u64),
    ) -> Result {
        if direction == Direction::Write {
            self.image.check()?;
        }
        let file = types::Fd(self.image.handle(lane).as_raw_fd());
        let mut done = 0;
        while let Some(rest) = self
            .memory
            .as_mut()
            .and_then(|memory| memory.get_mut(done..len))
            .filter(|rest| !rest.is_empty())
        {
            let at = offset + done as u64;
            let (start, left) = (rest.as_mut_ptr(), rest.len());
            // No piece is longer than 1 MiB.
            let count = u32::try_from(left).unwrap_or(u32::MAX);
            let entry = match direction {
                Direction::Read => opcode::Read::new(file, start, count).offset(at).build(),
                Direction::Write => opcode::Write::new(file, start, count).offset(at).build(),
            };
            self.in_ring = true;
            // SAFETY: the memory and the file are `self`'s, and nothing touches the memory until the result is here.
            // If this future is dropped before, `self` is dropped with it and leaks both.
            let result = unsafe { ring.operate(task, entry) }.await;
            self.in_ring = false;
            let result = match usize::try_from(result) {
                Ok(moved) => Ok(moved),
                Err(_) => Err(io::Error::from_raw_os_error(-result)),
            };
            let result = self.image.calls.transferred(direction, result);
            done += self.image.counts(direction, lane, result, at, left)?;
        }
        Ok(())
    }
}
