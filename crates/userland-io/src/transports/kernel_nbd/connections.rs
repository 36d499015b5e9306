//! The server's side: a thread for each connection, which sleeps on its socket and its bell alone.
//!
//! It runs the transmission phase of `transports::nbd` from the first byte on, for there is nobody to shake hands with. A
//! socket of tokio's would be looked after by a thread of the runtime, and each request cost a wake from there;
//! the runtime is entered for the engine's timers and sockets.

use std::future::Future;
use std::io::{self, Read, Write};
use std::net::Shutdown as Close;
use std::os::unix::net::UnixStream;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::task::{Context, Poll};
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::Handle;

use super::error::Error;
use crate::queue::{self, Queue};
use crate::transports::nbd::limits::Environment;
use crate::transports::nbd::session::Session;
use crate::transports::nbd::socket::Socket;
use crate::transports::nbd::transmission;
use crate::transports::wake::{self, Calls, Eventfd};
use crate::{Device, Engine};

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The kernel said goodbye.
    Left,
    /// It did not: it gave up waiting for an answer, say.
    Lost,
}

/// The connections of a device: all of them at one time.
#[derive(Debug)]
pub(super) struct Connections {
    lines: Arc<[Line]>,
    threads: Vec<JoinHandle<()>>,
}

/// The near end of one.
#[derive(Debug)]
struct Line {
    socket: UnixStream,
    /// What the task waits for, as `poll` has it.
    wants: AtomicU16,
    is_lost: AtomicBool,
}

/// Makes `count` connections and their threads. Answers the far ends, too. `ended` is called by each thread in the end.
pub(super) fn start<E: Engine>(
    count: usize,
    device: &Device<E>,
    session: &Session,
    environment: &Environment,
    runtime: &Handle,
    ended: impl Fn(End) + Clone + Send + 'static,
) -> Result<(Connections, Vec<UnixStream>), Error> {
    let (mut lines, mut far) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let pair = UnixStream::pair().and_then(|(near, far)| {
            near.set_nonblocking(true)?;
            Ok((near, far))
        });
        let (socket, other) = pair.map_err(Error::io("a pair of sockets"))?;
        lines.push(Line {
            socket,
            wants: AtomicU16::new(0),
            is_lost: AtomicBool::new(false),
        });
        far.push(other);
    }
    let mut connections = Connections {
        lines: lines.into(),
        threads: Vec::new(),
    };
    for index in 0..count {
        let near = Near {
            lines: connections.lines.clone(),
            index,
        };
        let bell = Eventfd::new().map_err(Error::io("an eventfd"))?;
        let calls = Arc::new(Calls::new(1, bell));
        let (device, session) = (device.clone(), session.clone());
        let (environment, runtime) = (environment.clone(), runtime.clone());
        let mut last_word = LastWord {
            ended: ended.clone(),
            end: End::Lost,
        };
        let work = move || {
            queue::enter(Queue { index, count });
            let lines = near.lines.clone();
            let line = &lines[index];
            let _inside = runtime.enter();
            let served = transmission::run(near, Vec::new(), session, device, environment);
            if let Err(error) = run(served, line, &calls) {
                tracing::debug!(connection = index, %error, "connection lost");
            } else if !line.is_lost.load(Ordering::Relaxed) {
                last_word.end = End::Left;
            }
            let _ = line.socket.shutdown(Close::Both);
            drop(last_word);
        };
        let thread = thread::Builder::new().name(format!("nbd-{index}"));
        let thread = thread.spawn(work).map_err(Error::io("a thread"))?;
        connections.threads.push(thread);
    }
    Ok((connections, far))
}

impl Connections {
    /// Hangs up. What is under way runs to its end.
    pub(super) fn hang_up(&self) {
        for line in self.lines.iter() {
            // It may have been shut down by its thread.
            let _ = line.socket.shutdown(Close::Both);
        }
    }

    /// Waits for the threads, which have nothing to do any more once the sockets are shut down.
    pub(super) fn join(&mut self) {
        for thread in self.threads.drain(..) {
            // One that has panicked has said so.
            let _ = thread.join();
        }
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        self.hang_up();
        self.join();
    }
}

/// Tells of a thread's end, however that comes.
struct LastWord<F: Fn(End)> {
    ended: F,
    end: End,
}

impl<F: Fn(End)> Drop for LastWord<F> {
    fn drop(&mut self) {
        (self.ended)(self.end);
    }
}

/// Runs `task` to its end on this thread, which sleeps when neither its line nor a wake has something for it.
fn run<T>(
    task: impl Future<Output = io::Result<T>>,
    line: &Line,
    calls: &Arc<Calls<Eventfd>>,
) -> io::Result<T> {
    let mut task = pin!(task);
    let waker = wake::waker(calls, 0);
    let mut cx = Context::from_waker(&waker);
    let mut taken = [0];
    loop {
        line.wants.store(0, Ordering::Relaxed);
        if let Poll::Ready(result) = task.as_mut().poll(&mut cx) {
            return result;
        }
        if calls.fall_asleep() {
            sleep(line, calls.bell())?;
        }
        calls.answer(&mut taken);
        taken = [0];
    }
}

fn sleep(line: &Line, bell: &Eventfd) -> io::Result<()> {
    let wants = PollFlags::from_bits_retain(line.wants.load(Ordering::Relaxed));
    let mut watched = [
        PollFd::new(bell, PollFlags::IN),
        PollFd::new(&line.socket, wants),
    ];
    // A socket that nothing is wanted of would tell of its end again and again.
    let watched = match wants.is_empty() {
        true => &mut watched[..1],
        false => &mut watched[..],
    };
    match poll(watched, None) {
        Err(rustix::io::Errno::INTR) => return Ok(()),
        polled => polled?,
    };
    if watched[0].revents().contains(PollFlags::IN) {
        let _ = rustix::io::read(bell, &mut [0; 8]);
    }
    Ok(())
}

/// A line as the transmission phase uses it.
struct Near {
    lines: Arc<[Line]>,
    index: usize,
}

impl Near {
    fn line(&self) -> &Line {
        &self.lines[self.index]
    }

    /// Receives; 0 at the end. `None` if nothing is there.
    fn receive(&self, to: &mut [u8]) -> io::Result<Option<usize>> {
        let line = self.line();
        let came = loop {
            match (&line.socket).read(to) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                came => break came,
            }
        };
        if !matches!(came, Ok(1..)) {
            line.is_lost.store(true, Ordering::Relaxed);
        }
        came.map(Some)
    }

    fn pending<T>(&self, wants: PollFlags) -> Poll<T> {
        self.line().wants.fetch_or(wants.bits(), Ordering::Relaxed);
        Poll::Pending
    }

    fn send(
        &self,
        bytes: impl Fn(&mut &UnixStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            match bytes(&mut &self.line().socket) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return self.pending(PollFlags::OUT);
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
            Ok(None) => self.pending(PollFlags::IN),
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
        Poll::Ready(self.line().socket.shutdown(Close::Write))
    }
}
