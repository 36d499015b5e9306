//! A block device from its making to its end, on a thread of its own: the driver's commands block.
//!
//! Who may touch what: the thread owns the driver's socket and the connections. Others send it [`Message`]s, and
//! wait for its answers in channels.
//!
//! The order of an end: what is in the page cache is written; the driver says goodbye on each connection and lets go
//! of the sockets; the connections' threads end; the driver forgets the device, unless it was there before.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::FileType;
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};

use super::connections::{Connections, End};
use super::control::{self, Control, Identity, Wanted};
use super::error::Error;
use crate::transports::nbd::limits::Environment;
use crate::transports::nbd::session::Session;
use crate::transports::node;
use crate::{Device, Engine, Geometry};

/// The kernel's smallest block.
const SECTOR: u32 = 512;
/// How long the driver may take to forget a device that nobody has open.
const FORGETTING: Duration = Duration::from_secs(5);
const STEP: Duration = Duration::from_millis(2);

/// A kernel block device that this process serves; see [`Target`](super::Target).
///
/// Dropped, it is taken down in the background, at once: what is open or mounted on it gets errors. Await
/// [`shutdown`](Self::shutdown) to know when, and how it went.
#[derive(Debug)]
pub struct BlockDevice {
    identity: Identity,
    path: PathBuf,
    to: mpsc::Sender<Message>,
    status: watch::Receiver<Status>,
}

/// What changes about a device.
#[derive(Debug)]
struct Status {
    size: u64,
    /// Why it is gone; the inner `None` stands for taken down in order.
    ended: Option<Option<String>>,
}

impl BlockDevice {
    /// The device: `/dev/nbdN`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What tells it from others at the same path, for [`remove`](super::remove).
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Its size in bytes, as the kernel has it.
    pub fn size(&self) -> u64 {
        self.status.borrow().size
    }

    /// Gives it the size that a disk of `size` bytes has in whole blocks.
    ///
    /// # Errors
    /// [`Error::CannotResize`] if the driver cannot; else what it says.
    pub async fn resize(&self, size: u64) -> Result<(), Error> {
        let (answer, answered) = oneshot::channel();
        self.ask(Message::Resize { size, answer }, answered).await
    }

    /// Takes the device down. Whoever has it open or mounted gets errors from now on.
    ///
    /// # Errors
    /// If what was in the page cache could not be written, or the driver refuses.
    pub async fn shutdown(self) -> Result<(), Error> {
        self.stop(false).await
    }

    /// As [`shutdown`](Self::shutdown), unless someone has it mounted or claimed. One who has it plainly open gets errors.
    ///
    /// # Errors
    /// [`Error::InUse`], and the device lives on; else as `shutdown`.
    pub async fn shutdown_if_unused(&self) -> Result<(), Error> {
        self.stop(true).await
    }

    /// Resolves when the device is gone, and says why: `None` if it was taken down in order.
    pub async fn ended(&self) -> Option<String> {
        let mut status = self.status.clone();
        match status.wait_for(|status| status.ended.is_some()).await {
            Ok(status) => status.ended.clone().flatten(),
            Err(_) => Some(Error::Lost.to_string()),
        }
    }

    async fn stop(&self, if_unused: bool) -> Result<(), Error> {
        let (answer, answered) = oneshot::channel();
        let answer = Some(answer);
        self.ask(Message::Stop { if_unused, answer }, answered)
            .await
    }

    async fn ask(
        &self,
        message: Message,
        answered: oneshot::Receiver<Result<(), Error>>,
    ) -> Result<(), Error> {
        if self.to.send(message).is_ok()
            && let Ok(result) = answered.await
        {
            return result;
        }
        // It has ended before it was asked.
        self.ended().await;
        Ok(())
    }
}

impl Drop for BlockDevice {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.to.send(Message::Stop {
            if_unused: false,
            answer: None,
        });
    }
}

type Answer = oneshot::Sender<Result<(), Error>>;

/// What a device's thread is told.
enum Message {
    /// By a connection's thread, as its last word.
    Ended { place: usize, end: End },
    /// The disk has another size.
    Resize { size: u64, answer: Answer },
    /// End.
    Stop {
        if_unused: bool,
        answer: Option<Answer>,
    },
}

/// What is to be made.
pub(super) struct Order<E: Engine> {
    pub(super) device: Device<E>,
    pub(super) session: Session,
    pub(super) environment: Environment,
    /// Gives what is under way in the end a limit of time.
    pub(super) stop: watch::Sender<bool>,
    pub(super) connections: usize,
    pub(super) timeout: Duration,
    pub(super) identifier: String,
    pub(super) runtime: Handle,
}

