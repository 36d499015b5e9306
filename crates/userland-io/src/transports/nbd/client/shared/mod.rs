//! What the callers, the connections and the supervisor of one client share:
//! requests on their way, the journal, and the state that decides where a request goes; `phases` is how that changes.
//!
//! The rules that make a lost connection harmless, each kept here:
//! * overlapping mutations are never in flight together, so their order is known, and a mutation
//!   that is sent again cannot pass a later one;
//! * a completed mutation enters the journal before its caller hears of it;
//! * what is sent again goes before all else: it may have acted, and been seen, at the server that was
//!   lost, and the journal has put older bytes in its place;
//! * a flush retires only what had ended when it began, and nothing if another failed beside it;
//! * what failed and may have acted stays as a read has shown it: see [`Doubts`];
//! * what cannot be vouched for any more latches: see [`Phase::Failed`].

mod phases;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, watch};

use super::connection::{Conn, Failure, Loss, LossKind};
use super::doubts::Doubts;
use super::export::{Durability, Export};
use super::journal::{Content, Journal};
use super::op::{Answer, Budget, Charge, Data, Kind, Op, Origin, Wait};
use crate::transports::nbd::wire::{CommandFlags, error};
use crate::{Error, ErrorKind, Result};

/// How many connections may be lost under one request before it fails.
const MAX_TRIES: u32 = 5;
/// What a mutation costs beside its bytes.
const OVERHEAD: u64 = 256;

/// See the module.
#[derive(Debug)]
pub(super) struct Shared {
    /// Where, for messages.
    pub(super) address: String,
    pub(super) export: Export,
    /// Not the only writer: see [`Builder::shared`](super::Builder::shared).
    others_write: bool,
    budget: Arc<Budget>,
    state: Mutex<State>,
    /// Told when a mutation has ended.
    ended: Notify,
    /// Tells the supervisor to look at the state.
    pub(super) event: Notify,
    /// True once the client is being closed or was dropped.
    closing: watch::Sender<bool>,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    conns: Vec<Arc<Conn>>,
    /// The connection whose turn it is.
    turn: usize,
    /// What waits for a connection.
    queue: VecDeque<Arc<Op>>,
    /// Why the connections are to be made anew, though none is lost.
    renew: Option<String>,
    /// The ranges of mutations in flight, by start.
    ranges: BTreeMap<u64, InFlight>,
    /// Their numbers.
    numbers: BTreeSet<u64>,
    next_number: u64,
    /// The numbers of those that are sent again. Nothing else is sent until they have ended.
    again: BTreeSet<u64>,
    journal: Journal,
    doubts: Doubts,
    /// A flush of our own is on its way.
    upkeep: bool,
    /// Why flushes of our own are of no use now.
    stuck: Option<String>,
}

/// The range of a mutation in flight, from its start on.
#[derive(Debug)]
struct InFlight {
    end: u64,
    /// A read has shown some of it meanwhile.
    seen: bool,
}

/// Where requests go.
#[derive(Clone, Debug)]
pub(super) enum Phase {
    /// To the connections.
    Up,
    /// To the queue, until connections are back.
    Down(String),
    /// Back with an error, until connections are back: it has taken too long.
    Overdue(String),
    /// Back with an error, for good: something cannot be vouched for.
    Failed(String),
    /// Back with an error: the client is closed.
    Closed,
}

