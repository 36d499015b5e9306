//! Doing the pieces: a fixed number in flight, each in a slot with its buffer.

use std::future::{Future, poll_fn};
use std::ops::Range;
use std::pin::pin;
use std::task::Poll;

use super::plan::{Piece, Plan, Shape};
use super::{Copied, CopyError, CopyOptions};
use crate::give_way::give_way;
use crate::{AlignedBuf, Device, Engine, ReadBuf, Result, Slots, WriteBuf, WriteFlags};

/// Zeroes inside data are looked for in steps of this: finer would cost requests, not only comparisons.
const GRAIN: usize = 64 << 10;
/// Requests that ended at once may go on for this long, then others get their turn.
const INLINE_AT_ONCE: u32 = 16;

/// The two disks of a copy.
pub(super) struct Pair<'a, S, T> {
    pub(super) source: &'a Device<S>,
    pub(super) target: &'a Device<T>,
    pub(super) options: &'a CopyOptions,
    pub(super) shape: &'a Shape,
}

/// What one request needs beside its piece; kept from one to the next.
#[derive(Default)]
struct Memory {
    source: Option<AlignedBuf>,
    target: Option<AlignedBuf>,
}

impl<S: Engine, T: Engine> Pair<'_, S, T> {
    /// Does all of `plan`, and tells `progress` how many bytes are done with.
    pub(super) async fn run(
        &self,
        mut plan: Plan<'_, S, T>,
        progress: impl FnMut(u64) + Send,
    ) -> Result<Copied, CopyError> {
        let depth = self.options.in_flight.clamp(1, CopyOptions::MAX_IN_FLIGHT);
        let mut slots = Slots::new(depth);
        let mut tally = Tally {
            copied: Copied::default(),
            done: 0,
            failed: None,
            spare: Vec::new(),
            progress,
        };
        let mut inline = 0;
        while tally.failed.is_none() {
            // What is in flight is polled while the plan asks for extents: it may hold what that waits for.
            let mut next = pin!(plan.next());
            let piece = poll_fn(|cx| {
                while let Poll::Ready(Some(ended)) = slots.poll(cx) {
                    tally.add(ended);
                }
                next.as_mut().poll(cx)
            })
            .await;
            let Some(piece) = piece else { break };
            if slots.is_full()
                && let Some(ended) = poll_fn(|cx| slots.poll(cx)).await
            {
                tally.add(ended);
            }
            if tally.failed.is_some() {
                break;
            }
            let memory = tally.spare.pop().unwrap_or_default();
            if let Poll::Ready(ended) = slots.start(self.perform(piece, memory)) {
                tally.add(ended);
                inline += 1;
                if inline % INLINE_AT_ONCE == 0 {
                    give_way().await;
                }
            }
        }
        while let Some(ended) = poll_fn(|cx| slots.poll(cx)).await {
            tally.add(ended);
        }
        match tally.failed {
            Some(error) => Err(error),
            None => Ok(tally.copied),
        }
    }

    async fn perform(&self, piece: Piece, mut memory: Memory) -> Ended {
        let result = match piece {
            Piece::Skip(range) => Ok(Copied {
                skipped: range.end - range.start,
                ..Copied::default()
            }),
            Piece::Zero(range) => self.zero(range).await,
            Piece::Data { range, clear } => self.transfer(range, clear, &mut memory).await,
            Piece::Compare(range) => self.compare(range, &mut memory).await,
        };
        Ended { memory, result }
    }

    async fn zero(&self, range: Range<u64>) -> Result<Copied, CopyError> {
        let (offset, len) = (range.start, range.end - range.start);
        self.target
            .write_zeroes(range, WriteFlags::empty())
            .await
            .map_err(|error| CopyError::Write { offset, len, error })?;
        Ok(Copied {
            zeroed: len,
            ..Copied::default()
        })
    }

    /// Reads a piece and writes it. Long stretches of zeroes in it become zeroes of the target.
    async fn transfer(
        &self,
        range: Range<u64>,
        clear: bool,
        memory: &mut Memory,
    ) -> Result<Copied, CopyError> {
        let bytes = self.read(range.clone(), &mut memory.source).await?;
        let grain = GRAIN.max(self.shape.unit as usize);
        let mut copied = Copied::default();
        let mut at = 0;
        while at < bytes.len() {
            let (len, zero) = stretch(&bytes[at..], grain);
            let (offset, end) = (range.start + at as u64, at + len);
            if !zero {
                self.target
                    .write(&WriteBuf::new(&bytes[at..end]), offset, WriteFlags::empty())
                    .await
                    .map_err(|error| CopyError::Write {
                        offset,
                        len: len as u64,
                        error,
                    })?;
                copied.data += len as u64;
            } else if clear {
                copied.skipped += len as u64;
            } else {
                copied.zeroed += self.zero(offset..range.start + end as u64).await?.zeroed;
            }
            at = end;
        }
        Ok(copied)
    }

    async fn compare(&self, range: Range<u64>, memory: &mut Memory) -> Result<Copied, CopyError> {
        let (offset, len) = (range.start, range.end - range.start);
        let expected = self.read(range, &mut memory.source).await?;
        let found = buffer(&mut memory.target, self.shape, expected.len());
        self.target
            .read(&mut ReadBuf::new(found), offset)
            .await
            .map_err(|error| CopyError::Reread { offset, len, error })?;
        if expected == found {
            return Ok(Copied {
                data: len,
                ..Copied::default()
            });
        }
        let same = expected.iter().zip(&*found).take_while(|(a, b)| a == b);
        let at = same.count();
        Err(CopyError::Differs {
            offset: offset + at as u64,
            expected: expected[at],
            target: found[at],
        })
    }

    async fn read<'m>(
        &self,
        range: Range<u64>,
        memory: &'m mut Option<AlignedBuf>,
    ) -> Result<&'m mut [u8], CopyError> {
        let (offset, len) = (range.start, range.end - range.start);
        // A piece of data is at most `CopyOptions::MAX_REQUEST` long, or one block.
        let bytes = buffer(memory, self.shape, len as usize);
        self.source
            .read(&mut ReadBuf::new(bytes), offset)
            .await
            .map_err(|error| CopyError::Read { offset, len, error })?;
        Ok(bytes)
    }
}

