//! Long writes to a device that need not wait: stored piece by piece, without a buffer of their own.
//!
//! Where an engine lends memory to be written to, whole units that the socket has are received there, if that is worth a call; what is less
//! comes by way of the input, and each receive ends where a unit does. Else all of it comes by way of the input, and is stored while
//! it is warm in the cache. As soon as the device would have to wait, what is left becomes an ordinary write.
//!
//! A long write is no more atomic than that anyway; of what the engine claims to be atomic, a piece has whole units.

use std::future::Future;
use std::io;
use std::task::Context;

use super::super::super::socket::Socket;
use super::super::command::{Done, Failure, Job};
use super::super::nowait::Asking;
use super::super::pool::footprint;
use super::super::request::Request;
use super::{Connection, Phase, TURN, Wants, give_way};
use crate::{Error, Geometry, Result, WriteFlags};

/// Shorter writes are gathered whole.
pub(super) const LONG: usize = 32 << 10;
/// The shortest piece but for the last, in bytes: shorter ones are not worth a call, unless what follows can be received to the
/// engine's memory then.
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

/// Takes the answer. That a write has to be durable says nothing of others.
pub(super) fn learn(asking: &mut Asking, written: &Option<Result>, flags: WriteFlags) {
    if written.is_some() || !flags.contains(WriteFlags::FUA) {
        asking.learn(written.is_some());
    }
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

    /// How many bytes may come by way of the input, beyond the `here` that are at hand: to the end of the first unit, or of the piece.
    pub(super) fn most(&self, here: u64) -> u64 {
        let first = self.rest.offset + if here == 0 { 1 } else { here.max(SHORTEST) };
        let end = first.next_multiple_of(self.unit);
        (end - self.rest.offset).min(self.rest.length) - here
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
    /// Stores what has come of `write`, and says what has to come before it goes on, if anything. `moved` is set if there is more to do.
    pub(super) fn write_pieces(
        &mut self,
        cx: &mut Context<'_>,
        mut write: LongWrite,
        moved: &mut bool,
    ) -> Option<Wants> {
        while write.rest.length > 0 {
            let here = self.input.bytes();
            let whole = write.piece(here.len() as u64);
            let lendable = self.lendable(&mut write);
            let len = match &write.failed {
                Some(_) => write.rest.length.min(here.len() as u64),
                None if lendable > 0 || whole >= SHORTEST.min(write.rest.length) => whole,
                None => 0,
            };
            // No longer than what is at hand.
            let bytes = &here[..len as usize];
            if bytes.is_empty() {
                if lendable == 0 {
                    self.phase = Phase::LongWrite(write);
                    return Some(Wants::Input);
                }
                if self.moved_lent >= TURN {
                    give_way(cx);
                } else {
                    self.receive_lent(&mut write, lendable);
                    *moved = true;
                }
                if write.rest.length > 0 {
                    // Replies that wait do not wait for all of this write.
                    self.phase = Phase::LongWrite(write);
                    return Some(Wants::Nothing);
                }
                continue;
            }
            if write.failed.is_none() {
                let written = self.device.write(bytes, write.rest.offset, write.flags);
                learn(&mut self.long_writes_now, &written, write.flags);
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

    /// How many bytes behind those at hand can be received to the engine's memory: whole units, if they are worth a call.
    fn lendable(&self, write: &mut LongWrite) -> u64 {
        let here = self.input.bytes().len() as u64;
        let left = write.rest.length.saturating_sub(here);
        let is_next = left > 0 && (here == 0 || write.piece(here) == here);
        if !write.is_lent || !is_next {
            return 0;
        }
        let Some(more) = self.stream.at_hand() else {
            write.is_lent = false;
            return 0;
        };
        let end = write.piece(here + more.min(LONGEST_LENT));
        match end.saturating_sub(here) {
            len if len >= SHORTEST.min(left) => len,
            _ => 0,
        }
    }

    /// Receives the next `len` bytes of `write`, which the socket has, to where the engine keeps them.
    fn receive_lent(&mut self, write: &mut LongWrite, len: u64) {
        let (stream, mut came, mut is_all) = (&self.stream, 0, true);
        let range = write.rest.offset..write.rest.offset + len;
        let written = self.device.lend_mut(range, write.flags, &mut |memory| {
            let mut at = 0;
            // A receive may end early.
            while is_all && at < memory.len() {
                let more = stream.receive_now(&mut memory[at..]).unwrap_or(0);
                is_all = more > 0;
                at += more;
            }
            came += at as u64;
        });
        learn(&mut self.long_writes_lent, &written, write.flags);
        write.advance(came);
        self.moved_bytes += came as usize;
        self.moved_lent += came as usize;
        self.was_direct |= came > 0;
        match written {
            // A client can bring that about, with urgent bytes. Others may have written meanwhile to where it stopped.
            _ if !is_all => {
                let error = "the socket had less than it said";
                self.lose(io::Error::new(io::ErrorKind::InvalidData, error));
            }
            Some(Ok(())) => {}
            Some(Err(error)) => write.fail(error),
            None => write.is_lent = false,
        }
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
