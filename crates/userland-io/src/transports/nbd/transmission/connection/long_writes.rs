//! Long writes to a device that need not wait: stored piece by piece, without a buffer of their own.
//!
//! Where an engine lends memory to be written to, whole units that the socket has are received there, if they are worth a call. What is
//! less comes by way of the input, and then each receive ends where a unit does, so that the next may begin there. Else
//! all of it comes by way of the input, and is stored while it is warm in the cache. As soon as the device would have to wait, what
//! is left becomes an ordinary write.
//!
//! A long write is no more atomic than that anyway; of what the engine claims to be atomic, a piece has whole units.

use std::future::Future;
use std::io;
use std::task::Context;

use super::super::super::socket::Socket;
use super::super::command::{Done, Failure, Job};
use super::super::pool::footprint;
use super::super::request::Request;
use super::{Connection, Phase, TURN, Wants, give_way};
use crate::{Error, Geometry, WriteFlags};

/// Shorter writes are gathered whole.
pub(super) const LONG: usize = SHORTEST as usize;
/// The shortest piece but for the last, in bytes: shorter ones are not worth a call, unless what follows can be received to the
/// engine's memory then.
const SHORTEST: u64 = 32 << 10;
/// The most that is received to the engine's memory at a time, in bytes: its lock may be held meanwhile.
const LONGEST_LENT: u64 = 256 << 10;

/// How writes are taken apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pieces {
    /// What pieces end at multiples of, in bytes.
    unit: u64,
    /// The most that is received to the engine's memory at a time, in bytes.
    longest_lent: u64,
}

/// A write that is under way.
#[derive(Debug)]
pub(super) struct LongWrite {
    /// What is left to be written.
    pub(super) rest: Request,
    pub(super) flags: WriteFlags,
    pub(super) pieces: Pieces,
    /// The engine may lend memory to be written to.
    pub(super) may_lend: bool,
    /// How a piece has failed: what follows is dropped.
    pub(super) failed: Option<Error>,
}

/// How a write goes on.
#[derive(Debug)]
enum Next {
    /// So many of the bytes at hand are stored, or dropped.
    Take(u64),
    /// The next so many bytes, of which none is at hand, are received to the engine's memory.
    Receive(u64),
    /// More has to come by way of the input.
    Wait,
}

impl Pieces {
    /// As an engine of `geometry` has them; `None` if there can be none.
    pub(super) fn of(geometry: &Geometry) -> Option<Self> {
        let whole = geometry.logical_block_size.max(geometry.atomic_write_unit);
        let unit = u64::from(whole.max(4096));
        let longest_lent = match geometry.max_transfer {
            0 => LONGEST_LENT,
            most => LONGEST_LENT.min(most.into()),
        };
        (unit <= SHORTEST && geometry.memory_alignment <= 1)
            .then_some(Pieces { unit, longest_lent })
    }
}

impl LongWrite {
    /// How many of the next `count` bytes are in whole units. The last unit ends where the write does.
    fn whole_units(&self, count: u64) -> u64 {
        if count >= self.rest.length {
            return self.rest.length;
        }
        let end = self.rest.offset + count;
        (end - end % self.pieces.unit).saturating_sub(self.rest.offset)
    }

    /// How many bytes may come by way of the input, where `here` of the rest are at hand: if none, a unit, behind which the next
    /// receive may be one to the engine's memory; else what makes a piece that is worth a call.
    pub(super) fn most(&self, here: u64) -> u64 {
        let enough = if here == 0 { 1 } else { here.max(SHORTEST) };
        let end = (self.rest.offset + enough).next_multiple_of(self.pieces.unit);
        let count = (end - self.rest.offset).min(self.rest.length);
        count.saturating_sub(here)
    }

