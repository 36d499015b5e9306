//! A block device from its making to its end, on a thread of its own: the driver's commands block.
//!
//! Who may touch what: the thread owns the driver's socket and the other side of the connections, whoever that is
//! ([`Side`]). Others send it [`Message`]s, and wait for its answers in channels.
//!
//! The order of an end: what is in the page cache is written; the driver says goodbye on each connection, lets go
//! of the sockets, and forgets the device, unless it was there before; the other side ends.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fd::OwnedFd;
use rustix::fs::FileType;
use tokio::sync::{oneshot, watch};

use super::connections::End;
use super::control::{self, Control, Identity, Waits, Wanted};
use super::error::Error;
use crate::Geometry;
use crate::transports::nbd::wire::TransmissionFlags;
use crate::transports::node;

/// The kernel's smallest block.
const SECTOR: u32 = 512;
/// How long the driver may take to forget a device that nobody has open, or only somebody who had a look at it.
const FORGETTING: Duration = Duration::from_secs(1);
/// How often another index is tried when somebody else was quicker.
const TRIES: usize = 1000;
const STEP: Duration = Duration::from_millis(2);

/// A kernel block device that this process serves; see [`Target`](super::Target).
///
/// Dropped, it is taken down in the background, at once: what is open or mounted on it gets errors. Await
/// [`shutdown`](Self::shutdown) to know when, and how it went.
#[derive(Debug)]
pub struct BlockDevice {
    identity: Identity,
    path: PathBuf,
    is_read_only: bool,
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

    /// True if it takes no writes.
    pub fn is_read_only(&self) -> bool {
        self.is_read_only
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
        self.stop(How::AtOnce).await
    }

    /// As [`shutdown`](Self::shutdown), unless someone has it mounted or claimed. One who has it plainly open gets errors.
    ///
    /// # Errors
    /// [`Error::InUse`], or [`Error::Io`] if that cannot be told, and the device lives on; else as `shutdown`.
    pub async fn shutdown_if_unused(&self) -> Result<(), Error> {
        self.stop(How::IfUnused).await
    }

    /// As [`shutdown_if_unused`](Self::shutdown_if_unused), by one who has claimed it. An error does not mean that it lives on.
    #[cfg(feature = "attach")]
    pub(crate) async fn shutdown_claimed(&self, claimed: File) -> Result<(), Error> {
        self.stop(How::Claimed(claimed)).await
    }

    /// Resolves when the device is gone, and says why: `None` if it was taken down in order.
    pub async fn ended(&self) -> Option<String> {
        let mut status = self.status.clone();
        match status.wait_for(|status| status.ended.is_some()).await {
            Ok(status) => status.ended.clone().flatten(),
            Err(_) => Some(Error::Lost.to_string()),
        }
    }

    async fn stop(&self, how: How) -> Result<(), Error> {
        let (answer, answered) = oneshot::channel();
        let answer = Some(answer);
        self.ask(Message::Stop { how, answer }, answered).await
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
        // It has ended before it was asked, or its thread has panicked.
        let mut status = self.status.clone();
        let ended = status.wait_for(|status| status.ended.is_some()).await;
        ended.map(drop).map_err(|_| Error::Lost)
    }
}

impl Drop for BlockDevice {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.to.send(Message::Stop {
            how: How::AtOnce,
            answer: None,
        });
    }
}

type Answer = oneshot::Sender<Result<(), Error>>;

/// What a device's thread is told.
pub(super) enum Message {
    /// A connection has ended.
    Ended { place: usize, end: End },
    /// It is to have another size.
    Resize { size: u64, answer: Answer },
    /// End.
    Stop { how: How, answer: Option<Answer> },
}

/// How a device is to end.
pub(super) enum How {
    /// Whoever uses it.
    AtOnce,
    /// Only if it can be claimed.
    IfUnused,
    /// It is claimed.
    #[cfg(feature = "attach")]
    Claimed(File),
}

/// That a device is to end, or has.
#[derive(Default)]
struct Ending {
    /// Who wants to know how that goes.
    answer: Option<Answer>,
    /// Why it has ended by itself.
    why: Option<String>,
    /// Kept until the driver has let go of it.
    claimed: Option<File>,
}

