//! A thread of its own for a connection that works beside others.
//!
//! A runtime serves whichever socket has something on whichever of its threads wakes first. That is as good as it gets for one
//! busy connection, which stays awake, and for very many. But of a few, each is better off with a thread that sleeps on its
//! socket alone: the kernel wakes it where its client runs, and what one has written is in the other's cache.
//!
//! So a connection's future moves. It is polled by a task of the runtime until the connection says, at rest, that it has worked
//! beside others for a while; then by a thread, within the runtime's context, until it is alone, in a throng, or has
//! nothing to do for a second. One that comes while there are others begins on a thread, and the first of several goes to one as soon as
//! it works: a client that several threads have woken is brought to where its server runs only seconds later. There are only so
//! many threads; who gets none then asks again when it has worked beside others.
//!
//! The socket goes along ([`stream`]), and the thread sleeps on it ([`thread`]). Where the connection is and wants to be is in its
//! [`seat`]. The task waits while the thread has the connection.

mod seat;
mod stream;
mod thread;

use std::future::{Future, poll_fn};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use super::parker::Parker;
use super::socket::Stream;
use seat::Seat;
pub(super) use stream::Movable;
use thread::{Left, OwnThread, Serve};

/// So many threads for each core. Where more connections work at once, they are a throng, and leave their threads: those that have
/// one would keep the others waiting.
const THREADS: usize = 32;

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
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
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
    let seat = Arc::new(Seat::new(threads));
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
                seat.refuse();
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
