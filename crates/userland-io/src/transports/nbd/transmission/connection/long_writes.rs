//! Long writes to a device that need not wait: stored piece by piece from where they were received, while they are warm in the cache,
//! and without a buffer of their own. As soon as the device would have to wait, what is left becomes an ordinary write.
//!
//! A long write is no more atomic than that anyway; of what the engine claims to be atomic, a piece has whole units.

use std::future::Future;
use std::task::Context;

use super::super::super::socket::Socket;
use super::super::command::{Done, Failure, Job};
use super::super::pool::footprint;
use super::super::request::Request;
use super::{Connection, Phase, Wants};
use crate::{Error, Geometry, WriteFlags};

/// Shorter writes are gathered whole.
pub(super) const LONG: usize = 64 << 10;
/// The shortest piece but for the last, in bytes: shorter ones are not worth a call.
const SHORTEST: u64 = 32 << 10;

/// A write that is under way.
#[derive(Debug)]
pub(super) struct LongWrite {
    /// What is left to be written.
    pub(super) rest: Request,
    pub(super) flags: WriteFlags,
    /// What pieces end at multiples of, in bytes.
    pub(super) unit: u64,
    /// How a piece has failed: what follows is dropped.
    pub(super) failed: Option<Error>,
}

/// What pieces end at multiples of, in bytes; `None` if there can be none.
pub(super) fn unit(geometry: &Geometry) -> Option<u64> {
    let whole = geometry.logical_block_size.max(geometry.atomic_write_unit);
    let unit = 4096_u64.next_multiple_of(u64::from(whole.max(1)));
    (unit <= SHORTEST && geometry.memory_alignment <= 1).then_some(unit)
}

/// The length of the next piece where `here` bytes of the rest are at hand; 0 if more have to come first.
fn piece(rest: &Request, here: u64, unit: u64) -> u64 {
    if here >= rest.length {
        return rest.length;
    }
    let end = rest.offset + here;
    let piece = (end - end % unit).saturating_sub(rest.offset);
    if piece < SHORTEST { 0 } else { piece }
}

impl<S, F, G> Connection<'_, S, F, G>
where
    S: Socket,
    F: Future<Output = Done>,
    G: FnMut(Job) -> F,
{
    /// Stores what has come of `write`, and says what has to come before it goes on, if anything.
    pub(super) fn write_pieces(
        &mut self,
        cx: &mut Context<'_>,
        mut write: LongWrite,
    ) -> Option<Wants> {
        let LongWrite {
            rest,
            flags,
            unit,
            failed,
        } = &mut write;
        while rest.length > 0 {
            let here = self.input.bytes();
            let len = match failed {
                None => piece(rest, here.len() as u64, *unit),
                Some(_) => rest.length.min(here.len() as u64),
            };
            // No longer than what is at hand.
            let bytes = &here[..len as usize];
            if bytes.is_empty() {
                self.phase = Phase::LongWrite(write);
                return Some(Wants::Input);
            }
            if failed.is_none() {
                let written = self.device.write(bytes, rest.offset, *flags);
                self.long_writes_now.learn(written.is_some());
                match written {
                    Some(Ok(())) => {}
                    Some(Err(error)) => *failed = Some(error),
                    None => return self.wait_for_rest(cx, write),
                }
            }
            self.input.consume(len as usize);
            rest.offset += len;
            rest.length -= len;
        }
        match write.failed {
            None => self.replies.success(&mut self.output, write.rest.tag),
            Some(error) => {
                let failure = Failure::Device(error);
                self.replies
                    .failure(&mut self.output, &write.rest, &failure);
            }
        }
        None
    }

    /// Makes the rest of `write` an ordinary write.
    fn wait_for_rest(&mut self, cx: &mut Context<'_>, write: LongWrite) -> Option<Wants> {
        // No longer than the longest request, which is 32 bits.
        let length = write.rest.length as usize;
        if self.take(cx, footprint(length)).is_pending() {
            self.phase = Phase::LongWrite(write);
            return Some(Wants::Nothing);
        }
        self.phase = Phase::Payload {
            request: write.rest,
            buffer: self.pool.take(length),
            filled: 0,
            charge: 0,
        };
        None
    }
}
