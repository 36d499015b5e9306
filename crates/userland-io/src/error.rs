//! What a request answers when it fails: a small kind to act on, an errno for
//! the kernel and the wire, and the cause for whoever reads the log.

use std::fmt;

/// What an operation of this library returns. `Result` alone is 16 bytes.
pub type Result<T = (), E = Error> = std::result::Result<T, E>;

/// Why a request failed, in as many kinds as a caller acts on differently.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The storage failed. Nothing is known but that each block is old or new.
    Io,
    /// The range does not lie inside the disk.
    OutOfRange,
    /// A mutation of a disk that is read-only.
    ReadOnly,
    /// No space is left below. Free some and try again.
    NoSpace,
    /// This engine does not do that, or (`FAST_ONLY`) not quickly.
    Unsupported,
    /// The request or the configuration makes no sense.
    Invalid,
    /// The disk is closed, or closing.
    Shutdown,
    /// The bytes are there, but fail their integrity or authenticity check.
    Protection,
}

impl ErrorKind {
    /// The Linux errno that stands for this kind, on every platform.
    pub const fn errno(self) -> i32 {
        match self {
            ErrorKind::Io => errno::EIO,
            ErrorKind::OutOfRange | ErrorKind::Invalid => errno::EINVAL,
            ErrorKind::ReadOnly => errno::EROFS,
            ErrorKind::NoSpace => errno::ENOSPC,
            ErrorKind::Unsupported => errno::EOPNOTSUPP,
            ErrorKind::Shutdown => errno::ESHUTDOWN,
            ErrorKind::Protection => errno::EILSEQ,
        }
    }

    /// The kind that a Linux errno falls under; what is not known is [`Io`](Self::Io).
    pub const fn from_errno(errno: i32) -> Self {
        match errno {
            errno::EROFS | errno::EPERM | errno::EACCES => ErrorKind::ReadOnly,
            errno::ENOSPC | errno::EDQUOT | errno::EFBIG => ErrorKind::NoSpace,
            errno::EOPNOTSUPP | errno::ENOSYS => ErrorKind::Unsupported,
            errno::EINVAL => ErrorKind::Invalid,
            errno::ESHUTDOWN => ErrorKind::Shutdown,
            errno::EILSEQ | errno::EBADMSG => ErrorKind::Protection,
            _ => ErrorKind::Io,
        }
    }

    const fn describe(self) -> &'static str {
        match self {
            ErrorKind::Io => "input/output error",
            ErrorKind::OutOfRange => "range lies outside the disk",
            ErrorKind::ReadOnly => "the disk is read-only",
            ErrorKind::NoSpace => "no space left",
            ErrorKind::Unsupported => "not supported",
            ErrorKind::Invalid => "invalid request",
            ErrorKind::Shutdown => "the disk is closed",
            ErrorKind::Protection => "integrity check failed",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.describe())
    }
}

/// A failed request: a [kind](Error::kind), an [errno](Error::errno), and
/// perhaps a [source](std::error::Error::source).
///
/// Made from an [`ErrorKind`], from an errno, from an [`std::io::Error`] (whose
/// raw errno is kept), or from a kind and any error of your own:
///
/// ```
/// use userland_io::{Error, ErrorKind};
///
/// let a: Error = ErrorKind::NoSpace.into();
/// let b = Error::from_errno(28);
/// let c = Error::new(ErrorKind::Protection, "tag of block 7 does not match");
/// assert_eq!((a.errno(), b.kind(), c.errno()), (28, ErrorKind::NoSpace, 84));
/// ```
pub struct Error(Repr);

enum Repr {
    Kind(ErrorKind),
    Errno(i32),
    Custom(Box<Custom>),
}

