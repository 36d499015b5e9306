//! The history of a round that many tasks write at once.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::check::{Clause, History, Verdict};

/// What is done at the moment at which the history is cut.
pub(super) type Stop = Box<dyn FnOnce() + Send>;

/// The history, until it is cut.
pub(super) struct Record(Mutex<State>);

struct State {
    history: History,
    complaint: Option<Verdict>,
    events: u64,
    stop: Option<(u64, Stop)>,
    stopped: bool,
}

impl Record {
    /// Goes on with `history`; `stop` is called at that event, counted from 0, under the lock that each event is
    /// noted under: all that was noted as answered has answered, all that has begun was noted.
    pub(super) fn new(history: History, stop: Option<(u64, Stop)>) -> Self {
        Record(Mutex::new(State {
            history,
            complaint: None,
            events: 0,
            stop,
            stopped: false,
        }))
    }

    /// Notes an event. `None`: the history was cut, and the client ends.
    pub(super) fn event<T>(&self, note: impl FnOnce(&mut History) -> T) -> Option<T> {
        let mut state = self.state();
        if state
            .stop
            .as_ref()
            .is_some_and(|(at, _)| state.events >= *at)
            && let Some((_, stop)) = state.stop.take()
        {
            stop();
            state.stopped = true;
        }
        if state.stopped {
            return None;
        }
        state.events += 1;
        Some(note(&mut state.history))
    }

    /// Notes what is wrong beside what the history says.
    pub(super) fn complain(&self, what: String) {
        let mut state = self.state();
        if !state.stopped {
            let verdict = || Verdict::new(Clause::Operation, what);
            state.complaint.get_or_insert_with(verdict);
        }
    }

    /// The history, cut now if it was to be and was not yet.
    pub(super) fn end(&self, nothing: History) -> (History, Option<Verdict>, bool) {
        let mut state = self.state();
        if let Some((_, stop)) = state.stop.take() {
            stop();
        }
        let stopped = std::mem::replace(&mut state.stopped, true);
        let history = std::mem::replace(&mut state.history, nothing);
        (history, state.complaint.take(), stopped)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Record").finish_non_exhaustive()
    }
}
