//! The driver's commands (linux/nbd-netlink.h), and what sysfs tells of its devices.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::time::Duration;

use super::error::Error;
use super::netlink::{Attributes, Family, attributes};

const FAMILY: &str = "nbd";
const VERSION: u8 = 1;

mod command {
    pub(super) const CONNECT: u8 = 1;
    pub(super) const DISCONNECT: u8 = 2;
    pub(super) const RECONFIGURE: u8 = 3;
}

mod attribute {
    pub(super) const INDEX: u16 = 1;
    pub(super) const SIZE_BYTES: u16 = 2;
    pub(super) const BLOCK_SIZE_BYTES: u16 = 3;
    pub(super) const TIMEOUT: u16 = 4;
    pub(super) const SERVER_FLAGS: u16 = 5;
    pub(super) const CLIENT_FLAGS: u16 = 6;
    pub(super) const SOCKETS: u16 = 7;
    pub(super) const DEAD_CONN_TIMEOUT: u16 = 8;
    pub(super) const BACKEND_IDENTIFIER: u16 = 10;
    /// Within `SOCKETS`, and within that.
    pub(super) const SOCK_ITEM: u16 = 1;
    pub(super) const SOCK_FD: u16 = 1;
}

/// The driver forgets the whole device once it is disconnected.
const DESTROY_ON_DISCONNECT: u64 = 1;

/// What a new device is to be.
#[derive(Debug)]
pub(super) struct Wanted<'a> {
    /// If left out, the driver chooses a free one, or makes one more.
    pub(super) index: Option<u32>,
    /// In bytes, whole blocks.
    pub(super) size: u64,
    pub(super) block_size: u32,
    /// The server's transmission flags.
    pub(super) flags: u16,
    pub(super) waits: Waits,
    pub(super) identifier: &'a str,
}

/// How long the driver waits for a server, in all and in whole seconds, before it fails requests.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waits {
    /// For the answer to a request: then it takes the connection for lost.
    answer: Duration,
    /// Then, for a connection on which it can ask again.
    connection: Duration,
}

impl Waits {
    /// Nearly all of it is for the answer: of a server whose process has died no connection comes, and one that lives makes
    /// it as soon as its disk has answered. The driver looks at its requests once a second, so it is two at least.
    pub(super) fn of(timeout: Duration) -> Self {
        let whole = timeout.as_secs();
        let connection = (whole / 10).max(2);
        Waits {
            answer: Duration::from_secs(whole.saturating_sub(connection).max(1)),
            connection: Duration::from_secs(connection),
        }
    }

    fn tell(self, asked: &mut Attributes) {
        asked.u64(attribute::TIMEOUT, self.answer.as_secs());
        asked.u64(attribute::DEAD_CONN_TIMEOUT, self.connection.as_secs());
    }
}

/// The driver.
#[derive(Debug)]
pub(super) struct Control(Family);

impl Control {
    pub(super) fn open() -> Result<Self, Error> {
        match Family::find(FAMILY) {
            Ok(family) => Ok(Control(family)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let why = "its driver nbd is neither built in nor loaded";
                Err(Error::Unavailable(why.to_owned()))
            }
            Err(error) => Err(Error::Unavailable(format!("netlink: {error}"))),
        }
    }

    /// Makes a device that talks through `sockets`, and answers its index.
    pub(super) fn connect<S: AsFd>(
        &mut self,
        wanted: &Wanted<'_>,
        sockets: &[S],
    ) -> Result<u32, Error> {
        let mut asked = Attributes::default();
        if let Some(index) = wanted.index {
            asked.u32(attribute::INDEX, index);
        }
        asked.u64(attribute::SIZE_BYTES, wanted.size);
        asked.u64(attribute::BLOCK_SIZE_BYTES, wanted.block_size.into());
        asked.u64(attribute::SERVER_FLAGS, wanted.flags.into());
        wanted.waits.tell(&mut asked);
        asked.u64(attribute::CLIENT_FLAGS, 0);
        asked.text(attribute::BACKEND_IDENTIFIER, wanted.identifier);
        asked.nest(attribute::SOCKETS, &list(sockets));
        let answers = self.0.command(command::CONNECT, VERSION, &asked);
        let answers = answers.map_err(refused("NBD_CMD_CONNECT"))?;
        let mut all = answers.iter().flat_map(|answer| attributes(answer));
        let index = all.find(|(kind, _)| *kind == attribute::INDEX);
        let index = index.and_then(|(_, value)| value.try_into().ok());
        index.map(u32::from_ne_bytes).ok_or_else(|| {
            let source = io::Error::from(io::ErrorKind::InvalidData);
            refused("NBD_CMD_CONNECT")(source)
        })
    }

