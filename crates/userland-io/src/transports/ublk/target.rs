//! What a caller asks for: a new block device, one to be resumed, or word of those there are.

use std::fs::File;
use std::path::{Path, PathBuf};
#[cfg(feature = "attach")]
use std::sync::mpsc;
#[cfg(feature = "attach")]
use std::time::Duration;
use std::time::Instant;

use tokio::sync::oneshot;

use super::abi::{Control, DeviceInfo, Flags};
use super::control::ControlDevice;
use super::error::Error;
use super::life::{BlockDevice, Order, Start};
#[cfg(feature = "attach")]
use super::places::identity;
use super::places::{CHAR_DEVICES, block_path, forget_nodes, is_alive};
use super::recover::{DYING, STEP};
use crate::transports::node;
use crate::{Device, Engine, Features};

/// A disk that is to be a block device: how it is to be served.
///
/// ```no_run
/// # async fn example(disk: userland_io::Device) -> userland_io::Result<()> {
/// use userland_io::transports::ublk::Target;
///
/// let block = Target::new(disk).queues(2).depth(64).add().await?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Target<E: Engine> {
    device: Device<E>,
    queues: u16,
    depth: u16,
    max_transfer: u32,
    index: Option<u32>,
    recoverable: bool,
    /// What the device to be resumed has to be: see [`identity`](super::places::identity).
    known_as: Option<u64>,
    tag: u64,
    follows: bool,
    runtime: Option<tokio::runtime::Handle>,
}

/// As many queues as this by default, on a machine that has the CPUs.
const QUEUES: usize = 4;
/// What the driver takes at most (`UBLK_MAX_QUEUE_DEPTH`).
const MAX_DEPTH: u16 = 4096;
/// The longest request that the driver takes, in bytes (`UBLK_IO_BUF_BITS`).
const MAX_TRANSFER: u32 = 32 << 20;

