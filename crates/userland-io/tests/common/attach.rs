//! Disks as block devices, by the way that `ULIO_VIA` names: `ublk`, `nbd` or `fuse`. If left out, `fuse`, which works
//! nearly everywhere; the others have their guests.
#![allow(dead_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use userland_io::attach::{AttachError, Attached, Builder, DetachError, Listed, Via, list};
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
    attached_as(&opened(engine).await, |builder| builder).await
}

/// A disk of `engine`.
pub(crate) async fn opened<E: Engine>(engine: E) -> Device<E> {
    Device::open(engine).await.unwrap()
}

/// `device`, attached by that way and with what `how` sets; `None` once the skip is told.
pub(crate) async fn attached_as<E: Engine>(
    device: &Device<E>,
    how: impl FnOnce(Builder<E>) -> Builder<E>,
) -> Option<Attached> {
    let label = std::thread::current().name().unwrap_or("test").to_owned();
    let builder = Builder::new(device.clone()).via(via()).label(label);
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

/// Detaches, and sees that nothing is left.
pub(crate) async fn detach(mut attached: Attached) {
    let path = attached.path().to_owned();
    let begun = Instant::now();
    // A process that a test beside this one is just starting has a copy of every descriptor until it is another program.
    while let Err(error) = attached.detach().await {
        let is_in_use = matches!(error, DetachError::InUse { .. });
        assert!(is_in_use && begun.elapsed() < PATIENCE, "{error}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(attached.ended().await, None);
    is_gone(&path);
}

/// Sees that the device that was at `path` is gone. Another test of this process may have been given the path at once.
pub(crate) fn is_gone(path: &Path) {
    let ours = |listed: &Listed| listed.pid() == std::process::id() && listed.path() == Some(path);
    until("nothing is left", || {
        is_free(path) || list().unwrap().iter().any(ours)
    });
}

/// The device's size when it is no longer `seen`.
pub(crate) async fn resized(attached: &Attached, seen: u64) -> u64 {
    let resized = tokio::time::timeout(PATIENCE, attached.resized(seen)).await;
    resized.expect("the device does not follow its disk")
}

/// True if the kernel has no device of this process at `path` any more.
pub(crate) fn is_free(path: &Path) -> bool {
    let sysfs = sysfs(path);
    match via() {
        Via::Ublk => !path.exists() && !sysfs.exists(),
        Via::Nbd => !sysfs.join("pid").exists(),
        // Another process may have been given it meanwhile.
        Via::Fuse => {
            let ours = format!("/ulio-{}-", std::process::id());
            let backing = std::fs::read_to_string(sysfs.join("loop/backing_file"));
            !backing.unwrap_or_default().contains(&ours)
        }
    }
}

/// What sysfs has about the device.
pub(crate) fn sysfs(path: &Path) -> PathBuf {
    Path::new("/sys/class/block").join(path.file_name().unwrap())
}

/// What sysfs says of the device: the text of a file in its directory.
pub(crate) fn told(path: &Path, file: &str) -> String {
    let file = sysfs(path).join(file);
    match std::fs::read_to_string(&file) {
        Ok(text) => text.trim_end().to_owned(),
        Err(error) => panic!("{}: {error}", file.display()),
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
    open(path, libc::O_DIRECT).unwrap()
}

/// The device, through the page cache.
pub(crate) fn buffered(path: &Path) -> File {
    open(path, 0).unwrap()
}

/// The device with further flags of open(2).
pub(crate) fn open(path: &Path, flags: i32) -> io::Result<File> {
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
