//! How bytes come in: received as far as they are wanted, or waited for a little before the connection sleeps.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::task::{Context, Poll};

use super::super::super::socket::Socket;
use super::super::command::{Done, Job};
use super::super::input;
use super::super::linger::Lingered;
use super::leaving::{Farewell, State};
use super::{Connection, Phase, Wants};

/// What is received after a long payload besides the next header, so that the next payload is not received beside its place.
const AFTER_DIRECT: usize = 4 << 10;

impl<S, F, G> Connection<'_, S, F, G>
where
    S: Socket,
    F: Future<Output = Done>,
    G: FnMut(Job) -> F,
{
    /// Stays awake for what is wanted, if that alone can move this connection. True if something came.
    pub(super) fn linger(&mut self, cx: &mut Context<'_>, wants: Wants) -> bool {
        let waits_for_client = self.state == State::Serving
            && self.slots.in_flight() == 0
            && self.output.pending() == 0;
        if !waits_for_client || wants == Wants::Nothing {
            return false;
        }
        let batch = std::mem::take(&mut self.begun);
        let most = self.most();
        let (stream, input) = (&self.stream, &mut self.input);
        let lingered = match &mut self.phase {
            Phase::Payload { buffer, filled, .. } if wants == Wants::Payload => {
                let lingered = self
                    .linger
                    .wait(batch, || stream.receive_now(&mut buffer[*filled..]));
                if let Lingered::Came(came) = lingered {
                    *filled += came;
                }
                lingered
            }
            _ => {
                let receive = || input.receive_with(most, |room| stream.receive_now(room));
                let lingered = self.linger.wait(batch, receive);
                if matches!(lingered, Lingered::Came(_)) {
                    self.was_direct = self.is_lent();
                }
                lingered
            }
        };
        match lingered {
            Lingered::Came(came) => {
                self.moved_bytes += came;
                came > 0
            }
            Lingered::Nothing => false,
            Lingered::Enough => {
                give_way(cx);
                false
            }
        }
    }

    /// Receives what is wanted.
    pub(super) fn receive(&mut self, cx: &mut Context<'_>, wants: Wants) -> bool {
        if self.state != State::Serving {
            return false;
        }
        if wants == Wants::Nothing {
            return false;
        }
        let most = self.most();
        let received = match (wants, &mut self.phase) {
            (Wants::Payload, Phase::Payload { buffer, filled, .. }) => {
                self.was_direct = true;
                let received = input::poll_receive(cx, &mut self.stream, &mut buffer[*filled..]);
                if let Poll::Ready(Ok(came)) = received {
                    *filled += came;
                }
                received
            }
            _ => {
                let received = self.input.poll_receive(cx, &mut self.stream, most);
                self.was_direct &= received.is_pending();
                received
            }
        };
        match received {
            Poll::Pending => return false,
            Poll::Ready(Ok(0)) => {
                if !matches!(self.phase, Phase::Header) || !self.input.bytes().is_empty() {
                    self.result = Err(io::ErrorKind::UnexpectedEof.into());
                }
                self.leave(Farewell::None);
            }
            Poll::Ready(Ok(came)) => self.moved_bytes += came,
            Poll::Ready(Err(error)) => self.lose(error),
        }
        true
    }

    /// How many bytes the next receive may bring by way of the input.
    fn most(&self) -> usize {
        match &self.phase {
            Phase::LongWrite(write) if write.may_lend => {
                write.most(self.input.bytes().len() as u64) as usize
            }
            _ if self.was_direct => AFTER_DIRECT + self.header_length(),
            _ => usize::MAX,
        }
    }

    /// True if what comes now should go to the engine's memory.
    fn is_lent(&self) -> bool {
        matches!(&self.phase, Phase::LongWrite(write) if write.may_lend)
    }
}

/// Asks for another turn after others'.
pub(super) fn give_way(cx: &mut Context<'_>) {
    // Unlike a plain wake, this lets the runtime look after its sockets first.
    let _ = pin!(tokio::task::yield_now()).poll(cx);
}
