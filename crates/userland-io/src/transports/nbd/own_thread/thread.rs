//! The thread that a connection may have: it polls the connection's future, and sleeps on its socket in between.
//!
//! The task that has polled the future so far starts the thread, hands the future over, and waits for what is left of it:
//! the connection's result, or the future itself, which had better be elsewhere. A task that is dropped ends its thread.

use std::future::Future;
use std::io;
use std::os::fd::AsFd;
use std::panic::resume_unwind;
use std::pin::Pin;
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::super::parker::{Parker, Unparked};
use super::seat::Seat;

/// After an error of the system's a thread tries again this much later.
const PAUSE: Duration = Duration::from_millis(1);
/// A thread that has nothing to do for so long is given back.
const IDLE: Duration = Duration::from_secs(1);

pub(super) type Serve = Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

/// What a thread leaves behind.
pub(super) enum Left {
    /// The connection is over.
    Over(io::Result<()>),
    /// It goes on elsewhere.
    Goes(Serve),
    /// It was cut.
    Nothing,
}

/// A connection's thread. Dropped, it cuts the connection and waits until the thread is gone.
pub(super) struct OwnThread {
    seat: Arc<Seat>,
    parker: Arc<Parker>,
    start: mpsc::Sender<Serve>,
    left: oneshot::Receiver<Left>,
    thread: Option<JoinHandle<()>>,
}

impl OwnThread {
    pub(super) fn start(seat: Arc<Seat>) -> io::Result<Self> {
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
        seat.grow_up();
        Ok(OwnThread {
            seat,
            parker,
            start,
            left,
            thread: Some(thread),
        })
    }

    pub(super) async fn run(mut self, serve: Serve) -> Left {
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
        self.seat.set_cut(true);
        self.parker.waker().wake();
        // One that never got a connection waits for that.
        self.start = mpsc::channel().0;
        if let Some(thread) = self.thread.take() {
            // It has its answer sent, or polls its connection at most once more. A panic has been told by its hook.
            let _ = thread.join();
        }
        *self.seat.parker() = None;
        self.seat.threads.parkers().push(self.parker.clone());
        self.seat.set_cut(false);
    }
}

/// The thread's loop.
fn drive(mut serve: Serve, seat: &Seat, parker: &Parker) -> Left {
    let waker = parker.waker();
    let mut cx = Context::from_waker(&waker);
    seat.set_idle(false);
    seat.set_on_thread(true);
    let left = loop {
        parker.begin();
        if seat.is_cut() {
            break Left::Nothing;
        }
        seat.begin_poll();
        match serve.as_mut().poll(&mut cx) {
            Poll::Ready(result) => break Left::Over(result),
            Poll::Pending if seat.wants_to_move() => break Left::Goes(serve),
            Poll::Pending => {}
        }
        let socket = seat.socket();
        let fd = socket.as_ref().map(|socket| socket.as_fd());
        let is_idle = match parker.park(fd, Some(IDLE)) {
            Ok(unparked) => unparked == Unparked::ByTime,
            // Of memory, say. What is in flight must not be lost for that.
            Err(_) => {
                thread::sleep(PAUSE);
                false
            }
        };
        seat.set_idle(is_idle);
    };
    seat.set_on_thread(false);
    left
}
