//! The way by FUSE and a loop device.
//!
//! The file system is in no place: no mount shows it, no mount namespace that is copied meanwhile keeps it, and nothing of it
//! is left when the loop device goes, whose open file is all that holds it. Its file is named after the record,
//! and that name, which sysfs tells of a loop device, is how a device is recognised later.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fd::AsFd;
use rustix::fs::FileType;
use tokio::runtime::Handle;

use super::loop_device::{CONTROL, LoopDevice};
use super::module;
use super::record::Record;
use super::way::{Pending, Running, Settings, Undone, blocking};
use crate::transports::{fuse, node};
use crate::{Device, Engine, Features, Geometry};

/// The largest block that loop devices have everywhere, in bytes: the smallest page.
const MAX_BLOCK: u32 = 4096;
/// Where sysfs has what makes both.
const MISC: &str = "/sys/class/misc";
/// How long a file system may take to end that nobody has any more.
const PATIENCE: Duration = Duration::from_secs(2);
/// The record's field: the name of the file.
const FILE: &str = "file";

pub(super) fn probe(settings: &Settings) -> Result<(), String> {
    if settings.recoverable || settings.resume.is_some() {
        return Err("a loop device over FUSE cannot outlive its process: only ublk can".to_owned());
    }
    for (node, name) in [(fuse::DEVICE, "fuse"), (CONTROL, "loop")] {
        if !Path::new(node).exists() {
            module::load(name)?;
        }
        // Where neither devtmpfs nor udev has made it.
        let device = Path::new(MISC).join(Path::new(node).file_name().unwrap_or_default());
        node::ensure(Path::new(node), &device, FileType::CharacterDevice)
            .map_err(|error| format!("{node}: {error}"))?;
    }
    Ok(())
}

pub(super) async fn start<E: Engine>(
    device: Device<E>,
    settings: &Settings,
    record: &Record,
) -> io::Result<Box<dyn Running>> {
    let mut file = fuse::File::new(device.clone()).runtime(Handle::current());
    if let Some(queues) = settings.queues {
        file = file.threads(queues.into());
    }
    if let Some(depth) = settings.depth {
        file = file.depth(depth);
    }
    // On record before there is a device, which is known by it.
    let name = file_name(record, fastrand::u64(..));
    let mut noted = record.clone();
    noted.remains = vec![(FILE.to_owned(), name.clone())];
    noted.save()?;
    let attached = blocking(move || Attached::new(device, file, name)).await?;
    Ok(Box::new(attached))
}

pub(super) fn remove_stale(record: &Record) -> io::Result<()> {
    // Without a name there was no device yet.
    let Some(name) = record.remains(FILE) else {
        return Ok(());
    };
    let Some(device) = LoopDevice::find(&format!("/{name}"))? else {
        return Ok(());
    };
    match device.remove() {
        // What was written last has nobody to go to, which whoever wrote it hears.
        Err(_) if !device.is_there() => Ok(()),
        other => other,
    }
}

/// True as long as the device of `record` is there, and not another in its place. What cannot be told is taken to be so.
pub(super) fn is_there(record: &Record) -> bool {
    let found = |name| LoopDevice::find(&format!("/{name}"));
    !matches!(record.remains(FILE).map(found), Some(Ok(None)))
}

/// The name of the file behind the device of `record`, in the root of its file system. Processes in other containers, or before and
/// after a restart of the machine, may have the same number and the same start, so it has something random, too.
fn file_name(record: &Record, random: u64) -> String {
    format!("ulio-{}-{:x}-{random:016x}", record.id, record.started)
}

struct Attached {
    /// The file's name.
    name: String,
    /// Until the device is detached.
    session: Option<fuse::Session>,
    device: LoopDevice,
    path: PathBuf,
    size: u64,
}