/// Makes a device as ordered, and resolves when it is there.
pub(super) async fn start<E: Engine>(order: Order<E>) -> Result<BlockDevice, Error> {
    let (to, from) = mpsc::channel();
    let (tell, told) = oneshot::channel();
    let sender = to.clone();
    let thread = thread::Builder::new().name("nbd-life".to_owned());
    let work = move || {
        let mut life = match Life::begin(order, sender, from) {
            Ok(life) => life,
            // Nobody listens if the order was taken back meanwhile.
            Err(error) => return drop(tell.send(Err(error))),
        };
        let (status, watched) = watch::channel(Status {
            size: life.size,
            ended: None,
        });
        let mut stop = None;
        let mut why = None;
        if tell.send(Ok((life.identity.clone(), watched))).is_ok() {
            (stop, why) = life.go_on(&status);
        }
        let result = life.end(why.is_some());
        // The disk's handle goes with it, before anybody hears of the end.
        drop(life);
        if let Err(error) = &result {
            tracing::debug!(%error, "a block device was not taken down well");
        }
        status.send_modify(|status| status.ended = Some(why));
        if let Some(stop) = stop {
            let _ = stop.send(result);
        }
    };
    thread.spawn(work).map_err(Error::io("a thread"))?;
    let (identity, status) = told.await.unwrap_or(Err(Error::Lost))?;
    Ok(BlockDevice {
        path: control::node(identity.index),
        identity,
        to,
        status,
    })
}

/// A device that lives.
struct Life<E: Engine> {
    order: Order<E>,
    control: Control,
    identity: Identity,
    block_size: u32,
    size: u64,
    connections: Connections,
    to: mpsc::Sender<Message>,
    from: mpsc::Receiver<Message>,
}

impl<E: Engine> Life<E> {
    fn begin(
        order: Order<E>,
        to: mpsc::Sender<Message>,
        from: mpsc::Receiver<Message>,
    ) -> Result<Self, Error> {
        let geometry = order.device.geometry();
        let block_size = block_size(&geometry);
        let size = whole_blocks(geometry.size, block_size);
        if size == 0 {
            return Err(Error::Unsuitable(format!(
                "a disk of {} bytes is shorter than one block of a kernel device",
                geometry.size
            )));
        }
        let mut control = Control::open()?;
        let mut connections = Connections::new(order.connections)?;
        let places = 0..order.connections;
        let far: Result<Vec<_>, Error> = places
            .map(|place| open(&mut connections, place, &order, &to))
            .collect();
        let far = far?;
        let before = control::indexes();
        let wanted = Wanted {
            index: None,
            size,
            block_size,
            flags: order.session.flags.bits(),
            timeout: order.timeout,
            identifier: &order.identifier,
        };
        let index = control.connect(&wanted, &far)?;
        drop(far);
        let identity = Identity {
            index,
            identifier: order.identifier.clone(),
            thread: rustix::thread::gettid()
                .as_raw_nonzero()
                .get()
                .cast_unsigned(),
        };
        let life = Life {
            order,
            control,
            identity,
            block_size,
            size,
            connections,
            to,
            from,
        };
        life.settle(before.contains(&index))
    }

    /// What a device that is connected still needs.
    fn settle(mut self, was_there: bool) -> Result<Self, Error> {
        let index = self.identity.index;
        let settled = match was_there {
            true => Ok(()),
            false => self.control.destroy_on_disconnect(&self.identity),
        };
        let settled = settled.and_then(|()| {
            let node = control::node(index);
            node::ensure(&node, &control::directory(index), FileType::BlockDevice)
                // The first to open it makes the kernel look for partitions.
                .and_then(|()| File::open(&node))
                .map_err(Error::io(format!("{}", node.display())))
        });
        match settled {
            Ok(_) => Ok(self),
            Err(error) => {
                let _ = self.end(false);
                Err(error)
            }
        }
    }

