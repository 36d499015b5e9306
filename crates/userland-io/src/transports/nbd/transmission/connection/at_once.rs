//! Requests that the device does without waiting: they are answered there and then.

use std::future::Future;
use std::ops::Range;
use std::task::Context;

use super::super::super::socket::Socket;
use super::super::command::{Done, Failure, Job};
use super::super::output;
use super::super::pool::footprint;
use super::super::request::{Command, Request};
use super::{Connection, TURN};
use crate::WriteFlags;

/// Shorter reads, beyond those that are copied beside their headers, are sent with others rather than by a call of their own.
const LONG: u64 = 32 << 10;

impl<S, F, G> Connection<'_, S, F, G>
where
    S: Socket,
    F: Future<Output = Done>,
    G: FnMut(Job) -> F,
{
    /// Answers a read with what the engine has in memory. False if it has to be asked.
    pub(super) fn read_now(&mut self, cx: &mut Context<'_>, request: &Request) -> bool {
        const COPIED: u64 = output::COPIED as u64;
        match request.length {
            ..=COPIED => self.copy_lent(request),
            LONG.. => self.send_lent(cx, request),
            _ => false,
        }
    }

    fn copy_lent(&mut self, request: &Request) -> bool {
        if !self.reads.ask() {
            return false;
        }
        let (replies, out) = (self.replies, &mut self.output);
        let (tag, offset) = (request.tag, request.offset);
        let lent = self
            .device
            .lend(offset..offset + request.length, &mut |bytes| {
                replies.bytes(out, tag, offset, bytes);
            });
        self.reads.learn(lent);
        lent
    }

    /// Sends a long read from where its bytes are. What the socket does not take at once is copied: nobody waits with the bytes in hand.
    fn send_lent(&mut self, cx: &mut Context<'_>, request: &Request) -> bool {
        let (tag, offset, length) = (request.tag, request.offset, request.length as usize);
        // Whoever is behind on replies will not take this one at once.
        // Nor is a question for holes passed by: a lender has them, too.
        let asks = matches!(request.command, Command::Read { split: true })
            && self.ask(offset, request.length);
        if asks
            || self.output.pending() >= length
            || self.moved_lent >= TURN
            || !self.long_reads_now.ask()
            || self.take(cx, footprint(length)).is_pending()
        {
            return false;
        }
        let (replies, out, pool) = (self.replies, &mut self.output, &mut self.pool);
        let (stream, mut sent, mut kept) = (&self.stream, 0, 0);
        let lent = self
            .device
            .lend(offset..offset + request.length, &mut |bytes| {
                replies.head(out, tag, offset, bytes.len());
                sent = out.send_now(stream, bytes);
                let rest = &bytes[sent..];
                if !rest.is_empty() {
                    let mut buffer = pool.take(rest.len());
                    buffer.copy_from_slice(rest);
                    match out.payload(buffer) {
                        Some(copied) => pool.give(copied),
                        None => kept = footprint(rest.len()),
                    }
                }
            });
        self.account.give(footprint(length) - kept);
        self.long_reads_now.learn(lent);
        self.moved_bytes += sent;
        self.moved_lent += sent;
        lent
    }

    /// Writes what lies at `place` of the bytes at hand, and answers, if all of it is there and the engine need not wait.
    pub(super) fn write_now(
        &mut self,
        request: &Request,
        flags: WriteFlags,
        place: Range<usize>,
    ) -> bool {
        let Some(bytes) = self.input.bytes().get(place) else {
            return false;
        };
        let asking = self.writes.of(bytes.len(), flags);
        if !self.writes_in_place || bytes.is_empty() || !asking.ask() {
            return false;
        }
        let written = self.device.write(bytes, request.offset, flags);
        asking.learn(written.is_some());
        let out = &mut self.output;
        match written {
            Some(Ok(())) => self.replies.success(out, request.tag),
            Some(Err(error)) => self.replies.failure(out, request, &Failure::Device(error)),
            None => return false,
        }
        true
    }
}
