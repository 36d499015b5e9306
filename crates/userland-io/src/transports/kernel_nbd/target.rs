//! What a caller asks for: a new block device, or the end of one whose process has died.

use std::sync::Arc;
use std::time::Duration;

#[cfg(feature = "attach")]
use rustix::fs::FileType;
use tokio::runtime::Handle;

use super::connections::MOST;
#[cfg(feature = "attach")]
use super::control;
use super::control::{Control, Identity, Waits};
use super::error::Error;
use super::life::{self, BlockDevice, Written};
use super::served::{Order, Served};
use crate::transports::nbd::export::{block_sizes, transmission_flags};
use crate::transports::nbd::limits::{Budget, Chairs, Environment, Limits, Shutdown};
use crate::transports::nbd::session::{ReplyMode, Session};
use crate::transports::nbd::wire::TransmissionFlags;
#[cfg(feature = "attach")]
use crate::transports::node;
use crate::{Device, Engine, Features, Geometry};

/// As many connections as this by default, on a machine that has the CPUs.
const CONNECTIONS: usize = 4;
/// The driver's own depth, for each connection.
const DEPTH: u16 = 128;
/// See [`Target::timeout`].
pub(super) const TIMEOUT: Duration = Duration::from_secs(60);

/// The shortest time-out, in seconds, of which a part is for the answer and a part for a new connection.
const SHORTEST: u64 = 3;
/// The longest, a day: the driver counts in 32 bits.
const LONGEST: u64 = 24 * 60 * 60;

/// As many connections as suit the machine.
pub(super) fn connections() -> u16 {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    cpus.min(CONNECTIONS) as u16
}

/// What a device is known by unless it is said.
pub(super) fn identifier() -> String {
    format!("userland-io {}", std::process::id())
}

pub(super) fn whole_seconds(timeout: Duration) -> Duration {
    Duration::from_secs(timeout.as_secs().clamp(SHORTEST, LONGEST))
}

pub(super) fn one_line(identifier: String) -> String {
    identifier.replace(char::is_control, " ")
}

/// A disk that is to be a block device: how it is to be served.
#[derive(Debug)]
pub struct Target<E: Engine> {
    device: Device<E>,
    connections: u16,
    depth: u16,
    timeout: Duration,
    identifier: String,
    runtime: Option<Handle>,
}

impl<E: Engine> Target<E> {
    /// `device` with the defaults: a connection for each CPU up to four, 128 requests at once in each.
    pub fn new(device: Device<E>) -> Self {
        Target {
            device,
            connections: connections(),
            depth: DEPTH,
            timeout: TIMEOUT,
            identifier: identifier(),
            runtime: None,
        }
    }

    /// How many connections, each with a thread of its own: 1 to 64.
    pub fn connections(mut self, connections: u16) -> Self {
        self.connections = connections.clamp(1, MOST as u16);
        self
    }

    /// How many requests run at once in each connection, at least one. The driver sends up to 128; more
    /// than this many wait.
    pub fn depth(mut self, depth: u16) -> Self {
        self.depth = depth.max(1);
        self
    }

