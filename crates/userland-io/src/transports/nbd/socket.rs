//! A connection's byte stream, whatever carries it.
//!
//! The request loop is generic over [`Socket`]; a server hands it the enum
//! [`Stream`], so that erasing an export costs one call a connection and no
//! box around each read.

use std::io::{self, IoSlice, Read, Write};
use std::pin::Pin;
use std::task::{Context, Poll};

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::net::TcpStream;
#[cfg(unix)]
use tokio::net::UnixStream;

#[cfg(target_os = "linux")]
use super::own_thread::Movable;

/// A byte stream on which the transmission phase can run.
pub trait Socket: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// Receives what has come already, past the runtime: neither waits nor leaves a waker, so that it can
    /// be asked over and over. Answers 0 at the end of the stream; `None` if nothing is there.
    ///
    /// Left out, nothing is ever there, and a connection sleeps as soon as it has nothing to do.
    fn receive_now(&self, to: &mut [u8]) -> Option<usize> {
        let _ = to;
        None
    }

    /// How many bytes have come already, and can be received at once; `None` if that cannot be told.
    ///
    /// Left out, it cannot.
    fn at_hand(&self) -> Option<u64> {
        None
    }

    /// Sends what can be sent at once of `slices`, past the runtime: neither waits nor leaves a waker. `None` if that is nothing.
    ///
    /// Left out, nothing ever is, and all is sent by the runtime.
    fn send_now(&self, slices: &[IoSlice<'_>]) -> Option<usize> {
        let _ = slices;
        None
    }

    /// What company to expect, as far as where it is served tells.
    ///
    /// Left out, none or too much.
    fn company(&self) -> Company {
        Company::NoneOrMany
    }

    /// Called when the connection has nothing to do, with who else has worked lately. If it will be served elsewhere from its next
    /// poll on: what company that is best for.
    ///
    /// Left out, it stays where it is.
    fn rest(&mut self, company: Company) -> Option<Company> {
        let _ = company;
        None
    }
}

/// What other connections of a server did while one worked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Company {
    /// They worked, too, for a while.
    Few,
    /// Now this, now that.
    Unsure,
    /// Nobody worked for a while, or too many for a thread each.
    NoneOrMany,
}

impl Socket for DuplexStream {}

/// The streams that a server accepts.
#[derive(Debug)]
pub enum Stream {
    /// TCP, v4 or v6.
    Tcp(TcpStream),
    /// A Unix domain socket.
    #[cfg(unix)]
    Unix(UnixStream),
    /// Either of these, wherever its connection is served.
    #[cfg(target_os = "linux")]
    Movable(Movable),
    /// A pipe in memory, for tests and for peers in the same process.
    Memory(DuplexStream),
}

/// What a Unix socket may hold of what was sent, in bytes, as far as the system allows it (`net.core.wmem_max`). Where it holds
/// less than a long payload, each part that fits wakes the other side, and this one again once it has been taken.
#[cfg(unix)]
const SEND_BUFFER: usize = 2 << 20;

#[cfg(unix)]
impl From<UnixStream> for Stream {
    fn from(stream: UnixStream) -> Self {
        let socket = SockRef::from(&stream);
        let is_short = |size: usize| size < SEND_BUFFER;
        let set = match socket.send_buffer_size().is_ok_and(is_short) {
            true => socket.set_send_buffer_size(SEND_BUFFER),
            false => Ok(()),
        };
        // A connection works without it.
        if let Err(error) = set {
            tracing::debug!(%error, "a send buffer was refused");
        }
        Stream::Unix(stream)
    }
}

impl Socket for Stream {
    // An error is left to the next receive or send, which meets it too.
    fn receive_now(&self, to: &mut [u8]) -> Option<usize> {
        let socket = self.socket()?;
        retry(|| (&*socket).read(to)).ok()
    }

    #[cfg(unix)]
    fn at_hand(&self) -> Option<u64> {
        rustix::io::ioctl_fionread(&*self.socket()?).ok()
    }

    fn send_now(&self, slices: &[IoSlice<'_>]) -> Option<usize> {
        (&*self.socket()?).write_vectored(slices).ok()
    }

    #[cfg(target_os = "linux")]
    fn company(&self) -> Company {
        match self {
            Stream::Movable(stream) => stream.company(),
            _ => Company::NoneOrMany,
        }
    }

    #[cfg(target_os = "linux")]
    fn rest(&mut self, company: Company) -> Option<Company> {
        match self {
            Stream::Movable(stream) => stream.rest(company),
            _ => None,
        }
    }
}

impl Stream {
    fn socket(&self) -> Option<SockRef<'_>> {
        match self {
            Stream::Tcp(stream) => Some(SockRef::from(stream)),
            #[cfg(unix)]
            Stream::Unix(stream) => Some(SockRef::from(stream)),
            #[cfg(target_os = "linux")]
            Stream::Movable(stream) => stream.socket(),
            Stream::Memory(_) => None,
        }
    }
}

/// Makes `call` again for as long as a signal interrupts it.
pub(super) fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

macro_rules! each {
    ($self:ident, $stream:ident => $call:expr) => {
        match $self.get_mut() {
            Stream::Tcp($stream) => $call,
            #[cfg(unix)]
            Stream::Unix($stream) => $call,
            #[cfg(target_os = "linux")]
            Stream::Movable($stream) => $call,
            Stream::Memory($stream) => $call,
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        each!(self, stream => Pin::new(stream).poll_read(cx, buf))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        each!(self, stream => Pin::new(stream).poll_write(cx, buf))
    }
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self, stream => Pin::new(stream).poll_write_vectored(cx, bufs))
    }
    fn is_write_vectored(&self) -> bool {
        true
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => Pin::new(stream).poll_flush(cx))
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => Pin::new(stream).poll_shutdown(cx))
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_unix_socket_holds_more_than_by_default() {
        let (stream, other) = UnixStream::pair().unwrap();
        let by_default = SockRef::from(&other).send_buffer_size().unwrap();
        let Stream::Unix(stream) = Stream::from(stream) else {
            panic!("not a Unix socket");
        };
        let now = SockRef::from(&stream).send_buffer_size().unwrap();
        let is_enough = by_default >= SEND_BUFFER;
        assert!(
            now > by_default || is_enough,
            "{now}, {by_default} by default"
        );
    }
}
