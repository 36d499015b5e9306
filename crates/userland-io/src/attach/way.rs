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
//! * `remove_stale(&Record) -> io::Result<()>`: takes away what a process that died has left. Its device is known
//!   to be unused. What is not there is no error.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Duration;

use super::record::Record;
use super::{PassedOver, Via, fuse, kernel_nbd, ublk};
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

    /// Takes the device away: nobody uses it, and when this answers no request is in flight, its handle of
    /// the disk is dropped, and nothing is left. The manager flushes and closes the disk then.
    ///
    /// [`io::ErrorKind::ResourceBusy`] and the way itself if somebody uses it after all, and all is as it was.
    fn detach(self: Box<Self>) -> Pending<'static, Result<(), Stuck>>;
}

/// Why a way did not let go.
pub(super) struct Stuck {
    pub(super) error: io::Error,
    /// It goes on, as if nobody had asked.
    pub(super) running: Option<Box<dyn Running>>,
}

impl From<io::Error> for Stuck {
    fn from(error: io::Error) -> Self {
        Stuck {
            error,
            running: None,
        }
    }
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

/// Takes away what the process of `record`, which is dead, has left.
pub(super) fn remove_stale(record: &Record) -> io::Result<()> {
    match record.via {
        Via::Ublk => ublk::remove_stale(record),
        Via::Nbd => kernel_nbd::remove_stale(record),
        Via::Fuse => fuse::remove_stale(record),
    }
}
