//! Why a disk could not be mounted as a file, or not be unmounted.

use std::io;
use std::path::PathBuf;

use crate::ErrorKind;

/// What went wrong with a mount, as opposed to a request to its file.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path cannot be where the file is. The text says why.
    #[error("{path}: {reason}", path = .path.display())]
    Place {
        /// The path.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// It could not be mounted. The text says why, and what may help.
    #[error("mounting {path}: {reason}", path = .path.display())]
    Mount {
        /// The path.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// It could not be unmounted.
    #[error("unmounting {path}: {source}", path = .path.display())]
    Unmount {
        /// The path.
        path: PathBuf,
        /// How it failed.
        source: io::Error,
    },
    /// A thread, or what it needs, could not be had.
    #[error("no thread for a mount: {0}")]
    Thread(io::Error),
    /// The disk's last flush, or its close, failed.
    #[error("the disk did not close well: {0}")]
    Close(crate::Error),
}

impl From<Error> for crate::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Close(error) => error.kind(),
            Error::Place { .. } => ErrorKind::Invalid,
            Error::Unmount { source, .. } | Error::Thread(source) => source
                .raw_os_error()
                .map_or(ErrorKind::Io, ErrorKind::from_errno),
            Error::Mount { .. } => ErrorKind::Unsupported,
        };
        crate::Error::new(kind, error)
    }
}