impl Attached {
    fn new<E: Engine>(device: Device<E>, file: fuse::File<E>, name: String) -> io::Result<Self> {
        let geometry = device.geometry();
        // The disk's handle belongs to the session from here on.
        drop(device);
        let block = geometry.logical_block_size.clamp(512, MAX_BLOCK);
        let is_read_only = geometry.is_read_only();
        let fuse::Unseen { session, mount } = file.unseen(name.clone().into(), block.into())?;
        // On an error, what is dropped takes the file system with it, and that ends the session.
        let made = fuse::open_in(mount.as_fd(), Path::new(&name), !is_read_only)
            .and_then(|file| LoopDevice::over(&file, block, is_read_only));
        drop(mount);
        let device = match made {
            Ok(device) => device,
            Err(error) => {
                // Not for ever: a loop device may be left that nobody knows of.
                session.ends_within(PATIENCE);
                return Err(error);
            }
        };
        let size = match settle(&device, &geometry) {
            Ok(size) => size,
            Err(error) => {
                // As long as it is there it holds the file, and the session does not end.
                return Err(match device.remove() {
                    Ok(()) => session.join().err().map_or(error, io::Error::from),
                    Err(why) => {
                        let path = device.path();
                        let left = format!("{error}; and {} is left: {why}", path.display());
                        io::Error::new(error.kind(), left)
                    }
                });
            }
        };
        Ok(Attached {
            name,
            path: device.path(),
            size,
            device,
            session: Some(session),
        })
    }
}

/// What a device that is over its file still needs; answers its size in bytes.
fn settle(device: &LoopDevice, geometry: &Geometry) -> io::Result<u64> {
    // The kernel takes this anew with each file. Other attributes would stay for whoever has the device next.
    let is_rotational = geometry.features.contains(Features::ROTATIONAL);
    if let Err(error) = device.set("rotational", if is_rotational { "1" } else { "0" }) {
        tracing::debug!(%error, "not set");
    }
    // Somebody may have told the kernel to leave flushes out, and it still does so with this file: what was synced there would
    // not be on the disk. A device that takes no writes has nothing to flush, nor the attribute's other value.
    if geometry.needs_flush() && !geometry.is_read_only() {
        device.set("write_cache", "write back")?;
    }
    device.size()
}

impl Running for Attached {
    fn path(&self) -> &Path {
        &self.path
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn remains(&self) -> Vec<(&'static str, String)> {
        vec![(FILE, self.name.clone())]
    }

    fn resize(&mut self, _: u64) -> Pending<'_, io::Result<()>> {
        Box::pin(async {
            let device = self.device.clone();
            let follow = move || device.follow_file().and_then(|()| device.size());
            self.size = blocking(follow).await?;
            Ok(())
        })
    }

    fn ended(&mut self) -> Pending<'_, String> {
        Box::pin(async {
            match &self.session {
                Some(session) => session.ended().await,
                None => std::future::pending().await,
            }
            let device = self.device.clone();
            if !device.is_there() {
                return format!("somebody has taken {} away", self.path.display());
            }
            // Its connection was cut, and every request to it fails.
            match blocking(move || device.remove()).await {
                Ok(()) => "its FUSE connection was aborted".to_owned(),
                Err(error) => format!(
                    "its FUSE connection was aborted, and {} could not be removed: {error}",
                    self.path.display()
                ),
            }
        })
    }

    fn is_there(&self) -> bool {
        self.device.is_there()
    }

    fn detach(&mut self, claimed: File) -> Pending<'_, Result<(), Undone>> {
        Box::pin(async move {
            let device = self.device.clone();
            let removed = match blocking(move || device.remove_claimed(claimed)).await {
                Err(error) if self.device.is_there() => return Err(Undone::Refused(error)),
                // With an error it is gone all the same, and so is what could not be written.
                removed => removed,
            };
            // The disk is flushed and closed by whoever has its other handle.
            let joined = match self.session.take() {
                Some(session) => blocking(move || session.join().map_err(io::Error::from)).await,
                None => Ok(()),
            };
            removed.and(joined).map_err(Undone::Ended)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attach::Via;

    #[test]
    fn processes_of_the_same_number_have_names_of_their_own() {
        let mut record = Record {
            id: "7-0".to_owned(),
            pid: 7,
            started: 100,
            via: Via::Fuse,
            device: None,
            size: 0,
            read_only: false,
            recoverable: false,
            label: String::new(),
            remains: Vec::new(),
        };
        let name = file_name(&record, 1);
        assert_eq!(name, "ulio-7-0-64-0000000000000001");
        assert_ne!(file_name(&record, 2), name);
        record.started += 1;
        assert_ne!(file_name(&record, 1), name);
        // Nothing is looked for by the number alone.
        remove_stale(&record).unwrap();
    }
}
