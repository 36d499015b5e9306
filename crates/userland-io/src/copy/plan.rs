//! What to do next: cuts two disks, by what their extents say, into pieces.
//!
//! Extents are advice here. A disk that has none, or fails to tell, counts as
//! data (the source) or as not known to be zero (the target), which costs time
//! and never bytes.

use std::ops::Range;

use super::CopyOptions;
use crate::{Device, Engine, Extent, ExtentKind, Extents, Geometry};

/// Holes smaller than this are not worth a request of their own.
const LEAST_UNIT: u64 = 4096;
/// One request to make zeroes covers at most this, so that several are in flight and progress is seen.
const ZEROES_AT_ONCE: u64 = 64 << 20;
/// How many runs are asked for at once.
const RUNS_AT_ONCE: usize = 1024;

/// The lengths that pieces have, in bytes.
#[derive(Debug)]
pub(super) struct Shape {
    /// What is copied.
    pub(super) size: u64,
    /// Pieces start on multiples of this, and end on them or at `size`: no block is written twice.
    pub(super) unit: u64,
    /// The longest piece of data, a multiple of `unit`.
    pub(super) longest: u64,
    /// What the addresses of buffers are aligned to.
    pub(super) alignment: usize,
}

impl Shape {
    pub(super) fn new(source: &Geometry, target: &Geometry, options: &CopyOptions) -> Self {
        let unit =
            u64::from(source.logical_block_size.max(target.physical_block())).max(LEAST_UNIT);
        let limit = [
            source.max_transfer,
            target.max_transfer,
            CopyOptions::MAX_REQUEST,
        ]
        .into_iter()
        .filter(|&limit| limit != 0)
        .fold(options.request_size, u32::min);
        Shape {
            size: source.size,
            unit,
            longest: (u64::from(limit) / unit).max(1) * unit,
            alignment: source
                .memory_alignment
                .max(target.memory_alignment)
                .max(4096) as usize,
        }
    }

    /// The last boundary at or before `at`.
    fn down(&self, at: u64) -> u64 {
        match at >= self.size {
            true => self.size,
            false => at - at % self.unit,
        }
    }

    /// The first boundary at or after `at`.
    fn up(&self, at: u64) -> u64 {
        at.next_multiple_of(self.unit).min(self.size)
    }
}

/// A part of the work, never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// Read it from the source and write it to the target. `clear`: the target is known to be zero there.
    Data { range: Range<u64>, clear: bool },
    /// Make it zero in the target.
    Zero(Range<u64>),
    /// Zero in both: nothing to do.
    Skip(Range<u64>),
    /// Read it from both, and compare.
    Compare(Range<u64>),
}

/// Gives one piece after the other, from the start of the disk to its end.
pub(super) struct Plan<'a, S, T> {
    shape: &'a Shape,
    at: u64,
    /// The disks' runs; `None` to compare everything.
    runs: Option<(Runs<'a, S>, Runs<'a, T>)>,
}

impl<'a, S: Engine, T: Engine> Plan<'a, S, T> {
    pub(super) fn copy(source: &'a Device<S>, target: &'a Device<T>, shape: &'a Shape) -> Self {
        let size = shape.size;
        let runs = (Runs::new(source, size), Runs::new(target, size));
        Plan {
            shape,
            at: 0,
            runs: Some(runs),
        }
    }

    pub(super) fn compare(_: &'a Device<S>, _: &'a Device<T>, shape: &'a Shape) -> Self {
        Plan {
            shape,
            at: 0,
            runs: None,
        }
    }

    pub(super) async fn next(&mut self) -> Option<Piece> {
        let (shape, at) = (self.shape, self.at);
        if at >= shape.size {
            return None;
        }
        // Pieces of data end on multiples of `longest`, however the runs fall: large requests stay aligned.
        let request_end = (at / shape.longest + 1)
            .saturating_mul(shape.longest)
            .min(shape.size);
        let Some((source, target)) = &mut self.runs else {
            self.at = request_end;
            return Some(Piece::Compare(at..request_end));
        };
        let (from, to) = (source.run(at).await, target.run(at).await);
        let zero_end = shape.down(from.end);
        let piece = if from.zero && zero_end > at {
            let same_end = shape.down(from.end.min(to.end));
            if to.zero && same_end > at {
                Piece::Skip(at..same_end)
            } else {
                let end = match same_end > at {
                    true => same_end,
                    // The target's run ends inside this unit.
                    false => shape.up(at + 1),
                };
                Piece::Zero(at..end.min(at + ZEROES_AT_ONCE.max(shape.unit)))
            }
        } else {
            let end = match from.zero {
                true => shape.up(at + 1),
                false => shape.up(from.end).min(request_end),
            };
            Piece::Data {
                range: at..end,
                clear: to.zero && to.end >= end,
            }
        };
        let (Piece::Data { range, .. } | Piece::Zero(range) | Piece::Skip(range)) = &piece else {
            return None;
        };
        self.at = range.end;
        Some(piece)
    }
}

/// A stretch of which all is zero, or nothing is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    zero: bool,
    end: u64,
}

/// A disk's runs, asked for many at a time.
struct Runs<'a, E> {
    device: &'a Device<E>,
    size: u64,
    list: std::vec::IntoIter<Extent>,
    current: Run,
}

impl<'a, E: Engine> Runs<'a, E> {
    fn new(device: &'a Device<E>, size: u64) -> Self {
        Runs {
            device,
            size,
            list: Vec::new().into_iter(),
            current: Run {
                zero: false,
                end: 0,
            },
        }
    }

    /// The run that `at` lies in. `at` never goes back, and lies inside the size.
    async fn run(&mut self, at: u64) -> Run {
        while self.current.end <= at {
            match self.list.next() {
                Some(extent) => {
                    self.current = Run {
                        zero: extent.kind != ExtentKind::Data,
                        end: self.current.end.saturating_add(extent.len).min(self.size),
                    }
                }
                None => self.ask(self.current.end.max(at)).await,
            }
        }
        self.current
    }

    /// Fetches the runs from `start` on.
    async fn ask(&mut self, start: u64) {
        let mut out = Extents::new(RUNS_AT_ONCE);
        let answer = self.device.extents(start..self.size, &mut out).await;
        if let Err(error) = &answer {
            tracing::debug!(%error, start, "extents failed; the rest counts as data");
        }
        if answer.is_err() || out.is_empty() {
            out = Extents::new(1);
            out.push(self.size - start, ExtentKind::Data);
        }
        self.current.end = start;
        self.list = out.iter().copied().collect::<Vec<_>>().into_iter();
    }
}
