//! Puts a thread to sleep until its socket moves, somebody wakes it, or it has been long enough.
//!
//! The thread that serves says what it waits for of its socket while it polls its connection, and then parks. Whoever else wakes the
//! connection (an engine that is done, a timer, a server that ends) finds out by `state` whether that takes more than a
//! mark: only one who sleeps must be told, by an event beside the socket.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Wake;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// Polls its connection, which no wake is meant for so far.
const AWAKE: u8 = 0;
/// Sleeps, or is about to: a wake must tell it.
const PARKED: u8 = 1;
/// Has been woken, and will not sleep before it has polled its connection once more.
const WOKEN: u8 = 2;

/// One thread's sleep. The thread itself calls all but `wake`, which anybody may.
#[derive(Debug, Default)]
pub(super) struct Parker {
    /// Not there before the first [`prepare`](Parker::prepare).
    event: OnceLock<OwnedFd>,
    state: AtomicU8,
    reads: AtomicBool,
    writes: AtomicBool,
}

/// What ended a sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unparked {
    /// The socket, or a wake.
    ForWork,
    /// Neither.
    ByTime,
}

impl Parker {
    /// Makes it ready for a thread.
    ///
    /// # Errors
    /// If the system has no event to give.
    pub(super) fn prepare(&self) -> io::Result<()> {
        if self.event.get().is_none() {
            let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
            // Another one would do as well.
            let _ = self.event.set(event);
        }
        Ok(())
    }

    /// To be called before the connection is polled: a wake from now on keeps the thread from sleeping.
    pub(super) fn begin(&self) {
        self.state.store(AWAKE, Ordering::SeqCst);
        self.reads.store(false, Ordering::Relaxed);
        self.writes.store(false, Ordering::Relaxed);
    }

    /// Notes that the thread waits for something to read.
    pub(super) fn want_read(&self) {
        self.reads.store(true, Ordering::Relaxed);
    }

    /// Notes that the thread waits for room to write.
    pub(super) fn want_write(&self) {
        self.writes.store(true, Ordering::Relaxed);
    }

    /// Sleeps until `socket` has what is wanted of it or somebody calls `wake`, but no longer than `patience`. Not at all
    /// if somebody has, since [`begin`](Self::begin). It may end for no reason.
    pub(super) fn park(&self, socket: Option<BorrowedFd<'_>>, patience: Duration) -> Unparked {
        let Some(event) = self.event.get() else {
            return Unparked::ForWork;
        };
        let parked = self
            .state
            .compare_exchange(AWAKE, PARKED, Ordering::SeqCst, Ordering::SeqCst);
        if parked.is_err() {
            return Unparked::ForWork;
        }
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::IN, self.reads.load(Ordering::Relaxed));
        wanted.set(PollFlags::OUT, self.writes.load(Ordering::Relaxed));
        let woken = PollFd::from_borrowed_fd(event.as_fd(), PollFlags::IN);
        let patience = Timespec {
            tv_sec: patience.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: patience.subsec_nanos().into(),
        };
        // A socket that nothing is wanted of would wake the thread by its errors, over and over.
        let ready = match socket.filter(|_| !wanted.is_empty()) {
            Some(socket) => {
                let socket = PollFd::from_borrowed_fd(socket, wanted);
                poll(&mut [woken, socket], Some(&patience))
            }
            None => poll(&mut [woken], Some(&patience)),
        };
        if self.state.swap(AWAKE, Ordering::SeqCst) == WOKEN {
            // If the event is yet to come, it ends the next sleep for no reason.
            let _ = rustix::io::read(event, &mut [0; 8]);
        }
        match ready {
            Ok(0) => Unparked::ByTime,
            // A signal, for one.
            _ => Unparked::ForWork,
        }
    }
}

impl Wake for Parker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.state.swap(WOKEN, Ordering::SeqCst) == PARKED
            && let Some(event) = self.event.get()
        {
            // It cannot be full: each sleep takes what was put there.
            let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::thread;

    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    fn prepared() -> Parker {
        let parker = Parker::default();
        parker.prepare().unwrap();
        parker
    }

    #[test]
    fn no_wake_is_lost() {
        const ROUNDS: usize = 100_000;
        let parker = Arc::new(prepared());
        let (asked, seen) = (AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            scope.spawn(|| {
                loop {
                    parker.begin();
                    // What a poll sees, it answers; what comes behind it must end the sleep.
                    let now = asked.load(Ordering::SeqCst);
                    seen.store(now, Ordering::SeqCst);
                    if now == ROUNDS {
                        return;
                    }
                    parker.park(None, LONG);
                }
            });
            for round in 1..=ROUNDS {
                asked.store(round, Ordering::SeqCst);
                parker.wake_by_ref();
                while round % 2 == 0 && seen.load(Ordering::SeqCst) < round {
                    thread::yield_now();
                }
            }
        });
    }

    #[test]
    fn a_wake_during_the_poll_keeps_awake_and_one_before_it_does_not() {
        let parker = Arc::new(prepared());
        parker.wake_by_ref();
        parker.begin();
        let short = Duration::from_millis(1);
        assert_eq!(parker.park(None, short), Unparked::ByTime);
        parker.begin();
        parker.wake_by_ref();
        assert_eq!(parker.park(None, LONG), Unparked::ForWork);
    }

    #[test]
    fn a_socket_wakes_by_what_is_wanted_alone() {
        use std::io::Write;
        use std::os::unix::net::UnixStream;
        let parker = prepared();
        let (here, mut there) = UnixStream::pair().unwrap();
        there.write_all(&[1]).unwrap();
        let short = Duration::from_millis(1);
        let park = |patience| parker.park(Some(here.as_fd()), patience);
        parker.begin();
        assert_eq!(park(short), Unparked::ByTime);
        parker.begin();
        parker.want_read();
        assert_eq!(park(LONG), Unparked::ForWork);
        parker.begin();
        assert_eq!(park(short), Unparked::ByTime);
        parker.begin();
        parker.want_write();
        assert_eq!(park(LONG), Unparked::ForWork);
    }
}
