//! A device under `/dev` in one call, by the best way that the running kernel has. Linux only, as root.
//!
//! ```no_run
//! use userland_io::{Device, Engine, attach};
//!
//! async fn example<E: Engine>(disk: Device<E>) -> Result<(), Box<dyn std::error::Error>> {
//!     let mut attached = attach(disk).await?;
//!     println!("{}", attached.path().display());
//!     // ... mkfs, mount, use, umount ...
//!     attached.detach().await?;
//!     Ok(())
//! }
//! ```
//!
//! The [ways](Via) are tried in order: `way` asks each and starts the first that works, `manager` is the
//! thread that owns a device from then on. `record` is what stands in `/run/ulio` about it, `list` reads that
//! back, also after a crash, and `holders` tells who uses a device.

mod error;
mod fuse;
mod holders;
mod kernel_nbd;
mod list;
mod loop_device;
mod manager;
mod module;
mod namespace;
mod process;
mod record;
mod ublk;
mod way;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

use crate::transports::nbd;
use crate::{AnyEngine, Device, Engine};
pub use error::{AttachError, DetachError, PassedOver};
pub use holders::{Holder, holders, in_use};
pub use list::{Counters, Listed, State, list};
use manager::{Order, Source, Started, Status};
pub use process::protect;
use way::Settings;

/// A way in which the kernel makes a block device of a disk in this process. Ordered, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Via {
    /// The kernel's userspace block driver: `/dev/ublkbN`. Linux 6.0 and later, where it is built.
    Ublk,
    /// The kernel's NBD client, connected to a server in this process: `/dev/nbdN`.
    Nbd,
    /// A FUSE file system of one file, and a loop device over it: `/dev/loopN`. Nearly everywhere.
    Fuse,
}

impl Via {
    /// Every way, best first.
    pub const ALL: [Via; 3] = [Via::Ublk, Via::Nbd, Via::Fuse];

    /// Its name: `ublk`, `nbd` or `fuse`. Its `Display` and `FromStr` too.
    pub const fn name(self) -> &'static str {
        match self {
            Via::Ublk => "ublk",
            Via::Nbd => "nbd",
            Via::Fuse => "fuse",
        }
    }
}

impl fmt::Display for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Via {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Via::ALL.into_iter().find(|via| via.name() == name);
        found.ok_or_else(|| format!("`{name}` is no way to attach: ublk, nbd or fuse"))
    }
}

/// Makes a block device of `device`, by the best way there is. See [`Builder`] for more.
///
/// # Errors
/// See [`AttachError`].
pub async fn attach<E: Engine>(device: Device<E>) -> Result<Attached, AttachError> {
    Builder::new(device).attach().await
}

/// How a disk is to be attached.
#[must_use = "nothing is attached until attach() is called"]
#[derive(Debug)]
pub struct Builder<E = AnyEngine> {
    source: Source<E>,
    settings: Settings,
}

impl Builder {
    /// Attaches the export at `uri` of somebody's NBD server, `nbd://host:port/export` or `nbd+unix:///export?socket=/path`.
    ///
    /// The kernel's own NBD client talks to the server if it can: then this process moves no bytes, [counts](Listed::server) no
    /// requests, and may die without harm to the device. But what was written and not flushed is lost with the server,
    /// and the device ends with the last connection. Where the kernel has no NBD client, or not what the export takes, and by
    /// [another way](Self::via) if one is asked for, a [`nbd::Client`] with its journal is attached like any disk.
    pub fn export(uri: impl Into<String>) -> Self {
        let uri = uri.into();
        let open = |uri: String| -> way::Pending<'static, _> {
            Box::pin(async move {
                let client = nbd::Client::connect(&uri).await;
                let client = AnyEngine::new(client.map_err(AttachError::Connect)?);
                let opened = Device::open(client).await;
                opened.map_err(|error| AttachError::Refused(error.to_string()))
            })
        };
        let settings = Settings {
            label: uri.clone(),
            ..Settings::default()
        };
        Builder {
            source: Source::Export { uri, open },
            settings,
        }
    }
}

impl<E: Engine> Builder<E> {
    /// Attaches `device` by the best way there is, with defaults that suit most.
    pub fn new(device: Device<E>) -> Self {
        Builder {
            source: Source::Disk(device),
            settings: Settings::default(),
        }
    }

    /// By this way alone. If left out: the first of [`Via::ALL`] that works.
    pub fn via(mut self, via: Via) -> Self {
        self.settings.via = Some(via);
        self
    }

