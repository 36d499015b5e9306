//! The loop of one connection: what its task does each time it is woken.
//!
//! Round by round: take what has finished, start what has arrived, send what there
//! is to send, receive if something more is wanted; and sleep when a round moves nothing.

mod at_once;
mod leaving;
mod long_writes;
mod receiving;
mod starting;

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::time::{Instant, Sleep};

use super::super::limits::{Environment, Limits};
use super::super::session::{ReplyMode, Session};
use super::super::socket::Socket;
use super::budget::Account;
use super::command::{Done, Job, Outcome};
use super::holes::Holes;
use super::input::Input;
use super::kits::{Kit, Kits};
use super::linger::Linger;
use super::nowait::{Asking, AskingToWrite, Nowait};
use super::output::Output;
use super::pool::{Buffer, Pool, footprint};
use super::reply::Replies;
use super::request::{Refusal, Request, Tag};
use crate::{Features, Geometry, Slots};
use leaving::{Farewell, State};
use long_writes::{LongWrite, Pieces};
use receiving::give_way;

/// No request is started while so many bytes wait to be sent, in the case that every request
/// finishes at once: more would only leave the cache before they are sent.
const GATHERED: usize = 256 << 10;
/// The same while requests are in flight, which must not run dry behind a long reply.
const GATHERED_IN_FLIGHT: usize = 4 << 20;
/// After so many bytes that were moved past the runtime, others have their turn.
const TURN: usize = 4 << 20;

/// One connection. `F` is a request's future, which `G` makes.
pub(super) struct Connection<'a, S, F, G> {
    stream: S,
    session: &'a Session,
    limits: &'a Limits,
    replies: Replies,
    make: G,
    device: &'a dyn Nowait,
    reads: Asking,
    long_reads_now: Asking,
    writes: AskingToWrite,
    lent_writes: AskingToWrite,
    slots: Slots<F>,
    input: Input,
    output: Output,
    pool: Pool,
    kits: Kits,
    has_kit: bool,
    account: Account,
    /// What is left of reads longer than the longest request.
    long_reads: VecDeque<Request>,
    /// Long reads and new requests take turns.
    is_long_reads_turn: bool,
    holes: Option<Holes>,
    /// What is written may stay where it was received.
    writes_in_place: bool,
    /// How a long write is taken apart, if it may be.
    pieces: Option<Pieces>,
    linger: Linger,
    /// Requests since it last lingered.
    begun: usize,
    phase: Phase,
    state: State,
    result: io::Result<()>,
    /// When requests in flight have had their time.
    deadline: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
    is_armed: bool,
    has_moved: bool,
    /// Bytes sent and received since the last tick.
    moved_bytes: usize,
    /// Bytes sent or received past the runtime, from or to the engine's memory, since this task was woken.
    moved_lent: usize,
    stalled: u32,
    was_direct: bool,
    /// The stream's end has been seen, before everything in front of it was taken.
    has_ended: bool,
}

/// What the next bytes are.
#[derive(Debug)]
enum Phase {
    Header,
    /// The payload of `request`, `filled` bytes of which have come.
    Payload {
        request: Request,
        buffer: Buffer,
        filled: usize,
        charge: usize,
    },
    /// What is left of the payload of a write that does not wait.
    LongWrite(LongWrite),
    /// So many bytes that nobody wants, and then the refusal: a client may not look for a reply to
    /// what it is still sending.
    Refused {
        left: u64,
        tag: Tag,
        refusal: Refusal,
    },
}

/// What a round needs from the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wants {
    /// Nothing: no request can be taken now, or one has more at hand and goes on in the next round.
    Nothing,
    /// Anything.
    Input,
    /// The rest of a payload.
    Payload,
}

