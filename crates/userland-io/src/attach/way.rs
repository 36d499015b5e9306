//! The ways a device can come about: one file each, asked and started from here.
//!
//! What a way has to have, in a module of its own beside this one (`ublk`, `kernel_nbd`, `fuse`):
//!
//! * `probe(&Settings) -> Result<(), String>`: quick, changes nothing but to load a module, and says in words
//!   why not. That also goes for what it cannot carry, such as `recoverable`.
//! * `async start(Device, &Settings, &Record) -> io::Result<Box<dyn Running>>`: makes the device. It runs on the
//!   manager's own current-thread runtime, which also drives the engine's timers and sockets (threads of the way
//!   enter its handle for that). So requests are served by other threads, which `start` makes, and system calls
//!   that wait for a request to the device go to `spawn_blocking`. On an error it leaves nothing behind.
//! * `remove_stale(&Record) -> io::Result<()>`: takes away what a process that died has left, by the kernel's own marks that
//!   it is that, and claims it before. `ResourceBusy` if it is in use. What is not there is no error, nor another in its place.

use std::fs::File;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Duration;

use tokio::task::spawn_blocking;

use super::holders::is_under_a_loop_device;
use super::record::Record;
use super::{PassedOver, Via, fuse, kernel_nbd, ublk};
use crate::transports::node;
use crate::{Device, Engine};

/// A future of a way, polled on the manager's thread.
pub(super) type Pending<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// What the caller asked for.
#[derive(Clone, Debug, Default)]
pub(super) struct Settings {
    pub(super) via: Option<Via>,
    /// Already applied to the `Device` that a way gets.
    pub(super) read_only: bool,
    pub(super) queues: Option<u16>,
    pub(super) depth: Option<u16>,
    pub(super) timeout: Option<Duration>,
    pub(super) recoverable: bool,
    pub(super) resume: Option<PathBuf>,
    pub(super) label: String,
}

/// A device that a way has made and serves.
pub(super) trait Running {
    /// The block device.
    fn path(&self) -> &Path;

    /// Its size in bytes, as the kernel has it.
    fn size(&self) -> u64;

    /// What `remove_stale` has to know, as the record's further fields. Keys are words; values are of one line.
    fn remains(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }

    /// The disk is `size` bytes long now: the device follows, rounded down to whole blocks.
    fn resize(&mut self, size: u64) -> Pending<'_, io::Result<()>>;

    /// Resolves when the device is gone or dead although nobody detached it, and says why. May be
    /// dropped and asked again.
    fn ended(&mut self) -> Pending<'_, String>;

    /// True as long as the kernel has the device. When it has ended: `remove_stale` is to take it away.
    fn is_there(&self) -> bool;

    /// Takes the device away. `claimed` is a claim of it, so nobody else uses it, and is kept until nobody can come to use
    /// it. When this answers, unless it is refused, no request is in flight and its handle of the disk is dropped. The
    /// manager flushes and closes the disk then.
    fn detach(&mut self, claimed: File) -> Pending<'_, Result<(), Undone>>;
}

/// How taking a device away went wrong.
pub(super) enum Undone {
    /// It goes on, as if nobody had asked. `ResourceBusy`: somebody uses it after all.
    Refused(io::Error),
    /// It has ended all the same.
    Ended(io::Error),
}

/// Claims the device at `path`. An error says nothing of whether it is used, but for `ResourceBusy`.
pub(super) async fn claim(path: &Path) -> io::Result<File> {
    let path = path.to_owned();
    // Whoever has the device's lock may be waiting for its next answer, which needs the manager's thread.
    blocking(move || {
        let claimed = node::claim(&path).map_err(|error| match error.kind() {
            io::ErrorKind::ResourceBusy => error,
            kind => io::Error::new(kind, format!("finding out if it is in use: {error}")),
        })?;
        match is_under_a_loop_device(&path) {
            true => Err(io::ErrorKind::ResourceBusy.into()),
            false => Ok(claimed),
        }
    })
    .await
}

/// Claims a device, and takes it away.
pub(super) async fn detach(running: &mut dyn Running) -> Result<(), Undone> {
    let claimed = claim(running.path()).await.map_err(Undone::Refused)?;
    running.detach(claimed).await
}

/// Runs what may wait for the device on a thread where that does no harm.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    spawn_blocking(work).await.map_err(io::Error::other)?
}

/// Starts the first way that works, and tells why those before it did not.
pub(super) async fn start<E: Engine>(
    device: &Device<E>,
    settings: &Settings,
    record: &mut Record,
) -> (Vec<PassedOver>, Option<(Via, Box<dyn Running>)>) {
    let mut passed_over = Vec::new();
    for via in Via::ALL {
        if settings.via.is_some_and(|only| only != via) {
            continue;
        }
        let reason = match probe(via, settings) {
            Ok(()) => {
                record.via = via;
                // For whoever has to clean up, if this process dies in the middle.
                let _ = record.save();
                match start_one(via, device.clone(), settings, record).await {
                    Ok(running) => return (passed_over, Some((via, running))),
                    Err(error) => error.to_string(),
                }
            }
            Err(reason) => reason,
        };
        tracing::debug!(%via, reason, "passed over");
        passed_over.push(PassedOver { via, reason });
    }
    (passed_over, None)
}

fn probe(via: Via, settings: &Settings) -> Result<(), String> {
    match via {
        Via::Ublk => ublk::probe(settings),
        Via::Nbd => kernel_nbd::probe(settings),
        Via::Fuse => fuse::probe(settings),
    }
}

async fn start_one<E: Engine>(
    via: Via,
    device: Device<E>,
    settings: &Settings,
    record: &Record,
) -> io::Result<Box<dyn Running>> {
    match via {
        Via::Ublk => ublk::start(device, settings, record).await,
        Via::Nbd => kernel_nbd::start(device, settings, record).await,
        Via::Fuse => fuse::start(device, settings, record).await,
    }
}

/// True as long as the kernel has the device of `record`, and not another in its place. What cannot be told is taken to be so.
pub(super) fn is_there(record: &Record) -> bool {
    match record.via {
        Via::Ublk => ublk::may_be_there(record),
        Via::Nbd => kernel_nbd::is_there(record),
        Via::Fuse => fuse::is_there(record),
    }
}

/// Takes away what the process of `record`, which is dead, has left.
pub(super) fn remove_stale(record: &Record) -> io::Result<()> {
    let device = record.device.as_deref();
    if is_there(record) && device.is_some_and(is_under_a_loop_device) {
        return Err(io::ErrorKind::ResourceBusy.into());
    }
    match record.via {
        Via::Ublk => ublk::remove_stale(record),
        Via::Nbd => kernel_nbd::remove_stale(record),
        Via::Fuse => fuse::remove_stale(record),
    }
}