    /// A device that takes no writes. If left out: what the disk says.
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.settings.read_only = read_only;
        self
    }

    /// How many queues (connections, threads) serve it at once. If left out: what suits the way and the machine.
    pub fn queues(mut self, queues: u16) -> Self {
        self.settings.queues = Some(queues);
        self
    }

    /// How many requests each queue has in flight at most. If left out: what suits the way.
    pub fn depth(mut self, depth: u16) -> Self {
        self.settings.depth = Some(depth);
        self
    }

    /// How long a request may hang when this process dies, in whole seconds from three to a day. Only the kernel's NBD client needs such
    /// a limit, and has it for a disk that is merely slow too: it is doubled each time that the disk is slower, and one that is much
    /// slower is lost, as [`kernel_nbd::Target::timeout`](crate::transports::kernel_nbd::Target::timeout) says. If left out: 60 s.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.settings.timeout = Some(timeout);
        self
    }

    /// A device that outlives this process and waits for another to [resume](Self::resume) it. Only ublk can,
    /// and only a disk that claims [`SURVIVES_KILL`](crate::Features::SURVIVES_KILL) may.
    pub fn recoverable(mut self, recoverable: bool) -> Self {
        self.settings.recoverable = recoverable;
        self
    }

    /// Takes over the device at `path`, whose process died, instead of making a new one.
    pub fn resume(mut self, path: impl Into<PathBuf>) -> Self {
        self.settings.resume = Some(path.into());
        self
    }

    /// What [`list`] calls it: the words of its stack, say. Control characters become spaces.
    pub fn label(mut self, label: impl Into<String>) -> Self {
        self.settings.label = label.into();
        self
    }

    /// Attaches it. When this answers, the device is there and ready for use.
    ///
    /// Its threads and its runtime are its own: the caller's may be busy or blocked on the device itself, on a
    /// current-thread runtime too. The one exception is an engine that has tasks on the caller's runtime: those of
    /// an NBD client run where it was opened.
    ///
    /// # Errors
    /// See [`AttachError`]. The disk is closed then, unless the caller has further handles to it.
    pub async fn attach(self) -> Result<Attached, AttachError> {
        let (orders, taken) = mpsc::unbounded_channel();
        let (answer, answered) = oneshot::channel();
        manager::start(self.source, self.settings, taken, answer)?;
        // It answers, or its thread has panicked.
        let started = answered.await.unwrap_or(Err(AttachError::Lost))?;
        Ok(Attached { started, orders })
    }
}

/// A disk that is attached. End it with [`detach`](Self::detach).
///
/// Dropped without, the device is served until nobody uses it any more and then detached, as long as
/// this process lives. Dropping does not block.
#[must_use = "a device is detached when its handle is dropped"]
#[derive(Debug)]
pub struct Attached {
    started: Started,
    orders: mpsc::UnboundedSender<Order>,
}

impl Attached {
    /// The block device: `/dev/ublkb0`, say.
    pub fn path(&self) -> &Path {
        &self.started.path
    }

    /// The way that was taken.
    pub fn via(&self) -> Via {
        self.started.via
    }

    /// The better ways, and why each was not taken.
    pub fn passed_over(&self) -> &[PassedOver] {
        &self.started.passed_over
    }

    /// The device's size in bytes, now. It follows the disk's, rounded down to whole blocks.
    pub fn size(&self) -> u64 {
        self.started.status.borrow().size
    }

    /// Resolves when the device's size is no longer `seen`, and answers the new one. Never, once it has ended.
    pub async fn resized(&self, seen: u64) -> u64 {
        let mut status: watch::Receiver<Status> = self.started.status.clone();
        match status.wait_for(|status| status.size != seen).await {
            Ok(status) => status.size,
            Err(_) => std::future::pending().await,
        }
    }

    /// Resolves when the device is gone, and says why: `None` if it was detached.
    pub async fn ended(&self) -> Option<String> {
        let mut status: watch::Receiver<Status> = self.started.status.clone();
        match status.wait_for(|status| status.ended.is_some()).await {
            Ok(status) => status.ended.clone().flatten(),
            Err(_) => Some(self.lost().to_string()),
        }
    }

    fn lost(&self) -> DetachError {
        let path = self.path().to_owned();
        DetachError::Lost { path }
    }

    /// True if somebody uses the device: a mount, a device on top of it, or an exclusive open.
    ///
    /// # Errors
    /// If the device cannot be opened.
    pub fn in_use(&self) -> std::io::Result<bool> {
        in_use(self.path())
    }

    /// Flushes, takes the device away, and closes the disk, unless the caller has further handles to it.
    /// Further calls do nothing, and answer how its end went.
    ///
    /// # Errors
    /// [`DetachError::InUse`] if somebody uses it, [`DetachError::Refused`] if that cannot be told: nothing has changed then, and
    /// it can be called again. Else the device has ended, and the error says what went wrong on the way.
    pub async fn detach(&mut self) -> Result<(), DetachError> {
        let (answer, answered) = oneshot::channel();
        if self.orders.send(Order::Detach(answer)).is_ok()
            && let Ok(result) = answered.await
        {
            return result;
        }
        // It had ended before the order was read, or its thread has panicked.
        let mut status: watch::Receiver<Status> = self.started.status.clone();
        match status.wait_for(|status| status.ended.is_some()).await {
            Ok(status) => match &status.failed {
                None => Ok(()),
                Some(text) => Err(DetachError::Told(text.clone())),
            },
            Err(_) => Err(self.lost()),
        }
    }
}