struct Custom {
    kind: ErrorKind,
    errno: Option<i32>,
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl Error {
    /// A kind with its cause: any error, or a text.
    pub fn new(
        kind: ErrorKind,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Error(Repr::Custom(Box::new(Custom {
            kind,
            errno: None,
            source: source.into(),
        })))
    }

    /// The failure that a Linux errno stands for.
    pub const fn from_errno(errno: i32) -> Self {
        Error(Repr::Errno(errno))
    }

    /// The same, in the words of whoever told it.
    #[cfg(feature = "nbd")]
    pub(crate) fn told(errno: i32, text: String) -> Self {
        Error(Repr::Custom(Box::new(Custom {
            kind: ErrorKind::from_errno(errno),
            errno: Some(errno),
            source: text.into(),
        })))
    }

    /// What a caller acts on.
    pub const fn kind(&self) -> ErrorKind {
        match &self.0 {
            Repr::Kind(kind) => *kind,
            Repr::Errno(errno) => ErrorKind::from_errno(*errno),
            Repr::Custom(custom) => custom.kind,
        }
    }

    /// The Linux errno, on every platform: the one this error was made from,
    /// else that of its kind.
    pub const fn errno(&self) -> i32 {
        match &self.0 {
            Repr::Kind(kind) => kind.errno(),
            Repr::Errno(errno) => *errno,
            Repr::Custom(custom) => match custom.errno {
                Some(errno) => errno,
                None => custom.kind.errno(),
            },
        }
    }
}

impl From<ErrorKind> for Error {
    fn from(kind: ErrorKind) -> Self {
        Error(Repr::Kind(kind))
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        #[cfg(any(target_os = "linux", target_os = "android"))]
        if let Some(errno) = error.raw_os_error() {
            return Error::from_errno(errno);
        }
        // Elsewhere the numbers are others, so the kind decides and the error stays as the source.
        let errno = match error.kind() {
            std::io::ErrorKind::OutOfMemory => Some(errno::ENOMEM),
            std::io::ErrorKind::PermissionDenied => Some(errno::EACCES),
            _ => None,
        };
        let kind = match error.kind() {
            std::io::ErrorKind::ReadOnlyFilesystem | std::io::ErrorKind::PermissionDenied => {
                ErrorKind::ReadOnly
            }
            std::io::ErrorKind::StorageFull
            | std::io::ErrorKind::QuotaExceeded
            | std::io::ErrorKind::FileTooLarge => ErrorKind::NoSpace,
            std::io::ErrorKind::Unsupported => ErrorKind::Unsupported,
            std::io::ErrorKind::InvalidInput => ErrorKind::Invalid,
            _ => ErrorKind::Io,
        };
        Error(Repr::Custom(Box::new(Custom {
            kind,
            errno,
            source: error.into(),
        })))
    }
}

impl From<Error> for std::io::Error {
    fn from(error: Error) -> Self {
        #[cfg(any(target_os = "linux", target_os = "android"))]
        if let Repr::Errno(errno) = error.0 {
            return std::io::Error::from_raw_os_error(errno);
        }
        let kind = match error.kind() {
            ErrorKind::ReadOnly => std::io::ErrorKind::ReadOnlyFilesystem,
            ErrorKind::NoSpace => std::io::ErrorKind::StorageFull,
            ErrorKind::Unsupported => std::io::ErrorKind::Unsupported,
            ErrorKind::Invalid | ErrorKind::OutOfRange => std::io::ErrorKind::InvalidInput,
            ErrorKind::Io | ErrorKind::Shutdown | ErrorKind::Protection => {
                std::io::ErrorKind::Other
            }
        };
        std::io::Error::new(kind, error)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Repr::Kind(kind) => write!(f, "Error({kind:?})"),
            Repr::Errno(errno) => write!(f, "Error({:?}, errno {errno})", self.kind()),
            Repr::Custom(custom) => write!(f, "Error({:?}, {:?})", custom.kind, custom.source),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Repr::Kind(kind) => kind.fmt(f),
            #[cfg(any(target_os = "linux", target_os = "android"))]
            Repr::Errno(errno) => std::io::Error::from_raw_os_error(*errno).fmt(f),
            #[cfg(not(any(target_os = "linux", target_os = "android")))]
            Repr::Errno(errno) => write!(f, "{} (errno {errno})", self.kind()),
            Repr::Custom(custom) => custom.source.fmt(f),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.0 {
            // The text is the source's own, so the chain goes on below it.
            Repr::Custom(custom) => custom.source.source(),
            _ => None,
        }
    }
}

/// Linux errno numbers, the ones that disks answer with (asm-generic/errno.h).
pub mod errno {
    #![allow(missing_docs)]
    pub const EPERM: i32 = 1;
    pub const EIO: i32 = 5;
    pub const ENOMEM: i32 = 12;
    pub const EACCES: i32 = 13;
    pub const EINVAL: i32 = 22;
    pub const EFBIG: i32 = 27;
    pub const ENOSPC: i32 = 28;
    pub const EROFS: i32 = 30;
    pub const ENOSYS: i32 = 38;
    pub const EBADMSG: i32 = 74;
    pub const EOVERFLOW: i32 = 75;
    pub const EILSEQ: i32 = 84;
    pub const EOPNOTSUPP: i32 = 95;
    pub const ESHUTDOWN: i32 = 108;
    pub const EDQUOT: i32 = 122;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_two_words() {
        assert_eq!(size_of::<Result<()>>(), 16);
    }

    #[test]
    fn every_kind_survives_its_errno() {
        for kind in [
            ErrorKind::Io,
            ErrorKind::ReadOnly,
            ErrorKind::NoSpace,
            ErrorKind::Unsupported,
            ErrorKind::Invalid,
            ErrorKind::Shutdown,
            ErrorKind::Protection,
        ] {
            assert_eq!(ErrorKind::from_errno(kind.errno()), kind);
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn an_io_error_keeps_its_number_both_ways() {
        let error = Error::from(std::io::Error::from_raw_os_error(122));
        assert_eq!((error.kind(), error.errno()), (ErrorKind::NoSpace, 122));
        assert_eq!(std::io::Error::from(error).raw_os_error(), Some(122));
    }

    #[test]
    fn a_text_is_what_is_shown() {
        let error = Error::new(ErrorKind::Protection, "tag of block 7 does not match");
        assert_eq!(error.to_string(), "tag of block 7 does not match");
        assert_eq!(error.errno(), 84);
    }
}
