//! Why a block device could not be made, changed or taken down.

use std::io;

use crate::ErrorKind;
use crate::transports::nbd::ConnectError;

/// What went wrong with a block device, as opposed to a request to it.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This machine, or this user, has no NBD client in the kernel. The text says why.
    #[error("no NBD client in this kernel: {0}")]
    Unavailable(String),
    /// The server that the kernel was to talk to cannot be had.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The disk cannot be a block device. The text says why.
    #[error("{0}")]
    Unsuitable(String),
    /// The device is mounted, or claimed by another program.
    #[error("/dev/nbd{0} is in use")]
    InUse(u32),
    /// This kernel's driver leaves a connected device its size (before Linux 5.5).
    #[error("the NBD driver of this kernel cannot resize /dev/nbd{0}: make it anew")]
    CannotResize(u32),
    /// The driver refused a command.
    #[error("the NBD driver refused {command}: {source}")]
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
}

impl Error {
    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io {
            what: what.into(),
            source,
        }
    }
}

impl From<Error> for crate::Error {
    fn from(error: Error) -> Self {
        if let Error::Connect(error) = error {
            return error.into();
        }
        let kind = match &error {
            Error::Unavailable(_) | Error::CannotResize(_) => ErrorKind::Unsupported,
            Error::Command { source, .. } | Error::Io { source, .. } => source
                .raw_os_error()
                .map_or(ErrorKind::Io, ErrorKind::from_errno),
            _ => ErrorKind::Invalid,
        };
        crate::Error::new(kind, error)
    }
}
