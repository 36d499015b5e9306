//! The replies' side of a connection: one task that reads, judges and hands over.
//!
//! Nothing is believed: each length is checked before it is acted on, and a
//! reply that the protocol does not allow ends the connection
//! ([`LossKind::Violation`](super::connection::LossKind::Violation)). Memory is
//! bounded by what was asked for: a read's own length, a status request's own
//! room, and [`MAX_STATUS`] bytes or [`MAX_MESSAGE`] of one chunk.

use std::ops::Range;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt};

use super::connection::{Conn, Failure, Loss, Progress};
use super::op::{Answer, Kind, Op};
use super::shared::Shared;
use crate::transports::nbd::session::ReplyMode;
use crate::transports::nbd::wire::{
    EXTENDED_REPLY_MAGIC, MAX_STATUS_EXTENTS, MAX_STRING, ReplyChunk, ReplyFlags,
    SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, SimpleReply, chunk, payload,
};

const INPUT: usize = 256 << 10;
const MAX_STATUS: u64 =
    (payload::STATUS_EXT_HEAD + MAX_STATUS_EXTENTS * payload::STATUS_EXT_EXTENT) as u64;
/// The longest error chunk: its message, and room for fields to come.
const MAX_MESSAGE: u64 = 2 * MAX_STRING as u64;
/// The most separate pieces that the reply to one read may consist of at a time.
const MAX_FRAGMENTS: usize = 4096;

/// Reads replies until the connection ends, and says why it did.
pub(super) async fn receive<R: AsyncRead + Unpin>(shared: &Shared, conn: &Conn, stream: R) -> Loss {
    let mut replies = Replies {
        shared,
        conn,
        input: Input {
            stream,
            buffer: vec![0; INPUT],
            start: 0,
            end: 0,
        },
    };
    loop {
        if let Err(loss) = replies.next().await {
            return loss;
        }
    }
}

struct Replies<'a, R> {
    shared: &'a Shared,
    conn: &'a Conn,
    input: Input<R>,
}

type Outcome = Result<Answer, Failure>;