    /// Fails what is under way, and lets go of the sockets.
    pub(super) fn disconnect(&mut self, index: u32) -> Result<(), Error> {
        let mut asked = Attributes::default();
        asked.u32(attribute::INDEX, index);
        let done = self.0.command(command::DISCONNECT, VERSION, &asked);
        done.map(drop).map_err(refused("NBD_CMD_DISCONNECT"))
    }

    /// Gives the device another size. Old drivers do nothing, and say that all is well.
    pub(super) fn resize(&mut self, of: &Identity, size: u64) -> Result<(), Error> {
        let mut asked = Attributes::default();
        asked.u64(attribute::SIZE_BYTES, size);
        self.reconfigure(of, asked)
    }

    /// Gives the device `sockets` in place of connections that are lost, and new time-outs from now on.
    pub(super) fn reconnect<S: AsFd>(
        &mut self,
        of: &Identity,
        sockets: &[S],
        waits: Waits,
    ) -> Result<(), Error> {
        let mut asked = Attributes::default();
        waits.tell(&mut asked);
        asked.nest(attribute::SOCKETS, &list(sockets));
        self.reconfigure(of, asked)
    }

    /// Has the driver forget the device once it is disconnected.
    pub(super) fn destroy_on_disconnect(&mut self, of: &Identity) -> Result<(), Error> {
        let mut asked = Attributes::default();
        asked.u64(attribute::CLIENT_FLAGS, DESTROY_ON_DISCONNECT);
        self.reconfigure(of, asked)
    }

    fn reconfigure(&mut self, of: &Identity, mut asked: Attributes) -> Result<(), Error> {
        asked.u32(attribute::INDEX, of.index);
        asked.text(attribute::BACKEND_IDENTIFIER, &of.identifier);
        let done = self.0.command(command::RECONFIGURE, VERSION, &asked);
        done.map(drop).map_err(refused("NBD_CMD_RECONFIGURE"))
    }
}

fn list<S: AsFd>(sockets: &[S]) -> Attributes {
    let mut all = Attributes::default();
    for socket in sockets {
        let mut item = Attributes::default();
        let descriptor = socket.as_fd().as_raw_fd();
        item.u32(attribute::SOCK_FD, descriptor.cast_unsigned());
        all.nest(attribute::SOCK_ITEM, &item);
    }
    all
}

fn refused(command: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| match source.raw_os_error() {
        Some(libc::EPERM) => Error::Unavailable(
            "it obeys only root outside of any container (CAP_SYS_ADMIN)".to_owned(),
        ),
        _ => Error::Command { command, source },
    }
}

/// What tells a connected device from any other that is, or will be, at the same index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// N of `/dev/nbdN`.
    pub index: u32,
    /// What it was given by its maker, for the driver to show (since Linux 5.14).
    pub identifier: String,
    /// The thread that made it, by which older drivers tell.
    pub thread: u32,
}

impl Identity {
    /// The connected device that was given `identifier`, as far as the driver shows that.
    pub fn find(identifier: &str) -> Option<Self> {
        let of = |index| Identity {
            index,
            identifier: identifier.to_owned(),
            thread: 0,
        };
        let mut all = indexes().into_iter().map(of);
        all.find(Identity::is_connected)
    }

    /// True if the device is there, and connected.
    pub fn is_connected(&self) -> bool {
        let read = |name| fs::read_to_string(directory(self.index).join(name));
        match read("backend") {
            Ok(backend) => backend.trim_end() == self.identifier,
            Err(_) => read("pid").is_ok_and(|pid| pid.trim_end().parse() == Ok(self.thread)),
        }
    }
}

/// The device's directory in sysfs.
pub(super) fn directory(index: u32) -> PathBuf {
    format!("/sys/block/nbd{index}").into()
}

pub(super) fn node(index: u32) -> PathBuf {
    format!("/dev/nbd{index}").into()
}

/// The indexes that there are, connected or not.
pub(super) fn indexes() -> Vec<u32> {
    let entries = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let index = |entry: fs::DirEntry| {
        entry
            .file_name()
            .to_str()?
            .strip_prefix("nbd")?
            .parse()
            .ok()
    };
    entries.filter_map(index).collect()
}

pub(super) fn has_partitions(index: u32) -> bool {
    let entries = fs::read_dir(directory(index)).into_iter().flatten();
    entries
        .flatten()
        .any(|entry| entry.path().join("partition").exists())
}

/// In bytes.
pub(super) fn size(index: u32) -> io::Result<u64> {
    let text = fs::read_to_string(directory(index).join("size"))?;
    let sectors: u64 = text.trim_end().parse().map_err(io::Error::other)?;
    Ok(sectors.saturating_mul(512))
}
