//! Disks as block devices, by the way that `ULIO_VIA` names: `ublk`, `nbd` or `fuse`. If left out, `fuse`, which works
//! nearly everywhere; the others have their guests.
#![allow(dead_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use userland_io::attach::{AttachError, Attached, Builder, Via};
use userland_io::{Device, Engine};

use crate::need;

/// How long anything may take: far more than it needs on a loaded machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The way that is to be tested.
pub(crate) fn via() -> Via {
    match std::env::var("ULIO_VIA") {
        Ok(name) => name.parse().unwrap(),
        Err(_) => Via::Fuse,
    }
}

/// `engine`, attached by that way; `None` once the skip is told.
pub(crate) async fn attached(engine: impl Engine) -> Option<Attached> {
    attached_as(engine, |builder| builder).await
}

/// As [`attached`], with what `how` sets.
pub(crate) async fn attached_as<E: Engine>(
    engine: E,
    how: impl FnOnce(Builder<E>) -> Builder<E>,
) -> Option<Attached> {
    let device = Device::open(engine).await.unwrap();
    let label = std::thread::current().name().unwrap_or("test").to_owned();
    let builder = Builder::new(device).via(via()).label(label);
    match how(builder).attach().await {
        Ok(attached) => Some(attached),
        Err(AttachError::NotRoot) => {
            need::impossible("only root makes block devices");
            None
        }
        // The host's own kernel may lack all of it, a guest's must not.
        Err(AttachError::NoWay(passed)) if std::env::var_os("ULIO_GUEST").is_none() => {
            match via() {
                Via::Fuse => need::impossible(&passed[0].to_string()),
                via => need::guest(via.name()),
            }
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Detaches, and waits for those who look at the device for a moment, as udev does.
pub(crate) async fn detach(mut attached: Attached) {
    let path = attached.path().to_owned();
    attached.detach().await.unwrap();
    assert_eq!(attached.ended().await, None);
    if via() != Via::Fuse && via() != Via::Nbd {
        assert!(!path.exists(), "{} is left", path.display());
    }
}

/// Waits until `is` is true.
pub(crate) fn until(what: &str, mut is: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(
            begun.elapsed() < PATIENCE,
            "{what}: not within {PATIENCE:?}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The device, past the page cache.
pub(crate) fn direct(path: &Path) -> File {
    opened(path, libc::O_DIRECT).unwrap()
}

/// The device, through the page cache.
pub(crate) fn buffered(path: &Path) -> File {
    opened(path, 0).unwrap()
}

pub(crate) fn opened(path: &Path, flags: i32) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)
}

/// Memory at a multiple of 4096, or so many bytes behind one.
pub(crate) struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    pub(crate) fn new(len: usize) -> Self {
        Self::behind(len, 0)
    }

    pub(crate) fn behind(len: usize, offset: usize) -> Self {
        let memory = vec![0; len + 8192];
        let start = memory.as_ptr().align_offset(4096) + offset;
        Aligned { memory, start, len }
    }

    pub(crate) fn filled(len: usize, byte: u8) -> Self {
        let mut aligned = Self::new(len);
        aligned.fill(byte);
        aligned
    }
}

impl Deref for Aligned {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[self.start..][..self.len]
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..][..self.len]
    }
}

/// Runs what blocks, as other programs do, beside the runtime.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}
