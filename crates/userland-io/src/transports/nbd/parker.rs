//! Puts a thread that serves one connection to sleep until its socket moves, somebody wakes it, or it has been long enough.
//!
//! While it polls its connection, the thread says what that waits for of the socket, and then parks. Whoever else
//! wakes the connection (an engine that is done, a timer, a server that ends) rings a bell beside the socket if it sleeps
//! ([`wake`](crate::wake)). The thread itself calls all but the waker, which anybody may.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::task::Waker;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::BorrowedFd;

use crate::bell::Eventfd;
use crate::wake::{self, Calls};

/// One thread's sleep.
pub(crate) struct Parker {
    calls: Arc<Calls<Eventfd>>,
    /// What the connection waits for, as `poll` has it.
    wants: AtomicU16,
}

/// What ended a sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unparked {
    /// The socket, or a wake.
    ForWork,
    /// Neither.
    ByTime,
}

impl Parker {
    /// # Errors
    /// If the system has no event to give.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Parker {
            calls: Arc::new(Calls::new(1, Eventfd::new()?)),
            wants: AtomicU16::new(0),
        })
    }

    /// Gets the thread out of its sleep, or keeps it from the next one.
    pub(crate) fn waker(&self) -> Waker {
        wake::waker(&self.calls, 0)
    }

    /// To be called before the connection is polled: it wants nothing yet, and a wake from now on keeps the thread from sleeping.
    pub(crate) fn begin(&self) {
        self.wants.store(0, Ordering::Relaxed);
        self.calls.answer(&mut [0]);
    }

    /// Notes that the connection waits for `what` of its socket.
    pub(crate) fn want(&self, what: PollFlags) {
        self.wants.fetch_or(what.bits(), Ordering::Relaxed);
    }

    /// Sleeps until `socket` has what is wanted of it or somebody wakes, but no longer than `patience`. Not at all
    /// if somebody has, since [`begin`](Self::begin). It may end for no reason.
    ///
    /// # Errors
    /// If the system cannot wait.
    pub(crate) fn park(
        &self,
        socket: Option<BorrowedFd<'_>>,
        patience: Option<Duration>,
    ) -> io::Result<Unparked> {
        if !self.calls.fall_asleep() {
            return Ok(Unparked::ForWork);
        }
        let bell = self.calls.bell();
        let wants = PollFlags::from_bits_retain(self.wants.load(Ordering::Relaxed));
        let patience = patience.and_then(|patience| Timespec::try_from(patience).ok());
        let mut watched = [PollFd::new(bell, PollFlags::IN), PollFd::new(bell, wants)];
        // A socket that nothing is wanted of would tell of its end again and again.
        let watched = match socket {
            Some(socket) if !wants.is_empty() => {
                watched[1] = PollFd::from_borrowed_fd(socket, wants);
                &mut watched[..]
            }
            _ => &mut watched[..1],
        };
        match poll(watched, patience.as_ref()) {
            Err(rustix::io::Errno::INTR) => return Ok(Unparked::ForWork),
            Ok(0) => return Ok(Unparked::ByTime),
            polled => polled?,
        };
        if watched[0].revents().contains(PollFlags::IN) {
            let _ = rustix::io::read(bell, &mut [0; 8]);
        }
        Ok(Unparked::ForWork)
    }
}

impl fmt::Debug for Parker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wants = PollFlags::from_bits_retain(self.wants.load(Ordering::Relaxed));
        f.debug_struct("Parker").field("wants", &wants).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::atomic::AtomicUsize;
    use std::thread;

    use super::*;

    #[test]
    fn no_wake_is_lost() {
        const ROUNDS: usize = 100_000;
        let parker = Parker::new().unwrap();
        let waker = parker.waker();
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
                    parker.park(None, None).unwrap();
                }
            });
            for round in 1..=ROUNDS {
                asked.store(round, Ordering::SeqCst);
                waker.wake_by_ref();
                while round % 2 == 0 && seen.load(Ordering::SeqCst) < round {
                    thread::yield_now();
                }
            }
        });
    }

    #[test]
    fn a_wake_during_the_poll_keeps_awake_and_one_before_it_does_not() {
        let parker = Parker::new().unwrap();
        let waker = parker.waker();
        waker.wake_by_ref();
        parker.begin();
        let short = Some(Duration::from_millis(1));
        assert_eq!(parker.park(None, short).unwrap(), Unparked::ByTime);
        parker.begin();
        waker.wake_by_ref();
        assert_eq!(parker.park(None, None).unwrap(), Unparked::ForWork);
    }

    #[test]
    fn a_socket_wakes_by_what_is_wanted_alone() {
        use std::io::Write;
        use std::os::unix::net::UnixStream;
        let parker = Parker::new().unwrap();
        let (here, mut there) = UnixStream::pair().unwrap();
        there.write_all(&[1]).unwrap();
        let short = Some(Duration::from_millis(1));
        let park = |patience| parker.park(Some(here.as_fd()), patience).unwrap();
        parker.begin();
        assert_eq!(park(short), Unparked::ByTime);
        parker.begin();
        parker.want(PollFlags::IN);
        assert_eq!(park(None), Unparked::ForWork);
        parker.begin();
        assert_eq!(park(short), Unparked::ByTime);
        parker.begin();
        parker.want(PollFlags::OUT);
        assert_eq!(park(None), Unparked::ForWork);
    }
}
