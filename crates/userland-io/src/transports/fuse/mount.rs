//! A file that is a disk, in a place of the user's choice or in none.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fd::AsFd;
#[cfg(feature = "attach")]
use rustix::fd::OwnedFd;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::error::Error;
use super::kernel::{self, FileSystem};
use super::session::{Service, Session};
use crate::{Device, Engine};

/// As many threads read requests by default, on a machine that has the CPUs.
const THREADS: usize = 4;
/// As many requests are served at once by default: what a loop device sends.
const DEPTH: u16 = 128;
/// How long what was cut off may take to end.
const PATIENCE: Duration = Duration::from_secs(2);

/// A disk that is to be a file: how it is to be served.
///
/// The file has the disk's size, to the byte, and follows it. It belongs to the caller, and nobody else may open
/// it (root included, unless the caller is). Writes past the end fail with `ENOSPC`, as those to a block device do; punching holes frees
/// space where the engine can; closing a file that was opened for writing flushes.
#[derive(Debug)]
pub struct File<E: Engine> {
    device: Device<E>,
    threads: usize,
    depth: u16,
    runtime: Option<Handle>,
}

impl<E: Engine> File<E> {
    /// `device` with the defaults: a thread for each CPU up to four, and 128 requests at once.
    pub fn new(device: Device<E>) -> Self {
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        File {
            device,
            threads: cpus.min(THREADS),
            depth: DEPTH,
            runtime: None,
        }
    }

    /// How many threads read and serve requests; as many again see to those that have to wait. At least one.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = threads.max(1);
        self
    }

    /// How many requests are served at once; further ones wait in the kernel. At least one. Each has a buffer, of up to 1 MiB.
    pub fn depth(mut self, depth: u16) -> Self {
        self.depth = depth.max(1);
        self
    }

    /// The runtime that the engine's timers and sockets register with. It must have threads that drive it while
    /// the file is used: not a `current_thread` one whose thread may wait for the file.
    /// If left out: one of the transport's own, with two threads.
    pub fn runtime(mut self, runtime: Handle) -> Self {
        self.runtime = Some(runtime);
        self
    }

    /// Mounts the file at `path`, which is created if nothing is there, and removed in the end if it was. Its directory
    /// and what else is there stay as they are.
    ///
    /// # Errors
    /// [`Error::Place`] if a directory or a file with content is there; [`Error::Mount`] without FUSE, or for a user other than root
    /// without `fusermount3`.
    pub async fn mount(self, path: impl AsRef<Path>) -> Result<Mounted, Error> {
        let path = path.as_ref().to_owned();
        blocking(move || {
            let place = Place::make(&path)?;
            let service = self.into_service(None, 1);
            let session = place.mount(service)?;
            let device = fs::metadata(&place.path).map_or(0, |file| file.dev());
            Ok(Mounted(Some(Inner {
                place,
                session,
                device,
            })))
        })
        .await
    }

    /// Serves the file without putting it anywhere: it is opened by its mount and its name. Blocks a little.
    #[cfg(feature = "attach")]
    pub(crate) fn unseen(self, name: OsString, block: u64) -> io::Result<Unseen> {
        let is_read_only = self.device.geometry().is_read_only();
        let (connection, mount) = FileSystem::new(true, is_read_only)?.into_parts();
        let service = self.into_service(Some(name), block);
        let session = service.start(connection)?;
        Ok(Unseen { session, mount })
    }

    fn into_service(self, name: Option<OsString>, block: u64) -> Service<E> {
        Service {
            device: self.device,
            threads: self.threads,
            depth: self.depth,
            runtime: self.runtime,
            name,
            block,
        }
    }
}

/// A file system in no place. It goes when `mount` and all files of it are closed.
#[cfg(feature = "attach")]
pub(crate) struct Unseen {
    pub(crate) session: Session,
    pub(crate) mount: OwnedFd,
}

/// A disk that is a file. End it with [`unmount`](Self::unmount).
///
/// Dropped without, it is unmounted in the background, at once: whoever has the file open gets errors.
#[must_use = "the file is unmounted when its handle is dropped"]
#[derive(Debug)]
pub struct Mounted(Option<Inner>);

#[derive(Debug)]
struct Inner {
    place: Place,
    session: Session,
    /// Its number while it is mounted.
    device: u64,
}

impl Mounted {
    /// The file.
    pub fn path(&self) -> &Path {
        self.0
            .as_ref()
            .map_or(Path::new(""), |inner| &inner.place.path)
    }

    /// Resolves when the file is gone, also if somebody else unmounted it.
    pub async fn ended(&self) {
        if let Some(inner) = &self.0 {
            inner.session.ended().await;
        }
    }