impl Shared {
    pub(super) fn new(address: String, export: Export, journal: u64, others_write: bool) -> Self {
        Shared {
            address,
            export,
            others_write,
            budget: Budget::new(journal),
            state: Mutex::new(State {
                phase: Phase::Down("not connected yet".to_owned()),
                conns: Vec::new(),
                turn: 0,
                queue: VecDeque::new(),
                renew: None,
                ranges: BTreeMap::new(),
                numbers: BTreeSet::new(),
                next_number: 0,
                again: BTreeSet::new(),
                journal: Journal::default(),
                doubts: Doubts::default(),
                upkeep: false,
                stuck: None,
            }),
            ended: Notify::new(),
            event: Notify::new(),
            closing: watch::channel(false).0,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // For callers.

    /// Sends a request that changes nothing, and waits for its answer.
    pub(super) async fn ask(&self, op: Op) -> Result<Answer> {
        let op = Arc::new(op);
        self.place(&mut self.state(), op.clone());
        Wait(op).await
    }

    /// Memory for a mutation of `len` bytes, once there is some.
    pub(super) async fn reserve(&self, len: u64) -> Result<Charge> {
        let len = len + OVERHEAD;
        if !self.keeps_journal() {
            return Ok(self.budget.take(len));
        }
        loop {
            if let Some(charge) = self.budget.try_take(len) {
                return Ok(charge);
            }
            let mut freed = std::pin::pin!(self.budget.freed.notified());
            freed.as_mut().enable();
            {
                let mut state = self.state();
                self.refuse(&state)?;
                if let Some(why) = &state.stuck {
                    return Err(Error::new(
                        ErrorKind::Io,
                        format!(
                            "{} bytes of unflushed mutations fill the journal, and they cannot be flushed: {why}",
                            self.budget.used()
                        ),
                    ));
                }
                self.make_room(&mut state, true);
            }
            if let Some(charge) = self.budget.try_take(len) {
                return Ok(charge);
            }
            freed.await;
        }
    }

    /// Sends a mutation as soon as none that overlaps is in flight, and waits for its answer.
    pub(super) async fn mutate(
        &self,
        kind: Kind,
        range: Range<u64>,
        flags: CommandFlags,
        data: Data,
    ) -> Result {
        let mut op = Op::new(kind, range);
        op.flags = flags;
        op.flags.set(
            CommandFlags::FUA,
            flags.contains(CommandFlags::FUA) || self.export.durability == Durability::Always,
        );
        op.data = Some(data);
        let op = match self.start(op)? {
            Ok(op) => op,
            Err(back) => self.start_later(back).await?,
        };
        Wait(op).await.map(drop)
    }

    /// Sends a mutation, or hands it back because one that overlaps is in flight.
    fn start(&self, mut op: Op) -> Result<Result<Arc<Op>, Op>> {
        let mut state = self.state();
        self.refuse(&state)?;
        if !state.enter(&mut op) {
            return Ok(Err(op));
        }
        let op = Arc::new(op);
        self.place(&mut state, op.clone());
        Ok(Ok(op))
    }

    async fn start_later(&self, mut op: Op) -> Result<Arc<Op>> {
        loop {
            let mut ended = std::pin::pin!(self.ended.notified());
            // Before the look, so that no end is missed.
            ended.as_mut().enable();
            match self.start(op)? {
                Ok(op) => return Ok(op),
                Err(back) => op = back,
            }
            ended.await;
        }
    }

    /// A flush, and the end of every mutation that began before it: one whose caller has gone
    /// away may not act after this.
    pub(super) async fn flush(&self) -> Result {
        let barrier = self.state().next_number;
        let answer = match self.export.durability {
            Durability::Flush => {
                let op = {
                    let mut state = self.state();
                    let mut op = Op::new(Kind::Flush, 0..0);
                    op.number = state.journal.stamp();
                    let op = Arc::new(op);
                    self.place(&mut state, op.clone());
                    op
                };
                Wait(op).await.map(drop)
            }
            Durability::Always => Ok(()),
            Durability::Never => Err(ErrorKind::Unsupported.into()),
        };
        self.settle_before(barrier).await;
        if self.export.durability == Durability::Always {
            let state = self.state();
            self.refuse(&state)?;
            if let Some(range) = state.doubts.seen() {
                return Err(Error::new(
                    ErrorKind::Io,
                    format!(
                        "a mutation of bytes {range:?} failed, a read has shown what it did or did not do, and the server has \
                         no flush to settle it: write them anew"
                    ),
                ));
            }
        }
        answer
    }

    /// Waits for the end of every mutation with a number below `barrier`.
    async fn settle_before(&self, barrier: u64) {
        loop {
            let mut ended = std::pin::pin!(self.ended.notified());
            {
                let state = self.state();
                if state.numbers.first().is_none_or(|&first| first >= barrier) {
                    return;
                }
                ended.as_mut().enable();
            }
            ended.await;
        }
    }

    /// Lets nothing new in, and tells the supervisor to leave.
    pub(super) fn close(&self) {
        self.closing.send_replace(true);
        self.event.notify_one();
    }

    /// Resolves when the client is being closed.
    pub(super) async fn closing(&self) {
        // The sender is `self`, so it is never gone.
        let _ = self.closing.subscribe().wait_for(|closing| *closing).await;
    }

    pub(super) fn is_closing(&self) -> bool {
        *self.closing.borrow()
    }

    pub(super) fn connections(&self) -> usize {
        self.state().conns.len()
    }

    // For connections.

    /// The server has answered `op`, which its connection has let go of.
    pub(super) fn answered(&self, conn: &Conn, op: &Arc<Op>, outcome: Result<Answer, Failure>) {
        let result: Result<Answer> = match outcome {
            Ok(answer) => Ok(answer),
            Err(failure)
                if failure.errno == error::ESHUTDOWN
                    && !self.others_write
                    && op.origin != Origin::Replay
                    && op.count_try() < MAX_TRIES =>
            {
                // It asks to be left; another may have taken its place.
                let mut state = self.state();
                self.renew(&mut state, "the server is shutting down".to_owned());
                // It may have acted in part.
                if op.kind.is_mutation() {
                    state.again.insert(op.number);
                }
                self.place(&mut state, op.clone());
                self.told_drained(conn);
                return;
            }
            Err(failure) => Err(failure.into()),
        };
        if op.kind.is_mutation() || op.kind == Kind::Flush {
            let mut state = self.state();
            if op.kind == Kind::Flush && result.is_ok() && state.flush_failed_beside() {
                self.place(&mut state, op.clone());
                drop(state);
                return self.told_drained(conn);
            }
            if op.kind == Kind::Flush
                && let Err(error) = &result
            {
                // What the server failed to make durable it may have thrown away: the journal is written again
                // before the next flush.
                let why = format!("the server failed a flush: {error}");
                state.stuck = Some(error.to_string());
                self.renew(&mut state, why);
            }
            self.settle(&mut state, op, result);
        } else {
            if result.is_ok() && op.kind != Kind::Cache {
                self.state().see(&op.range);
            }
            op.finish(result);
        }
        self.told_drained(conn);
    }

    fn told_drained(&self, conn: &Conn) {
        if conn.is_draining() && conn.is_drained() {
            self.event.notify_one();
        }
    }

    /// `conn` is gone: what was on its way is tried again, or fails.
    pub(super) fn lost(&self, conn: &Conn, loss: &Loss) {
        let mut state = self.state();
        let ops = conn.die();
        // A connection of an earlier session, or one that is to end, is nobody's loss.
        let ours = state.conns.iter().any(|own| std::ptr::eq(&**own, conn));
        if let Phase::Up = state.phase
            && ours
            && !conn.said_goodbye()
        {
            self.down(&mut state, loss.why.clone());
        }
        for op in ops {
            self.salvage(&mut state, op, loss);
        }
        self.event.notify_one();
    }

    fn salvage(&self, state: &mut State, op: Arc<Op>, loss: &Loss) {
        let failed = || Error::new(ErrorKind::Io, loss.why.clone());
        // Those of the journal too: told twice, the first could act over what is newer than the second.
        if loss.kind != LossKind::Ended && op.kind.is_mutation() {
            let why = format!(
                "{}, with mutations on their way that the server may or may not carry out, at any time",
                loss.why
            );
            self.settle(state, &op, Err(failed()));
            self.latch(state, why);
        } else if op.origin == Origin::Replay
            || loss.kind == LossKind::Violation
            || op.is_unwanted() && !op.kind.is_mutation()
            || op.count_try() >= MAX_TRIES
        {
            self.settle(state, &op, Err(failed()));
        } else {
            if op.kind.is_mutation() {
                state.again.insert(op.number);
            }
            self.place(state, op);
        }
    }

    // Within the lock.

    /// Sends `op`, queues it, or fails it.
    fn place(&self, state: &mut State, op: Arc<Op>) {
        if let Err(error) = self.refuse(state) {
            return self.settle(state, &op, Err(error));
        }
        let mut op = op;
        if let Phase::Up = state.phase
            && state.renew.is_none()
            && state.may_go(&op)
        {
            for _ in 0..state.conns.len() {
                state.turn = (state.turn + 1) % state.conns.len();
                match state.conns[state.turn].push(op) {
                    Ok(()) => return,
                    Err(back) => op = back,
                }
            }
        }
        state.queue.push_back(op);
    }

    /// Places anew what waits.
    fn place_queue(&self, state: &mut State) {
        for op in std::mem::take(&mut state.queue) {
            self.place(state, op);
        }
    }

    /// The error that new requests get, if they do.
    fn refuse(&self, state: &State) -> Result {
        match &state.phase {
            Phase::Up | Phase::Down(_) => Ok(()),
            Phase::Overdue(why) => Err(Error::new(
                ErrorKind::Io,
                format!("{} is not reachable: {why}", self.address),
            )),
            Phase::Failed(why) => Err(Error::new(
                ErrorKind::Io,
                format!("{} has to be opened anew: {why}", self.address),
            )),
            Phase::Closed => Err(ErrorKind::Shutdown.into()),
        }
    }

    /// Ends `op`, with what follows from that for those that wait for it and for the journal.
    fn settle(&self, state: &mut State, op: &Arc<Op>, result: Result<Answer>) {
        match (op.origin, op.kind) {
            (Origin::Replay, _) => {}
            (_, Kind::Flush) => {
                if result.is_ok() {
                    state.journal.retire(op.number);
                    state.doubts.retire(op.number);
                    state.stuck = None;
                }
                if op.origin == Origin::Upkeep {
                    state.upkeep = false;
                }
                self.budget.freed.notify_waiters();
            }
            (_, kind) if kind.is_mutation() => {
                let in_flight = state.ranges.remove(&op.range.start);
                state.numbers.remove(&op.number);
                let again = state.again.remove(&op.number);
                match &result {
                    Ok(_) => {
                        state.doubts.forget(&op.range);
                        self.record(state, op);
                    }
                    Err(_) if op.may_have_acted() => {
                        let stamp = state.journal.next_stamp();
                        let seen = in_flight.is_some_and(|in_flight| in_flight.seen);
                        state.doubts.add(op.range.clone(), stamp, seen);
                        // The journal has put older bytes over what was seen.
                        if again
                            && seen
                            && let Phase::Up = state.phase
                            && let Some(why) = state.undone()
                        {
                            self.latch(state, why);
                        }
                    }
                    Err(_) => {}
                }
                self.make_room(state, false);
                if again && state.again.is_empty() {
                    self.place_queue(state);
                }
                self.ended.notify_waiters();
                // Whoever waits for room looks again: there is something to flush now.
                self.budget.freed.notify_waiters();
            }
            _ => {}
        }
        op.finish(result);
    }

    /// Notes a mutation that completed.
    fn record(&self, state: &mut State, op: &Op) {
        if op.flags.contains(CommandFlags::FUA) {
            return state.journal.forget(op.range.clone());
        }
        let full = !self.keeps_journal()
            && (self.budget.cap() == 0 || self.budget.used() > self.budget.cap());
        match &op.data {
            Some(data) if !full && !state.journal.is_incomplete() => {
                let content = Content {
                    kind: op.kind,
                    // Fast or not at all was the caller's wish; it was done, and is to be done again.
                    flags: op.flags - CommandFlags::FAST_ZERO,
                    data: data.clone(),
                };
                state.journal.keep(op.range.clone(), content);
            }
            _ => state.journal.miss(),
        }
    }

    /// True if the journal can be kept complete, by flushes.
    fn keeps_journal(&self) -> bool {
        self.export.durability == Durability::Flush && self.budget.cap() > 0
    }

    /// Flushes on the journal's behalf when half of it is used, somebody waits for room, or there is a doubt to settle.
    fn make_room(&self, state: &mut State, needed: bool) {
        if !self.keeps_journal()
            || state.upkeep
            || state.stuck.is_some()
            || state.doubts.is_empty()
                && (state.journal.is_empty()
                    || !needed && self.budget.used() <= self.budget.cap() / 2)
        {
            return;
        }
        let mut op = Op::new(Kind::Flush, 0..0);
        op.origin = Origin::Upkeep;
        op.number = state.journal.stamp();
        state.upkeep = true;
        self.place(state, Arc::new(op));
    }
}

impl State {
    /// Lets a mutation in unless one that overlaps is in flight.
    fn enter(&mut self, op: &mut Op) -> bool {
        let range = &op.range;
        let before = self.ranges.range(..range.end).next_back();
        if before.is_some_and(|(_, in_flight)| in_flight.end > range.start) {
            return false;
        }
        let in_flight = InFlight {
            end: range.end,
            seen: false,
        };
        self.ranges.insert(range.start, in_flight);
        op.number = self.next_number;
        self.next_number += 1;
        self.numbers.insert(op.number);
        true
    }

    /// A read has shown what `range` holds.
    fn see(&mut self, range: &Range<u64>) {
        // They do not overlap, so their ends are in order too.
        let before = self.ranges.range_mut(..range.end).rev();
        for (_, in_flight) in before.take_while(|(_, in_flight)| in_flight.end > range.start) {
            in_flight.seen = true;
        }
        self.doubts.see(range);
    }

    /// True if a flush has failed in this session: one that was on its way with it covers nothing, whatever it says.
    fn flush_failed_beside(&self) -> bool {
        self.stuck.is_some() && (self.renew.is_some() || !matches!(self.phase, Phase::Up))
    }

    /// False for what has to wait for the mutations that are sent again.
    fn may_go(&self, op: &Op) -> bool {
        self.again.is_empty() || op.kind.is_mutation() && self.again.contains(&op.number)
    }
}