    /// Drops what follows.
    fn fail(&mut self, error: Error) {
        self.failed = Some(error);
        self.may_lend = false;
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
    /// Stores what has come of `write`, and says what has to come before it goes on, if anything. Sets `moved` if bytes came.
    pub(super) fn write_pieces(
        &mut self,
        cx: &mut Context<'_>,
        mut write: LongWrite,
        moved: &mut bool,
    ) -> Option<Wants> {
        while write.rest.length > 0 {
            match self.next(&write) {
                Next::Wait => {
                    self.phase = Phase::LongWrite(write);
                    return Some(Wants::Input);
                }
                Next::Receive(len) => {
                    if self.moved_lent >= TURN {
                        give_way(cx);
                    } else {
                        self.receive_lent(&mut write, len);
                        *moved = true;
                    }
                    // Replies that wait do not wait for all of this write.
                    self.phase = Phase::LongWrite(write);
                    return Some(Wants::Nothing);
                }
                Next::Take(len) => {
                    // No longer than what is at hand.
                    let bytes = &self.input.bytes()[..len as usize];
                    if write.failed.is_none() {
                        let written = self.device.write(bytes, write.rest.offset, write.flags);
                        let asking = self.writes.of(bytes.len(), write.flags);
                        asking.learn(written.is_some());
                        match written {
                            Some(Ok(())) => {}
                            Some(Err(error)) => write.fail(error),
                            None => return self.wait_for_rest(cx, write),
                        }
                    }
                    self.input.consume(len as usize);
                    write.advance(len);
                }
            }
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

    fn next(&self, write: &LongWrite) -> Next {
        let here = self.input.bytes().len() as u64;
        let left = write.rest.length;
        if write.failed.is_some() {
            return match here.min(left) {
                0 => Next::Wait,
                len => Next::Take(len),
            };
        }
        let whole = write.whole_units(here);
        if whole >= SHORTEST.min(left) {
            return Next::Take(whole);
        }
        // Only behind a whole unit can the next begin.
        if !write.may_lend || whole < here {
            return Next::Wait;
        }
        let more = self.stream.at_hand().unwrap_or(0);
        let more = more.min(write.pieces.longest_lent);
        let lent = write.whole_units(here + more) - whole;
        match (lent >= SHORTEST.min(left - here), here) {
            (false, _) => Next::Wait,
            (true, 0) => Next::Receive(lent),
            (true, _) => Next::Take(whole),
        }
    }

    /// Receives the next `len` bytes of `write`, which the socket has, to where the engine keeps them.
    fn receive_lent(&mut self, write: &mut LongWrite, len: u64) {
        let (stream, mut came, mut is_there) = (&self.stream, 0, true);
        let offset = write.rest.offset;
        let written = self
            .device
            .lend_mut(offset..offset + len, write.flags, &mut |memory| {
                let mut at = 0;
                // A receive may end early.
                while is_there && at < memory.len() {
                    let more = stream.receive_now(&mut memory[at..]).unwrap_or(0);
                    is_there = more > 0;
                    at += more;
                }
                came += at as u64;
            });
        let asking = self.lent_writes.of(len as usize, write.flags);
        asking.learn(written.is_some());
        write.advance(came);
        self.moved_bytes += came as usize;
        self.moved_lent += came as usize;
        self.was_direct |= came > 0;
        match written {
            // A client can bring that about, with urgent bytes. The rest of a block would be another write, after others' to it.
            _ if !is_there => {
                let error = format!(
                    "the socket announced {len} bytes, to be written at {offset}, and had {came}"
                );
                self.lose(io::Error::new(io::ErrorKind::InvalidData, error));
            }
            Some(Ok(())) => {}
            Some(Err(error)) => write.fail(error),
            None => write.may_lend = false,
        }
    }

    /// Makes the rest of `write` an ordinary write.
    fn wait_for_rest(&mut self, cx: &mut Context<'_>, mut write: LongWrite) -> Option<Wants> {
        // What it stands in line for is not to be kept for as long as the client sends.
        write.may_lend = false;
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

#[cfg(test)]
mod tests {
    use super::super::super::request::{Command, Tag};
    use super::*;

    fn write(unit: u64, offset: u64, length: u64) -> LongWrite {
        let flags = WriteFlags::empty();
        LongWrite {
            rest: Request {
                tag: Tag { cookie: 0, offset },
                command: Command::Write(flags),
                offset,
                length,
            },
            flags,
            pieces: Pieces {
                unit,
                longest_lent: LONGEST_LENT,
            },
            may_lend: true,
            failed: None,
        }
    }

    #[test]
    fn what_comes_by_way_of_the_input_ends_where_a_unit_does() {
        for (unit, offset) in [(4096, 0), (4096, 512), (16384, 40_000), (32768, 32767)] {
            let length = 200_000;
            let write = write(unit, offset, length);
            for here in (0..2 * length).step_by(509) {
                let most = write.most(here);
                // Requests behind it may be at hand, too.
                assert_eq!(most == 0, here >= length, "{unit}, {offset}: {here}");
                let end = offset + here + most;
                let is_end = end.is_multiple_of(unit) || end == offset + length;
                assert!(
                    is_end || here >= length,
                    "{unit}, {offset}: {here} + {most}"
                );
                assert!(most <= SHORTEST + unit);
                let whole = write.whole_units(here);
                assert!(whole <= here.min(length));
                let end = offset + whole;
                let is_end = end.is_multiple_of(unit) || whole == length;
                assert!(is_end || whole == 0, "{unit}, {offset}: {here}, {whole}");
            }
        }
    }
}