    /// Takes the file away, finishes the requests in flight, and gives the disk's handle back by [closing](Device::close) it.
    /// Whoever has the file open gets errors from now on.
    ///
    /// # Errors
    /// [`Error::Unmount`] if the system refuses: it goes on being served then, as long as the process lives.
    /// [`Error::Close`] if the disk did not close well.
    pub async fn unmount(mut self) -> Result<(), Error> {
        match self.0.take() {
            Some(inner) => blocking(|| inner.end()).await,
            None => Ok(()),
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Some(inner) = self.0.take() {
            let end = || {
                if let Err(error) = inner.end() {
                    tracing::error!(%error, "a file was not unmounted well");
                }
            };
            if let Err(error) = thread::Builder::new().spawn(end) {
                tracing::error!(%error, "a file is left mounted");
            }
        }
    }
}

impl Inner {
    fn end(self) -> Result<(), Error> {
        if !self.session.has_ended() {
            let path = &self.place.path;
            let unmounted = match kernel::take_away(path, false) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => self.cut_off(),
                other => other,
            };
            unmounted.map_err(|source| Error::Unmount {
                path: path.clone(),
                source,
            })?;
        }
        let closed = self.session.join();
        drop(self.place);
        closed.map_err(Error::Close)
    }
}

impl Inner {
    /// Takes it away from those who have it open.
    fn cut_off(&self) -> io::Result<()> {
        kernel::take_away(&self.place.path, true)?;
        // For root that was enough. Others need a file that is not everywhere.
        let cut = kernel::cut(self.device);
        match cut.is_ok() || self.session.ends_within(PATIENCE) {
            true => Ok(()),
            false => Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                "a program has it open, and only root could take it away",
            )),
        }
    }
}

/// Where the file is to be: a file that is covered, and goes in the end if it was made for that.
#[derive(Debug)]
struct Place {
    path: PathBuf,
    is_ours: bool,
}

impl Place {
    fn make(path: &Path) -> Result<Self, Error> {
        let refuse = |reason: &str| Error::Place {
            path: path.to_owned(),
            reason: reason.to_owned(),
        };
        if let Err(error) = fs::metadata(path)
            && error.raw_os_error() == Some(libc::ENOTCONN)
        {
            // Left mounted by a process that has died.
            match kernel::is_ours(path) {
                Ok(true) => {}
                Ok(false) => {
                    return Err(refuse(
                        "a FUSE file system of another program is mounted there, and is dead: unmount it first",
                    ));
                }
                Err(error) => return Err(refuse(&error.to_string())),
            }
            kernel::take_away(path, true).map_err(|error| refuse(&error.to_string()))?;
        }
        let is_ours = match fs::metadata(path) {
            Ok(there) if there.is_dir() => {
                return Err(refuse(
                    "this is a directory: name the file in it that is to be the disk",
                ));
            }
            Ok(there) if !there.is_file() || there.len() > 0 => {
                return Err(refuse(
                    "something is there, which the disk would hide: name a file that does not exist, or is empty",
                ));
            }
            Ok(_) => false,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let mut new = OpenOptions::new();
                let made = new.write(true).create_new(true).mode(0o600).open(path);
                made.map_err(|error| refuse(&error.to_string()))?;
                true
            }
            Err(error) => return Err(refuse(&error.to_string())),
        };
        let mut place = Place {
            path: path.to_owned(),
            is_ours,
        };
        // As the kernel lists it, wherever this process goes.
        place.path = path
            .canonicalize()
            .map_err(|error| refuse(&error.to_string()))?;
        Ok(place)
    }

    fn mount<E: Engine>(&self, service: Service<E>) -> Result<Session, Error> {
        let failed = |reason: String| Error::Mount {
            path: self.path.clone(),
            reason,
        };
        if !Path::new(kernel::DEVICE).exists() {
            return Err(failed(format!(
                "there is no {}: load the module fuse (modprobe fuse)",
                kernel::DEVICE
            )));
        }
        let is_read_only = service.device.geometry().is_read_only();
        let (connection, mount) = match FileSystem::new(false, is_read_only) {
            Ok(made) => {
                let (connection, mount) = made.into_parts();
                (connection, Some(mount))
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                let mounted = kernel::mount_by_helper(&self.path, is_read_only);
                (mounted.map_err(|error| failed(without_root(&error)))?, None)
            }
            Err(error) => return Err(failed(error.to_string())),
        };
        let session = service.start(connection).map_err(|error| {
            if mount.is_none() {
                // What follows of it does not matter.
                let _ = kernel::take_away(&self.path, true);
            }
            failed(error.to_string())
        })?;
        if let Some(mount) = mount {
            // If it cannot be put there nobody has it open, so the session ends when `mount` is closed.
            kernel::put(mount.as_fd(), &self.path).map_err(|error| failed(error.to_string()))?;
        }
        Ok(session)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // If something else is in its place by now, it is not ours.
        let is_empty =
            || fs::metadata(&self.path).is_ok_and(|there| there.is_file() && there.len() == 0);
        if self.is_ours && is_empty() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// What to do for one who is not root.
fn without_root(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "this takes root, or the program fusermount3 (in the package fuse3)".to_owned()
        }
        _ => error.to_string(),
    }
}

/// Runs what blocks on a thread of its own.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let (tell, told) = oneshot::channel();
    thread::Builder::new()
        .name("fuse-mount".to_owned())
        .spawn(move || tell.send(work()))
        .map_err(Error::Thread)?;
    told.await
        .unwrap_or_else(|_| Err(Error::Thread(io::Error::other("it has panicked"))))
}