impl<E: Engine> Target<E> {
    /// `device` with the defaults: a queue for each CPU up to four, 128 requests at once in each, of up to 512 KiB.
    pub fn new(device: Device<E>) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Target {
            device,
            queues: cpus.min(QUEUES) as u16,
            depth: 128,
            max_transfer: 512 << 10,
            index: None,
            recoverable: false,
            known_as: None,
            tag: 0,
            follows: true,
            runtime: None,
        }
    }

    /// How many hardware queues, each with a thread of its own. At least one; no more than the machine has CPUs.
    pub fn queues(mut self, queues: u16) -> Self {
        self.queues = queues.max(1);
        self
    }

    /// How many requests each queue has under way at most: 1 to 4096.
    pub fn depth(mut self, depth: u16) -> Self {
        self.depth = depth.clamp(1, MAX_DEPTH);
        self
    }

    /// How long a read or write is at most, in bytes: whole pages up to 32 MiB. Each tag has a buffer of this length,
    /// of which the part that was ever used is kept in memory.
    pub fn max_transfer(mut self, bytes: u32) -> Self {
        self.max_transfer = bytes.min(MAX_TRANSFER);
        self
    }

    /// The device is to be `/dev/ublkbN` with this N. If left out: the first that is free.
    pub fn index(mut self, index: u32) -> Self {
        self.index = Some(index);
        self
    }

    /// If this process dies, the device waits for another to [`resume`](Self::resume) it, and requests with it. It takes a
    /// disk that claims [`SURVIVES_KILL`](Features::SURVIVES_KILL). If left out: the device dies with the process.
    pub fn recoverable(mut self, recoverable: bool) -> Self {
        self.recoverable = recoverable;
        self
    }

    /// The runtime that the engine's timers and sockets register with. It must have threads that drive it while
    /// the device is used: not a `current_thread` one whose thread may wait for the device.
    /// If left out: one of the transport's own, with two threads.
    pub fn runtime(mut self, runtime: tokio::runtime::Handle) -> Self {
        self.runtime = Some(runtime);
        self
    }

    /// The device has a new size of the disk only when [`BlockDevice::resize`] asks for it.
    #[cfg(feature = "attach")]
    pub(crate) fn resized_when_asked(mut self) -> Self {
        self.follows = false;
        self
    }

    /// By which [`tagged`] finds a new device, also if this process dies before it knows the index.
    #[cfg(feature = "attach")]
    pub(crate) fn tag(mut self, tag: u64) -> Self {
        self.tag = tag;
        self
    }

    /// What is resumed must be the device that `identity` named, not another that has its index now.
    #[cfg(feature = "attach")]
    pub(crate) fn known_as(mut self, identity: u64) -> Self {
        self.known_as = Some(identity);
        self
    }

    /// Makes the block device. It is there, and answers, when this resolves.
    ///
    /// # Errors
    /// [`Error::Unavailable`] where there is no ublk; [`Error::Unsuitable`] for a disk without a whole block, or one that is
    /// to be recoverable and cannot be; else what the driver said.
    pub async fn add(self) -> Result<BlockDevice, Error> {
        if self.recoverable {
            self.survives_kill()?;
        }
        let info = DeviceInfo {
            queues: self.queues,
            depth: self.depth,
            state: DeviceInfo::DEAD,
            max_transfer: self.max_transfer,
            index: self.index.unwrap_or(u32::MAX),
            pid: 0,
            flags: match self.recoverable {
                true => Flags::USER_RECOVERY | Flags::USER_RECOVERY_REISSUE,
                false => Flags::empty(),
            },
            tag: self.tag,
        };
        self.start(Start::Add(info)).await
    }

    /// Carries on with a block device whose process has died: `path` is its `/dev/ublkbN`, made
    /// [`recoverable`](Self::recoverable) from the same disk. Requests that were under way are done again. Queues and depth stay as
    /// they are. If the process is just dying, this waits for that for some seconds.
    ///
    /// # Errors
    /// [`Error::Served`] while the process lives; [`Error::Unsuitable`] if the device or the disk is not made for it;
    /// [`Error::Mismatch`] for another disk. The device waits on, then.
    pub async fn resume(self, path: impl AsRef<Path>) -> Result<BlockDevice, Error> {
        self.survives_kill()?;
        let index = index_of(path.as_ref())?;
        let known_as = self.known_as;
        self.start(Start::Resume { index, known_as }).await
    }

    async fn start(self, start: Start) -> Result<BlockDevice, Error> {
        let order = Order {
            device: self.device,
            start,
            follows: self.follows,
            runtime: self.runtime,
        };
        BlockDevice::start(order).await
    }

    fn survives_kill(&self) -> Result<(), Error> {
        let features = self.device.geometry().features;
        match features.contains(Features::SURVIVES_KILL) {
            true => Ok(()),
            false => Err(Error::Unsuitable(
                "this disk does not claim that completed writes survive the end of its process (SURVIVES_KILL): \
                 another process could not carry on where this one ends"
                    .to_owned(),
            )),
        }
    }
}

/// A device of the ublk driver, whoever made it.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// N of `/dev/ublkbN`.
    pub index: u32,
    /// What it is doing.
    pub state: State,
    /// The process that serves it, or did last.
    pub pid: i32,
    /// Its hardware queues.
    pub queues: u16,
    /// Requests of each queue.
    pub depth: u16,
    /// True if it waits for another process when its own dies.
    pub recoverable: bool,
}

/// What a device of the ublk driver is doing.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing: it was not started, or was stopped. There is no `/dev/ublkbN`.
    Dead,
    /// Being served.
    Live,
    /// Its process has died, and it waits to be resumed.
    Waiting,
    /// Its process has died, and requests fail until it is resumed.
    Failing,
}

impl From<DeviceInfo> for Info {
    fn from(info: DeviceInfo) -> Self {
        Info {
            index: info.index,
            state: match info.state {
                DeviceInfo::LIVE => State::Live,
                DeviceInfo::QUIESCED => State::Waiting,
                DeviceInfo::DEAD => State::Dead,
                _ => State::Failing,
            },
            pid: info.pid,
            queues: info.queues,
            depth: info.depth,
            recoverable: info.flags.contains(Flags::USER_RECOVERY),
        }
    }
}

