//! What can go wrong, in words that say what to do.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::{Holder, Via};
use crate::Error;
use crate::transports::nbd::ConnectError;

/// A way that was not taken, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassedOver {
    /// The way.
    pub via: Via,
    /// The reason.
    pub reason: String,
}

impl fmt::Display for PassedOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.via, self.reason)
    }
}

/// Why a disk could not be attached.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Only root may make block devices.
    #[error(
        "making a block device needs root: run it with sudo, or serve the disk over NBD instead"
    )]
    NotRoot,
    /// What was asked for contradicts the disk or itself.
    #[error("{0}")]
    Refused(String),
    /// The NBD server whose export was to be attached cannot be had.
    #[error(transparent)]
    Connect(ConnectError),
    /// No way works here, or not the one that was asked for.
    #[error("this disk cannot be attached here: {}", Reasons(.0))]
    NoWay(Vec<PassedOver>),
    /// The records under `/run/ulio` cannot be kept.
    #[error("{path}: {error}", path = .path.display())]
    Record {
        /// Where.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// No thread could be started, or no runtime.
    #[error("no thread for the device: {0}")]
    Thread(io::Error),
    /// The thread that was to attach it has panicked.
    #[error("the thread that was to attach the disk has panicked")]
    Lost,
}

struct Reasons<'a>(&'a [PassedOver]);

impl fmt::Display for Reasons<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, passed) in self.0.iter().enumerate() {
            let before = if index == 0 { "" } else { "; " };
            write!(f, "{before}{passed}")?;
        }
        Ok(())
    }
}

/// Why a device was not detached, or not in good order.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum DetachError {
    /// Somebody uses it. It is still attached.
    #[error("{path} is in use{}", Users(.holders), path = .path.display())]
    InUse {
        /// The device.
        path: PathBuf,
        /// Who uses it, as far as can be told.
        holders: Vec<Holder>,
    },
    /// It is still attached: the kernel would not let go of it, or it cannot be told whether somebody uses it.
    #[error("{path} stays attached: {error}", path = .path.display())]
    Refused {
        /// The device.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// It has ended, but not in order. What the kernel still has of it stays on record, as [stale](super::State::Stale).
    #[error("detaching {path}: {error}", path = .path.display())]
    Kernel {
        /// The device.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// What the process says that serves it, or did, in its words for any of the others.
    #[error("{0}")]
    Told(String),
    /// Whoever served it ended, or gave no answer, before it had said that the disk was flushed.
    #[error("{path}: what serves it ended, or gave no answer, before the disk was flushed", path = .path.display())]
    Lost {
        /// The device.
        path: PathBuf,
    },
    /// The device is gone, but the disk's last flush or its close failed.
    #[error("the disk could not be flushed or closed: {0}")]
    Disk(Error),
}

struct Users<'a>(&'a [Holder]);

impl fmt::Display for Users<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, holder) in self.0.iter().enumerate() {
            let before = if index == 0 { ": " } else { ", " };
            write!(f, "{before}{holder}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_is_in_the_error() {
        let passed = |via, reason: &str| PassedOver {
            via,
            reason: reason.to_owned(),
        };
        let error = AttachError::NoWay(vec![
            passed(Via::Ublk, "not in this kernel"),
            passed(Via::Fuse, "no loop device"),
        ]);
        assert_eq!(
            error.to_string(),
            "this disk cannot be attached here: ublk: not in this kernel; fuse: no loop device"
        );
    }
}
