//! A block device from its making to its end, on a thread of its own: commands to the driver block.
//!
//! Who may touch what: the thread owns the control device, the character device, the queues' threads
//! and the runtime. Others send it [`Message`]s, and wait for its answers in channels.
//!
//! The order of an end: the driver stops the device, which finishes what is under way and ends every tag's
//! task; the queues' threads end; the character device is closed, and the driver removes it; the disk is closed.

use std::fs::File;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::FileType;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use super::abi::{Control, DeviceInfo, Flags};
use super::control::ControlDevice;
use super::error::Error;
use super::params;
use super::places::{block_device, block_path, identity};
use super::queues::Queues;
use super::recover;
use super::target::{claim, delete, stop_unused};
use crate::transports::node;
use crate::{Device, Engine, Geometry};

/// How long the index of a device that nobody uses may take to be free.
const CLOSING: Duration = Duration::from_secs(2);
const STEP: Duration = Duration::from_millis(1);

/// A kernel block device that this process serves; see [`Target`](super::Target).
///
/// Dropped, it is taken down in the background, at once: what is open or mounted on it gets errors. Await
/// [`shutdown`](Self::shutdown) to know when, and how it went.
#[derive(Debug)]
pub struct BlockDevice {
    index: u32,
    to: mpsc::Sender<Message>,
    status: watch::Receiver<Status>,
}

/// What others can see of it.
#[derive(Debug)]
struct Status {
    /// In bytes.
    size: u64,
    ended: bool,
}

impl BlockDevice {
    /// Makes a device as ordered, and resolves when it answers.
    pub(super) async fn start<E: Engine>(order: Order<E>) -> Result<Self, Error> {
        let (to, from) = mpsc::channel();
        let (status, watched) = watch::channel(Status {
            size: 0,
            ended: false,
        });
        let (tell, told) = oneshot::channel();
        let sender = to.clone();
        thread::Builder::new()
            .name("ublk-life".to_owned())
            .spawn(move || {
                live(order, sender, from, tell, &status);
                status.send_modify(|status| status.ended = true);
            })
            .map_err(Error::io("a thread"))?;
        let index = told.await.unwrap_or(Err(Error::Lost))?;
        Ok(BlockDevice {
            index,
            to,
            status: watched,
        })
    }

    /// The device: `/dev/ublkbN`.
    pub fn path(&self) -> PathBuf {
        block_path(self.index)
    }

    /// N of `/dev/ublkbN`.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Its size in bytes, now: the disk's, rounded down to whole blocks.
    pub fn size(&self) -> u64 {
        self.status.borrow().size
    }

    /// Makes the device as long as the disk is now. It becomes so by itself, too; this waits for it.
    ///
    /// # Errors
    /// [`Error::Unsuitable`] if the driver cannot resize a device, or there is not one whole block left; else what
    /// the driver said. The device stays as it was.
    pub async fn resize(&self) -> Result<(), Error> {
        let (answer, answered) = oneshot::channel();
        let answer = Some(answer);
        if self.to.send(Message::Resize { answer }).is_ok()
            && let Ok(result) = answered.await
        {
            return result;
        }
        Err(Error::NotFound(self.path().display().to_string()))
    }

    /// Takes the device down: finishes the requests under way, and gives the disk's handle back by
    /// [closing](Device::close) it. Whoever has the device open or mounted gets errors from now on.
    ///
    /// # Errors
    /// If the driver refuses, or [`Error::Close`] if the disk did not close well.
    pub async fn shutdown(self) -> Result<(), Error> {
        self.stop(How::AtOnce).await
    }

    /// As [`shutdown`](Self::shutdown), unless someone has the device open or mounted.
    ///
    /// # Errors
    /// [`Error::InUse`], or what says why that cannot be told, and the device lives on; else as `shutdown`.
    pub async fn shutdown_if_unused(&self) -> Result<(), Error> {
        self.stop(How::IfUnused).await
    }

    /// As [`shutdown_if_unused`](Self::shutdown_if_unused), by one who has claimed it.
    #[cfg(feature = "attach")]
    pub(crate) async fn shutdown_claimed(&self, claimed: File) -> Result<(), Error> {
        self.stop(How::Claimed(claimed)).await
    }

    /// Resolves when the device is gone, also if somebody else took it away.
    pub async fn ended(&self) {
        let mut status = self.status.clone();
        // An error means that the thread is gone, and with it the device.
        let _ = status.wait_for(|status| status.ended).await;
    }

