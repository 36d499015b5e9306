//! Somebody else's NBD server at the other end: this process shakes hands with it, gives the kernel the sockets, and
//! then only watches whether they are still connected.

use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, OwnedFd};

use super::connections::{End, MOST};
use super::control::{Control, Identity, Waits};
use super::error::Error;
use super::life::{self, BlockDevice, Message, Side};
use super::target;
use crate::bell::{Bell, Eventfd};
use crate::transports::nbd::socket::Stream;
use crate::transports::nbd::{Client, ClientBuilder};

/// The longest request that the driver sends, in bytes.
const LONGEST: u32 = 32 << 20;

/// An export of an NBD server that is to be a block device, with which the kernel talks itself.
///
/// The kernel's client does less than [`Client`]: what was written and not flushed is lost with the server, and when the last
/// connection is lost the device has ended. TLS and blocks that are longer than a page it has not.
#[derive(Debug)]
pub struct Remote {
    client: ClientBuilder,
    connections: u16,
    read_only: bool,
    timeout: Duration,
    identifier: String,
}

impl Remote {
    /// The export at `uri`: `nbd://host:port/export`, or `nbd+unix:///export?socket=/path`.
    pub fn new(uri: &str) -> Self {
        Remote {
            client: Client::builder(uri),
            connections: target::connections(),
            read_only: false,
            timeout: target::TIMEOUT,
            identifier: target::identifier(),
        }
    }

    /// How many connections, where the server has `CAN_MULTI_CONN`: 1 to 64. If left out: one for each CPU up to four.
    pub fn connections(mut self, connections: u16) -> Self {
        self.connections = connections.clamp(1, MOST as u16);
        self
    }

    /// A device that takes no writes. If left out: what the server says.
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// How long a request may go unanswered before it fails, in whole seconds from three to a day: the kernel takes the connection for
    /// lost after nine tenths of that. A server that hangs, rather than being gone, is asked again on each connection that is
    /// left, each with a time-out of its own. If left out: 60 s.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = target::whole_seconds(timeout);
        self
    }

    /// See [`Target::identifier`](super::Target::identifier).
    pub fn identifier(mut self, identifier: impl Into<String>) -> Self {
        self.identifier = target::one_line(identifier.into());
        self
    }

    /// Makes the block device. It is there, with its partitions, when this resolves.
    ///
    /// # Errors
    /// [`Error::Connect`] as the client's; [`Error::Unsuitable`] if the kernel cannot use the export; else as
    /// [`Target::connect`](super::Target::connect).
    pub async fn connect(self) -> Result<BlockDevice, Error> {
        let client = self.client.connections(self.connections.into());
        let simple = client.connect_simple().await?;
        let mut geometry = simple.geometry;
        let mut flags = simple.flags;
        if self.read_only {
            geometry = geometry.into_read_only();
            flags.insert(crate::transports::nbd::wire::TransmissionFlags::READ_ONLY);
        }
        let plan = life::Plan {
            size: geometry.size,
            block_size: life::block_size(&geometry),
            flags,
            waits: Waits::of(self.timeout),
            identifier: self.identifier,
        };
        let unsuitable = |why: String| Err(Error::Unsuitable(why));
        if geometry.logical_block_size > plan.block_size {
            return unsuitable(format!(
                "the server's blocks of {} bytes are longer than a page",
                geometry.logical_block_size
            ));
        }
        if geometry.max_transfer < LONGEST {
            return unsuitable(format!(
                "the server takes requests of {} bytes at most, and the kernel sends up to {LONGEST}",
                geometry.max_transfer
            ));
        }
        if life::whole_blocks(plan.size, plan.block_size) == 0 {
            return unsuitable(format!(
                "an export of {} bytes is shorter than one block of a kernel device",
                plan.size
            ));
        }
        let sockets: Result<Vec<OwnedFd>, _> = simple.streams.into_iter().map(socket).collect();
        let sockets = sockets.map_err(Error::io("a socket"))?;
        life::start(plan, move |to| {
            let watched = sockets.iter().map(|socket| socket.try_clone());
            let watched: Result<Vec<_>, _> = watched.collect();
            let watch = Watch::start(watched.map_err(Error::io("a socket"))?, to.clone())?;
            Ok((watch, sockets))
        })
        .await
    }
}

fn socket(stream: Stream) -> std::io::Result<OwnedFd> {
    match stream {
        Stream::Tcp(stream) => Ok(stream.into_std()?.into()),
        Stream::Unix(stream) => Ok(stream.into_std()?.into()),
        Stream::Movable(_) | Stream::Memory(_) => Err(std::io::ErrorKind::Unsupported.into()),
    }
}

/// Watches connections that are the kernel's: it hangs up on its own side too when the server has.
struct Watch {
    left: usize,
    bell: Arc<Eventfd>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    fn start(sockets: Vec<OwnedFd>, to: mpsc::Sender<Message>) -> Result<Self, Error> {
        let bell = Arc::new(Eventfd::new().map_err(Error::io("an eventfd"))?);
        let (left, rung) = (sockets.len(), bell.clone());
        let thread = thread::Builder::new().name("nbd-watch".to_owned());
        let thread = thread.spawn(move || watch(sockets, &rung, &to));
        Ok(Watch {
            left,
            bell,
            thread: Some(thread.map_err(Error::io("a thread"))?),
        })
    }
}

impl Side for Watch {
    fn ended(&mut self, _: usize, _: End, _: &mut Control, _: &Identity) -> Option<String> {
        self.left = self.left.saturating_sub(1);
        match self.left {
            0 => Some("the server, or somebody here, has ended its connections".to_owned()),
            left => {
                tracing::warn!(left, "the server has ended a connection");
                None
            }
        }
    }

    fn end(&mut self) {
        self.bell.ring();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Sends word of each socket that is hung up on, until all are, or the bell is rung.
fn watch(sockets: Vec<OwnedFd>, bell: &Eventfd, to: &mpsc::Sender<Message>) {
    let mut sockets: Vec<(usize, OwnedFd)> = sockets.into_iter().enumerate().collect();
    while !sockets.is_empty() {
        // No event is asked for: a hang-up is told all the same.
        let none = PollFlags::empty();
        let mut watched = vec![PollFd::from_borrowed_fd(bell.as_fd(), PollFlags::IN)];
        let lines = sockets.iter();
        watched.extend(lines.map(|(_, socket)| PollFd::from_borrowed_fd(socket.as_fd(), none)));
        match poll(&mut watched, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return,
            Ok(_) => {}
        }
        let mut has_ended = watched.iter().map(|fd| !fd.revents().is_empty());
        if has_ended.next() == Some(true) {
            return;
        }
        let has_ended: Vec<bool> = has_ended.collect();
        drop(watched);
        let mut has_ended = has_ended.into_iter();
        sockets.retain(|(place, _)| {
            let has_ended = has_ended.next() == Some(true);
            if has_ended {
                let (place, end) = (*place, End::Lost);
                // The device's thread may have ended already.
                let _ = to.send(Message::Ended { place, end });
            }
            !has_ended
        });
    }
}
