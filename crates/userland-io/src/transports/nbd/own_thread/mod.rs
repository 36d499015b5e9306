//! A thread of its own for a connection that works beside others.
//!
//! A runtime serves whichever socket has something on whichever of its threads wakes first. That is as good as it gets for one
//! busy connection, which stays awake, and for very many. But of a few, each is better off with a thread that sleeps on its
//! socket alone: the kernel wakes it where its client runs, and what one has written is in the other's cache.
//!
//! So a connection's future moves. It is polled by a task of the runtime until the connection says, at rest, that it has worked
//! beside others for a while; then by a thread, within the runtime's context, until it is alone, in a throng, or has
//! nothing to do for a second. One that comes while there are others begins on a thread, and the first of several goes to one as soon as
//! it works: a client that several threads have woken is brought to where its server runs only seconds later. Its socket goes along
//! ([`stream`]); the thread sleeps on it in a [`Parker`]. There are only so many threads; who gets none then asks again when it has worked beside others.

mod stream;

use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::AsFd;
use std::panic::resume_unwind;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::task::{Context, Poll};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::parker::{Parker, Unparked};
use super::socket::{Company, Stream};
pub(super) use stream::Movable;

/// A connection that has rested less often, and never had a thread, is young.
const YOUNG: u8 = 16;
/// So many threads for each core. Where more connections work at once, they are a throng, and leave their threads: those that have
/// one would keep the others waiting.
const THREADS: usize = 32;
/// How often a connection may use its socket before the thread looks at what else there is: as often as tokio lets a task.
const USES: u8 = 128;
/// After an error of the system's a thread tries again this much later.
const PAUSE: Duration = Duration::from_millis(1);
/// A thread that has nothing to do for so long is given back.
const IDLE: Duration = Duration::from_secs(1);

/// The connections of a server, and how many of them may yet have threads. The counts are only counts: nothing is read or written
/// under their protection.
#[derive(Clone, Debug)]
pub(super) struct Threads(Arc<Counts>);

#[derive(Debug)]
struct Counts {
    free: AtomicUsize,
    connections: AtomicUsize,
    /// Those of threads that have ended. A late wake of somebody whom they used to serve does no harm, but keeps their descriptors open,
    /// so they are not thrown away.
    parkers: Mutex<Vec<Arc<Parker>>>,
}

impl Default for Threads {
    fn default() -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Threads(Arc::new(Counts {
            free: AtomicUsize::new(cores * THREADS),
            connections: AtomicUsize::new(0),
            parkers: Mutex::default(),
        }))
    }
}

impl Threads {
    /// Takes a thread, if one is left.
    fn take(&self) -> bool {
        let order = Ordering::Relaxed;
        let less = |free: usize| free.checked_sub(1);
        self.0.free.fetch_update(order, order, less).is_ok()
    }

    fn give(&self) {
        self.0.free.fetch_add(1, Ordering::Relaxed);
    }

    fn parkers(&self) -> MutexGuard<'_, Vec<Arc<Parker>>> {
        self.0
            .parkers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// True if there are other connections.
    fn are_several(&self) -> bool {
        self.0.connections.load(Ordering::Relaxed) > 1
    }

    /// Counts a connection for as long as the answer is kept. True if it is not the only one.
    fn join(&self) -> (Joined<'_>, bool) {
        let before = self.0.connections.fetch_add(1, Ordering::Relaxed);
        (Joined(self), before > 0)
    }
}

struct Joined<'a>(&'a Threads);

