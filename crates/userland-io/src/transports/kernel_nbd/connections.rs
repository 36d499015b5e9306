//! The server's side: a thread for each connection, which sleeps on its socket and its bell alone.
//!
//! It runs the transmission phase of `transports::nbd` from the first byte on, for there is nobody to shake hands with. A
//! socket of tokio's would be looked after by a thread of the runtime, and each request cost a wake from there;
//! the runtime is entered for the engine's timers and sockets.
//!
//! When the kernel gives up on a connection, since a request took too long, it sends what was on its way there through
//! another, and what comes after it too. That must not pass the request that is still running here, or a newer write could be
//! overwritten by an older one. So while a connection that the kernel has hung up on has not finished, the others take no requests.

use std::cell::RefCell;
use std::future::Future;
use std::io::{self, Read, Write};
use std::net::Shutdown as Close;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::error::Error;
use super::served::Order;
use crate::Engine;
use crate::queue::{self, Queue};
use crate::transports::nbd::parker::Parker;
use crate::transports::nbd::socket::Socket;
use crate::transports::nbd::transmission;

/// How many connections there can be.
pub(super) const MOST: usize = 64;
/// How long the kernel may take to notice that we have hung up.
const NOTICE: Duration = Duration::from_secs(1);

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The kernel said goodbye.
    Left,
    /// It did not: it gave up waiting for an answer, say.
    Lost,
}

/// The connections of a device.
#[derive(Debug)]
pub(super) struct Connections {
    places: Vec<Option<Place>>,
    hung_up: Arc<HungUp>,
}

#[derive(Debug)]
struct Place {
    line: Arc<Line>,
    thread: JoinHandle<()>,
}

/// The near end of a connection.
#[derive(Debug)]
struct Line {
    socket: UnixStream,
    parker: Parker,
    is_lost: AtomicBool,
}

/// Tells which connections the kernel has hung up on, of those that have not finished.
#[derive(Debug)]
struct HungUp(OwnedFd);

impl HungUp {
    /// True if any has been, but not the one of `place`.
    fn others_than(&self, place: usize) -> bool {
        let mut events = [epoll::Event {
            flags: EventFlags::empty(),
            data: EventData::new_u64(0),
        }; MOST];
        let now = Timespec::default();
        // It takes nothing but right arguments, and no time in which a signal could come.
        let count = epoll::wait(&self.0, &mut events, Some(&now)).unwrap_or(0);
        let is_own = |event: &epoll::Event| event.data.u64() == place as u64;
        count > 0 && !events[..count].iter().any(is_own)
    }
}

impl Connections {
    /// Places for `count` connections, without any.
    pub(super) fn new(count: usize) -> Result<Self, Error> {
        let hung_up = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(io::Error::from);
        Ok(Connections {
            places: (0..count).map(|_| None).collect(),
            hung_up: Arc::new(HungUp(hung_up.map_err(Error::io("an epoll"))?)),
        })
    }

    /// Makes a connection and its thread at `place`, and answers its far end. `ended` is called by the thread in the end.
    pub(super) fn open<E: Engine>(
        &mut self,
        place: usize,
        order: &Order<E>,
        ended: impl FnOnce(End) + Send + 'static,
    ) -> Result<UnixStream, Error> {
        let (socket, far) = UnixStream::pair().map_err(Error::io("a pair of sockets"))?;
        let nonblocking = socket.set_nonblocking(true);
        nonblocking.map_err(Error::io("a pair of sockets"))?;
        // No event is asked for: a hang-up is told all the same.
        let name = EventData::new_u64(place as u64);
        epoll::add(&self.hung_up.0, &socket, name, EventFlags::empty())
            .map_err(|error| Error::io("an epoll")(error.into()))?;
        let line = Arc::new(Line {
            socket,
            parker: Parker::new().map_err(Error::io("an eventfd"))?,
            is_lost: AtomicBool::new(false),
        });
        let near = Near {
            line: line.clone(),
            kept: RefCell::default(),
            hung_up: (self.places.len() > 1).then(|| self.hung_up.clone()),
            place,
        };
        let queue = Queue {
            index: place,
            count: self.places.len(),
        };
        let (device, session) = (order.device.clone(), order.session.clone());
        let (environment, runtime) = (order.environment.clone(), order.runtime.clone());
        let mut last_word = LastWord {
            ended: Some(ended),
            end: End::Lost,
        };
        let own = line.clone();
        let work = move || {
            queue::enter(queue);
            let _inside = runtime.enter();
            let served = transmission::run(near, Vec::new(), session, device, environment);
            if let Err(error) = run(served, &own) {
                tracing::debug!(connection = place, %error, "connection lost");
            } else if !own.is_lost.load(Ordering::Relaxed) {
                last_word.end = End::Left;
            }
            // The kernel does the same when it reads the end.
            let _ = own.socket.shutdown(Close::Write);
            drop(last_word);
        };
        let thread = thread::Builder::new().name(format!("nbd-{place}"));
        let thread = thread.spawn(work).map_err(Error::io("a thread"))?;
        self.places[place] = Some(Place { line, thread });
        Ok(far)
    }

