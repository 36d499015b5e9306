//! The way by FUSE and a loop device.

use std::io;

use super::record::Record;
use super::way::{Running, Settings};
use crate::{Device, Engine};

pub(super) fn probe(_: &Settings) -> Result<(), String> {
    Err("this version of userland-io does not have it yet".to_owned())
}

pub(super) async fn start<E: Engine>(
    _: Device<E>,
    _: &Settings,
    _: &Record,
) -> io::Result<Box<dyn Running>> {
    Err(io::ErrorKind::Unsupported.into())
}

pub(super) fn remove_stale(_: &Record) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