impl Drop for Joined<'_> {
    fn drop(&mut self) {
        self.0.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Where a connection is and where it wants to be: shared by its stream, which asks, and whoever polls it.
#[derive(Debug, Default)]
struct Seat {
    /// Of the thread, while there is one.
    parker: Mutex<Option<Arc<Parker>>>,
    threads: Threads,
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
    fn is_on_thread(&self) -> bool {
        self.is_on_thread.load(Ordering::Acquire)
    }

    /// True before the socket's first use in a poll. The thread has slept since the last one's.
    fn is_unused(&self) -> bool {
        self.uses_left.load(Ordering::Relaxed) == USES
    }

    /// Uses the socket once. False if the poll has lasted long enough: then it should end, and be repeated.
    fn may_use(&self) -> bool {
        let left = self.uses_left.load(Ordering::Relaxed);
        self.uses_left
            .store(left.saturating_sub(1), Ordering::Relaxed);
        left > 0 && !self.is_cut.load(Ordering::Relaxed)
    }

    fn parker(&self) -> MutexGuard<'_, Option<Arc<Parker>>> {
        self.parker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sleep_on(&self, socket: Option<Arc<socket2::Socket>>) {
        *self.socket.lock().unwrap_or_else(PoisonError::into_inner) = socket;
    }

    /// The connection has nothing to do. Asks to be moved if it had better be elsewhere, and answers what company that is for.
    fn rest(&self, company: Company) -> Option<Company> {
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

    /// Notes that the connection rests. True if it is young.
    fn grow_older(&self) -> bool {
        let left = self.youth.load(Ordering::Relaxed);
        self.youth.store(left.saturating_sub(1), Ordering::Relaxed);
        left > 0
    }

    /// Takes a thread for a young connection beside others, but once: one that gets none has no claim to the next that is free.
    fn take_thread_young(&self) -> bool {
        self.youth.store(0, Ordering::Relaxed);
        self.take_thread()
    }

    fn take_thread(&self) -> bool {
        !self.is_refused.load(Ordering::Relaxed) && self.threads.take()
    }

    fn wants_to_move(&self) -> bool {
        self.wants_to_move.swap(false, Ordering::Relaxed)
    }
}

type Serve = Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

/// What a thread leaves behind.
enum Left {
    /// The connection is over.
    Over(io::Result<()>),
    /// It goes on elsewhere.
    Goes(Serve),
    /// It was cut.
    Nothing,
}

/// Runs what `serve` makes of `stream` until it ends, here or on a thread of its own, of which `threads` may still be had.
///
/// Dropped, it ends the connection at once, as a task's end would, and waits for the thread.
pub(super) async fn run<F>(
    stream: Stream,
    threads: Threads,
    serve: impl FnOnce(Stream) -> F,
) -> io::Result<()>
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let seat = Arc::new(Seat {
        threads,
        youth: AtomicU8::new(YOUNG),
        ..Seat::default()
    });
    let stream = match stream {
        Stream::Tcp(stream) => Stream::Movable(Movable::tcp(stream, seat.clone())),
        Stream::Unix(stream) => Stream::Movable(Movable::unix(stream, seat.clone())),
        stream => stream,
    };
    let mut serve: Serve = Box::pin(serve(stream));
    let (_joined, is_beside_others) = seat.threads.join();
    let mut is_moving = is_beside_others && seat.take_thread_young();
    loop {
        let ended = poll_fn(|cx| match is_moving {
            true => Poll::Ready(None),
            false => match serve.as_mut().poll(cx) {
                Poll::Pending if seat.wants_to_move() => Poll::Ready(None),
                polled => polled.map(Some),
            },
        });
        if let Some(result) = ended.await {
            return result;
        }
        is_moving = false;
        let _taken = Taken(&seat.threads);
        let own = match OwnThread::start(seat.clone()) {
            Ok(own) => own,
            Err(error) => {
                tracing::debug!(%error, "no thread for a connection");
                seat.is_refused.store(true, Ordering::Relaxed);
                continue;
            }
        };
        match own.run(serve).await {
            Left::Over(result) => return result,
            Left::Goes(back) => serve = back,
            Left::Nothing => return Ok(()),
        }
    }
}

/// A thread that was taken, given back when this is dropped.
struct Taken<'a>(&'a Threads);

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.0.give();
    }
}

/// A connection's thread. Dropped, it cuts the connection and waits until the thread is gone.
struct OwnThread {
    seat: Arc<Seat>,
    parker: Arc<Parker>,
    start: mpsc::Sender<Serve>,
    left: oneshot::Receiver<Left>,
    thread: Option<JoinHandle<()>>,
}

impl OwnThread {
    fn start(seat: Arc<Seat>) -> io::Result<Self> {
        let used = seat.threads.parkers().pop();
        let parker = match used {
            Some(parker) => parker,
            None => Arc::new(Parker::new()?),
        };
        let (start, started) = mpsc::channel();
        let (leave, left) = oneshot::channel();
        let runtime = Handle::current();
        let (own, own_parker) = (seat.clone(), parker.clone());
        let builder = thread::Builder::new().name("ulio-nbd".into());
        let thread = builder.spawn(move || {
            // Without one, the connection ended before it got here.
            if let Ok(serve) = started.recv() {
                let _context = runtime.enter();
                // Nobody to tell: then it was cut.
                let _ = leave.send(drive(serve, &own, &own_parker));
            }
        })?;
        *seat.parker() = Some(parker.clone());
        // Or it would come again as soon as it had left for being alone.
        seat.youth.store(0, Ordering::Relaxed);
        Ok(OwnThread {
            seat,
            parker,
            start,
            left,
            thread: Some(thread),
        })
    }

    async fn run(mut self, serve: Serve) -> Left {
        // A thread that is not there any more has panicked, which is told below.
        let _ = self.start.send(serve);
        match (&mut self.left).await {
            Ok(left) => left,
            Err(_) => match self.thread.take().map(JoinHandle::join) {
                // As if it had happened here.
                Some(Err(panic)) => resume_unwind(panic),
                _ => Left::Nothing,
            },
        }
    }
}

impl Drop for OwnThread {
    fn drop(&mut self) {
        self.seat.is_cut.store(true, Ordering::SeqCst);
        self.parker.waker().wake();
        // One that never got a connection waits for that.
        self.start = mpsc::channel().0;
        if let Some(thread) = self.thread.take() {
            // It has its answer sent, or polls its connection at most once more. A panic has been told by its hook.
            let _ = thread.join();
        }
        *self.seat.parker() = None;
        self.seat.threads.parkers().push(self.parker.clone());
        self.seat.is_cut.store(false, Ordering::SeqCst);
    }
}

