//! Where there is no io_uring: a ring that nobody can have.

use std::io;
use std::sync::Arc;

use tokio::runtime::Handle;

use super::image::{Image, Lane};
use crate::{AlignedBuf, Result};

#[derive(Debug)]
pub(super) enum Ring {}

impl Ring {
    pub(super) fn new(_: Option<&Handle>) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(super) async fn read(
        &self,
        _: &Arc<Image>,
        _: Lane,
        _: AlignedBuf,
        _: usize,
        _: u64,
    ) -> Result<AlignedBuf> {
        match *self {}
    }

    pub(super) async fn write(
        &self,
        _: &Arc<Image>,
        _: Lane,
        _: AlignedBuf,
        _: usize,
        _: u64,
    ) -> Result<AlignedBuf> {
        match *self {}
    }

    pub(super) async fn settle(&self) {
        match *self {}
    }
}
