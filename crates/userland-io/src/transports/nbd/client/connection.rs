//! One connection in the transmission phase: the table of requests on their way, and the task that sends them.
//!
//! Requests wait in an outbox; one task, made once, takes all that is there and
//! sends it in one go. The replies' side is in `replies`.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;

use super::op::{Kind, Op};
use crate::Error;
use crate::transports::nbd::session::ReplyMode;
use crate::transports::nbd::wire::{CommandFlags, Request, cmd, error};

/// Payloads up to this length are copied to travel with their neighbours.
const COPIED: usize = 16 << 10;
/// What is gathered before it is sent.
const BATCH: usize = 256 << 10;

/// Why a connection is gone.
#[derive(Clone, Debug)]
pub(super) struct Loss {
    pub(super) why: String,
    pub(super) kind: LossKind,
}

/// What a loss says about requests that were on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LossKind {
    /// The server's side ended it: what was on its way is done with, there.
    Ended,
    /// Nobody knows what the server still does with what it was sent.
    Doubtful,
    /// The server broke the protocol, and we hung up. As doubtful, and not worth another try.
    Violation,
}

impl Loss {
    pub(super) fn violation(why: impl Into<String>) -> Self {
        Loss {
            why: format!("the server broke the NBD protocol: {}", why.into()),
            kind: LossKind::Violation,
        }
    }
}

impl From<io::Error> for Loss {
    fn from(error: io::Error) -> Self {
        // Not ConnectionAborted: it may be this machine that lost patience.
        use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        match error.kind() {
            UnexpectedEof => Loss {
                why: "the server closed the connection".to_owned(),
                kind: LossKind::Ended,
            },
            ConnectionReset | BrokenPipe => Loss {
                why: format!("the server closed the connection ({error})"),
                kind: LossKind::Ended,
            },
            _ => Loss {
                why: format!("the connection failed: {error}"),
                kind: LossKind::Doubtful,
            },
        }
    }
}

/// How far the reply to a request has come.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// The bytes of a read.
    pub(super) bytes: Vec<u8>,
    /// Which of them are there: sorted, merged, relative to the request's start.
    pub(super) covered: Vec<(u64, u64)>,
    /// The runs of a status request, once they are here.
    pub(super) status: Option<Vec<(u64, u64)>>,
    /// The first error chunk.
    pub(super) failure: Option<Failure>,
}

/// An error that the server answered.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub(super) errno: u32,
    pub(super) text: String,
}

/// In this library's words.
impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        let errno = match failure.errno {
            // The specification: what is not on its list is EINVAL.
            error::EPERM
            | error::EIO
            | error::ENOMEM
            | error::EINVAL
            | error::ENOSPC
            | error::EOVERFLOW
            | error::ENOTSUP
            | error::ESHUTDOWN => failure.errno as i32,
            _ => error::EINVAL as i32,
        };
        match failure.text.is_empty() {
            true => Error::from_errno(errno),
            false => Error::told(
                errno,
                format!("the server says: {}", failure.text.escape_debug()),
            ),
        }
    }
}

/// A connection.
#[derive(Debug)]
pub(super) struct Conn {
    pub(super) mode: ReplyMode,
    /// The ids of the export's contexts, in their order.
    pub(super) contexts: Vec<u32>,
    table: Mutex<Table>,
    work: Notify,
    /// Nothing new is sent, and somebody waits for the last reply.
    draining: AtomicBool,
    /// A request was answered.
    answered: AtomicBool,
}

#[derive(Debug, Default)]
struct Table {
    slots: Vec<Slot>,
    free: Vec<u32>,
    outbox: VecDeque<(u64, Arc<Op>)>,
    live: usize,
    dead: bool,
    goodbye: bool,
}

#[derive(Debug, Default)]
struct Slot {
    /// In the cookie's upper half, so that a late or invented reply meets nobody else's request.
    generation: u32,
    entry: Option<(Arc<Op>, Progress)>,
}

impl Conn {
    pub(super) fn new(mode: ReplyMode, contexts: Vec<u32>) -> Self {
        Conn {
            mode,
            contexts,
            table: Mutex::default(),
            work: Notify::new(),
            draining: AtomicBool::new(false),
            answered: AtomicBool::new(false),
        }
    }

    /// Sends `op` soon; hands it back if the connection is gone.
    pub(super) fn push(&self, op: Arc<Op>) -> Result<(), Arc<Op>> {
        let mut table = self.table();
        if table.dead || table.goodbye {
            return Err(op);
        }
        let index = match table.free.pop() {
            Some(index) => index,
            None => {
                table.slots.push(Slot::default());
                table.slots.len() as u32 - 1
            }
        };
        let slot = &mut table.slots[index as usize];
        slot.generation = slot.generation.wrapping_add(1);
        let cookie = u64::from(slot.generation) << 32 | u64::from(index);
        op.mark_sent();
        slot.entry = Some((op.clone(), Progress::default()));
        table.live += 1;
        let idle = table.outbox.is_empty();
        table.outbox.push_back((cookie, op));
        drop(table);
        if idle {
            self.work.notify_one();
        }
        Ok(())
    }

