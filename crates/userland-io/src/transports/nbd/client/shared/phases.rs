//! Where requests go, and why: what the supervisor does to a client's [`Phase`], and what trouble does.

use std::ops::Range;
use std::sync::Arc;

use super::{Conn, Content, Phase, Shared, State};
use crate::{ErrorKind, Result};

impl Shared {
    // For the supervisor.

    pub(in super::super) fn phase(&self) -> Phase {
        self.state().phase.clone()
    }

    /// Why the connections have to be made anew, if they have to; nothing is sent on them from then on.
    pub(in super::super) fn trouble(&self) -> Option<String> {
        let mut state = self.state();
        if let (Some(why), Phase::Up) = (state.renew.take(), &state.phase) {
            self.down(&mut state, why);
        }
        match &state.phase {
            Phase::Down(why) | Phase::Overdue(why) => Some(why.clone()),
            Phase::Up | Phase::Failed(_) | Phase::Closed => None,
        }
    }

    /// True if the client is about to end, and its connections are there: it should be told what became of all that is on its way.
    pub(in super::super) fn is_giving_up(&self) -> bool {
        let state = self.state();
        self.others_write && state.renew.is_some() && matches!(state.phase, Phase::Up)
    }

    /// Gives up waiting: what is queued fails, and so does what comes, until connections are back.
    pub(in super::super) fn overdue(&self, why: &str) {
        let mut state = self.state();
        if let Phase::Down(_) = state.phase {
            tracing::error!("{}: still not back: {why}", self.address);
            state.phase = Phase::Overdue(why.to_owned());
            self.fail_queue(&mut state);
        }
    }

    /// What the server that is back has to be told again; an error if not all of it is known.
    pub(in super::super) fn restorable(&self) -> Result<Vec<(Range<u64>, Content)>, String> {
        let state = self.state();
        if let Some(why) = state.undone() {
            return Err(why);
        }
        match state.journal.is_incomplete() {
            true => Err(format!(
                "mutations that no flush covered may be lost, and were not all kept (the journal holds {} bytes)",
                self.budget.cap()
            )),
            false => Ok(state.journal.pieces()),
        }
    }

    /// The connections are there, and the server holds all that it should: what waits is sent.
    pub(in super::super) fn up(&self, conns: Vec<Arc<Conn>>) {
        let mut state = self.state();
        if matches!(state.phase, Phase::Failed(_) | Phase::Closed) {
            return;
        }
        // What failed while the journal was written: the wait for the server took too long.
        if let Some(why) = state.undone() {
            return self.latch(&mut state, why);
        }
        state.phase = Phase::Up;
        state.renew = None;
        state.conns = conns;
        if state.conns.iter().any(|conn| conn.is_dead()) {
            state.phase = Phase::Down("the connection was lost again".to_owned());
            self.event.notify_one();
        }
        self.place_queue(&mut state);
        self.make_room(&mut state, false);
    }

    /// Fails everything, from now on and for good.
    pub(in super::super) fn fail(&self, why: String) {
        self.latch(&mut self.state(), why);
    }

    /// Nothing is sent or answered any more.
    pub(in super::super) fn end(&self) {
        let mut state = self.state();
        if !matches!(state.phase, Phase::Failed(_)) {
            state.phase = Phase::Closed;
        }
        self.abandon(&mut state);
    }

    // Within the lock.

    /// The connections are lost, or of no use any more.
    pub(super) fn down(&self, state: &mut State, why: String) {
        if self.others_write {
            let why = format!(
                "{why}; others write to it, too, and what is left of all that was written is unknown"
            );
            return self.latch(state, why);
        }
        tracing::warn!("{}: {why}", self.address);
        state.phase = Phase::Down(why);
    }

    pub(super) fn renew(&self, state: &mut State, why: String) {
        if let Phase::Up = state.phase {
            tracing::warn!("{}: {why}", self.address);
            state.renew.get_or_insert(why);
            self.event.notify_one();
        }
    }

    pub(super) fn latch(&self, state: &mut State, why: String) {
        if !matches!(state.phase, Phase::Failed(_) | Phase::Closed) {
            tracing::error!("{}: {why}", self.address);
            state.phase = Phase::Failed(why);
            self.event.notify_one();
        }
        self.abandon(state);
    }

    /// Fails all that is on its way or waits.
    pub(super) fn abandon(&self, state: &mut State) {
        for conn in std::mem::take(&mut state.conns) {
            state.queue.extend(conn.die());
        }
        self.fail_queue(state);
        self.budget.freed.notify_waiters();
        self.ended.notify_waiters();
    }

    pub(super) fn fail_queue(&self, state: &mut State) {
        while let Some(op) = state.queue.pop_front() {
            let error = match self.refuse(state) {
                Err(error) => error,
                Ok(()) => ErrorKind::Io.into(),
            };
            self.settle(state, &op, Err(error));
        }
        self.budget.freed.notify_waiters();
        self.ended.notify_waiters();
    }
}

impl State {
    /// Why readers may see time go backwards after the loss of a server, if they may.
    pub(super) fn undone(&self) -> Option<String> {
        let range = self.doubts.seen()?;
        Some(format!(
            "a mutation of bytes {range:?} failed, a read has shown what it did or did not do, and a server that was \
             lost before a flush may not have kept it so"
        ))
    }
}
