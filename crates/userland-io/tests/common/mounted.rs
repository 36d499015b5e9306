//! A mounted ext4.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::clients::run;
use crate::need;

/// How long others may take to let go of it.
const PATIENCE: Duration = Duration::from_secs(10);

/// A file system that is mounted until this is dropped.
pub(crate) struct Mounted {
    directory: TempDir,
    umount: PathBuf,
}

impl Mounted {
    /// Mounts the ext4 on `device`.
    pub(crate) fn new(device: &Path) -> Self {
        Self::attempt(device).unwrap()
    }

    /// As [`new`](Self::new), or what mount says.
    pub(crate) fn attempt(device: &Path) -> Result<Self, String> {
        let [mount, umount] = ["mount", "umount"].map(|name| need::program(name).unwrap());
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (device.to_str().unwrap(), directory.path().to_str().unwrap());
        match run(&mount, &["-t", "ext4", from, to]) {
            ran if ran.ok => Ok(Mounted { directory, umount }),
            ran => Err(ran.stderr),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let begun = Instant::now();
        loop {
            let ran = run(&self.umount, &[self.path().to_str().unwrap()]);
            // A program that has said its last word may not have ended yet.
            let is_busy = ran.stderr.contains("busy") && begun.elapsed() < PATIENCE;
            if ran.ok || !is_busy {
                assert!(ran.ok || std::thread::panicking(), "{}", ran.stderr);
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
