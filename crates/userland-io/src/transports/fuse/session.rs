//! What serves a mount, from the kernel's first request to its last: fuser's threads, which read requests, and those for
//! requests that wait. A thread of its own sees to the end of all of them.
//!
//! It ends when the kernel has dropped the mount: because it was unmounted and the file is closed, or was aborted. Then the
//! requests in flight are finished and the disk's handle is given back, in this order.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use fuser::{Config, SessionACL};
use rustix::fd::OwnedFd;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::watch;

use super::file::{DiskFile, Modified};
use super::kernel::DEVICE;
use super::requests::Requests;
use crate::{Device, Engine, Result};

/// What is to be served, and how.
pub(crate) struct Service<E> {
    pub(crate) device: Device<E>,
    /// How many threads read requests.
    pub(crate) threads: usize,
    /// How many requests are served at once.
    pub(crate) depth: u16,
    /// What timers and sockets of the engine register with; if left out: a runtime of two threads.
    pub(crate) runtime: Option<Handle>,
    /// The file's name in the root directory; if left out: it is the root.
    pub(crate) name: Option<OsString>,
    /// The file's size is rounded down to whole blocks of this many bytes.
    pub(crate) block: u64,
}

/// A mount that is served.
#[derive(Debug)]
pub(crate) struct Session {
    ended: watch::Receiver<bool>,
    thread: JoinHandle<Result>,
}

impl<E: Engine> Service<E> {
    /// Serves the file system of `connection`. Blocks for as long as the kernel takes to say hello.
    pub(super) fn start(self, connection: File) -> io::Result<Session> {
        let own = match self.runtime {
            Some(_) => None,
            None => Some(own_runtime()?),
        };
        let of_own = || own.as_ref().map(|own| own.handle().clone());
        let Some(runtime) = self.runtime.or_else(of_own) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let (depth, threads) = (self.depth.max(1), self.threads.max(1));
        let (requests, waiting) = Requests::new(&self.device, depth.into(), threads, &runtime)?;
        let file = DiskFile {
            device: self.device.clone(),
            requests,
            name: self.name,
            block: self.block.max(1),
            depth,
            modified: Modified::now(),
        };
        let mut config = Config::default();
        config.n_threads = Some(threads);
        // Those who may not open it have the one that they were given.
        config.clone_fd = threads > 1 && File::open(DEVICE).is_ok();
        let session =
            fuser::Session::from_fd(file, OwnedFd::from(connection), SessionACL::Owner, config)?;
        let (ends, ended) = watch::channel(false);
        let device = self.device;
        let life = thread::Builder::new().name("fuse-life".to_owned());
        let thread = life.spawn(move || {
            if let Err(error) = session.run() {
                tracing::error!(%error, "a FUSE mount is served no more");
            }
            for thread in waiting {
                if thread.join().is_err() {
                    tracing::error!("a thread that serves a FUSE file has panicked");
                }
            }
            let closed = runtime.block_on(device.close());
            drop(own);
            ends.send_replace(true);
            closed
        })?;
        Ok(Session { ended, thread })
    }
}

fn own_runtime() -> io::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("fuse-runtime")
        .enable_all()
        .build()
}

impl Session {
    /// Resolves when the kernel has dropped the mount, and everything of it has ended here.
    pub(crate) async fn ended(&self) {
        let mut ended = self.ended.clone();
        // An error means that the thread is gone.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    /// True once it has.
    pub(crate) fn has_ended(&self) -> bool {
        *self.ended.borrow() || self.thread.is_finished()
    }

    /// Waits for that, for so long.
    pub(crate) fn ends_within(&self, time: Duration) -> bool {
        let until = Instant::now() + time;
        while !self.has_ended() && Instant::now() < until {
            thread::sleep(Duration::from_millis(2));
        }
        self.has_ended()
    }

    /// Waits for that, and tells how the disk's handle was closed.
    pub(crate) fn join(self) -> Result {
        self.thread.join().unwrap_or_else(|_| {
            Err(crate::Error::new(
                crate::ErrorKind::Io,
                "the thread that serves a FUSE file has panicked",
            ))
        })
    }
}