/// Who is at the other end of a device's connections.
pub(super) trait Side {
    /// The connection at `place` has ended, of the device `of`. Answers why the device has, if it has.
    fn ended(
        &mut self,
        place: usize,
        end: End,
        control: &mut Control,
        of: &Identity,
    ) -> Option<String>;

    /// The device is gone: nothing may run any more when this returns.
    fn end(&mut self);
}

/// What is to be made.
pub(super) struct Plan {
    /// The disk's, in bytes; the device's is in whole blocks.
    pub(super) size: u64,
    pub(super) block_size: u32,
    pub(super) flags: TransmissionFlags,
    pub(super) waits: Waits,
    pub(super) identifier: String,
}

/// Makes a device as planned, and resolves when it is there. On the device's thread, `make` makes the other side and gives
/// the sockets for the kernel.
pub(super) async fn start<S: Side>(
    plan: Plan,
    make: impl FnOnce(&mpsc::Sender<Message>) -> Result<(S, Vec<OwnedFd>), Error> + Send + 'static,
) -> Result<BlockDevice, Error> {
    let (to, from) = mpsc::channel();
    let (tell, told) = oneshot::channel();
    let sender = to.clone();
    let is_read_only = plan.flags.contains(TransmissionFlags::READ_ONLY);
    let thread = thread::Builder::new().name("nbd-life".to_owned());
    let work = move || {
        let begun = make(&sender).and_then(|(side, far)| Life::begin(plan, side, far, from));
        let mut life = match begun {
            Ok(life) => life,
            // Nobody listens if the order was taken back meanwhile.
            Err(error) => return drop(tell.send(Err(error))),
        };
        let (status, watched) = watch::channel(Status {
            size: life.size,
            ended: None,
        });
        let Ending {
            answer,
            why,
            claimed,
        } = match tell.send(Ok((life.identity.clone(), watched))) {
            Ok(()) => life.go_on(&status),
            Err(_) => Ending::default(),
        };
        let result = life.end(why.is_some(), claimed);
        if let Err(error) = &result {
            tracing::debug!(%error, "a block device was not taken down well");
        }
        // The disk's handle goes with it, before anybody hears of the end.
        drop(life);
        status.send_modify(|status| status.ended = Some(why));
        if let Some(answer) = answer {
            let _ = answer.send(result);
        }
    };
    thread.spawn(work).map_err(Error::io("a thread"))?;
    let (identity, status) = told.await.unwrap_or(Err(Error::Lost))?;
    Ok(BlockDevice {
        path: control::node(identity.index),
        identity,
        is_read_only,
        to,
        status,
    })
}

/// A device that lives.
struct Life<S> {
    side: S,
    control: Control,
    identity: Identity,
    block_size: u32,
    size: u64,
    from: mpsc::Receiver<Message>,
}

impl<S: Side> Life<S> {
    fn begin(
        plan: Plan,
        mut side: S,
        far: Vec<OwnedFd>,
        from: mpsc::Receiver<Message>,
    ) -> Result<Self, Error> {
        let connected = connect(&plan, &far);
        drop(far);
        let (control, identity, was_there) = match connected {
            Ok(connected) => connected,
            Err(error) => {
                side.end();
                return Err(error);
            }
        };
        let mut life = Life {
            side,
            control,
            identity,
            block_size: plan.block_size,
            size: whole_blocks(plan.size, plan.block_size),
            from,
        };
        match life.settle(was_there) {
            Ok(()) => Ok(life),
            Err(error) => {
                let _ = life.end(false, None);
                Err(error)
            }
        }
    }

    /// What a device that is connected still needs.
    fn settle(&mut self, was_there: bool) -> Result<(), Error> {
        let index = self.identity.index;
        if !was_there {
            self.control.destroy_on_disconnect(&self.identity)?;
        }
        let node = control::node(index);
        node::ensure(&node, &control::directory(index), FileType::BlockDevice)
            // The first to open it makes the kernel look for partitions.
            .and_then(|()| File::open(&node))
            .map(drop)
            .map_err(Error::io(format!("{}", node.display())))
    }