    async fn stop(&self, how: How) -> Result<(), Error> {
        let (answer, answered) = oneshot::channel();
        let answer = Some(answer);
        if self.to.send(Message::Stop { how, answer }).is_ok()
            && let Ok(result) = answered.await
        {
            return result;
        }
        // It has ended before it was asked to, or its thread has panicked.
        let mut status = self.status.clone();
        let ended = status.wait_for(|status| status.ended).await;
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

/// What is to be made.
pub(super) struct Order<E: Engine> {
    pub(super) device: Device<E>,
    pub(super) start: Start,
    /// It is resized when the disk is.
    pub(super) follows: bool,
    pub(super) runtime: Option<Handle>,
}

pub(super) enum Start {
    /// A new device, as this says.
    Add(DeviceInfo),
    /// The one of this index, whose process has died, if that is the one that has this identity.
    Resume { index: u32, known_as: Option<u64> },
}

type Answer = oneshot::Sender<Result<(), Error>>;

/// What a device's thread is told.
enum Message {
    /// By a queue's thread, as its last word.
    QueueEnded,
    /// The disk may have another size.
    Resize { answer: Option<Answer> },
    /// End.
    Stop { how: How, answer: Option<Answer> },
}

/// How a device is to end.
enum How {
    /// Whoever uses it.
    AtOnce,
    /// Only if nobody does.
    IfUnused,
    /// It is claimed.
    #[cfg(feature = "attach")]
    Claimed(File),
}

/// A device's thread.
fn live<E: Engine>(
    order: Order<E>,
    to: mpsc::Sender<Message>,
    from: mpsc::Receiver<Message>,
    tell: oneshot::Sender<Result<u32, Error>>,
    status: &watch::Sender<Status>,
) {
    // Every thread that is made from here on inherits it.
    be_an_io_flusher();
    let mut life = match Life::begin(order, to, from) {
        Ok(life) => life,
        Err(error) => {
            // Nobody listens if the order was taken back meanwhile.
            let _ = tell.send(Err(error));
            return;
        }
    };
    status.send_modify(|status| status.size = life.size);
    let end = match tell.send(Ok(life.info.index)) {
        Ok(()) => life.go_on(status),
        Err(_) => End::default(),
    };
    match (end.answer, life.end(end.unused)) {
        (Some(answer), result) => {
            if let Err(Err(error)) = answer.send(result) {
                tracing::error!(%error, "a block device was not taken down well");
            }
        }
        (None, Err(error)) => {
            tracing::error!(%error, "a block device was not taken down well")
        }
        (None, Ok(())) => {}
    }
}

/// Tells the kernel that this thread serves a disk: memory it needs must not be had by writing to disks.
fn be_an_io_flusher() {
    /// linux/prctl.h
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    // SAFETY: it takes plain numbers, and changes only how this thread gets memory.
    if unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } != 0 {
        let error = std::io::Error::last_os_error();
        tracing::debug!(%error, "PR_SET_IO_FLUSHER");
    }
}

/// A device that lives.
struct Life<E: Engine> {
    device: Device<E>,
    control: ControlDevice,
    info: DeviceInfo,
    /// Others may have its index when it is gone.
    identity: Option<u64>,
    /// In bytes.
    size: u64,
    queues: Queues,
    runtime: OwnOrShared,
    /// Tells of the disk's new sizes.
    watcher: Option<JoinHandle<()>>,
    from: mpsc::Receiver<Message>,
}

/// How a device ends.
#[derive(Default)]
struct End {
    /// Who wants to know how that goes.
    answer: Option<Answer>,
    /// Nobody uses it any more.
    unused: Option<Unused>,
}

/// A device that nobody uses.
struct Unused {
    /// Kept until it is stopped, so that nobody comes to use it. `None` if it is stopped.
    claimed: Option<File>,
    /// How it went to write what was in the page cache.
    written: Result<(), Error>,
}

enum OwnOrShared {
    Own(Runtime),
    Shared(Handle),
}

impl OwnOrShared {
    fn handle(&self) -> &Handle {
        match self {
            OwnOrShared::Own(runtime) => runtime.handle(),
            OwnOrShared::Shared(handle) => handle,
        }
    }
}

impl<E: Engine> Life<E> {
    fn begin(
        order: Order<E>,
        to: mpsc::Sender<Message>,
        from: mpsc::Receiver<Message>,
    ) -> Result<Self, Error> {
        let Order {
            device,
            start,
            follows,
            runtime,
        } = order;
        let mut control = ControlDevice::open()?;
        let runtime = match runtime {
            Some(handle) => OwnOrShared::Shared(handle),
            None => OwnOrShared::Own(
                tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(2)
                    .thread_name("ublk-runtime")
                    .enable_all()
                    .build()
                    .map_err(Error::io("a runtime"))?,
            ),
        };
        let seen = device.geometry();
        let (info, go) = match start {
            Start::Add(info) => (add(&mut control, &seen, info)?, Control::StartDev),
            Start::Resume { index, known_as } => (
                recover::examine(&mut control, &seen, index, known_as)?,
                Control::EndUserRecovery,
            ),
        };
        let mut queues = Queues::default();
        let ended = to.clone();
        let started = queues
            .ready(&mut control, &device, &info, runtime.handle(), move || {
                // The device's thread may have ended before its queues did.
                let _ = ended.send(Message::QueueEnded);
            })
            .and_then(|()| match go {
                Control::EndUserRecovery => recover::begin(&mut control, &info),
                _ => Ok(()),
            })
            .and_then(|()| queues.start(info.index))
            .and_then(|()| {
                let pid = u64::from(std::process::id());
                let gone = control.tell(go, info.index, pid);
                gone.map_err(Error::command(go))?;
                let path = block_path(info.index);
                let there = node::ensure(&path, &block_device(info.index), FileType::BlockDevice);
                there.map_err(Error::io(path.display().to_string()))
            });
        if let Err(error) = started {
            match go {
                // It goes on waiting for a process that can serve it.
                Control::EndUserRecovery => queues.break_off(),
                // The driver may have the commands of some tags, and others come yet.
                _ => {
                    let stopped = stop(&mut control, info.index);
                    queues.break_off();
                    stopped.and(remove(&mut control, info.index, true))?;
                }
            }
            return Err(error);
        }
        let watcher = follows.then(|| {
            let watch = watch_size(device.clone(), seen, to);
            runtime.handle().spawn(watch)
        });
        Ok(Life {
            device,
            control,
            identity: identity(info.index),
            info,
            size: params::whole_blocks(&seen, page_size()),
            queues,
            runtime,
            watcher,
            from,
        })
    }