    /// How long a request may hang if this process dies, in whole seconds from three to a day: nine tenths of it the kernel waits for
    /// an answer before it takes the connection for lost, and then, for two seconds at least, for a new connection. The driver
    /// looks once a second. If left out: 60 s.
    ///
    /// If the process lives and the disk is that slow, the connection is made anew as soon as the disk has answered, what
    /// was asked is done again, and the kernel waits twice as long from then on, each time, up to an hour: for the answers to new
    /// requests, and for a new connection. A disk that answers only after both times is lost, and requests to it fail. So is one that
    /// is too slow again and again for four times this time, since the kernel asks the same request without end, with the time-out that it
    /// had at first.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = whole_seconds(timeout);
        self
    }

    /// What the driver shows in `/sys/block/nbdN/backend` (since Linux 5.14), for the device to be known by. If
    /// left out: this library's name, and the process's number.
    pub fn identifier(mut self, identifier: impl Into<String>) -> Self {
        self.identifier = one_line(identifier.into());
        self
    }

    /// The runtime that the engine's timers and sockets register with. If left out: the caller's of
    /// [`connect`](Self::connect).
    pub fn runtime(mut self, runtime: Handle) -> Self {
        self.runtime = Some(runtime);
        self
    }

    /// Makes the block device. It is there, with its partitions, when this resolves.
    ///
    /// # Errors
    /// [`Error::Unavailable`] where the kernel has no NBD client; [`Error::Unsuitable`] for a disk without a whole
    /// block; else what the driver said.
    pub async fn connect(self) -> Result<BlockDevice, Error> {
        let geometry = self.device.geometry();
        let limits = Limits {
            max_in_flight: self.depth.into(),
            ..Limits::default()
        };
        let mut flags = transmission_flags(&geometry, ReplyMode::Simple, false);
        // Where the engine has no zeroes the kernel writes them itself, in requests that no time-out meets: one that zeroes
        // has up to 4 GiB.
        if !geometry.features.contains(Features::WRITE_ZEROES) {
            flags.remove(TransmissionFlags::SEND_WRITE_ZEROES);
        }
        let session = Session {
            export: self.identifier.clone(),
            // The disk's own, which may change; its edge refuses what is beyond.
            size: Geometry::MAX_SIZE,
            flags,
            replies: ReplyMode::Simple,
            contexts: Vec::new(),
            blocks: block_sizes(&geometry, limits.max_request, false),
        };
        let plan = life::Plan {
            size: geometry.size,
            block_size: life::block_size(&geometry),
            flags,
            waits: Waits::of(self.timeout),
            identifier: self.identifier,
        };
        if life::whole_blocks(plan.size, plan.block_size) == 0 {
            return Err(Error::Unsuitable(format!(
                "a disk of {} bytes is shorter than one block of a kernel device",
                plan.size
            )));
        }
        let (stop, shutdown) = Shutdown::channel();
        let order = Order {
            device: self.device,
            session,
            environment: Environment {
                budget: Budget::new(limits.max_server_bytes),
                chairs: Chairs::default(),
                limits: Arc::new(limits),
                shutdown,
            },
            stop,
            runtime: self.runtime.unwrap_or_else(Handle::current),
            timeout: self.timeout,
        };
        let count = self.connections.into();
        life::start(plan, move |to| Served::new(order, count, to)).await
    }
}

/// Tells if this kernel has an NBD client. It loads the driver's module if it finds it.
///
/// # Errors
/// [`Error::Unavailable`].
pub fn available() -> Result<(), Error> {
    Control::open().map(drop)
}

/// Takes away the device that a process which has died left connected. What is open on it gets errors. One that is
/// gone is no error, nor is another in its place, which stays. Blocks for a moment.
///
/// # Errors
/// As the driver says.
pub fn remove(device: &Identity) -> Result<(), Error> {
    match device.is_connected() {
        true => life::take_down(&mut Control::open()?, device, None, Written::Nothing),
        false => Ok(()),
    }
}

/// As [`remove`], but takes away none that is in use, nor one of which that cannot be told.
#[cfg(feature = "attach")]
pub(crate) fn remove_unused(device: &Identity) -> Result<(), Error> {
    if !device.is_connected() {
        return Ok(());
    }
    let node = control::node(device.index);
    let directory = control::directory(device.index);
    node::ensure(&node, &directory, FileType::BlockDevice)
        .map_err(Error::io(node.display().to_string()))?;
    let claimed = life::claim(device.index)?;
    match device.is_connected() {
        true => life::take_down(
            &mut Control::open()?,
            device,
            Some(claimed),
            Written::Nothing,
        ),
        // It has gone meanwhile, and another may have come.
        false => Ok(()),
    }
}