    /// Until the device is to end, or has ended. Answers who wants to know how that goes, or why it has ended.
    fn go_on(&mut self, status: &watch::Sender<Status>) -> (Option<Answer>, Option<String>) {
        loop {
            // Never an error: this end has a sender itself.
            let Ok(message) = self.from.recv() else {
                return (None, None);
            };
            match message {
                Message::Ended { place, end } => {
                    if let Some(why) = self.ended(place, end) {
                        return (None, Some(why));
                    }
                }
                Message::Resize { size, answer } => {
                    let result = self.resize(size);
                    status.send_modify(|status| status.size = self.size);
                    let _ = answer.send(result);
                }
                Message::Stop {
                    if_unused: true,
                    answer: Some(answer),
                } => match claim(self.identity.index) {
                    Err(error @ Error::InUse(_)) => drop(answer.send(Err(error))),
                    _ => return (Some(answer), None),
                },
                Message::Stop { answer, .. } => return (answer, None),
            }
        }
    }

    /// A connection has ended. Answers why the device has, if it has.
    fn ended(&mut self, place: usize, end: End) -> Option<String> {
        if end == End::Left {
            return Some("somebody has disconnected it".to_owned());
        }
        tracing::warn!(
            device = %control::node(self.identity.index).display(),
            connection = place,
            "the kernel has given up waiting for an answer: connecting anew, now that the disk has answered"
        );
        self.connections.close(place);
        let far = open(&mut self.connections, place, &self.order, &self.to);
        let again = far.and_then(|far| self.control.reconnect(&self.identity, &[far]));
        again
            .err()
            .map(|error| format!("the kernel has hung up, and takes no new connection: {error}"))
    }

    fn resize(&mut self, size: u64) -> Result<(), Error> {
        let index = self.identity.index;
        let wanted = whole_blocks(size, self.block_size);
        self.control.resize(&self.identity, wanted)?;
        let has = control::size(index).map_err(Error::io(format!("the size of nbd{index}")))?;
        self.size = has;
        match has == wanted {
            true => Ok(()),
            false => Err(Error::CannotResize(index)),
        }
    }

    /// Takes the device down.
    fn end(&mut self, is_gone: bool) -> Result<(), Error> {
        let taken = match is_gone && !self.identity.is_connected() {
            true => Ok(()),
            false => take_down(&mut self.control, &self.identity, Written::All),
        };
        // Without a receiver there are no threads any more.
        let _ = self.order.stop.send(true);
        self.connections.end();
        taken
    }
}

/// Makes the connection at `place`, and gives its far end.
fn open<E: Engine>(
    connections: &mut Connections,
    place: usize,
    order: &Order<E>,
    to: &mpsc::Sender<Message>,
) -> Result<UnixStream, Error> {
    let to = to.clone();
    connections.open(place, order, move |end| {
        // The device's thread may have ended before its connections did.
        let _ = to.send(Message::Ended { place, end });
    })
}

/// What becomes of that in the page cache which is not yet written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Written {
    All,
    /// Nobody is there to take it.
    Nothing,
}

/// Disconnects the device, and waits until nothing is left of it.
pub(super) fn take_down(
    control: &mut Control,
    device: &Identity,
    written: Written,
) -> Result<(), Error> {
    let index = device.index;
    // Nobody else claims it from here on, if nobody has.
    let claimed = claim(index);
    let written = match &claimed {
        Ok(file) if written == Written::All => file.sync_all(),
        _ => Ok(()),
    };
    control.disconnect(index)?;
    drop(claimed);
    let until = Instant::now() + FORGETTING;
    while device.is_connected() && Instant::now() < until {
        thread::sleep(STEP);
    }
    if device.is_connected() {
        tracing::warn!("nbd{index} stays taken until whoever has it open closes it");
    }
    let node = control::node(index);
    match control::has_partitions(index) {
        // The driver forgets them when it is opened next.
        true => drop(File::open(&node)),
        false if !control::directory(index).exists() => {
            let _ = node::forget(&node);
        }
        false => {}
    }
    written.map_err(Error::io(format!("the last writes to {}", node.display())))
}

/// Claims the device, unless somebody has.
fn claim(index: u32) -> Result<File, Error> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_EXCL);
    let node = control::node(index);
    options.open(&node).map_err(|error| match error.kind() {
        io::ErrorKind::ResourceBusy => Error::InUse(index),
        _ => Error::io(format!("{}", node.display()))(error),
    })
}

/// The block size that the kernel is told: the engine's, where every driver takes it. It takes no larger than a page; the
/// device's edge makes up for the rest.
fn block_size(geometry: &Geometry) -> u32 {
    let page = rustix::param::page_size() as u32;
    geometry.logical_block_size.clamp(SECTOR, page)
}

fn whole_blocks(size: u64, block_size: u32) -> u64 {
    size - size % u64::from(block_size)
}