    /// Until the device is to end, or has ended.
    fn go_on(&mut self, status: &watch::Sender<Status>) -> End {
        let mut serving = self.queues.count();
        while serving > 0 {
            // An error would mean that nobody is left to be served for.
            let Ok(message) = self.from.recv() else {
                break;
            };
            match message {
                Message::QueueEnded => serving -= 1,
                Message::Resize { answer } => {
                    let resized = self.resize();
                    status.send_modify(|status| status.size = self.size);
                    match (answer, resized) {
                        (Some(answer), resized) => drop(answer.send(resized)),
                        (None, Err(error)) => {
                            let (index, to) = (self.info.index, self.device.geometry().size);
                            tracing::error!(index, to, %error, "a block device cannot follow its disk's size");
                        }
                        (None, Ok(())) => {}
                    }
                }
                Message::Stop { how, answer } => {
                    let unused = match how {
                        How::AtOnce => Ok(None),
                        How::IfUnused => claim(self.info.index)
                            .and_then(|claimed| self.stop_unused(claimed))
                            .map(Some),
                        #[cfg(feature = "attach")]
                        How::Claimed(claimed) => self.stop_unused(claimed).map(Some),
                    };
                    match (unused, answer) {
                        (Ok(unused), answer) => return End { answer, unused },
                        (Err(error), Some(answer)) => drop(answer.send(Err(error))),
                        (Err(_), None) => {}
                    }
                }
            }
        }
        End::default()
    }

    /// Writes what is in the page cache, and stops the device unless somebody uses it, or has it claimed to be stopped.
    fn stop_unused(&mut self, claimed: File) -> Result<Unused, Error> {
        let index = self.info.index;
        // One that somebody else has put to rest would wait for a process to take it. And one that is recoverable
        // fails what is written while it is being stopped.
        let info = self.control.info(index);
        let written = match info.is_ok_and(|info| info.state == DeviceInfo::LIVE) {
            true => claimed.sync_all(),
            false => Ok(()),
        };
        let claimed = stop_unused(&mut self.control, index, Some(claimed))?;
        let path = block_path(index);
        let written = written.map_err(Error::io(format!("the last writes to {}", path.display())));
        Ok(Unused { claimed, written })
    }

    /// Gives the device the size that the disk has.
    fn resize(&mut self) -> Result<(), Error> {
        let size = params::whole_blocks(&self.device.geometry(), page_size());
        if size == self.size {
            return Ok(());
        }
        if !self.control.can(Flags::UPDATE_SIZE) {
            return Err(Error::Unsuitable(
                "the ublk driver of this kernel cannot resize a device (Linux 6.16 can): make it anew".to_owned(),
            ));
        }
        if size == 0 {
            return Err(Error::Unsuitable(
                "a disk without one whole block is no size for a kernel device".to_owned(),
            ));
        }
        let index = self.info.index;
        let told = self.control.tell(Control::UpdateSize, index, size / 512);
        told.map_err(Error::command(Control::UpdateSize))?;
        tracing::info!(index, size, "resized");
        self.size = size;
        Ok(())
    }

