//! Where a connection is served, and where it had better be.
//!
//! Its stream asks where it is, and says at rest if it wants to move; who polls the connection, be it the task or the thread,
//! looks for that after each poll. The task starts the thread, and ends it. They take turns, so that no two of them write or
//! read a seat at once, with one exception: a thread may be cut at any time.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::super::parker::Parker;
use super::super::socket::Company;
use super::Threads;

/// A connection that has rested less often, and never had a thread, is young.
const YOUNG: u8 = 16;
/// How often a connection may use its socket before the thread looks at what else there is: as often as tokio lets a task.
pub(super) const USES: u8 = 128;

/// Where a connection is and where it wants to be: shared by its stream, which asks, and whoever polls it.
#[derive(Debug, Default)]
pub(super) struct Seat {
    /// Of the thread, while there is one.
    parker: Mutex<Option<Arc<Parker>>>,
    pub(super) threads: Threads,
    /// Written by the thread, at its first and last breath.
    is_on_thread: AtomicBool,
    /// Written by the stream while the connection is polled, read by who polls it afterwards.
    wants_to_move: AtomicBool,
    /// The thread has had nothing to do for long.
    is_idle: AtomicBool,
    /// How often the socket may yet be used in this poll: a client that sends and takes without end must not keep the thread from what else
    /// there is to look at. (A task's runtime sees to that by itself.)
    uses_left: AtomicU8,
    /// How often the connection may yet rest before it is young no more.
    youth: AtomicU8,
    /// The system has refused a thread.
    is_refused: AtomicBool,
    /// The thread must end, wherever the connection stands.
    is_cut: AtomicBool,
    /// There, while the stream has left the runtime. Its only users take turns.
    socket: Mutex<Option<Arc<socket2::Socket>>>,
}

impl Seat {
    /// That of a connection that comes.
    pub(super) fn new(threads: Threads) -> Self {
        Seat {
            threads,
            youth: AtomicU8::new(YOUNG),
            ..Seat::default()
        }
    }

    pub(super) fn is_on_thread(&self) -> bool {
        self.is_on_thread.load(Ordering::Acquire)
    }

    /// True before the socket's first use in a poll: the thread has slept since the one before.
    pub(super) fn is_unused(&self) -> bool {
        self.uses_left.load(Ordering::Relaxed) == USES
    }

    /// Uses the socket once. False if the poll has lasted long enough: then it should end, and be repeated.
    pub(super) fn may_use(&self) -> bool {
        let left = self.uses_left.load(Ordering::Relaxed);
        self.uses_left
            .store(left.saturating_sub(1), Ordering::Relaxed);
        left > 0 && !self.is_cut.load(Ordering::Relaxed)
    }

    pub(super) fn parker(&self) -> MutexGuard<'_, Option<Arc<Parker>>> {
        self.parker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn sleep_on(&self, socket: Option<Arc<socket2::Socket>>) {
        *self.socket() = socket;
    }

    /// What the thread sleeps on.
    pub(super) fn socket(&self) -> MutexGuard<'_, Option<Arc<socket2::Socket>>> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection has nothing to do. Asks to be moved if it had better be elsewhere, and answers what company that is for.
    pub(super) fn rest(&self, company: Company) -> Option<Company> {
        let is_idle = self.is_idle.load(Ordering::Relaxed);
        let is_young = self.grow_older();
        let better = match (self.is_on_thread(), company) {
            (true, _) if is_idle => Some(Company::NoneOrMany),
            (true, Company::NoneOrMany) => Some(company),
            (false, Company::Few) => self.take_thread().then_some(company),
            (false, _) if is_young && self.threads.are_several() => {
                self.take_thread_young().then_some(Company::Unsure)
            }
            _ => None,
        };
        let is_moving = better.is_some();
        self.wants_to_move.store(is_moving, Ordering::Relaxed);
        better
    }

    /// The connection is young no more.
    pub(super) fn grow_up(&self) {
        self.youth.store(0, Ordering::Relaxed);
    }

    /// Notes that the connection rests. True if it is young.
    fn grow_older(&self) -> bool {
        let left = self.youth.load(Ordering::Relaxed);
        self.youth.store(left.saturating_sub(1), Ordering::Relaxed);
        left > 0
    }

    /// Takes a thread for a young connection beside others, but once: one that gets none has no claim to the next that is free.
    pub(super) fn take_thread_young(&self) -> bool {
        self.grow_up();
        self.take_thread()
    }

    fn take_thread(&self) -> bool {
        !self.is_refused.load(Ordering::Relaxed) && self.threads.take()
    }

    pub(super) fn wants_to_move(&self) -> bool {
        self.wants_to_move.swap(false, Ordering::Relaxed)
    }

    /// Notes that the system has refused a thread: it is not asked again.
    pub(super) fn refuse(&self) {
        self.is_refused.store(true, Ordering::Relaxed);
    }

    /// Called by the thread when it begins to serve the connection, and when that is over.
    pub(super) fn set_on_thread(&self, is_on_thread: bool) {
        self.is_on_thread.store(is_on_thread, Ordering::Release);
    }

    /// Called by the thread before each poll.
    pub(super) fn begin_poll(&self) {
        self.uses_left.store(USES, Ordering::Relaxed);
    }

    /// Called by the thread after each sleep, and before the first.
    pub(super) fn set_idle(&self, is_idle: bool) {
        self.is_idle.store(is_idle, Ordering::Relaxed);
    }

    /// Tells the thread to end; `false` once it has, for the next one.
    pub(super) fn set_cut(&self, is_cut: bool) {
        self.is_cut.store(is_cut, Ordering::SeqCst);
    }

    pub(super) fn is_cut(&self) -> bool {
        self.is_cut.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::super::Counts;
    use super::super::thread::OwnThread;
    use super::*;

    #[tokio::test]
    async fn a_connection_is_young_but_once() {
        let young = |free: usize| {
            let counts = Counts {
                free: AtomicUsize::new(free),
                connections: AtomicUsize::new(2),
                parkers: Mutex::default(),
            };
            Arc::new(Seat::new(Threads(Arc::new(counts))))
        };
        let rest = |seat: &Seat| seat.rest(Company::NoneOrMany);
        let goes = young(9);
        assert_eq!(rest(&goes), Some(Company::Unsure));
        assert_eq!(rest(&goes), None);
        // Whoever gets no thread then has none when others leave.
        let late = young(0);
        assert_eq!(rest(&late), None);
        late.threads.give();
        assert_eq!(rest(&late), None);
        let newcomer = young(0);
        assert!(!newcomer.take_thread_young());
        newcomer.threads.give();
        assert_eq!(rest(&newcomer), None);
        let had_one = young(9);
        drop(OwnThread::start(had_one.clone()).unwrap());
        assert_eq!(rest(&had_one), None);
        let grown = young(9);
        grown.threads.0.connections.store(1, Ordering::Relaxed);
        (0..YOUNG).for_each(|_| assert_eq!(rest(&grown), None));
        grown.threads.0.connections.store(2, Ordering::Relaxed);
        assert_eq!(rest(&grown), None);
    }
}