/// How a piece went, and its memory for the next.
struct Ended {
    memory: Memory,
    result: Result<Copied, CopyError>,
}

struct Tally<P> {
    copied: Copied,
    done: u64,
    failed: Option<CopyError>,
    spare: Vec<Memory>,
    progress: P,
}

impl<P: FnMut(u64)> Tally<P> {
    fn add(&mut self, ended: Ended) {
        self.spare.push(ended.memory);
        match ended.result {
            Ok(part) => {
                self.copied.data += part.data;
                self.copied.zeroed += part.zeroed;
                self.copied.skipped += part.skipped;
                self.done += part.data + part.zeroed + part.skipped;
                (self.progress)(self.done);
            }
            Err(error) => {
                self.failed.get_or_insert(error);
            }
        }
    }
}

/// The first `len` bytes of a buffer that is made when it is first needed.
fn buffer<'m>(memory: &'m mut Option<AlignedBuf>, shape: &Shape, len: usize) -> &'m mut [u8] {
    let whole =
        memory.get_or_insert_with(|| AlignedBuf::zeroed(shape.longest as usize, shape.alignment));
    &mut whole[..len]
}

/// How many bytes from the start are all zero, or have no long stretch of zeroes.
fn stretch(bytes: &[u8], grain: usize) -> (usize, bool) {
    let mut grains = bytes
        .chunks(grain)
        .map(|grain| (grain.len(), is_zero(grain)));
    let Some((mut len, zero)) = grains.next() else {
        return (0, false);
    };
    len += grains
        .take_while(|&(_, other)| other == zero)
        .map(|(len, _)| len)
        .sum::<usize>();
    (len, zero)
}

/// Compares the bytes with themselves, one further: the first decides, and the rest goes by memcmp.
fn is_zero(bytes: &[u8]) -> bool {
    match bytes {
        [] => true,
        [first, rest @ ..] => *first == 0 && *rest == bytes[..rest.len()],
    }
}