impl<R: AsyncRead + Unpin> Replies<'_, R> {
    async fn next(&mut self) -> Result<(), Loss> {
        let magic = u32::from_be_bytes(self.input.peek().await?);
        match (self.conn.mode, magic) {
            (ReplyMode::Simple | ReplyMode::Structured, SIMPLE_REPLY_MAGIC) => {
                let bytes = self.input.take().await?;
                let reply = SimpleReply::decode(&bytes).map_err(bad_magic)?;
                self.simple(reply).await
            }
            (ReplyMode::Structured, STRUCTURED_REPLY_MAGIC) => {
                let bytes = self.input.take().await?;
                let head = ReplyChunk::decode_structured(&bytes).map_err(bad_magic)?;
                self.chunk(head).await
            }
            (ReplyMode::Extended, EXTENDED_REPLY_MAGIC) => {
                let bytes = self.input.take().await?;
                let head = ReplyChunk::decode_extended(&bytes).map_err(bad_magic)?;
                self.chunk(head).await
            }
            (mode, magic) => Err(Loss::violation(format!(
                "a reply begins with {magic:#010x}, which is no magic number of {} replies",
                match mode {
                    ReplyMode::Simple => "simple",
                    ReplyMode::Structured => "structured",
                    ReplyMode::Extended => "extended",
                }
            ))),
        }
    }

    async fn simple(&mut self, reply: SimpleReply) -> Result<(), Loss> {
        let (op, mut progress) = self.look_up(reply.cookie)?;
        let outcome = match (reply.error, op.kind) {
            (0, Kind::Read) if self.conn.mode == ReplyMode::Simple => {
                let range = op.range.clone();
                self.bytes(&op, &mut progress, range).await?;
                Ok(Answer::Data(progress.bytes))
            }
            (0, Kind::Read | Kind::Status { .. }) => {
                return Err(Loss::violation(
                    "a simple reply without bytes to a request for some",
                ));
            }
            (0, _) => Ok(Answer::Done),
            (errno, _) => Err(Failure {
                errno,
                text: String::new(),
            }),
        };
        self.end(reply.cookie, &op, outcome);
        Ok(())
    }

    async fn chunk(&mut self, head: ReplyChunk) -> Result<(), Loss> {
        let (op, mut progress) = self.look_up(head.cookie)?;
        if self.conn.mode == ReplyMode::Extended && head.offset != op.range.start {
            return Err(Loss::violation(format!(
                "a reply for offset {} to a request at {}",
                head.offset, op.range.start
            )));
        }
        let done = head.flags.contains(ReplyFlags::DONE);
        match (head.kind, op.kind) {
            (chunk::NONE, _) => {
                if head.length != 0 || !done {
                    return Err(Loss::violation(
                        "a NONE chunk that has a payload or is not the last",
                    ));
                }
            }
            (chunk::OFFSET_DATA, Kind::Read) => {
                let head_len = payload::OFFSET_DATA_HEAD as u64;
                if head.length <= head_len || head.length > head_len + op.len() {
                    return Err(wrong_length("OFFSET_DATA", &head, &op));
                }
                let offset = u64::from_be_bytes(self.input.take().await?);
                let range = part(&op, offset, head.length - head_len)?;
                self.bytes(&op, &mut progress, range).await?;
            }
            (chunk::OFFSET_HOLE, Kind::Read) => {
                if head.length != payload::OFFSET_HOLE as u64 {
                    return Err(wrong_length("OFFSET_HOLE", &head, &op));
                }
                let offset = u64::from_be_bytes(self.input.take().await?);
                let len = u32::from_be_bytes(self.input.take().await?);
                let range = part(&op, offset, u64::from(len))?;
                cover(&mut progress, &op, &range)?;
                // What no data chunk fills is zero: see `bytes`.
                whole(&mut progress, &op);
            }
            (chunk::BLOCK_STATUS, Kind::Status { .. })
                if self.conn.mode == ReplyMode::Structured =>
            {
                self.status(&head, &op, &mut progress, false).await?;
            }
            (chunk::BLOCK_STATUS_EXT, Kind::Status { .. })
                if self.conn.mode == ReplyMode::Extended =>
            {
                self.status(&head, &op, &mut progress, true).await?;
            }
            (kind, _) if kind & chunk::IS_ERROR != 0 => {
                let failure = self.failure(&head, &op).await?;
                progress.failure.get_or_insert(failure);
            }
            (kind, asked) => {
                return Err(Loss::violation(format!(
                    "a chunk of type {kind} in reply to {asked:?}"
                )));
            }
        }
        if !done {
            self.conn.resume(head.cookie, progress);
            return Ok(());
        }
        let outcome = match (progress.failure.take(), op.kind) {
            (Some(failure), _) => Err(failure),
            (None, Kind::Read) => {
                if progress.covered != [(0, op.len())] {
                    return Err(Loss::violation(format!(
                        "it claims to have read {} bytes at {} and left some out",
                        op.len(),
                        op.range.start
                    )));
                }
                Ok(Answer::Data(progress.bytes))
            }
            (None, Kind::Status { .. }) => match progress.status.take() {
                Some(status) => Ok(Answer::Status(status)),
                None => {
                    return Err(Loss::violation(
                        "no status of a context that was negotiated",
                    ));
                }
            },
            (None, _) => Ok(Answer::Done),
        };
        self.end(head.cookie, &op, outcome);
        Ok(())
    }

    /// Receives the bytes of `range`, a part of the read `op`.
    async fn bytes(
        &mut self,
        op: &Op,
        progress: &mut Progress,
        range: Range<u64>,
    ) -> Result<(), Loss> {
        cover(progress, op, &range)?;
        let len = (range.end - range.start) as usize;
        if range == op.range {
            // The usual case: all at once, so nothing needs zeroes first.
            progress.bytes = Vec::with_capacity(len);
            return self.input.append(&mut progress.bytes, len).await;
        }
        whole(progress, op);
        let start = (range.start - op.range.start) as usize;
        let Some(to) = progress.bytes.get_mut(start..start + len) else {
            return Err(Loss::violation("bytes outside the request"));
        };
        self.input.fill(to).await
    }

    async fn status(
        &mut self,
        head: &ReplyChunk,
        op: &Op,
        progress: &mut Progress,
        extended: bool,
    ) -> Result<(), Loss> {
        let Kind::Status { context, room } = op.kind else {
            return Err(Loss::violation("a status that nobody asked for"));
        };
        let (head_len, each) = match extended {
            true => (payload::STATUS_EXT_HEAD, payload::STATUS_EXT_EXTENT),
            false => (payload::STATUS_HEAD, payload::STATUS_EXTENT),
        };
        let runs = head.length.saturating_sub(head_len as u64);
        if runs == 0 || !runs.is_multiple_of(each as u64) || head.length > MAX_STATUS {
            return Err(wrong_length("BLOCK_STATUS", head, op));
        }
        let runs = runs / each as u64;
        let id = u32::from_be_bytes(self.input.take().await?);
        if extended {
            let count = u32::from_be_bytes(self.input.take().await?);
            if u64::from(count) != runs {
                return Err(Loss::violation(format!(
                    "a status of {runs} extents that says {count}"
                )));
            }
        }
        if !self.conn.contexts.contains(&id) {
            return Err(Loss::violation(format!(
                "the status of context {id}, which was not negotiated"
            )));
        }
        let ours = self.conn.contexts.get(context) == Some(&id);
        if ours && progress.status.is_some() {
            return Err(Loss::violation(format!(
                "the status of context {id} twice in one reply"
            )));
        }
        let mut status = Vec::new();
        for _ in 0..runs {
            let (len, word) = match extended {
                true => (
                    u64::from_be_bytes(self.input.take().await?),
                    u64::from_be_bytes(self.input.take().await?),
                ),
                false => (
                    u64::from(u32::from_be_bytes(self.input.take().await?)),
                    u64::from(u32::from_be_bytes(self.input.take().await?)),
                ),
            };
            if len == 0 {
                return Err(Loss::violation("an extent of no bytes"));
            }
            if ours && status.len() < room {
                status.push((len, word));
            }
        }
        if ours {
            progress.status = Some(status);
        }
        Ok(())
    }

    async fn failure(&mut self, head: &ReplyChunk, op: &Op) -> Result<Failure, Loss> {
        let fixed = payload::ERROR_HEAD as u64;
        if head.length < fixed || head.length > MAX_MESSAGE {
            return Err(wrong_length("error", head, op));
        }
        let errno = u32::from_be_bytes(self.input.take().await?);
        let text_len = u16::from_be_bytes(self.input.take().await?);
        if errno == 0 {
            return Err(Loss::violation("an error chunk whose error is 0"));
        }
        let mut rest = Vec::new();
        let rest_len = (head.length - fixed) as usize;
        self.input.append(&mut rest, rest_len).await?;
        let Some((text, tail)) = rest.split_at_checked(usize::from(text_len)) else {
            return Err(Loss::violation(format!(
                "an error chunk whose message of {text_len} bytes does not fit into it"
            )));
        };
        let mut text = String::from_utf8_lossy(text).trim().to_owned();
        if head.kind == chunk::ERROR_OFFSET {
            let Ok(offset) = <[u8; payload::ERROR_OFFSET_TAIL]>::try_from(tail) else {
                return Err(wrong_length("ERROR_OFFSET", head, op));
            };
            let offset = u64::from_be_bytes(offset);
            if !op.range.contains(&offset) {
                return Err(Loss::violation(format!(
                    "an error at {offset}, outside the request's {:?}",
                    op.range
                )));
            }
            text = match text.as_str() {
                "" => format!("at offset {offset}"),
                text => format!("{text} (at offset {offset})"),
            };
        }
        Ok(Failure { errno, text })
    }

    fn look_up(&self, cookie: u64) -> Result<(Arc<Op>, Progress), Loss> {
        self.conn.look_up(cookie).ok_or_else(|| {
            Loss::violation(format!(
                "a reply with cookie {cookie:#x}, which no request in flight has"
            ))
        })
    }

    fn end(&self, cookie: u64, op: &Arc<Op>, outcome: Outcome) {
        // Not there: the connection was given up meanwhile, and the request is somebody else's.
        if self.conn.end(cookie) {
            self.shared.answered(self.conn, op, outcome);
        }
    }
}

