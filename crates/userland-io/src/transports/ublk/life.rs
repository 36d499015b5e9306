//! A block device from its making to its end, on a thread of its own: commands to the driver block.
//!
//! Who may touch what: the thread owns the control device, the character device, the queues' threads
//! and the runtime. Others send it [`Message`]s, and wait for its answers in channels.
//!
//! The order of an end: the driver stops the device, which finishes what is under way and ends every tag's
//! task; the queues' threads end; the character device is closed, and the driver removes it; the disk is closed.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;

use tokio::runtime::{Handle, Runtime};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use super::abi::{Control, DeviceInfo, Flags};
use super::control::ControlDevice;
use super::error::Error;
use super::params;
use super::queues::Queues;
use super::recover::recover;
use super::target::block_path;
use crate::{Device, Engine, Geometry};

/// A kernel block device that this process serves; see [`Target`](super::Target).
///
/// Dropped, it is taken down in the background, at once: what is open or mounted on it gets errors. Await
/// [`shutdown`](Self::shutdown) to know when, and how it went.
#[derive(Debug)]
pub struct BlockDevice {
    index: u32,
    to: mpsc::Sender<Message>,
    ended: watch::Receiver<bool>,
}

impl BlockDevice {
    /// Makes a device as ordered, and resolves when it answers.
    pub(super) async fn start<E: Engine>(order: Order<E>) -> Result<Self, Error> {
        let (to, from) = mpsc::channel();
        let (ended, sees_end) = watch::channel(false);
        let (tell, told) = oneshot::channel();
        let sender = to.clone();
        thread::Builder::new()
            .name("ublk-life".to_owned())
            .spawn(move || {
                live(order, sender, from, tell);
                ended.send_replace(true);
            })
            .map_err(Error::io("a thread"))?;
        let index = told.await.unwrap_or_else(|_| {
            Err(Error::Unavailable(
                "the device's thread has panicked".to_owned(),
            ))
        })?;
        Ok(BlockDevice {
            index,
            to,
            ended: sees_end,
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

    /// Takes the device down: finishes the requests under way, and gives the disk's handle back by
    /// [closing](Device::close) it. Whoever has the device open or mounted gets errors from now on.
    ///
    /// # Errors
    /// If the driver refuses, or [`Error::Close`] if the disk did not close well.
    pub async fn shutdown(self) -> Result<(), Error> {
        self.stop(false).await
    }

    /// As [`shutdown`](Self::shutdown), unless someone has the device open or mounted.
    ///
    /// # Errors
    /// [`Error::InUse`], and the device lives on; else as `shutdown`.
    pub async fn shutdown_if_unused(&self) -> Result<(), Error> {
        self.stop(true).await
    }

    /// Resolves when the device is gone, also if somebody else took it away.
    pub async fn ended(&self) {
        let mut ended = self.ended.clone();
        // An error means that the thread is gone, and with it the device.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    async fn stop(&self, if_unused: bool) -> Result<(), Error> {
        let (answer, answered) = oneshot::channel();
        let answer = Some(answer);
        if self.to.send(Message::Stop { if_unused, answer }).is_ok()
            && let Ok(result) = answered.await
        {
            return result;
        }
        // It has ended before it was asked to.
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

/// What is to be made.
pub(super) struct Order<E: Engine> {
    pub(super) device: Device<E>,
    pub(super) start: Start,
    pub(super) runtime: Option<Handle>,
}

pub(super) enum Start {
    /// A new device, as this says.
    Add(DeviceInfo),
    /// The one of this index, whose process has died.
    Resume(u32),
}

type Answer = oneshot::Sender<Result<(), Error>>;

/// What a device's thread is told.
enum Message {
    /// By a queue's thread, as its last word.
    QueueEnded,
    /// The disk has another size.
    Resized(Geometry),
    /// End.
    Stop {
        if_unused: bool,
        answer: Option<Answer>,
    },
}

/// A device's thread.
fn live<E: Engine>(
    order: Order<E>,
    to: mpsc::Sender<Message>,
    from: mpsc::Receiver<Message>,
    tell: oneshot::Sender<Result<u32, Error>>,
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
    let answer = match tell.send(Ok(life.info.index)) {
        Ok(()) => life.go_on(),
        Err(_) => None,
    };
    match (answer, life.end()) {
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
    queues: Queues,
    runtime: OwnOrShared,
    /// Tells of the disk's new sizes.
    watcher: JoinHandle<()>,
    from: mpsc::Receiver<Message>,
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
            Start::Resume(index) => (
                recover(&mut control, &seen, index)?,
                Control::EndUserRecovery,
            ),
        };
        let mut queues = Queues::default();
        let ended = to.clone();
        let started = queues
            .start(&mut control, &device, &info, runtime.handle(), move || {
                // The device's thread may have ended before its queues did.
                let _ = ended.send(Message::QueueEnded);
            })
            .and_then(|()| {
                let pid = u64::from(std::process::id());
                control
                    .tell(go, info.index, pid)
                    .map_err(Error::command(go))
            });
        if let Err(error) = started {
            match go {
                // It goes on waiting for a process that can serve it.
                Control::EndUserRecovery => queues.break_off(),
                _ => take_down(&mut control, &mut queues, info.index)?,
            }
            return Err(error);
        }
        let watcher = runtime.handle().spawn(watch_size(device.clone(), seen, to));
        Ok(Life {
            device,
            control,
            info,
            queues,
            runtime,
            watcher,
            from,
        })
    }

    /// Until the device is to end, or has ended. Answers who wants to know how that goes.
    fn go_on(&mut self) -> Option<Answer> {
        let mut serving = self.queues.count();
        while serving > 0 {
            // Never an error: the watcher has a sender, and ends after this.
            match self.from.recv().ok()? {
                Message::QueueEnded => serving -= 1,
                Message::Resized(geometry) => self.resize(&geometry),
                Message::Stop {
                    if_unused: true,
                    answer: Some(answer),
                } => match self.stop_unused() {
                    Ok(()) => return Some(answer),
                    Err(error) => drop(answer.send(Err(error))),
                },
                Message::Stop { answer, .. } => return answer,
            }
        }
        None
    }

    fn resize(&mut self, geometry: &Geometry) {
        let index = self.info.index;
        if !self.control.can(Flags::UPDATE_SIZE) {
            tracing::error!(
                index,
                "the disk has another size, but the ublk driver of this kernel cannot resize a device: make it anew"
            );
            return;
        }
        let sectors = params::whole_blocks(geometry, page_size()) / 512;
        match self.control.tell(Control::UpdateSize, index, sectors) {
            Ok(()) => tracing::info!(index, size = sectors * 512, "resized"),
            Err(error) => tracing::error!(index, %error, "the device could not be resized"),
        }
    }

    /// Stops the device if nobody has it open.
    fn stop_unused(&mut self) -> Result<(), Error> {
        let index = self.info.index;
        let in_use = |error: std::io::Error| match error.raw_os_error() {
            Some(libc::EBUSY) => Error::InUse(index),
            _ => Error::command(Control::TryStopDev)(error),
        };
        if self.control.can(Flags::SAFE_STOP_DEV) {
            return self
                .control
                .tell(Control::TryStopDev, index, 0)
                .map_err(in_use);
        }
        // An exclusive opener is refused while there is another, such as a mount; plain ones are not seen.
        let path = block_path(index);
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_EXCL | libc::O_CLOEXEC)
            .open(path)
            .map(drop)
            .map_err(in_use)
    }

    /// Takes the device down, and gives the disk's handle back.
    fn end(mut self) -> Result<(), Error> {
        let index = self.info.index;
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
            false => take_down(&mut self.control, &mut self.queues, index),
        };
        self.watcher.abort();
        let closed = self.runtime.handle().block_on(async {
            // When it has ended, its handle of the disk is gone.
            let _ = self.watcher.await;
            self.device.close().await.map_err(Error::Close)
        });
        taken.and(closed)
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

/// Stops and removes a device whose queues may run, or none of them.
fn take_down(control: &mut ControlDevice, queues: &mut Queues, index: u32) -> Result<(), Error> {
    let mut taken = Ok(());
    for command in [Control::StopDev, Control::DelDev] {
        if let Err(error) = control.tell(command, index, 0)
            // Somebody else may have been faster.
            && control.info(index).is_ok()
        {
            taken = taken.and(Err(Error::command(command)(error)));
        }
        if command == Control::StopDev {
            queues.end();
        }
    }
    taken
}

/// Sends word of each new size of the disk.
async fn watch_size<E: Engine>(device: Device<E>, mut seen: Geometry, to: mpsc::Sender<Message>) {
    loop {
        seen = device.changed(seen).await;
        if to.send(Message::Resized(seen)).is_err() {
            return;
        }
    }
}
