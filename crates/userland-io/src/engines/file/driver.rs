//! What works a ring: takes transfers from the inbox, hands them to the kernel, and answers them when they have ended.
//!
//! As a rule a task of the runtime that the disk was opened in: then what the tasks of a thread ask for is handed over together when
//! they have had their turn, its end wakes that thread, and nobody else need be woken on either way. If that runtime ends first,
//! a thread goes on; where tasks have not several threads to run on (who waits for a disk there may hold the only one), it is a thread from the start.
//! Both sleep on a bell, which the kernel rings when operations have ended.
//!
//! Who may touch what: a transfer's memory belongs to the driver, and to the kernel while an operation is in
//! the ring. Should the ring fail meanwhile, the memory is leaked, and the disk latches as after a failed sync.

use std::future::poll_fn;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};
use rustix::fd::AsRawFd;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::image::{Image, Lane};
use super::ring::{Inbox, Mutation, Transfer};
use super::sys::Direction;
use crate::bell::Eventfd;
use crate::{AlignedBuf, ErrorKind, Result};

/// How many transfers can be under way; more wait in the inbox.
const MOST: u16 = 128;
/// A transfer of which nothing was moved for so long fails: where the kernel can have no thread for it, say, it gives up each
/// attempt.
const PATIENCE: Duration = match cfg!(test) {
    false => Duration::from_secs(10),
    true => Duration::from_millis(200),
};

/// The ring, and what is under way in it.
pub(super) struct Driver {
    uring: IoUring,
    inbox: Arc<Inbox>,
    bell: Arc<Eventfd>,
    /// By the name that an operation has in the ring.
    under_way: Vec<Option<Operation>>,
    free: Vec<usize>,
    /// What the kernel has given up, with its place: for the next turn.
    given_up: Vec<(usize, Operation)>,
}

/// A driver that is a task. Dropped before it has ended, it goes on as a thread.
struct OnRuntime(Option<Driver>);

/// A transfer that has begun.
struct Operation {
    lent: Lent,
    direction: Direction,
    lane: Lane,
    len: usize,
    offset: u64,
    done: usize,
    /// Since when nothing was moved.
    given_up: Option<Instant>,
    reply: oneshot::Sender<Result<AlignedBuf>>,
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

impl Driver {
    /// # Errors
    /// If the kernel has no io_uring, has one that is too old, or forbids it to this process.
    pub(super) fn new(inbox: Arc<Inbox>) -> io::Result<Self> {
        let uring = IoUring::new(MOST.into())?;
        // So it is Linux 5.13: nothing older has been tried.
        if !uring.params().is_feature_resource_tagging() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let bell = Arc::new(Eventfd::new()?);
        uring.submitter().register_eventfd(bell.as_raw_fd())?;
        Ok(Driver {
            uring,
            inbox,
            bell,
            under_way: (0..MOST).map(|_| None).collect(),
            free: (0..MOST.into()).collect(),
            given_up: Vec::new(),
        })
    }

    /// Works until the inbox is closed and empty, as a task of `runtime` or a thread.
    ///
    /// # Errors
    /// If a thread cannot be had.
    pub(super) fn start(self, runtime: Option<&Handle>) -> io::Result<()> {
        match runtime {
            Some(runtime) => {
                let driver = OnRuntime(Some(self));
                drop(runtime.spawn(driver.run()));
                Ok(())
            }
            None => {
                let thread = thread::Builder::new().name("ulio-file-ring".into());
                thread.spawn(move || self.run_here())?;
                Ok(())
            }
        }
    }

    fn run_here(mut self) {
        let waker = Waker::from(self.bell.clone());
        let mut cx = Context::from_waker(&waker);
        while self.poll(&mut cx).is_pending() {
            // It fails only by a signal.
            let _ = rustix::io::read(&*self.bell, &mut [0; 8]);
        }
    }