impl Info {
    /// Its block device.
    pub fn path(&self) -> PathBuf {
        block_path(self.index)
    }
}

/// All devices of the ublk driver, by index.
///
/// # Errors
/// [`Error::Unavailable`] where there is no ublk.
pub async fn devices() -> Result<Vec<Info>, Error> {
    blocking(|| {
        let mut control = ControlDevice::open()?;
        // One that is gone by now is not there.
        let infos = indices()?
            .into_iter()
            .filter_map(|index| control.info(index).ok());
        Ok(infos.map(Info::from).collect())
    })
    .await
}

/// The indices of all devices, in order.
fn indices() -> Result<Vec<u32>, Error> {
    let mut indices: Vec<u32> = std::fs::read_dir(CHAR_DEVICES)
        .map_err(Error::io(CHAR_DEVICES))?
        .filter_map(|entry| {
            let name = entry.ok()?.file_name();
            name.to_str()?.strip_prefix("ublkc")?.parse().ok()
        })
        .collect();
    indices.sort_unstable();
    Ok(indices)
}

/// The index and the [`identity`] of the device that was made with this [tag](Target::tag). Blocks for a moment.
#[cfg(feature = "attach")]
pub(crate) fn tagged(tag: u64) -> Result<Option<(u32, u64)>, Error> {
    let mut control = ControlDevice::open()?;
    Ok(indices()?.into_iter().find_map(|index| {
        // Before it is asked for its tag: another with the index would have another identity.
        let identity = identity(index)?;
        let info = control.info(index).ok()?;
        (info.tag == tag).then_some((index, identity))
    }))
}

/// Takes a device away, whoever made it: for what a process left behind that is gone. Requests to it fail.
///
/// # Errors
/// [`Error::Served`] if its process lives.
pub async fn remove(index: u32) -> Result<(), Error> {
    blocking(move || {
        let mut control = ControlDevice::open()?;
        left(&mut control, index)?
            .ok_or_else(|| Error::NotFound(block_path(index).display().to_string()))?;
        control
            .tell(Control::StopDev, index, 0)
            .map_err(Error::command(Control::StopDev))?;
        delete(&mut control, index)
    })
    .await
}

/// Whether there is a driver, and one that takes our commands. Blocks for a moment.
#[cfg(feature = "attach")]
pub(crate) fn available() -> Result<(), Error> {
    ControlDevice::open().map(drop)
}

/// How long the driver may take to tell whether a device is open. Longer, and somebody has the device's lock who waits for
/// the answers of the process that is dead.
#[cfg(feature = "attach")]
const LOCKED: Duration = Duration::from_secs(1);

/// As [`remove`], but blocks, takes away none but the device that [`identity`] names, and none that is open, if anybody was
/// told of it: then `is_used` answers if anybody is seen to use it. Else there are but those who look at each new device.
///
/// Those may wait for a process that is dead, with a lock in hand that it takes to see who has the device open: the kernel, for
/// partitions. If the driver does not answer, and nobody was seen, it is they.
#[cfg(feature = "attach")]
pub(crate) fn remove_unused(
    index: u32,
    named: u64,
    is_used: Option<&dyn Fn() -> std::io::Result<bool>>,
) -> Result<(), Error> {
    if identity(index) != Some(named) {
        // It is gone; another may have the index now.
        return Ok(());
    }
    let mut control = ControlDevice::open()?;
    let Some(info) = left(&mut control, index)? else {
        return Ok(());
    };
    if info.state != DeviceInfo::DEAD {
        // Nobody is there to take what is not yet written.
        let claimed = match is_used {
            Some(is_used) => {
                let what = || format!("finding out who uses {}", block_path(index).display());
                if is_used().map_err(|error| Error::io(what())(error))? {
                    return Err(Error::InUse(index));
                }
                stop_unused_soon(index)?
            }
            None => None,
        };
        // What is under way fails, and whoever waited for it goes on.
        let stopped = control.tell(Control::StopDev, index, 0);
        drop(claimed);
        stopped.map_err(Error::command(Control::StopDev))?;
    }
    delete(&mut control, index)
}

