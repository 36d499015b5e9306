//! How a connection ends: by leave of the client or the server, by a stream that breaks, or because its time is up.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::super::super::socket::Socket;
use super::super::command::{Done, Job};
use super::receiving::give_way;
use super::{Connection, Phase, give};

/// How often a connection looks after itself, if there is a reason to.
const TICK: Duration = Duration::from_millis(250);
/// For how many ticks a client may lag while others wait for its memory.
const STALLED: u32 = 40;
/// A client lags that sends and takes fewer bytes than this in a tick.
const PACE: usize = 16 << 10;
/// So many receives of what is thrown away, and others have their turn.
const DRAINED: u32 = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Requests are taken.
    Serving,
    /// No longer; those in flight finish, and their replies are sent.
    Leaving { farewell: Farewell },
    /// Nobody takes replies any more; what is in flight finishes.
    Gone,
    /// All is sent; what the client still sends is thrown away, lest the replies be lost with it.
    Farewell(Farewell),
    /// Nothing is left to do, or no time to do it.
    Over,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Farewell {
    /// The client has left too.
    None,
    /// It may be sending a request.
    Brief,
    /// It is sending a payload.
    Patient,
}

impl<S, F, G> Connection<'_, S, F, G>
where
    S: Socket,
    F: Future<Output = Done>,
    G: FnMut(Job) -> F,
{
    /// Looks whether the client still sends, while it takes no replies and so no request is taken.
    pub(super) fn probe(&mut self, cx: &mut Context<'_>) {
        if self.has_ended && self.slots.in_flight() == 0 {
            self.end("the client left and takes no replies");
        } else if !self.input.is_full() && matches!(self.phase, Phase::Header | Phase::LongWrite(_))
        {
            match self.input.poll_receive(cx, &mut self.stream, usize::MAX) {
                Poll::Ready(Ok(0)) => self.has_ended = true,
                Poll::Ready(Err(error)) => self.lose(error),
                _ => {}
            }
        }
    }

    /// Goes from leaving to left, as far as it can.
    pub(super) fn part(&mut self, cx: &mut Context<'_>) -> bool {
        let before = self.state;
        let is_idle = self.slots.in_flight() == 0 && self.long_reads.is_empty();
        match self.state {
            State::Leaving { farewell } if is_idle && self.output.pending() == 0 => {
                self.state = match farewell {
                    Farewell::None => State::Over,
                    farewell => {
                        // It lasts a whole tick.
                        self.is_armed = false;
                        State::Farewell(farewell)
                    }
                };
            }
            State::Gone if is_idle => self.state = State::Over,
            State::Farewell(farewell) => {
                if Pin::new(&mut self.stream).poll_shutdown(cx).is_pending() {
                    return false;
                }
                for _ in 0..DRAINED {
                    self.input.consume(usize::MAX);
                    match self.input.poll_receive(cx, &mut self.stream, usize::MAX) {
                        Poll::Ready(Ok(1..)) => {}
                        Poll::Pending if farewell == Farewell::Patient => return false,
                        _ => {
                            self.state = State::Over;
                            return true;
                        }
                    }
                }
                give_way(cx);
                return false;
            }
            _ => {}
        }
        // Whoever left with nothing unfinished has given every byte back.
        let is_done = is_idle && self.output.pending() == 0 && before != State::Serving;
        debug_assert!(!is_done || self.account.is_settled(), "{:?}", self.account);
        self.state != before
    }

    /// Looks after what only time can decide. True if it changed anything.
    pub(super) fn tick(&mut self, cx: &mut Context<'_>) -> bool {
        let is_due = match self.state {
            State::Serving => {
                let is_trimmed = self.pool.is_trimmed() && self.output.is_trimmed();
                !is_trimmed || self.account.borrows() || self.output.pending() > 0
            }
            _ => true,
        };
        if !is_due {
            return false;
        }
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(TICK)));
        if !self.is_armed {
            self.is_armed = true;
            self.has_moved = false;
            let next = Instant::now() + TICK;
            let next = self.deadline.map_or(next, |deadline| next.min(deadline));
            timer.as_mut().reset(next);
        }
        if timer.as_mut().poll(cx).is_pending() {
            return false;
        }
        self.is_armed = false;
        let moved_bytes = std::mem::take(&mut self.moved_bytes);
        let is_late = self.deadline.is_some_and(|end| Instant::now() >= end);
        let is_stuck = !self.has_moved && self.slots.in_flight() == 0;
        match self.state {
            _ if is_late => self.end("requests in flight at shutdown took too long"),
            State::Farewell(_) => self.state = State::Over,
            // A server that leaves has set a time for it.
            State::Leaving { .. }
                if is_stuck && self.output.pending() > 0 && self.deadline.is_none() =>
            {
                self.end("the client left and takes no replies");
            }
            State::Serving => {
                let lags = moved_bytes < PACE && self.slots.in_flight() == 0;
                match lags && self.account.holds_up_others() {
                    true => self.stalled += 1,
                    false => self.stalled = 0,
                }
                if self.stalled >= STALLED {
                    self.end("the client is too slow for the memory it holds, and others wait");
                } else if !self.has_moved {
                    self.pool.trim();
                    self.output.trim();
                    if self.output.pending() > 0 {
                        self.probe(cx);
                    }
                }
            }
            _ => self.stalled = 0,
        }
        true
    }

    fn end(&mut self, why: &str) {
        if self.result.is_ok() {
            self.result = Err(io::Error::new(io::ErrorKind::TimedOut, why));
        }
        self.state = State::Over;
    }

    /// Takes no more requests.
    pub(super) fn leave(&mut self, farewell: Farewell) {
        if self.state == State::Serving {
            self.state = State::Leaving { farewell };
            self.abandon_payload();
        }
    }

    /// Gives up on a stream that is of no more use.
    pub(super) fn lose(&mut self, error: io::Error) {
        self.state = State::Gone;
        if self.result.is_ok() {
            self.result = Err(error);
        }
        self.long_reads.clear();
        self.abandon_payload();
        let (pool, account) = (&mut self.pool, &mut self.account);
        self.output.clear(|buffer| give(pool, account, buffer));
    }
}