    /// Moves what can be moved. The bell rings when more can be; so does the waker. Ready when there will be no more.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        for (place, operation) in std::mem::take(&mut self.given_up) {
            self.push(place, operation);
        }
        loop {
            let is_closed = self.begin(cx);
            if let Err(error) = self.submit(cx) {
                tracing::error!(%error, "a ring has failed");
                return Poll::Ready(());
            }
            if !self.end() {
                if !self.given_up.is_empty() {
                    // Others may have to run before it comes to more.
                    cx.waker().wake_by_ref();
                }
                return match is_closed && self.free.len() == self.under_way.len() {
                    true => Poll::Ready(()),
                    false => Poll::Pending,
                };
            }
        }
    }

    /// Takes transfers for which there is a place. True if there will be no more.
    fn begin(&mut self, cx: &Context<'_>) -> bool {
        while let Some(&place) = self.free.last() {
            match self.inbox.poll_next(cx) {
                // Dropped while it waited: then it need not begin.
                Poll::Ready(Some(transfer)) if transfer.reply.is_closed() => {}
                Poll::Ready(Some(transfer)) => {
                    let operation = Operation::from(transfer);
                    if let Err(error) = operation.may_begin() {
                        operation.answer(Err(error));
                        continue;
                    }
                    self.free.pop();
                    self.push(place, operation);
                }
                Poll::Ready(None) => return true,
                Poll::Pending => return false,
            }
        }
        false
    }

    /// Puts what is left of `operation` into the ring.
    fn push(&mut self, place: usize, mut operation: Operation) {
        let Some(entry) = operation.entry() else {
            self.free.push(place);
            return operation.answer(Ok(()));
        };
        let entry = entry.user_data(place as u64);
        operation.lent.in_ring = true;
        // SAFETY: the memory and the file are the operation's, and nothing touches the memory until the result is here.
        // If the operation is dropped before, it leaks both.
        let pushed = unsafe { self.uring.submission().push(&entry) };
        if pushed.is_err() {
            // Not reached: there is an entry for each place.
            operation.lent.in_ring = false;
            self.free.push(place);
            return operation.answer(Err(io::Error::from(io::ErrorKind::ResourceBusy).into()));
        }
        self.under_way[place] = Some(operation);
    }

    fn submit(&mut self, cx: &Context<'_>) -> io::Result<()> {
        if self.uring.submission().is_empty() {
            return Ok(());
        }
        match self.uring.submit().map_err(|error| error.raw_os_error()) {
            // Interrupted, too much unread, or no memory for now: others may have to run before that changes.
            Ok(_) | Err(Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {}
            Err(errno) => return Err(io::Error::from_raw_os_error(errno.unwrap_or(libc::EIO))),
        }
        if !self.uring.submission().is_empty() {
            cx.waker().wake_by_ref();
        }
        Ok(())
    }

    /// Answers what has ended, or sees to its rest. True if anything has.
    fn end(&mut self) -> bool {
        let mut any = false;
        while let Some((place, result)) = self.next_result() {
            let Some(mut operation) = self.under_way.get_mut(place).and_then(Option::take) else {
                continue;
            };
            operation.lent.in_ring = false;
            match operation.note(result) {
                Ok(()) if operation.given_up.is_some() => {
                    self.given_up.push((place, operation));
                    continue;
                }
                Ok(()) => self.push(place, operation),
                Err(error) => {
                    self.free.push(place);
                    operation.answer(Err(error));
                }
            }
            any = true;
        }
        any
    }

    fn next_result(&mut self) -> Option<(usize, i32)> {
        let entry = self.uring.completion().next()?;
        Some((entry.user_data() as usize, entry.result()))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.inbox.fail();
    }
}