    /// Closes the connection at `place`, whose thread has ended, and lets the others go on.
    pub(super) fn close(&mut self, place: usize) {
        let Some(Place { line, thread, .. }) = self.places[place].take() else {
            return;
        };
        // One that has panicked has said so.
        let _ = thread.join();
        // The driver takes a new connection only for one that it knows to be dead.
        let mut watched = [PollFd::new(&line.socket, PollFlags::HUP)];
        let _ = poll(&mut watched, Timespec::try_from(NOTICE).ok().as_ref());
        // By name: a process that is about to be started may hold a copy of the socket.
        let _ = epoll::delete(&self.hung_up.0, &line.socket);
        for place in self.places.iter().flatten() {
            place.line.parker.waker().wake();
        }
    }
}

impl Connections {
    /// Hangs up on all, and waits until what is under way has come to an end.
    pub(super) fn end(&mut self) {
        for place in self.places.iter().flatten() {
            // It may have been shut down by its thread.
            let _ = place.line.socket.shutdown(Close::Both);
        }
        for place in self.places.drain(..).flatten() {
            let _ = place.thread.join();
        }
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        self.end();
    }
}

/// Tells of a thread's end, however that comes.
struct LastWord<F: FnOnce(End)> {
    ended: Option<F>,
    end: End,
}

impl<F: FnOnce(End)> Drop for LastWord<F> {
    fn drop(&mut self) {
        if let Some(ended) = self.ended.take() {
            ended(self.end);
        }
    }
}

/// Runs `task` to its end on this thread, which sleeps when neither its line nor a wake has something for it.
fn run<T>(task: impl Future<Output = io::Result<T>>, line: &Line) -> io::Result<T> {
    let mut task = pin!(task);
    let waker = line.parker.waker();
    let mut cx = Context::from_waker(&waker);
    loop {
        line.parker.begin();
        if let Poll::Ready(result) = task.as_mut().poll(&mut cx) {
            return result;
        }
        line.parker.park(Some(line.socket.as_fd()), None)?;
    }
}

/// A line as the transmission phase uses it.
struct Near {
    line: Arc<Line>,
    /// What came when it was not to be taken.
    kept: RefCell<Vec<u8>>,
    /// If there are others.
    hung_up: Option<Arc<HungUp>>,
    place: usize,
}

impl Near {
    /// Receives; 0 at the end. `None` if nothing is there, and then `wants` says what to wait for.
    fn receive(&self, to: &mut [u8]) -> io::Result<Option<usize>> {
        let mut kept = self.kept.borrow_mut();
        if kept.is_empty() {
            let came = self.receive_line(to)?;
            let Some(came @ 1..) = came else {
                return Ok(came);
            };
            // Asked after bytes have come: what was on a lost connection comes only once that is hung up on.
            if !self.has_to_wait() {
                return Ok(Some(came));
            }
            kept.extend_from_slice(&to[..came]);
        } else if !self.has_to_wait() {
            let len = to.len().min(kept.len());
            to[..len].copy_from_slice(&kept[..len]);
            kept.drain(..len);
            return Ok(Some(len));
        }
        // For its own end; the other's is told by a wake.
        self.wait_for(PollFlags::HUP);
        Ok(None)
    }

    fn receive_line(&self, to: &mut [u8]) -> io::Result<Option<usize>> {
        let came = loop {
            match (&self.line.socket).read(to) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait_for(PollFlags::IN);
                    return Ok(None);
                }
                came => break came,
            }
        };
        if !matches!(came, Ok(1..)) {
            self.line.is_lost.store(true, Ordering::Relaxed);
        }
        came.map(Some)
    }

    /// True while another connection finishes that the kernel has hung up on. What comes on one of the same fate is
    /// nothing new, and may be its goodbye.
    fn has_to_wait(&self) -> bool {
        let hung_up = self.hung_up.as_ref();
        hung_up.is_some_and(|hung_up| hung_up.others_than(self.place))
    }

    fn wait_for(&self, wants: PollFlags) {
        self.line.parker.want(wants);
    }

    fn send(
        &self,
        bytes: impl Fn(&mut &UnixStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            match bytes(&mut &self.line.socket) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait_for(PollFlags::OUT);
                    return Poll::Pending;
                }
                sent => return Poll::Ready(sent),
            }
        }
    }
}

impl Socket for Near {
    // An error is left to the next receive, which meets it too.
    fn receive_now(&self, to: &mut [u8]) -> Option<usize> {
        self.receive(to).ok().flatten()
    }
}

impl AsyncRead for Near {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.receive(buf.initialize_unfilled()) {
            Ok(None) => Poll::Pending,
            Ok(Some(came)) => {
                buf.advance(came);
                Poll::Ready(Ok(()))
            }
            Err(error) => Poll::Ready(Err(error)),
        }
    }
}

impl AsyncWrite for Near {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.send(|socket| socket.write(buf))
    }
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.send(|socket| socket.write_vectored(bufs))
    }
    fn is_write_vectored(&self) -> bool {
        true
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.line.socket.shutdown(Close::Write))
    }
}
