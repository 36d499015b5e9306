//! An io_uring ring, and the operations that its tasks have in it.
//!
//! Each task has at most one operation under way, named in the ring by the task's index: so nothing is
//! allocated for one, and the ring can hold them all.
//!
//! Who may touch what: all of it belongs to the tasks' thread (the kernel is told so: a single issuer),
//! and is neither `Send` nor `Sync`.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use io_uring::{EnterFlags, IoUring, cqueue, opcode, squeue, types};
use rustix::fd::AsFd;
use rustix::fd::{AsRawFd, BorrowedFd};
use rustix::io::Errno;

/// The name of the bell's entry in the ring.
const BELL: u64 = u64::MAX;

/// One thread's ring.
pub(crate) struct Ring {
    uring: RefCell<IoUring>,
    operations: Box<[Cell<State>]>,
}

#[derive(Clone, Copy)]
enum State {
    Idle,
    UnderWay,
    Done(i32),
}

/// What came out of the ring.
#[derive(Clone, Copy)]
pub(super) enum Event {
    /// The operation of this task has ended.
    Ended(usize),
    /// The bell was rung; `armed` if it still is in the ring.
    Rung { armed: bool },
}

impl Ring {
    /// A ring for `tasks` tasks and a bell, for this thread alone.
    ///
    /// # Errors
    /// If the kernel has no io_uring, or denies it.
    pub(super) fn new(tasks: usize) -> io::Result<Self> {
        let entries = u32::try_from(tasks + 1).map_err(|_| io::ErrorKind::InvalidInput)?;
        let entries = entries.next_power_of_two();
        // Completions are worked off when this thread asks for them, not by interrupting it. Linux 6.1 has that.
        let deferred = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(entries);
        let uring = match deferred {
            Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                IoUring::builder().build(entries)
            }
            other => other,
        }?;
        // So it is Linux 5.13, which has polls that stay armed, too.
        if !uring.params().is_feature_resource_tagging() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Ring {
            uring: RefCell::new(uring),
            operations: (0..tasks).map(|_| Cell::new(State::Idle)).collect(),
        })
    }

    /// Makes the place in the ring for the file that [`register`](Self::register) brings.
    pub(crate) fn make_room(&self) -> io::Result<()> {
        self.uring.borrow().submitter().register_files_sparse(1)
    }

    /// Gives the ring a copy of `file`, its only one: operations name it as `types::Fixed(0)`, which is cheaper than
    /// to look a descriptor up each time.
    pub(crate) fn register(&self, file: impl AsFd) -> io::Result<()> {
        let descriptor = file.as_fd().as_raw_fd();
        let uring = self.uring.borrow();
        match uring.submitter().register_files_update(0, &[descriptor])? {
            1 => Ok(()),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Puts `entry` into the ring for `task`, and resolves to its result: what the call would return, or an errno
    /// below zero. It is handed to the kernel when all tasks that can run have done so.
    ///
    /// Dropped before it has ended, it goes on, and `task` can have no other until then.
    ///
    /// # Safety
    /// What `entry` refers to (descriptors and memory) must stay valid until the operation has ended, or
    /// for ever if that is not waited for.
    pub(crate) unsafe fn operate(&self, task: usize, entry: squeue::Entry) -> Operation<'_> {
        Operation {
            ring: self,
            task,
            entry: Some(entry.user_data(task as u64)),
        }
    }

    /// Lets the ring tell of rings of the bell, until [`Event::Rung`] says that it does not any more.
    pub(super) fn arm(&self, bell: BorrowedFd<'_>) {
        let poll = opcode::PollAdd::new(types::Fd(bell.as_raw_fd()), libc::POLLIN as u32);
        let entry = poll.multi(true).build().user_data(BELL);
        // SAFETY: a poll refers to no memory, and the kernel holds the file it polls.
        unsafe { self.push(&entry) };
    }

    /// # Safety
    /// As [`operate`](Self::operate).
    unsafe fn push(&self, entry: &squeue::Entry) -> bool {
        let mut uring = self.uring.borrow_mut();
        // SAFETY: by the caller's word.
        if unsafe { uring.submission().push(entry) }.is_ok() {
            return true;
        }
        // Not reached while each task has one operation: then there is a place for each, and for the bell.
        // SAFETY: as above.
        uring.submit().is_ok() && unsafe { uring.submission().push(entry) }.is_ok()
    }

    /// Hands to the kernel what was put in, waits for an event if `wait`, and moves the events there are to `events`.
    pub(super) fn turn(&self, wait: bool, events: &mut Vec<Event>) -> io::Result<()> {
        let mut uring = self.uring.borrow_mut();
        let submit = uring.submission().len() as u32;
        // Asked for events also where none is waited for: only then does the kernel work off completions.
        let flags = EnterFlags::GETEVENTS.bits();
        // SAFETY: no argument is passed.
        let entered = unsafe {
            uring
                .submitter()
                .enter::<libc::sigset_t>(submit, wait.into(), flags, None)
        };
        match entered.map_err(|error| error.raw_os_error()) {
            // Interrupted: what there is, is read below.
            Ok(_) | Err(Some(libc::EINTR)) => {}
            // Too much unread, or no memory for now: others may have to run before that changes.
            Err(Some(libc::EBUSY | libc::EAGAIN)) => std::thread::yield_now(),
            Err(errno) => return Err(io::Error::from_raw_os_error(errno.unwrap_or(libc::EIO))),
        }
        events.extend(uring.completion().filter_map(|entry| self.event(&entry)));
        Ok(())
    }

    fn event(&self, entry: &cqueue::Entry) -> Option<Event> {
        if entry.user_data() == BELL {
            let armed = cqueue::more(entry.flags());
            return Some(Event::Rung { armed });
        }
        let task = entry.user_data() as usize;
        self.operations.get(task)?.set(State::Done(entry.result()));
        Some(Event::Ended(task))
    }

    /// True if an operation is under way: the kernel may still use what it refers to.
    pub(crate) fn is_busy(&self) -> bool {
        let under_way = |state: &Cell<State>| matches!(state.get(), State::UnderWay);
        self.operations.iter().any(under_way)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel takes its time to end a ring, and would keep the file open until then.
        let _ = self.uring.get_mut().submitter().unregister_files();
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ring({} tasks)", self.operations.len())
    }
}

/// An operation in the ring; see [`Ring::operate`].
#[must_use = "it begins when it is first polled"]
pub(crate) struct Operation<'a> {
    ring: &'a Ring,
    task: usize,
    entry: Option<squeue::Entry>,
}

impl Future for Operation<'_> {
    type Output = i32;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<i32> {
        let ring = self.ring;
        let state = &ring.operations[self.task];
        if let Some(entry) = self.entry.take() {
            assert!(
                matches!(state.get(), State::Idle),
                "a task has one operation at a time"
            );
            // SAFETY: whoever made this operation answers for what its entry refers to.
            if !unsafe { ring.push(&entry) } {
                return Poll::Ready(-libc::EBUSY);
            }
            state.set(State::UnderWay);
            return Poll::Pending;
        }
        match state.get() {
            State::Done(result) => {
                state.set(State::Idle);
                Poll::Ready(result)
            }
            // The executor polls the task when its operation has ended: no waker is needed for that.
            State::Idle | State::UnderWay => Poll::Pending,
        }
    }
}
