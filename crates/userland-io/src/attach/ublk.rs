//! The way by ublk.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use super::Via;
use super::holders::{holders_besides, waiting};
use super::module;
use super::record::Record;
use super::way::{self, Pending, Running, Settings, Undone};
use crate::transports::ublk::{self, BlockDevice, Error, Target};
use crate::{Device, Engine};

/// The driver's module.
const MODULE: &str = "ublk_drv";
/// Its control device in sysfs, wherever the driver is.
const CONTROL: &str = "/sys/class/misc/ublk-control";
/// The record's fields.
const INDEX: &str = "index";
const IDENTITY: &str = "identity";
/// How long somebody may look at the device who has not claimed it: udev, which does so with each new one and
/// after each writer, or the kernel, for partitions.
const GLANCE: Duration = Duration::from_secs(2);
const STEP: Duration = Duration::from_millis(5);

pub(super) fn probe(_: &Settings) -> Result<(), String> {
    if !Path::new(CONTROL).exists() {
        module::load(MODULE)?;
    }
    ublk::available().map_err(words)
}

pub(super) async fn start<E: Engine>(
    device: Device<E>,
    settings: &Settings,
    record: &Record,
) -> io::Result<Box<dyn Running>> {
    let mut target = Target::new(device)
        .recoverable(settings.recoverable)
        .resized_when_asked()
        .tag(tag(record))
        .runtime(Handle::current());
    if let Some(queues) = settings.queues {
        target = target.queues(queues);
    }
    if let Some(depth) = settings.depth {
        target = target.depth(depth);
    }
    let started = match &settings.resume {
        Some(path) => {
            if let Some(identity) = on_record(path) {
                target = target.known_as(identity);
            }
            target.resume(path).await
        }
        None => target.add().await,
    };
    let block = started.map_err(|error| io::Error::other(words(error)))?;
    Ok(Box::new(Served {
        path: block.path(),
        identity: ublk::identity(block.index()),
        block,
    }))
}

/// True as long as the device of `record` is there, and not another in its place.
pub(super) fn is_there(record: &Record) -> bool {
    noted(record).is_some_and(|(index, identity)| ublk::identity(index) == Some(identity))
}

/// As [`is_there`], and true of one that could not be noted.
pub(super) fn may_be_there(record: &Record) -> bool {
    noted(record).is_none() || is_there(record)
}

/// What the device at `path` has to be, if it is on record.
fn on_record(path: &Path) -> Option<u64> {
    // A link may lead there.
    let path = path.canonicalize().ok()?;
    let all = Record::all().unwrap_or_default();
    let of_it: Vec<&Record> = all
        .iter()
        .filter(|record| record.via == Via::Ublk && record.device.as_ref() == Some(&path))
        .collect();
    // Earlier devices of this path may be on record as well.
    let record = of_it.iter().find(|record| is_there(record));
    let (_, identity) = noted(record.or(of_it.first())?)?;
    Some(identity)
}

/// The index and the identity of a device that was noted.
fn noted(record: &Record) -> Option<(u32, u64)> {
    let index = record.remains(INDEX)?.parse().ok()?;
    let identity = record.remains(IDENTITY)?.parse().ok()?;
    Some((index, identity))
}

pub(super) fn remove_stale(record: &Record) -> io::Result<()> {
    let noted = noted(record);
    let device = match noted {
        // It died before it could note where.
        None if Path::new(CONTROL).exists() => ublk::tagged(tag(record)).map_err(system)?,
        noted => noted,
    };
    match device {
        Some((index, identity)) => {
            let is_used = || is_used(record);
            // Before it was noted, nobody was told of it.
            let is_used = noted.is_some().then_some(&is_used as &dyn Fn() -> _);
            ublk::remove_unused(index, identity, is_used).map_err(system)
        }
        None => Ok(()),
    }
}

/// True if anybody is seen to use the device of `record`, or to wait for what may be it.
fn is_used(record: &Record) -> io::Result<bool> {
    let holders = match &record.device {
        Some(path) => holders_besides(path, None)?,
        None => Vec::new(),
    };
    Ok(!holders.is_empty() || !waiting().is_empty())
}

/// What the driver keeps with the device: a hash of the record's identifier, which is too long. FNV-1a, since each build has to
/// come to the same.
fn tag(record: &Record) -> u64 {
    let add = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    record.identifier().bytes().fold(0xcbf2_9ce4_8422_2325, add)
}

/// A device, and its path for those who borrow it.
struct Served {
    path: PathBuf,
    identity: Option<u64>,
    block: BlockDevice,
}

impl Running for Served {
    fn path(&self) -> &Path {
        &self.path
    }

    fn size(&self) -> u64 {
        self.block.size()
    }

    fn remains(&self) -> Vec<(&'static str, String)> {
        let index = self.block.index();
        let mut remains = vec![(INDEX, index.to_string())];
        remains.extend(
            self.identity
                .map(|identity| (IDENTITY, identity.to_string())),
        );
        remains
    }

    fn resize(&mut self, _: u64) -> Pending<'_, io::Result<()>> {
        // It asks the disk itself, which may be longer already.
        Box::pin(async { self.block.resize().await.map_err(system) })
    }

    fn ended(&mut self) -> Pending<'_, String> {
        Box::pin(async {
            self.block.ended().await;
            "the driver has stopped it: somebody took it away, or it failed".to_owned()
        })
    }

    fn is_there(&self) -> bool {
        self.identity.is_some() && ublk::identity(self.block.index()) == self.identity
    }

    fn detach(&mut self, claimed: File) -> Pending<'_, Result<(), Undone>> {
        Box::pin(async move {
            let until = Instant::now() + GLANCE;
            let mut claimed = Ok(claimed);
            loop {
                let error = match claimed {
                    Ok(claimed) => match self.block.shutdown_claimed(claimed).await {
                        Ok(()) => {
                            self.block.ended().await;
                            return Ok(());
                        }
                        Err(error) if error.is_refusal() => system(error),
                        Err(error) => return Err(Undone::Ended(system(error))),
                    },
                    Err(error) => error,
                };
                let is_busy = error.kind() == io::ErrorKind::ResourceBusy;
                if !is_busy || Instant::now() >= until {
                    return Err(Undone::Refused(error));
                }
                tokio::time::sleep(STEP).await;
                // A process that this one is about to start may have a copy of the last claim.
                claimed = way::claim(&self.path).await;
            }
        })
    }
}

/// As an error of the system's, whose kind says if the device is in use.
fn system(error: Error) -> io::Error {
    let kind = match &error {
        Error::InUse(_) => io::ErrorKind::ResourceBusy,
        Error::Command { source, .. } | Error::Io { source, .. } => source.kind(),
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, words(error))
}

/// What to tell whoever knows already that this is about ublk.
fn words(error: Error) -> String {
    match error {
        Error::Unavailable(why) => why,
        other => other.to_string(),
    }
}