/// The part of `op` that a chunk is about.
fn part(op: &Op, offset: u64, len: u64) -> Result<Range<u64>, Loss> {
    match offset.checked_add(len) {
        Some(end) if len > 0 && offset >= op.range.start && end <= op.range.end => Ok(offset..end),
        _ => Err(Loss::violation(format!(
            "{len} bytes at {offset} in reply to a read of {:?}",
            op.range
        ))),
    }
}

/// Notes that `range` is there; an overlap is a lie.
fn cover(progress: &mut Progress, op: &Op, range: &Range<u64>) -> Result<(), Loss> {
    let (start, end) = (range.start - op.range.start, range.end - op.range.start);
    let covered = &mut progress.covered;
    let at = covered.partition_point(|piece| piece.0 < start);
    let overlaps = covered.get(at).is_some_and(|next| next.0 < end)
        || at > 0 && covered.get(at - 1).is_some_and(|last| last.1 > start);
    if overlaps {
        return Err(Loss::violation(format!(
            "the bytes of {range:?} twice in one reply"
        )));
    }
    let joins_next = covered.get(at).is_some_and(|next| next.0 == end);
    let joins_last = at > 0 && covered[at - 1].1 == start;
    match (joins_last, joins_next) {
        (true, true) => covered[at - 1].1 = covered.remove(at).1,
        (true, false) => covered[at - 1].1 = end,
        (false, true) => covered[at].0 = start,
        (false, false) if covered.len() >= MAX_FRAGMENTS => {
            return Err(Loss::violation(format!(
                "a read answered in more than {MAX_FRAGMENTS} scattered pieces"
            )));
        }
        (false, false) => covered.insert(at, (start, end)),
    }
    Ok(())
}