impl OnRuntime {
    async fn run(mut self) {
        let Some(driver) = &mut self.0 else { return };
        // SAFETY: the bell keeps its descriptor open as long as it lives, and this holds it.
        // In a runtime without I/O this panics, and a thread goes on.
        let bell =
            unsafe { AsyncFd::register_with_interest(driver.bell.clone(), Interest::READABLE) };
        let Ok(bell) = bell else { return };
        let ended = poll_fn(|cx| {
            loop {
                if driver.poll(cx).is_ready() {
                    return Poll::Ready(true);
                }
                // Each ring is told once, so nobody need read the bell.
                match bell.poll_read_ready(cx) {
                    Poll::Ready(Ok(mut rung)) => rung.clear_ready(),
                    Poll::Ready(Err(_)) => return Poll::Ready(false),
                    Poll::Pending => return Poll::Pending,
                }
            }
        });
        if ended.await {
            self.0 = None;
        }
    }
}

impl Drop for OnRuntime {
    fn drop(&mut self) {
        if let Some(driver) = self.0.take()
            && let Err(error) = driver.start(None)
        {
            tracing::error!(%error, "a ring has lost its runtime, and can have no thread");
        }
    }
}

impl From<Transfer> for Operation {
    fn from(transfer: Transfer) -> Self {
        Operation {
            lent: Lent {
                memory: Some(transfer.memory),
                image: transfer.image,
                in_ring: false,
                _mutation: transfer.mutation,
            },
            direction: transfer.direction,
            lane: transfer.lane,
            len: transfer.len,
            offset: transfer.offset,
            done: 0,
            given_up: None,
            reply: transfer.reply,
        }
    }
}

impl Operation {
    fn may_begin(&self) -> Result {
        match self.direction {
            Direction::Write => self.lent.image.check(),
            Direction::Read => Ok(()),
        }
    }

    /// What asks the kernel for the rest; `None` if nothing is left.
    fn entry(&mut self) -> Option<squeue::Entry> {
        let file = types::Fd(self.lent.image.handle(self.lane).as_raw_fd());
        let at = self.offset + self.done as u64;
        let memory = self.lent.memory.as_mut()?;
        let rest = memory.get_mut(self.done..self.len)?;
        // No piece is longer than 1 MiB.
        let (start, left) = (rest.as_mut_ptr(), u32::try_from(rest.len()).ok()?);
        let entry = match (left, self.direction) {
            (0, _) => return None,
            (_, Direction::Read) => opcode::Read::new(file, start, left).offset(at).build(),
            (_, Direction::Write) => opcode::Write::new(file, start, left).offset(at).build(),
        };
        Some(entry)
    }

    /// Takes the kernel's result of one operation.
    ///
    /// # Errors
    /// If the transfer has failed.
    fn note(&mut self, result: i32) -> Result {
        let result = match (usize::try_from(result), -result) {
            (Ok(moved), _) => Ok(moved),
            // The thread that handed it in has ended. (A bad address it cannot be: the memory is this engine's.)
            (Err(_), libc::ECANCELED | libc::EFAULT) => Err(io::ErrorKind::Interrupted.into()),
            (Err(_), errno) => Err(io::Error::from_raw_os_error(errno)),
        };
        let (image, at) = (&self.lent.image, self.offset + self.done as u64);
        let result = image.calls.transferred(self.direction, result);
        let left = self.len - self.done;
        let moved = image.counts(self.direction, self.lane, result, at, left)?;
        self.done += moved;
        self.given_up = match moved {
            0 => self.given_up.or_else(|| Some(Instant::now())),
            _ => None,
        };
        if self
            .given_up
            .is_some_and(|since| since.elapsed() >= PATIENCE)
        {
            let text =
                format!("for {PATIENCE:?} the kernel has moved none of {left} bytes at {at}");
            return Err(io::Error::other(text).into());
        }
        Ok(())
    }

    fn answer(self, result: Result) {
        let Operation {
            mut lent, reply, ..
        } = self;
        let memory = lent.memory.take();
        // Nobody must hear of its end before it counts as ended.
        drop(lent);
        let answer = result.and_then(|()| memory.ok_or_else(|| ErrorKind::Io.into()));
        // Wakers are foreign code, which must not take the driver along.
        drop(catch_unwind(AssertUnwindSafe(|| reply.send(answer))));
    }
}