    /// The request with this cookie, and how far it has come: the caller puts the latter
    /// [back](Self::resume) or [ends](Self::end) the request.
    pub(super) fn look_up(&self, cookie: u64) -> Option<(Arc<Op>, Progress)> {
        let mut table = self.table();
        let (op, progress) = table.slot(cookie)?.entry.as_mut()?;
        Some((op.clone(), std::mem::take(progress)))
    }

    pub(super) fn resume(&self, cookie: u64, progress: Progress) {
        if let Some(slot) = self.table().slot(cookie)
            && let Some(entry) = &mut slot.entry
        {
            entry.1 = progress;
        }
    }

    /// Takes the request off the table. True if it was there, and so is the caller's to finish.
    pub(super) fn end(&self, cookie: u64) -> bool {
        let mut table = self.table();
        let Some(slot) = table.slot(cookie) else {
            return false;
        };
        if slot.entry.take().is_none() {
            return false;
        }
        table.free.push(cookie as u32);
        table.live -= 1;
        drop(table);
        self.answered.store(true, Ordering::Relaxed);
        true
    }

    /// Ends the connection. The first caller gets what was on its way, and has to see to it.
    pub(super) fn die(&self) -> Vec<Arc<Op>> {
        let mut table = self.table();
        table.dead = true;
        table.outbox.clear();
        table.live = 0;
        let slots = std::mem::take(&mut table.slots);
        drop(table);
        self.work.notify_one();
        slots
            .into_iter()
            .filter_map(|slot| slot.entry.map(|entry| entry.0))
            .collect()
    }

    /// Lets the sender say goodbye once all else is sent.
    pub(super) fn say_goodbye(&self) {
        self.table().goodbye = true;
        self.work.notify_one();
    }

    pub(super) fn start_draining(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    /// True if nothing is on its way, or never will be again.
    pub(super) fn is_drained(&self) -> bool {
        self.table().live == 0
    }

    pub(super) fn is_dead(&self) -> bool {
        self.table().dead
    }

    pub(super) fn said_goodbye(&self) -> bool {
        self.table().goodbye
    }

    pub(super) fn has_answered(&self) -> bool {
        self.answered.load(Ordering::Relaxed)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what the outbox brings, until goodbye or the connection's end.
    pub(super) async fn send<W: AsyncWrite + Unpin>(&self, mut stream: W) -> Result<(), Loss> {
        let mut batch = VecDeque::new();
        let mut out = Vec::with_capacity(BATCH);
        loop {
            let (dead, goodbye) = {
                let mut table = self.table();
                std::mem::swap(&mut batch, &mut table.outbox);
                (table.dead, table.goodbye)
            };
            if dead {
                return Ok(());
            }
            if batch.is_empty() {
                if goodbye {
                    self.encode(0, CommandFlags::empty(), cmd::DISC, 0..0, &mut out);
                    stream.write_all(&out).await?;
                    stream.shutdown().await?;
                    return Ok(());
                }
                self.work.notified().await;
                continue;
            }
            for (cookie, op) in batch.drain(..) {
                let payload = op.payload();
                let mut flags = op.flags;
                flags.set(
                    CommandFlags::PAYLOAD_LEN,
                    op.kind == Kind::Write && self.mode == ReplyMode::Extended,
                );
                self.encode(cookie, flags, op.kind.command(), op.range.clone(), &mut out);
                if payload.len() <= COPIED {
                    out.extend_from_slice(payload);
                } else {
                    write_both(&mut stream, &out, payload).await?;
                    out.clear();
                }
                if out.len() >= BATCH {
                    stream.write_all(&out).await?;
                    out.clear();
                }
            }
            stream.write_all(&out).await?;
            out.clear();
        }
    }

    fn encode(
        &self,
        cookie: u64,
        flags: CommandFlags,
        command: u16,
        range: std::ops::Range<u64>,
        out: &mut Vec<u8>,
    ) {
        let request = Request {
            flags,
            command,
            cookie,
            offset: range.start,
            length: range.end - range.start,
        };
        match self.mode {
            ReplyMode::Extended => out.extend_from_slice(&request.encode_extended()),
            _ => out.extend_from_slice(&request.encode_compact()),
        }
    }
}

impl Table {
    fn slot(&mut self, cookie: u64) -> Option<&mut Slot> {
        let slot = self.slots.get_mut(cookie as u32 as usize)?;
        (u64::from(slot.generation) == cookie >> 32).then_some(slot)
    }
}

/// Writes `head` and `tail` without joining them in memory.
async fn write_both<W: AsyncWrite + Unpin>(
    stream: &mut W,
    head: &[u8],
    tail: &[u8],
) -> io::Result<()> {
    let mut sent = 0;
    while sent < head.len() {
        match stream
            .write_vectored(&[IoSlice::new(&head[sent..]), IoSlice::new(tail)])
            .await?
        {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            n => sent += n,
        }
    }
    stream.write_all(&tail[sent - head.len()..]).await
}