/// As [`stop_unused`], unless that takes too long: a thread waits for it, then.
#[cfg(feature = "attach")]
fn stop_unused_soon(index: u32) -> Result<Option<File>, Error> {
    let (begin, begun) = mpsc::channel();
    let (tell, told) = mpsc::channel();
    let ask = move || {
        let asked = ControlDevice::open();
        let _ = begin.send(());
        // Nobody listens any more once the device was stopped without an answer.
        let _ = tell.send(asked.and_then(|mut control| stop_unused(&mut control, index, None)));
    };
    std::thread::Builder::new()
        .name("ublk-control".to_owned())
        .spawn(ask)
        .map_err(Error::io("a thread"))?;
    // What a busy machine takes to start a thread says nothing of the device.
    begun.recv().map_err(|_| Error::Lost)?;
    match told.recv_timeout(LOCKED) {
        Ok(answer) => answer,
        Err(mpsc::RecvTimeoutError::Timeout) => Ok(None),
        Err(mpsc::RecvTimeoutError::Disconnected) => Err(Error::Lost),
    }
}

/// A device whose process is gone, if it is there at all, once the driver has seen that: to be stopped while it is
/// at it brings the drivers of some kernels to a standstill.
fn left(control: &mut ControlDevice, index: u32) -> Result<Option<DeviceInfo>, Error> {
    let until = Instant::now() + DYING;
    loop {
        match control.info(index) {
            Err(_) => return Ok(None),
            Ok(info) if info.state != DeviceInfo::LIVE => return Ok(Some(info)),
            Ok(DeviceInfo { pid, .. }) if is_alive(pid) => {
                return Err(Error::Served { index, pid });
            }
            Ok(info) if Instant::now() >= until => return Ok(Some(info)),
            Ok(_) => std::thread::sleep(STEP),
        }
    }
}

/// Stops a device if nobody has it open. Where the driver cannot do that in one, it is claimed, unless it is already, and the
/// claim is for the caller to keep until the device is stopped. Plain openers are not seen then.
pub(super) fn stop_unused(
    control: &mut ControlDevice,
    index: u32,
    claimed: Option<File>,
) -> Result<Option<File>, Error> {
    if control.can(Flags::SAFE_STOP_DEV) {
        // It counts.
        drop(claimed);
        return match control.tell(Control::TryStopDev, index, 0) {
            Ok(()) => Ok(None),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Err(Error::InUse(index)),
            Err(error) => Err(Error::command(Control::TryStopDev)(error)),
        };
    }
    claimed.map_or_else(|| claim(index), Ok).map(Some)
}

/// Claims the device, unless somebody has.
pub(super) fn claim(index: u32) -> Result<File, Error> {
    let path = block_path(index);
    node::claim(&path).map_err(|error| match error.kind() {
        std::io::ErrorKind::ResourceBusy => Error::InUse(index),
        _ => Error::io(path.display().to_string())(error),
    })
}

/// Removes a device that is stopped, without waiting for those who still have it open. Its index is
/// free when they have closed it.
pub(super) fn delete(control: &mut ControlDevice, index: u32) -> Result<(), Error> {
    let deleted = match control.tell(Control::DelDevAsync, index, 0) {
        // Linux before 6.9.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL)) => {
            control.tell(Control::DelDev, index, 0)
        }
        other => other,
    };
    forget_nodes(index);
    deleted.map_err(Error::command(Control::DelDev))
}

/// The index of a block device.
fn index_of(path: &Path) -> Result<u32, Error> {
    let not_one = || Error::NotFound(path.display().to_string());
    // A link may have led here.
    let path = path.canonicalize().map_err(|_| not_one())?;
    path.to_str()
        .and_then(|path| path.strip_prefix("/dev/ublkb")?.parse().ok())
        .ok_or_else(not_one)
}

/// Runs what blocks on a thread of its own.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let (tell, told) = oneshot::channel();
    std::thread::Builder::new()
        .name("ublk-control".to_owned())
        .spawn(move || tell.send(work()))
        .map_err(Error::io("a thread"))?;
    told.await
        .unwrap_or_else(|_| Err(Error::Unavailable("the thread has panicked".to_owned())))
}
