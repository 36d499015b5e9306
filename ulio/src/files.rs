//! `--listen fuse:PATH`: a disk as a file of this machine, beside or instead of a server.

use std::path::Path;

use userland_io::Device;
#[cfg(target_os = "linux")]
use userland_io::transports::fuse;

use crate::errors::Failure;

/// What an address of a file begins with.
const SCHEME: &str = "fuse:";

/// The file that `address` names, if it is such an address.
pub(crate) fn path(address: &str) -> Option<&Path> {
    address.strip_prefix(SCHEME).map(Path::new)
}

/// Whether `path` may be served, as far as that can be told before anything is opened.
pub(crate) fn check(path: &Path) -> Result<(), String> {
    if cfg!(not(target_os = "linux")) {
        return Err("a disk is a file on Linux only: serve it over NBD".to_owned());
    }
    match path.as_os_str().is_empty() {
        true => Err("write the path of the file, such as fuse:/run/disk".to_owned()),
        false => Ok(()),
    }
}

/// Files that are one disk.
#[derive(Default)]
pub(crate) struct Files {
    #[cfg(target_os = "linux")]
    mounted: Vec<fuse::Mounted>,
}

#[cfg(target_os = "linux")]
impl Files {
    /// Mounts `device` at each of `paths`. On a failure none is left.
    pub(crate) async fn mount(device: &Device, paths: &[&Path]) -> Result<Self, Failure> {
        let mut files = Files::default();
        for path in paths {
            let file = fuse::File::new(device.clone()).runtime(tokio::runtime::Handle::current());
            match file.mount(path).await {
                Ok(mounted) => files.mounted.push(mounted),
                Err(error) => {
                    files.unmount().await?;
                    return Err(Failure::Failed(error.to_string()));
                }
            }
        }
        Ok(files)
    }

    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.mounted.iter().map(fuse::Mounted::path)
    }

    /// Resolves when somebody has unmounted all of them.
    pub(crate) async fn ended(&self) {
        for mounted in &self.mounted {
            mounted.ended().await;
        }
    }

    /// Takes them away, and tells of the first failure.
    pub(crate) async fn unmount(self) -> Result<(), Failure> {
        let mut first = Ok(());
        for mounted in self.mounted {
            let unmounted = mounted.unmount().await;
            first = first.and(unmounted.map_err(|error| Failure::Failed(error.to_string())));
        }
        first
    }
}

/// There are none.
#[cfg(not(target_os = "linux"))]
impl Files {
    pub(crate) async fn mount(_: &Device, _: &[&Path]) -> Result<Self, Failure> {
        Ok(Files::default())
    }

    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        std::iter::empty()
    }

    pub(crate) async fn ended(&self) {}

    pub(crate) async fn unmount(self) -> Result<(), Failure> {
        Ok(())
    }
}