    /// Takes the device down, and gives the disk's handle back.
    fn end(mut self, unused: Option<Unused>) -> Result<(), Error> {
        let index = self.info.index;
        let is_unused = unused.is_some();
        let (claimed, written) = match unused {
            Some(Unused { claimed, written }) => (claimed, written),
            None => (None, Ok(())),
        };
        // Somebody else may have put it to rest, for another process to resume it.
        let waits = self
            .control
            .info(index)
            .is_ok_and(|info| info.state == DeviceInfo::QUIESCED);
        let taken = match waits {
            true => {
                self.queues.end();
                Ok(())
            }
            // As long as the character device is open here, nobody else has the index.
            false => {
                let stopped = stop(&mut self.control, index);
                // A claim would keep the index taken.
                drop(claimed);
                self.queues.end();
                // Somebody else may have removed it.
                match identity(index) == self.identity {
                    true => stopped.and(remove(&mut self.control, index, is_unused)),
                    false => stopped,
                }
            }
        };
        let closed = self.runtime.handle().block_on(async {
            if let Some(watcher) = self.watcher {
                watcher.abort();
                // When it has ended, its handle of the disk is gone.
                let _ = watcher.await;
            }
            self.device.close().await.map_err(Error::Close)
        });
        written.and(taken).and(closed)
    }
}

fn page_size() -> u32 {
    rustix::param::page_size() as u32
}

/// Adds a device for a disk.
fn add(
    control: &mut ControlDevice,
    geometry: &Geometry,
    mut info: DeviceInfo,
) -> Result<DeviceInfo, Error> {
    let page = page_size();
    let size = params::whole_blocks(geometry, page);
    if size == 0 {
        return Err(Error::Unsuitable(format!(
            "a disk of {} bytes is shorter than one block of a kernel device",
            geometry.size
        )));
    }
    if size != geometry.size {
        tracing::warn!(
            size = geometry.size,
            shown = size,
            "the disk does not end on a block of the kernel device, which leaves the rest out"
        );
    }
    let shortest = (geometry.logical_block_size.clamp(512, page)).max(page);
    if geometry.max_transfer != 0 {
        info.max_transfer = info.max_transfer.min(geometry.max_transfer);
    }
    // Whole pages; the edge splits where that is more than the engine takes.
    info.max_transfer = (info.max_transfer - info.max_transfer % page).max(shortest);
    if control.can(Flags::UPDATE_SIZE) {
        info.flags |= Flags::UPDATE_SIZE;
    }
    if control.can(Flags::SAFE_STOP_DEV) {
        info.flags |= Flags::SAFE_STOP_DEV;
    }
    let info = control.add(&info)?;
    let params = params::of(geometry, info.max_transfer, page);
    if let Err(error) = control.set_params(info.index, &params) {
        let _ = control.tell(Control::DelDev, info.index, 0);
        return Err(Error::command(Control::SetParams)(error));
    }
    Ok(info)
}

/// Stops a device: the tasks of its tags end.
fn stop(control: &mut ControlDevice, index: u32) -> Result<(), Error> {
    match control.tell(Control::StopDev, index, 0) {
        // Somebody else may have been faster.
        Err(error) if control.info(index).is_ok() => Err(Error::command(Control::StopDev)(error)),
        _ => Ok(()),
    }
}

/// Removes a device that is stopped. If it is `unused`, its index is free when this is done, unless somebody who did not
/// claim it has it open after all.
fn remove(control: &mut ControlDevice, index: u32, unused: bool) -> Result<(), Error> {
    let deleted = delete(control, index);
    let until = Instant::now() + CLOSING;
    // Somebody else may have removed it.
    while control.info(index).is_ok() {
        if deleted.is_err() || !unused {
            return deleted;
        }
        if Instant::now() >= until {
            tracing::warn!(
                index,
                "a block device is stopped, and its index is taken until those close it who have it open still"
            );
            break;
        }
        thread::sleep(STEP);
    }
    Ok(())
}

/// Sends word of each new size of the disk.
async fn watch_size<E: Engine>(device: Device<E>, mut seen: Geometry, to: mpsc::Sender<Message>) {
    loop {
        seen = device.changed(seen).await;
        if to.send(Message::Resize { answer: None }).is_err() {
            return;
        }
    }
}
