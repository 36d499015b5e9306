//! Copying one disk onto another: sparse, parallel, and certain at the end.
//!
//! [`copy`] walks both disks' extents (`plan`). What the source holds is read and
//! written; where the source is zero the target is made zero, unless it says that
//! it is already. A fixed number of requests is in flight, each in a slot with a
//! buffer of its own. The target's flush decides whether the copy succeeded, and
//! [`CopyOptions::verify`] then reads both disks again and compares.

mod plan;
mod run;
#[cfg(test)]
mod tests;

use crate::{Device, Engine, Error};

/// How to copy. The defaults suit local disks and servers alike.
#[non_exhaustive]
#[derive(Clone, Debug)]
pub struct CopyOptions {
    /// How many requests are in flight at once, at least 1. Default: 16.
    pub in_flight: usize,
    /// The longest read or write in bytes; kept to what both disks take in one piece, and to
    /// [`MAX_REQUEST`](Self::MAX_REQUEST). Memory in use is this times [`in_flight`](Self::in_flight), twice
    /// that while verifying. Default: 1 MiB.
    pub request_size: u32,
    /// Read both disks again after the flush, and compare every byte. Default: no.
    pub verify: bool,
}

impl CopyOptions {
    /// The upper bound of [`request_size`](Self::request_size): 64 MiB.
    pub const MAX_REQUEST: u32 = 64 << 20;
    /// The upper bound of [`in_flight`](Self::in_flight).
    pub const MAX_IN_FLIGHT: usize = 1024;
}

impl Default for CopyOptions {
    fn default() -> Self {
        CopyOptions {
            in_flight: 16,
            request_size: 1 << 20,
            verify: false,
        }
    }
}

/// What a copy does at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyPhase {
    /// Bytes and zeroes go to the target.
    Copying,
    /// The target makes them durable.
    Flushing,
    /// Both disks are read again.
    Verifying,
}

/// How far a copy is. `done` starts at 0 in each phase and ends at `total`.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyProgress {
    /// What is being done.
    pub phase: CopyPhase,
    /// Bytes of the source that are done with, holes included.
    pub done: u64,
    /// The source's size in bytes.
    pub total: u64,
}

/// What a copy did. The first four add up: `size` is `data + zeroed + skipped`.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// The source's size in bytes.
    pub size: u64,
    /// Bytes that were written.
    pub data: u64,
    /// Bytes that the target was told to make zero.
    pub zeroed: u64,
    /// Bytes that are zero in the source, and were so in the target.
    pub skipped: u64,
    /// Bytes of the target beyond the source's end, which were left as they were.
    pub tail: u64,
}

/// Why a copy failed.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The source does not fit. Nothing was written.
    #[error("the target has {target} bytes, {} fewer than the source's {source_size}", source_size - target)]
    TooShort {
        /// The source's size in bytes.
        source_size: u64,
        /// The target's size in bytes.
        target: u64,
    },
    /// The target accepts no writes. Nothing was written.
    #[error("the target is read-only")]
    ReadOnly,
    /// The source could not be read.
    #[error("reading {len} bytes of the source at offset {offset}: {error}")]
    Read {
        /// Where, in bytes.
        offset: u64,
        /// How much, in bytes.
        len: u64,
        /// What it answered.
        error: Error,
    },
    /// The target could not be written.
    #[error("writing {len} bytes of the target at offset {offset}: {error}")]
    Write {
        /// Where, in bytes.
        offset: u64,
        /// How much, in bytes.
        len: u64,
        /// What it answered.
        error: Error,
    },
    /// Everything was written, but the target cannot say that it is durable.
    #[error("flushing the target: {0}")]
    Flush(Error),
    /// The target could not be read again.
    #[error("reading {len} bytes of the target again at offset {offset}: {error}")]
    Reread {
        /// Where, in bytes.
        offset: u64,
        /// How much, in bytes.
        len: u64,
        /// What it answered.
        error: Error,
    },
    /// The disks differ after the copy: one of them is faulty, or was written to meanwhile.
    #[error(
        "the target differs from the source at offset {offset}: {target:#04x} where the source has {expected:#04x}"
    )]
    Differs {
        /// The first byte that was seen to differ.
        offset: u64,
        /// The source's byte there.
        expected: u8,
        /// The target's byte there.
        target: u8,
    },
}

/// Makes `target` begin with what `source` holds, durably, and tells `progress` how far it is.
///
/// A target that is longer keeps what lies beyond. Neither disk may be written to by others meanwhile.
/// Nothing is spawned: dropping the future ends the copy, and leaves the target partly written.
///
/// # Errors
/// The first that occurred. The requests in flight have ended by then, and no later one was started.
/// [`CopyError::TooShort`] and [`CopyError::ReadOnly`] come before anything is written.
///
/// # Example
/// ```
/// use userland_io::copy::{CopyError, CopyOptions, copy};
/// use userland_io::{Device, Engine};
///
/// async fn back_up<S: Engine, T: Engine>(disk: &Device<S>, backup: &Device<T>) -> Result<(), CopyError> {
///     let mut options = CopyOptions::default();
///     options.verify = true;
///     let copied = copy(disk, backup, &options, |_| ()).await?;
///     println!("{} bytes, of which {} were written", copied.size, copied.data);
///     Ok(())
/// }
/// ```
pub async fn copy<S: Engine, T: Engine>(
    source: &Device<S>,
    target: &Device<T>,
    options: &CopyOptions,
    mut progress: impl FnMut(CopyProgress) + Send,
) -> Result<Copied, CopyError> {
    let (from, to) = (source.geometry(), target.geometry());
    let size = from.size;
    if to.size < size {
        return Err(CopyError::TooShort {
            source_size: size,
            target: to.size,
        });
    }
    if to.is_read_only() {
        return Err(CopyError::ReadOnly);
    }
    let shape = plan::Shape::new(&from, &to, options);
    let pair = run::Pair {
        source,
        target,
        options,
        shape: &shape,
    };
    let mut told = |phase, done| {
        progress(CopyProgress {
            phase,
            done,
            total: size,
        })
    };

    told(CopyPhase::Copying, 0);
    let plan = plan::Plan::copy(source, target, &shape);
    let mut copied = pair
        .run(plan, |done| told(CopyPhase::Copying, done))
        .await?;
    (copied.size, copied.tail) = (size, to.size - size);

    told(CopyPhase::Flushing, 0);
    target.flush().await.map_err(CopyError::Flush)?;
    told(CopyPhase::Flushing, size);

    if options.verify {
        told(CopyPhase::Verifying, 0);
        let plan = plan::Plan::compare(source, target, &shape);
        pair.run(plan, |done| told(CopyPhase::Verifying, done))
            .await?;
    }
    Ok(copied)
}
