//! How requests begin: taken from what has arrived, checked, and done at once, piece by piece or as a future.

use std::future::Future;
use std::io;
use std::task::{Context, Poll};

use super::super::super::session::ReplyMode;
use super::super::super::socket::Socket;
use super::super::super::wire::{self, cmd};
use super::super::command::{Done, Job};
use super::super::pool::footprint;
use super::super::request::{self, Command, Request};
use super::super::status;
use super::leaving::{Farewell, State};
use super::long_writes::{LONG, LongWrite};
use super::{Connection, Phase, Wants};

/// The rest of a payload, if at least this long, is received straight into its buffer; a shorter
/// one comes along with the requests behind it.
const DIRECT: usize = 32 << 10;
/// A read longer than the longest request is answered in pieces of this many bytes.
const PIECE: u64 = 4 << 20;

impl<S, F, G> Connection<'_, S, F, G>
where
    S: Socket,
    F: Future<Output = Done>,
    G: FnMut(Job) -> F,
{
    /// Starts the next piece of a long read, if it is its turn.
    pub(super) fn start_long_read(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.is_long_reads_turn || !self.has_room() {
            return false;
        }
        let Some(whole) = self.long_reads.front().copied() else {
            return false;
        };
        let length = whole.length.min(PIECE);
        if self.take(cx, footprint(length as usize)).is_pending() {
            return false;
        }
        self.long_reads.pop_front();
        self.is_long_reads_turn = false;
        let buffer = Some(self.pool.take(length as usize));
        let ask = self.ask(whole.offset, length);
        self.start(Job {
            request: Request { length, ..whole },
            buffer,
            received: None,
            ask,
            charge: 0,
            rest: whole.length - length,
        });
        true
    }

    /// Starts what has arrived whole, and says what has to come before there is more. Nothing is wanted while something else must
    /// happen first: an operation in flight ends, a reply is sent, memory is free (each of which wakes this task), or
    /// a long read has its turn, which it must then be given here.
    pub(super) fn start_requests(&mut self, cx: &mut Context<'_>, moved: &mut bool) -> Wants {
        let before = (self.is_long_reads_turn, self.long_reads.len());
        let wants = loop {
            if self.state != State::Serving {
                break Wants::Nothing;
            }
            match &mut self.phase {
                Phase::Refused { left, tag, refusal } => {
                    let here = self.input.bytes().len();
                    self.input.consume(usize::try_from(*left).unwrap_or(here));
                    *left = left.saturating_sub(here as u64);
                    if *left > 0 {
                        break Wants::Input;
                    }
                    self.replies
                        .error(&mut self.output, *tag, refusal.error, refusal.at, refusal);
                    self.phase = Phase::Header;
                }
                Phase::Payload { buffer, filled, .. } => {
                    *filled += self.input.take(&mut buffer[*filled..]);
                    match buffer.len() - *filled {
                        0 => self.start_with_payload(),
                        DIRECT.. => break Wants::Payload,
                        _ => break Wants::Input,
                    }
                }
                Phase::LongWrite(_) => {
                    let phase = std::mem::replace(&mut self.phase, Phase::Header);
                    if let Phase::LongWrite(write) = phase
                        && let Some(wants) = self.write_pieces(cx, write, moved)
                    {
                        break wants;
                    }
                }
                Phase::Header => {
                    let in_flight = self.slots.in_flight() + self.long_reads.len();
                    if in_flight >= self.limits.max_in_flight.max(1) {
                        // No request comes to give it to them.
                        self.is_long_reads_turn = true;
                        break Wants::Nothing;
                    }
                    if !self.has_room() {
                        break Wants::Nothing;
                    }
                    let header = match self.header() {
                        None => break Wants::Input,
                        Some(Ok(header)) => header,
                        Some(Err(error)) => {
                            self.lose(io::Error::new(io::ErrorKind::InvalidData, error));
                            continue;
                        }
                    };
                    if self.begin(cx, header).is_pending() {
                        break Wants::Nothing;
                    }
                    self.begun += 1;
                    self.is_long_reads_turn = true;
                }
            }
        };
        if wants != Wants::Nothing || self.state != State::Serving {
            self.is_long_reads_turn = true;
        }
        // Nobody would look after what the line brings to who takes no replies and so gets no further, or to who has had done
        // without memory what it stood in line for.
        let waits = wants == Wants::Nothing || !self.long_reads.is_empty();
        if !waits || !self.has_room() {
            self.account.stop_waiting();
        }
        // A turn that came after the long reads were asked in this round.
        let after = (self.is_long_reads_turn, self.long_reads.len());
        *moved |= after != before && after.1 > 0;
        wants
    }

    /// The next header, if it is there.
    fn header(&self) -> Option<Result<wire::Request, wire::BadMagic>> {
        let bytes = self.input.bytes();
        match self.session.replies {
            ReplyMode::Extended => bytes.first_chunk().map(wire::Request::decode_extended),
            _ => bytes.first_chunk().map(wire::Request::decode_compact),
        }
    }

    pub(super) fn header_length(&self) -> usize {
        match self.session.replies {
            ReplyMode::Extended => wire::Request::EXTENDED_LEN,
            _ => wire::Request::COMPACT_LEN,
        }
    }

    /// Takes the request of `header`, which is at hand. Pending if there is no memory for it now.
    ///
    /// A write goes the first of these ways that is open to it: at once, from where it was received (`write_now`); piece by piece
    /// while it comes, from there or received to memory that the engine lends (`LongWrite`); as a future, from where it was received
    /// (`Input::share`); as a future, gathered in a buffer of its own (`Phase::Payload`). Pieces go on the last way
    /// once the device would have to wait.
    fn begin(&mut self, cx: &mut Context<'_>, header: wire::Request) -> Poll<()> {
        let header_length = self.header_length();
        if header.command == cmd::DISC {
            self.input.consume(header_length);
            self.leave(Farewell::None);
            return Poll::Ready(());
        }
        let payload = request::payload_length(&header, self.session.replies);
        let maximum = self.limits.max_request;
        let request = match request::check(&header, self.session, maximum) {
            Ok(request) => request,
            Err(refusal) => {
                self.input.consume(header_length);
                let tag = (&header).into();
                if payload > 0 && payload <= self.limits.max_payload_drain {
                    let left = payload;
                    self.phase = Phase::Refused { left, tag, refusal };
                    return Poll::Ready(());
                }
                self.replies
                    .error(&mut self.output, tag, refusal.error, refusal.at, &refusal);
                if payload > 0 {
                    let error = format!("a refused payload of {payload} bytes");
                    self.result = Err(io::Error::new(io::ErrorKind::InvalidData, error));
                    self.leave(Farewell::Patient);
                }
                return Poll::Ready(());
            }
        };
        // From here on the lengths of payloads are at most `maximum`, which is 32 bits.
        let length = match request.command {
            Command::Read { .. } if request.length > u64::from(maximum) => {
                self.input.consume(header_length);
                self.long_reads.push_back(request);
                return Poll::Ready(());
            }
            Command::Read { .. } => request.length as usize,
            _ => payload as usize,
        };
        let is_done = match request.command {
            Command::Read { .. } => self.read_now(cx, &request),
            Command::Write(flags) => {
                self.write_now(&request, flags, header_length..header_length + length)
            }
            _ => false,
        };
        if is_done {
            self.input.consume(header_length + payload as usize);
            return Poll::Ready(());
        }
        if length > LONG
            && let Some(pieces) = self.pieces
            && let Command::Write(flags) = request.command
            && self.writes.of(length, flags).ask()
        {
            self.input.consume(header_length);
            self.phase = Phase::LongWrite(LongWrite {
                rest: request,
                flags,
                pieces,
                may_lend: self.lent_writes.of(length, flags).ask()
                    && self.stream.at_hand().is_some(),
                failed: None,
            });
            return Poll::Ready(());
        }
        let charge = match request.command {
            Command::Status { .. } => {
                self.session.contexts.len()
                    * status::MOST_EXTENTS
                    * wire::payload::STATUS_EXT_EXTENT
            }
            _ => 0,
        };
        let bytes = if length > 0 { footprint(length) } else { 0 };
        if self.take(cx, bytes + charge).is_pending() {
            return Poll::Pending;
        }
        self.input.consume(header_length);
        if self.writes_in_place
            && length > 0
            && let Command::Write(_) = request.command
            && let Some(received) = self.input.share(length)
        {
            self.start(Job {
                request,
                buffer: None,
                received: Some(received),
                ask: false,
                charge: bytes,
                rest: 0,
            });
            return Poll::Ready(());
        }
        let buffer = (length > 0).then(|| self.pool.take(length));
        match buffer {
            Some(buffer) if payload > 0 => {
                self.phase = Phase::Payload {
                    request,
                    buffer,
                    filled: 0,
                    charge,
                };
            }
            buffer => {
                let ask = matches!(request.command, Command::Read { split: true })
                    && self.ask(request.offset, request.length);
                self.start(Job {
                    request,
                    buffer,
                    received: None,
                    ask,
                    charge,
                    rest: 0,
                });
            }
        }
        Poll::Ready(())
    }

    fn start_with_payload(&mut self) {
        if let Phase::Payload {
            request,
            buffer,
            charge,
            ..
        } = std::mem::replace(&mut self.phase, Phase::Header)
        {
            self.start(Job {
                request,
                buffer: Some(buffer),
                received: None,
                ask: false,
                charge,
                rest: 0,
            });
        }
    }

    fn start(&mut self, job: Job) {
        let future = (self.make)(job);
        if let Poll::Ready(done) = self.slots.start(future) {
            self.finish(done);
        }
    }

    pub(super) fn ask(&mut self, offset: u64, length: u64) -> bool {
        let holes = self.holes.as_mut();
        holes.is_some_and(|holes| holes.ask(offset, length))
    }
}
