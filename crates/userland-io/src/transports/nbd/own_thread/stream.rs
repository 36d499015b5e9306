//! A socket that its connection takes along, from the runtime to a thread of its own and back.
//!
//! Each read or write first looks where it is: on a thread, the runtime must not watch the socket, or each request would wake
//! it for nothing.

use std::io::{self, IoSlice, Read, Write};
use std::net::Shutdown;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use rustix::event::PollFlags;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

use super::super::parker::Parker;
use super::super::socket::{Company, retry};
use super::seat::Seat;

/// A connection's socket, wherever that is served.
#[derive(Debug)]
pub struct Movable {
    io: Io,
    seat: Arc<Seat>,
    /// A receive has brought less than it could: nothing more is there before the thread has slept.
    is_drained: bool,
}

#[derive(Debug)]
enum Io {
    Tcp(TcpStream),
    Unix(UnixStream),
    /// On a thread of its own, which sleeps on the socket, too.
    Own(Arc<socket2::Socket>, Arc<Parker>, Kind),
    /// Lost on the way.
    Gone,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Tcp,
    Unix,
}

impl Movable {
    pub(super) fn tcp(stream: TcpStream, seat: Arc<Seat>) -> Self {
        Movable::new(Io::Tcp(stream), seat)
    }

    pub(super) fn unix(stream: UnixStream, seat: Arc<Seat>) -> Self {
        Movable::new(Io::Unix(stream), seat)
    }

    fn new(io: Io, seat: Arc<Seat>) -> Self {
        Movable {
            io,
            seat,
            is_drained: false,
        }
    }

    /// Follows the connection to where it is now.
    fn follow(&mut self) -> io::Result<()> {
        match (&mut self.io, self.seat.is_on_thread()) {
            (Io::Own(_, parker, _), true) => {
                self.is_drained &= !self.seat.is_unused();
                // It may have gone from one thread to the next without a look at its socket.
                match &*self.seat.parker() {
                    Some(now) if !Arc::ptr_eq(now, parker) => *parker = now.clone(),
                    _ => {}
                }
                return Ok(());
            }
            (Io::Tcp(_) | Io::Unix(_), false) | (Io::Gone, _) => return Ok(()),
            _ => {}
        }
        self.is_drained = false;
        let own = |socket: socket2::Socket, kind| {
            let socket = Arc::new(socket);
            self.seat.sleep_on(Some(socket.clone()));
            match self.seat.parker().clone() {
                Some(parker) => Io::Own(socket, parker, kind),
                // A thread without: there is none.
                None => Io::Gone,
            }
        };
        self.io = match std::mem::replace(&mut self.io, Io::Gone) {
            Io::Tcp(stream) => own(stream.into_std()?.into(), Kind::Tcp),
            Io::Unix(stream) => own(stream.into_std()?.into(), Kind::Unix),
            Io::Own(socket, _, kind) => {
                self.seat.sleep_on(None);
                let socket = Arc::into_inner(socket).ok_or(io::ErrorKind::NotConnected)?;
                match kind {
                    Kind::Tcp => Io::Tcp(TcpStream::from_std(socket.into())?),
                    Kind::Unix => Io::Unix(UnixStream::from_std(socket.into())?),
                }
            }
            Io::Gone => Io::Gone,
        };
        Ok(())
    }

    pub(in super::super) fn socket(&self) -> Option<SockRef<'_>> {
        match &self.io {
            Io::Tcp(stream) => Some(SockRef::from(stream)),
            Io::Unix(stream) => Some(SockRef::from(stream)),
            Io::Own(socket, ..) => Some(SockRef::from(&**socket)),
            Io::Gone => None,
        }
    }

    /// See [`Socket::company`](super::super::socket::Socket::company).
    pub(in super::super) fn company(&self) -> Company {
        match self.seat.is_on_thread() {
            // It only begins here because there were others.
            true => Company::Unsure,
            false => Company::NoneOrMany,
        }
    }

    /// See [`Socket::rest`](super::super::socket::Socket::rest).
    pub(in super::super) fn rest(&self, company: Company) -> Option<Company> {
        self.seat.rest(company)
    }
}

impl Drop for Movable {
    fn drop(&mut self) {
        // Lest the client wait for the end until the thread has been looked after.
        self.seat.sleep_on(None);
    }
}

fn gone<T>() -> Poll<io::Result<T>> {
    Poll::Ready(Err(io::ErrorKind::NotConnected.into()))
}

/// What came of a call that does not wait, and `want` of the socket if it would have to.
fn polled<T>(result: io::Result<T>, want: impl FnOnce()) -> Poll<io::Result<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            want();
            Poll::Pending
        }
        result => Poll::Ready(result),
    }
}

impl AsyncRead for Movable {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.follow()?;
        let this = &mut *self;
        match &mut this.io {
            Io::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Io::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            Io::Own(..) if !this.seat.may_use() => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Io::Own(_, parker, _) if this.is_drained => {
                parker.want(PollFlags::IN);
                Poll::Pending
            }
            Io::Own(socket, parker, _) => {
                let room = buf.initialize_unfilled();
                let most = room.len();
                let received = retry(|| (&**socket).read(room));
                this.is_drained = received.as_ref().is_ok_and(|&came| 0 < came && came < most);
                polled(received, || parker.want(PollFlags::IN)).map_ok(|came| buf.advance(came))
            }
            Io::Gone => gone(),
        }
    }
}

impl AsyncWrite for Movable {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.follow()?;
        let this = &mut *self;
        match &mut this.io {
            Io::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Io::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Io::Own(..) if !this.seat.may_use() => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Io::Own(socket, parker, _) => {
                let sent = retry(|| (&**socket).write_vectored(bufs));
                polled(sent, || parker.want(PollFlags::OUT))
            }
            Io::Gone => gone(),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // A socket keeps nothing back.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.socket() {
            Some(socket) => Poll::Ready(socket.shutdown(Shutdown::Write)),
            None => gone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::super::super::parker::Unparked;
    use super::super::seat::USES;
    use super::*;

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
        seat.set_on_thread(true);
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
            seat.begin_poll();
            for _ in 0..USES {
                assert_eq!(poll(), Poll::Ready(vec![7]));
            }
            assert_eq!(poll(), Poll::Pending);
            // Nobody wakes but itself.
            assert_eq!(parker.park(None, None).unwrap(), Unparked::ForWork);
        }
        parker.begin();
        seat.begin_poll();
        seat.set_cut(true);
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
        seat.set_on_thread(true);
        let waker = parker.waker();
        let mut cx = Context::from_waker(&waker);
        there.write_all(&[7; 9]).unwrap();
        for writes in [0, 1, 0, 1] {
            seat.begin_poll();
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
