//! Long writes to a device that need not wait: stored piece by piece, without a buffer of their own.
//!
//! Where an engine lends memory to be written to, whole blocks that the socket has are received there; what is less comes by way of the
//! input, and each receive ends where a block does. Else all of it comes by way of the input, and is stored while it is warm in the
//! cache. As soon as the device would have to wait, what is left becomes an ordinary write.
//!
//! A long write is no more atomic than that anyway; of what the engine claims to be atomic, a piece has whole units.

use std::future::Future;
use std::task::Context;

use super::super::super::socket::Socket;
use super::super::command::{Done, Failure, Job};
use super::super::pool::footprint;
use super::super::request::Request;
use super::{Connection, Phase, TURN, Wants, give_way};
use crate::{Error, Geometry, WriteFlags};

/// Shorter writes are gathered whole.
pub(super) const LONG: usize = 64 << 10;
/// The shortest piece but for the last, in bytes: shorter ones are not worth a call.
const SHORTEST: u64 = 32 << 10;

/// The most that is received to the engine's memory at a time, in bytes: its lock may be held meanwhile.
const LONGEST_LENT: u64 = 256 << 10;

/// A write that is under way.
#[derive(Debug)]
pub(super) struct LongWrite {
    /// What is left to be written.
    pub(super) rest: Request,
    pub(super) flags: WriteFlags,
    /// What pieces end at multiples of, in bytes.
    pub(super) unit: u64,
    /// The engine may lend memory to be written to.
    pub(super) is_lent: bool,
    /// How a piece has failed: what follows is dropped.
    pub(super) failed: Option<Error>,
}

/// What pieces end at multiples of, in bytes; `None` if there can be none.
pub(super) fn unit(geometry: &Geometry) -> Option<u64> {
    let whole = geometry.logical_block_size.max(geometry.atomic_write_unit);
    let unit = 4096_u64.next_multiple_of(u64::from(whole.max(1)));
    (unit <= SHORTEST && geometry.memory_alignment <= 1).then_some(unit)
}

impl LongWrite {
    /// The length of the next piece where `here` bytes of the rest are at hand; 0 if more have to come first.
    fn piece(&self, here: u64) -> u64 {
        if here >= self.rest.length {
            return self.rest.length;
        }
        let end = self.rest.offset + here;
        (end - end % self.unit).saturating_sub(self.rest.offset)
    }

    /// How many bytes there are from what is at hand to where the next piece may end.
    pub(super) fn to_end_of_unit(&self, here: u64) -> u64 {
        let end = self.rest.offset + here;
        let left = self.rest.length.saturating_sub(here);
        left.min(self.unit - end % self.unit)
    }

    /// Drops what follows.
    fn fail(&mut self, error: Error) {
        self.failed = Some(error);
        self.is_lent = false;
    }

    fn advance(&mut self, len: u64) {
        self.rest.offset += len;
        self.rest.length -= len;
    }
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
        while write.rest.length > 0 {
            if write.is_lent && self.input.bytes().is_empty() {
                if self.moved_lent >= TURN {
                    give_way(cx);
                    self.phase = Phase::LongWrite(write);
                    return Some(Wants::Nothing);
                }
                if self.receive_lent(&mut write) {
                    continue;
                }
            }
            let here = self.input.bytes();
            let len = match (&write.failed, write.piece(here.len() as u64)) {
                (Some(_), _) => write.rest.length.min(here.len() as u64),
                (None, piece) if write.is_lent || piece >= SHORTEST.min(write.rest.length) => piece,
                (None, _) => 0,
            };
            // No longer than what is at hand.
            let bytes = &here[..len as usize];
            if bytes.is_empty() {
                self.phase = Phase::LongWrite(write);
                return Some(Wants::Input);
            }
            if write.failed.is_none() {
                let written = self.device.write(bytes, write.rest.offset, write.flags);
                self.long_writes_now.learn(written.is_some());
                match written {
                    Some(Ok(())) => {}
                    Some(Err(error)) => write.fail(error),
                    None => return self.wait_for_rest(cx, write),
                }
            }
            self.input.consume(len as usize);
            write.advance(len);
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

    /// Receives what the socket has of `write`, in whole units, to where the engine keeps it. False if that is nothing.
    fn receive_lent(&mut self, write: &mut LongWrite) -> bool {
        let stream = &self.stream;
        let Some(here) = stream.at_hand() else {
            self.long_writes_lent.learn(false);
            write.is_lent = false;
            return false;
        };
        let len = write.piece(here).min(LONGEST_LENT);
        if len == 0 {
            return false;
        }
        let range = write.rest.offset..write.rest.offset + len;
        let (mut came, mut is_all) = (0, true);
        let written = self.device.lend_mut(range, write.flags, &mut |memory| {
            let mut at = 0;
            // A receive may end early; and a client can see to it that less is there than the system says.
            while is_all && at < memory.len() {
                let more = stream.receive_now(&mut memory[at..]).unwrap_or(0);
                is_all = more > 0;
                at += more;
            }
            came += at;
        });
        self.long_writes_lent.learn(written.is_some());
        write.advance(came as u64);
        self.moved_bytes += came;
        self.moved_lent += came;
        self.was_direct |= came > 0;
        match written {
            Some(Ok(())) => {}
            Some(Err(error)) => write.fail(error),
            None => write.is_lent = false,
        }
        came > 0
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
