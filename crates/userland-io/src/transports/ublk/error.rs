//! Why a block device could not be made, resumed or taken down.

use std::io;

use super::abi::Control;
use crate::ErrorKind;

/// What went wrong with a block device, as opposed to a request to it.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This machine, or this user, has no ublk. The text says why.
    #[error("no ublk: {0}")]
    Unavailable(String),
    /// The index asked for is taken.
    #[error("/dev/ublkb{0} exists already")]
    Exists(u32),
    /// There is no device of that index, or it is no device of the ublk driver.
    #[error("{0} is no ublk device")]
    NotFound(String),
    /// The disk cannot be a block device, or not a recoverable one. The text says why.
    #[error("{0}")]
    Unsuitable(String),
    /// The device to be resumed is not the one that the disk would make. The text says where they differ.
    #[error("/dev/ublkb{index} was made for another disk: {difference}")]
    Mismatch {
        /// The device's index.
        index: u32,
        /// What differs.
        difference: String,
    },
    /// The device to be resumed is served by a process that lives.
    #[error("/dev/ublkb{index} is being served by process {pid}")]
    Served {
        /// The device's index.
        index: u32,
        /// The process.
        pid: i32,
    },
    /// The device is mounted, or open.
    #[error("/dev/ublkb{0} is in use")]
    InUse(u32),
    /// The driver refused a command.
    #[error("ublk refused {command}: {source}")]
    Command {
        /// The driver's name of the command.
        command: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What it was for.
        what: String,
        /// How it failed.
        source: io::Error,
    },
    /// The thread that looks after the device has panicked.
    #[error("the thread that looks after the block device has panicked")]
    Lost,
    /// The disk's last flush, or its close, failed.
    #[error("the disk did not close well: {0}")]
    Close(crate::Error),
}

impl Error {
    /// True if it comes of asking the driver to stop a device that is not in use, and the device lives on.
    #[cfg(feature = "attach")]
    pub(crate) fn is_refusal(&self) -> bool {
        match self {
            Error::InUse(_) => true,
            Error::Command { command, .. } => *command == Control::TryStopDev.name(),
            _ => false,
        }
    }

    pub(super) fn command(command: Control) -> impl Fn(io::Error) -> Error {
        move |source| Error::Command {
            command: command.name(),
            source,
        }
    }

    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io {
            what: what.into(),
            source,
        }
    }
}

impl From<Error> for crate::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Unavailable(_) => ErrorKind::Unsupported,
            Error::Command { source, .. } | Error::Io { source, .. } => source
                .raw_os_error()
                .map_or(ErrorKind::Io, ErrorKind::from_errno),
            Error::Close(error) => error.kind(),
            _ => ErrorKind::Invalid,
        };
        crate::Error::new(kind, error)
    }
}
