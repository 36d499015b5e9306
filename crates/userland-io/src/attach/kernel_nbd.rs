//! The way by the kernel's NBD client.

use std::fs::File;
use std::io;
use std::path::Path;

use tokio::runtime::Handle;

use super::module;
use super::record::Record;
use super::way::{Pending, Running, Settings, Undone};
pub(super) use crate::transports::kernel_nbd::Error;
use crate::transports::kernel_nbd::{self, BlockDevice, Identity, Remote, Target};
use crate::{Device, Engine};

/// The driver's module.
const MODULE: &str = "nbd";
/// The record's fields.
const INDEX: &str = "index";
const THREAD: &str = "thread";
/// The server's URI, if the kernel talks to somebody else's.
pub(super) const SERVER: &str = "server";

pub(super) fn probe(settings: &Settings) -> Result<(), String> {
    if settings.recoverable || settings.resume.is_some() {
        return Err("its devices end with the process: only ublk's can be resumed".to_owned());
    }
    if kernel_nbd::available().is_ok() {
        return Ok(());
    }
    module::load(MODULE)?;
    kernel_nbd::available().map_err(words)
}

pub(super) async fn start<E: Engine>(
    device: Device<E>,
    settings: &Settings,
    record: &Record,
) -> io::Result<Box<dyn Running>> {
    let mut target = Target::new(device)
        .identifier(record.identifier())
        .runtime(Handle::current());
    if let Some(queues) = settings.queues {
        target = target.connections(queues);
    }
    if let Some(depth) = settings.depth {
        target = target.depth(depth);
    }
    if let Some(timeout) = settings.timeout {
        target = target.timeout(timeout);
    }
    let block = target.connect().await.map_err(system)?;
    let server = None;
    Ok(Box::new(Connected { block, server }))
}

/// Gives the kernel connections to the export at `uri`, somebody else's server, for it to use itself.
pub(super) async fn hand_over(
    uri: &str,
    settings: &Settings,
    record: &mut Record,
) -> Result<Box<dyn Running>, Error> {
    let mut remote = Remote::new(uri)
        .identifier(record.identifier())
        .read_only(settings.read_only);
    if let Some(queues) = settings.queues {
        remote = remote.connections(queues);
    }
    if let Some(timeout) = settings.timeout {
        remote = remote.timeout(timeout);
    }
    let block = remote.connect().await?;
    record.read_only = block.is_read_only();
    let server = Some(uri.to_owned());
    Ok(Box::new(Connected { block, server }))
}

/// True as long as the device of `record` is there, and not another in its place. One that could not be noted is
/// taken to be so.
pub(super) fn is_there(record: &Record) -> bool {
    noted(record).is_none_or(|device| device.is_connected())
}

fn noted(record: &Record) -> Option<Identity> {
    let number = |key| record.remains(key)?.parse().ok();
    Some(Identity {
        index: number(INDEX)?,
        identifier: record.identifier(),
        thread: number(THREAD)?,
    })
}

pub(super) fn remove_stale(record: &Record) -> io::Result<()> {
    // It may have died before it could note where.
    let device = noted(record).or_else(|| Identity::find(&record.identifier()));
    match device {
        Some(device) => kernel_nbd::remove_unused(&device).map_err(system),
        None => Ok(()),
    }
}

struct Connected {
    block: BlockDevice,
    server: Option<String>,
}

impl Running for Connected {
    fn path(&self) -> &Path {
        self.block.path()
    }

    fn size(&self) -> u64 {
        self.block.size()
    }

    fn remains(&self) -> Vec<(&'static str, String)> {
        let identity = self.block.identity();
        let mut remains = vec![
            (INDEX, identity.index.to_string()),
            (THREAD, identity.thread.to_string()),
        ];
        remains.extend(self.server.clone().map(|server| (SERVER, server)));
        remains
    }

    fn resize(&mut self, size: u64) -> Pending<'_, io::Result<()>> {
        Box::pin(async move { self.block.resize(size).await.map_err(system) })
    }

    fn ended(&mut self) -> Pending<'_, String> {
        Box::pin(async {
            match self.block.ended().await {
                Some(why) => why,
                None => std::future::pending().await,
            }
        })
    }

    fn is_there(&self) -> bool {
        self.block.identity().is_connected()
    }

    fn detach(&mut self, claimed: File) -> Pending<'_, Result<(), Undone>> {
        Box::pin(async move {
            let down = self.block.shutdown_claimed(claimed).await;
            down.map_err(|error| Undone::Ended(system(error)))
        })
    }
}

/// As an error of the system's, whose kind says if the device is in use.
fn system(error: Error) -> io::Error {
    let kind = match &error {
        Error::InUse(_) => io::ErrorKind::ResourceBusy,
        Error::CannotResize(_) => io::ErrorKind::Unsupported,
        Error::Command { source, .. } | Error::Io { source, .. } => source.kind(),
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, words(error))
}

/// What to tell whoever knows already that this is about the kernel's NBD client.
pub(super) fn words(error: Error) -> String {
    match error {
        Error::Unavailable(why) => why,
        other => other.to_string(),
    }
}