/// The thread's loop.
fn drive(mut serve: Serve, seat: &Seat, parker: &Parker) -> Left {
    let waker = parker.waker();
    let mut cx = Context::from_waker(&waker);
    seat.is_idle.store(false, Ordering::Relaxed);
    seat.is_on_thread.store(true, Ordering::Release);
    let left = loop {
        parker.begin();
        if seat.is_cut.load(Ordering::SeqCst) {
            break Left::Nothing;
        }
        seat.uses_left.store(USES, Ordering::Relaxed);
        match serve.as_mut().poll(&mut cx) {
            Poll::Ready(result) => break Left::Over(result),
            Poll::Pending if seat.wants_to_move() => break Left::Goes(serve),
            Poll::Pending => {}
        }
        let socket = seat.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let fd = socket.as_ref().map(|socket| socket.as_fd());
        let is_idle = match parker.park(fd, Some(IDLE)) {
            Ok(unparked) => unparked == Unparked::ByTime,
            // Of memory, say. What is in flight must not be lost for that.
            Err(_) => {
                thread::sleep(PAUSE);
                false
            }
        };
        seat.is_idle.store(is_idle, Ordering::Relaxed);
    };
    seat.is_on_thread.store(false, Ordering::Release);
    left
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::pin::pin;

    use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
    use tokio::net::UnixStream;

    use super::*;

    #[tokio::test]
    async fn a_connection_is_young_but_once() {
        let young = |free: usize| {
            let counts = Counts {
                free: AtomicUsize::new(free),
                connections: AtomicUsize::new(2),
                parkers: Mutex::default(),
            };
            Arc::new(Seat {
                threads: Threads(Arc::new(counts)),
                youth: AtomicU8::new(YOUNG),
                ..Seat::default()
            })
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

    #[tokio::test]
    async fn a_poll_uses_its_socket_so_often_and_asks_for_another_one() {
        let (mut there, here) = std::os::unix::net::UnixStream::pair().unwrap();
        here.set_nonblocking(true).unwrap();
        there.write_all(&[7; 1000]).unwrap();
        let seat = Arc::new(Seat::default());
        let parker = Arc::new(Parker::new().unwrap());
        *seat.parker() = Some(parker.clone());
        let stream = Movable::unix(UnixStream::from_std(here).unwrap(), seat.clone());
        let mut stream = pin!(stream);
        seat.is_on_thread.store(true, Ordering::Release);
        let waker = parker.waker();
        let mut poll = || {
            let mut byte = [0];
            let mut to = ReadBuf::new(&mut byte);
            let polled = stream
                .as_mut()
                .poll_read(&mut Context::from_waker(&waker), &mut to);
            polled.map(|read| read.map(|()| to.filled().to_vec()).unwrap())
        };
        for _ in 0..2 {
            parker.begin();
            seat.uses_left.store(USES, Ordering::Relaxed);
            for _ in 0..USES {
                assert_eq!(poll(), Poll::Ready(vec![7]));
            }
            assert_eq!(poll(), Poll::Pending);
            // Nobody wakes but itself.
            assert_eq!(parker.park(None, None).unwrap(), Unparked::ForWork);
        }
        parker.begin();
        seat.uses_left.store(USES, Ordering::Relaxed);
        seat.is_cut.store(true, Ordering::SeqCst);
        assert_eq!(poll(), Poll::Pending);
    }

    #[tokio::test]
    async fn a_socket_that_is_drained_is_asked_again_only_after_a_sleep() {
        let (mut there, here) = std::os::unix::net::UnixStream::pair().unwrap();
        here.set_nonblocking(true).unwrap();
        let seat = Arc::new(Seat::default());
        let parker = Arc::new(Parker::new().unwrap());
        *seat.parker() = Some(parker.clone());
        let mut stream = Movable::unix(UnixStream::from_std(here).unwrap(), seat.clone());
        seat.is_on_thread.store(true, Ordering::Release);
        let waker = parker.waker();
        let mut cx = Context::from_waker(&waker);
        there.write_all(&[7; 9]).unwrap();
        for writes in [0, 1, 0, 1] {
            seat.uses_left.store(USES, Ordering::Relaxed);
            there.write_all(&[7]).unwrap();
            for _ in 0..writes {
                let polled = Pin::new(&mut stream).poll_write(&mut cx, &[8]);
                assert!(matches!(polled, Poll::Ready(Ok(1))));
            }
            let mut room = [0; 100];
            let mut to = ReadBuf::new(&mut room);
            let polled = Pin::new(&mut stream).poll_read(&mut cx, &mut to);
            assert!(matches!(polled, Poll::Ready(Ok(()))));
            assert_eq!(to.filled(), [7; 10]);
            // It does not look: that is left for the next poll.
            there.write_all(&[7; 9]).unwrap();
            let mut to = ReadBuf::new(&mut room);
            let polled = Pin::new(&mut stream).poll_read(&mut cx, &mut to);
            assert!(polled.is_pending());
        }
    }
}