/// Makes room for all of a read, in zeroes.
fn whole(progress: &mut Progress, op: &Op) {
    if progress.bytes.is_empty() {
        progress.bytes = vec![0; op.len() as usize];
    }
}

fn wrong_length(what: &str, head: &ReplyChunk, op: &Op) -> Loss {
    Loss::violation(format!(
        "a chunk of type {what} of {} bytes in reply to {:?} of {:?}",
        head.length, op.kind, op.range
    ))
}

fn bad_magic(error: crate::transports::nbd::wire::BadMagic) -> Loss {
    Loss::violation(error.to_string())
}

/// What was received and not yet looked at.
struct Input<R> {
    stream: R,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl<R: AsyncRead + Unpin> Input<R> {
    /// The next bytes, which stay where they are.
    async fn peek<const N: usize>(&mut self) -> Result<[u8; N], Loss> {
        while self.end - self.start < N {
            self.receive().await?;
        }
        match self.buffer[self.start..self.end].first_chunk() {
            Some(bytes) => Ok(*bytes),
            None => Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into()),
        }
    }

    /// The next bytes.
    async fn take<const N: usize>(&mut self) -> Result<[u8; N], Loss> {
        let bytes = self.peek().await?;
        self.start += N;
        Ok(bytes)
    }

    /// Fills `to`: first from the buffer, then straight from the stream.
    async fn fill(&mut self, to: &mut [u8]) -> Result<(), Loss> {
        let here = to.len().min(self.end - self.start);
        let (first, rest) = to.split_at_mut(here);
        first.copy_from_slice(&self.buffer[self.start..self.start + here]);
        self.start += here;
        if !rest.is_empty() {
            self.stream.read_exact(rest).await?;
        }
        Ok(())
    }

    /// Appends `len` bytes to `to`.
    async fn append(&mut self, to: &mut Vec<u8>, len: usize) -> Result<(), Loss> {
        let here = len.min(self.end - self.start);
        to.extend_from_slice(&self.buffer[self.start..self.start + here]);
        self.start += here;
        let mut rest = (&mut self.stream).take((len - here) as u64);
        while rest.limit() > 0 {
            if rest.read_buf(to).await? == 0 {
                return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
            }
        }
        Ok(())
    }

    async fn receive(&mut self) -> Result<(), Loss> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        match self.stream.read(&mut self.buffer[self.end..]).await? {
            0 => Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into()),
            n => {
                self.end += n;
                Ok(())
            }
        }
    }
}