impl<'a, S, F, G> Connection<'a, S, F, G>
where
    S: Socket,
    F: Future<Output = Done>,
    G: FnMut(Job) -> F,
{
    /// A connection whose requests run as the futures that `make` makes, but for what `device` does without waiting.
    pub(super) fn new(
        stream: S,
        input: Vec<u8>,
        session: &'a Session,
        environment: &'a Environment,
        make: G,
        device: &'a dyn Nowait,
    ) -> Self {
        let limits = &*environment.limits;
        let mut linger = Linger::new(environment.chairs.clone());
        linger.believe(stream.company());
        Connection {
            stream,
            session,
            limits,
            replies: Replies::new(session.replies),
            make,
            device,
            reads: Asking::default(),
            long_reads_now: Asking::default(),
            writes: AskingToWrite::default(),
            lent_writes: AskingToWrite::default(),
            slots: Slots::new(limits.max_in_flight.max(1)),
            input: Input::new(input),
            output: Output::new(),
            pool: Pool::new(),
            kits: environment.budget.kits().clone(),
            has_kit: false,
            account: Account::new(environment.budget.clone(), limits.max_connection_bytes),
            long_reads: VecDeque::new(),
            is_long_reads_turn: false,
            holes: None,
            writes_in_place: false,
            pieces: None,
            linger,
            begun: 0,
            phase: Phase::Header,
            state: State::Serving,
            result: Ok(()),
            deadline: None,
            timer: None,
            is_armed: false,
            has_moved: false,
            moved_bytes: 0,
            moved_lent: 0,
            stalled: 0,
            was_direct: false,
            has_ended: false,
        }
    }

    /// Does as is best for a disk of `geometry`.
    pub(super) fn suit(&mut self, geometry: &Geometry) {
        // Which parts of a read are holes only chunks can tell.
        let has_chunks = self.session.replies != ReplyMode::Simple;
        if has_chunks && geometry.features.contains(Features::EXTENTS) {
            self.holes = Some(Holes::default());
        }
        // A payload begins anywhere in what was received.
        self.writes_in_place = geometry.memory_alignment <= 1;
        self.pieces = Pieces::of(geometry);
    }

    /// Takes no more requests, and gives those in flight the grace period.
    pub(super) fn stop(&mut self) {
        self.deadline = Some(Instant::now() + self.limits.shutdown_grace);
        self.leave(Farewell::Brief);
    }

    /// Works until nothing moves. Ready when the connection is over.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.take_kit();
        self.linger.wake();
        self.moved_lent = 0;
        loop {
            let mut moved = self.reap(cx);
            let in_flight = self.slots.in_flight();
            moved |= self.start_long_read(cx);
            let wants = self.start_requests(cx, &mut moved);
            // Slots tell this task of a wake only once they were polled with it in flight.
            moved |= self.slots.in_flight() > in_flight;
            moved |= self.send(cx);
            moved |= self.receive(cx, wants);
            moved |= self.part(cx);
            if self.state == State::Over {
                return Poll::Ready(std::mem::replace(&mut self.result, Ok(())));
            }
            self.has_moved |= moved;
            if !moved && !self.tick(cx) && !self.linger(cx, wants) {
                self.rest();
                self.linger.sleep();
                return Poll::Pending;
            }
        }
    }

    fn take_kit(&mut self) {
        if !self.has_kit {
            let Kit {
                input,
                pool,
                output,
            } = self.kits.take();
            self.input.lend(input);
            self.pool = pool;
            self.output = output;
            self.has_kit = true;
        }
    }

    /// Lends what it works with to others, and may be served elsewhere, if it has nothing to do.
    fn rest(&mut self) {
        let rests = self.state == State::Serving
            && self.slots.in_flight() == 0
            && self.output.pending() == 0
            && self.long_reads.is_empty()
            && matches!(self.phase, Phase::Header);
        if rests && let Some(company) = self.stream.rest(self.linger.company()) {
            self.linger.believe(company);
        }
        if rests && let Some(input) = self.input.take_memory() {
            self.has_kit = false;
            self.kits.give(Kit {
                input,
                pool: std::mem::replace(&mut self.pool, Pool::new()),
                output: std::mem::replace(&mut self.output, Output::new()),
            });
        }
    }

    /// Answers what has finished.
    fn reap(&mut self, cx: &mut Context<'_>) -> bool {
        let mut moved = false;
        while let Poll::Ready(Some(done)) = self.slots.poll(cx) {
            self.finish(done);
            moved = true;
        }
        moved
    }

    /// Answers a request that has been run.
    fn finish(&mut self, done: Done) {
        let Job {
            request,
            mut buffer,
            charge,
            rest,
            ..
        } = done.job;
        self.account.give(charge);
        if self.state != State::Gone {
            let (replies, out, tag) = (self.replies, &mut self.output, request.tag);
            let last = rest == 0;
            match (&done.outcome, buffer.take()) {
                (Ok(Outcome::Data | Outcome::KnownData(_)), Some(data)) => {
                    buffer = replies.data(out, tag, request.offset, data, last);
                }
                (Ok(Outcome::Sparse(runs)), Some(data)) => {
                    buffer = replies.sparse(out, tag, request.offset, data, runs, last);
                }
                (Ok(Outcome::Status(all)), unused) => {
                    replies.status(out, tag, all);
                    buffer = unused;
                }
                (Ok(_), unused) => {
                    replies.success(out, tag);
                    buffer = unused;
                }
                (Err(failure), unused) => {
                    replies.failure(out, &request, failure);
                    buffer = unused;
                }
            }
            match (&mut self.holes, &done.outcome) {
                (Some(holes), Ok(Outcome::KnownData(data))) => {
                    holes.learn(request.offset, *data, false);
                }
                (Some(holes), Ok(Outcome::Sparse(_))) => holes.learn(request.offset, 0, true),
                _ => {}
            }
            if rest > 0 && done.outcome.is_ok() {
                self.long_reads.push_back(Request {
                    offset: request.offset + request.length,
                    length: rest,
                    ..request
                });
            }
        }
        if let Some(buffer) = buffer {
            give(&mut self.pool, &mut self.account, buffer);
        }
    }

    /// Sends what there is.
    fn send(&mut self, cx: &mut Context<'_>) -> bool {
        let before = self.output.pending();
        if before == 0 {
            return false;
        }
        let (pool, account) = (&mut self.pool, &mut self.account);
        let sent = self
            .output
            .poll_send(cx, &mut self.stream, |buffer| give(pool, account, buffer));
        if let Poll::Ready(Err(error)) = sent {
            self.lose(error);
            return true;
        }
        let sent = before - self.output.pending();
        self.moved_bytes += sent;
        sent > 0
    }

    fn abandon_payload(&mut self) {
        if let Phase::Payload { buffer, charge, .. } =
            std::mem::replace(&mut self.phase, Phase::Header)
        {
            self.account.give(charge);
            give(&mut self.pool, &mut self.account, buffer);
        }
    }

    fn has_room(&self) -> bool {
        let most = match self.slots.in_flight() {
            0 => GATHERED,
            _ => GATHERED_IN_FLIGHT,
        };
        self.output.pending() < most && !self.slots.is_full()
    }

    fn take(&mut self, cx: &mut Context<'_>, bytes: usize) -> Poll<()> {
        match bytes {
            0 => Poll::Ready(()),
            _ => self.account.poll_take(cx, bytes),
        }
    }
}

fn give(pool: &mut Pool, account: &mut Account, buffer: Buffer) {
    account.give(footprint(buffer.len()));
    pool.give(buffer);
}