    /// Until the device is to end, or has ended.
    fn go_on(&mut self, status: &watch::Sender<Status>) -> Ending {
        loop {
            // Whoever could send has gone: nobody is interested.
            let Ok(message) = self.from.recv() else {
                return Ending::default();
            };
            match message {
                Message::Ended { place, end } => {
                    let side = &mut self.side;
                    let why = side.ended(place, end, &mut self.control, &self.identity);
                    if why.is_some() {
                        return Ending {
                            why,
                            ..Ending::default()
                        };
                    }
                }
                Message::Resize { size, answer } => {
                    let result = self.resize(size);
                    status.send_modify(|status| status.size = self.size);
                    let _ = answer.send(result);
                }
                Message::Stop { how, answer } => {
                    let claimed = match how {
                        How::AtOnce => Ok(None),
                        How::IfUnused => claim(self.identity.index).map(Some),
                        #[cfg(feature = "attach")]
                        How::Claimed(claimed) => Ok(Some(claimed)),
                    };
                    match (claimed, answer) {
                        (Ok(claimed), answer) => {
                            return Ending {
                                answer,
                                why: None,
                                claimed,
                            };
                        }
                        (Err(error), Some(answer)) => drop(answer.send(Err(error))),
                        (Err(_), None) => {}
                    }
                }
            }
        }
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
    fn end(&mut self, is_gone: bool, claimed: Option<File>) -> Result<(), Error> {
        let (control, identity) = (&mut self.control, &self.identity);
        let taken = match is_gone {
            true if !identity.is_connected() => Ok(()),
            true => take_down(control, identity, claimed, Written::Nothing),
            false => take_down(control, identity, claimed, Written::All),
        };
        self.side.end();
        taken
    }
}

/// Connects a device. Answers if the driver had it before.
fn connect(plan: &Plan, far: &[OwnedFd]) -> Result<(Control, Identity, bool), Error> {
    let mut control = Control::open()?;
    // Some kernels (6.12, for one) let a device that once could zero by command go on doing so. A server that cannot
    // gets one that was never used.
    let harmless = TransmissionFlags::SEND_WRITE_ZEROES | TransmissionFlags::READ_ONLY;
    let mut wanted = Wanted {
        index: None,
        size: whole_blocks(plan.size, plan.block_size),
        block_size: plan.block_size,
        flags: plan.flags.bits(),
        waits: plan.waits,
        identifier: &plan.identifier,
    };
    let mut before = control::indexes();
    let index = match plan.flags.intersects(harmless) {
        true => control.connect(&wanted, far)?,
        false => {
            let mut tries = 0;
            loop {
                wanted.index = (0..).find(|index| !before.contains(index));
                match control.connect(&wanted, far) {
                    // Somebody else was quicker: theirs is used, and this looks for the next.
                    Err(Error::Command { source, .. }) if is_taken(&source) && tries < TRIES => {
                        tries += 1;
                        before.extend(wanted.index);
                        before.extend(control::indexes());
                    }
                    connected => break connected?,
                }
            }
        }
    };
    let identity = Identity {
        index,
        identifier: plan.identifier.clone(),
        thread: rustix::thread::gettid()
            .as_raw_nonzero()
            .get()
            .cast_unsigned(),
    };
    Ok((control, identity, before.contains(&index)))
}

/// What the driver says of an index that was free a moment ago.
fn is_taken(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EEXIST))
}

/// What becomes of that in the page cache which is not yet written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Written {
    All,
    /// Nobody is there to take it.
    Nothing,
}

/// Disconnects the device, and waits until nothing is left of it. Nobody can come to use it meanwhile, if nobody does.
pub(super) fn take_down(
    control: &mut Control,
    device: &Identity,
    claimed: Option<File>,
    written: Written,
) -> Result<(), Error> {
    let index = device.index;
    // One that is in use goes all the same, if it has come to this.
    let claimed = claimed.or_else(|| claim(index).ok());
    let written = match &claimed {
        Some(file) if written == Written::All => file.sync_all(),
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
pub(super) fn claim(index: u32) -> Result<File, Error> {
    let node = control::node(index);
    node::claim(&node).map_err(|error| match error.kind() {
        io::ErrorKind::ResourceBusy => Error::InUse(index),
        _ => Error::io(format!("{}", node.display()))(error),
    })
}

/// The block size that the kernel is told: the engine's, where every driver takes it. It takes no larger than a page; the
/// device's edge makes up for the rest.
pub(super) fn block_size(geometry: &Geometry) -> u32 {
    let page = rustix::param::page_size() as u32;
    geometry.logical_block_size.clamp(SECTOR, page)
}

pub(super) fn whole_blocks(size: u64, block_size: u32) -> u64 {
    size - size % u64::from(block_size)
}
