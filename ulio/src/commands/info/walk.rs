//! Going through a disk's runs, however many there are.

use std::fmt;

use serde::Serialize;
use userland_io::{Device, Error, ErrorKind, Extent, ExtentKind, Extents};

use crate::errors::Failure;

/// How many runs are asked for at once.
const RUNS_AT_ONCE: usize = 4096;

/// A run, and where it starts.
#[derive(Clone, Copy, Serialize)]
pub(super) struct Placed {
    offset: u64,
    length: u64,
    kind: &'static str,
}

impl Placed {
    /// A disk that tells nothing.
    pub(super) fn whole(size: u64) -> Self {
        Placed {
            offset: 0,
            length: size,
            kind: "data",
        }
    }
}

/// A row of the map.
impl fmt::Display for Placed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Placed {
            offset,
            length,
            kind,
        } = self;
        write!(f, "{offset:>20} {length:>20}  {kind}")
    }
}

/// Bytes of each kind.
#[derive(Clone, Copy, Default, Serialize)]
pub(super) struct Sums {
    pub(super) data: u64,
    pub(super) zero: u64,
    pub(super) hole: u64,
    pub(super) runs: u64,
}

/// Hands each run of the disk to `each`, and adds them up. Neighbours of a kind are one, whatever pieces they came in.
/// Keeps none of them, since a server can tell as many as it likes.
pub(super) async fn walk(
    disk: &Device,
    size: u64,
    failed: impl Fn(Error) -> Failure,
    mut each: impl FnMut(Placed) -> Result<(), Failure>,
) -> Result<Sums, Failure> {
    let mut sums = Sums::default();
    let mut last: Option<Placed> = None;
    let mut at = 0;
    while at < size {
        let mut out = Extents::new(RUNS_AT_ONCE);
        disk.extents(at..size, &mut out).await.map_err(&failed)?;
        if out.is_empty() {
            let text = format!("no extent was told at offset {at}");
            return Err(failed(Error::new(ErrorKind::Io, text)));
        }
        for &Extent { len, kind } in &out {
            let (kind, sum) = match kind {
                ExtentKind::Data => ("data", &mut sums.data),
                ExtentKind::Zero => ("zero", &mut sums.zero),
                ExtentKind::Hole => ("hole", &mut sums.hole),
            };
            *sum += len;
            match &mut last {
                Some(last) if last.kind == kind => last.length += len,
                _ => {
                    sums.runs += 1;
                    let run = Placed {
                        offset: at,
                        length: len,
                        kind,
                    };
                    if let Some(before) = last.replace(run) {
                        each(before)?;
                    }
                }
            }
            at += len;
        }
    }
    if let Some(last) = last {
        each(last)?;
    }
    Ok(sums)
}
