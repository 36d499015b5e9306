//! Where the clients of a round meet: they take their operations from a script and enter what comes of them in
//! the history.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::ops::Range;
use std::pin::Pin;
use std::task::Poll;

use userland_io::{
    Checked, Discard, Engine, Error, ErrorKind, Extents, Geometry, ReadBuf, Result, WriteBuf,
    WriteFlags,
};

use crate::check::{Clause, History, OpId, Request, Shape, Verdict};
use crate::script::{Abandon, Action, Op};
use crate::sim::World;

/// Memory for a read, filled with a pattern that no disk holds: what the read leaves alone must not pass for content.
pub(crate) fn unread(world: &World, len: usize) -> (Vec<u8>, [u8; 8]) {
    let pattern = world.draw(u64::MAX).to_le_bytes();
    (pattern.iter().copied().cycle().take(len).collect(), pattern)
}

/// Where a read left the pattern in place.
pub(crate) fn left_alone(bytes: &[u8], pattern: [u8; 8]) -> Option<usize> {
    let at = bytes.chunks_exact(8).position(|chunk| chunk == pattern)?;
    Some(at * 8)
}

/// Puts what comes next of `from` into lent memory, as far as it goes.
pub(crate) fn put(from: &mut &[u8], memory: &mut [u8]) {
    let (piece, rest) = from.split_at(from.len().min(memory.len()));
    memory[..piece.len()].copy_from_slice(piece);
    *from = rest;
}

/// Where the clients of a round meet.
pub(crate) struct Desk<'a> {
    pub(crate) world: &'a World,
    pub(crate) geometry: Geometry,
    pub(crate) history: RefCell<History>,
    pub(crate) complaint: RefCell<Option<Verdict>>,
    pub(crate) forgot: Cell<bool>,
    pub(crate) may_fail: bool,
}

impl Desk<'_> {
    pub(crate) async fn client<'a, E: Engine>(
        &self,
        front: &Checked<E>,
        client: usize,
        actions: impl Iterator<Item = &'a Action>,
    ) {
        for action in actions {
            let shape = self.history.borrow().shape();
            let Some(request) = request(action.op, shape, &self.geometry) else {
                continue;
            };
            let id = self.history.borrow_mut().start(client, request.clone());
            let work = self.work(front, id, request);
            match action.abandon {
                None => work.await,
                Some(abandon) => self.give_up(id, work, abandon).await,
            }
            self.world.pause().await;
        }
    }

    /// Polls `work` so often, and then no more.
    async fn give_up(&self, id: OpId, work: impl Future<Output = ()>, abandon: Abandon) {
        let mut work: Pin<Box<dyn Future<Output = ()> + '_>> = Box::pin(work);
        let mut polls = abandon.polls;
        let answered = poll_fn(|cx| {
            if polls == 0 {
                return Poll::Ready(false);
            }
            polls -= 1;
            match work.as_mut().poll(cx) {
                Poll::Ready(()) => Poll::Ready(true),
                Poll::Pending => {
                    // Nobody else may ever wake what is about to be given up.
                    cx.waker().wake_by_ref();
                    Poll::Pending
                }
            }
        });
        if answered.await {
            return;
        }
        self.history.borrow_mut().abandon(id);
        if abandon.forget {
            std::mem::forget(work);
            self.forgot.set(true);
            self.world.note_forgotten();
        }
    }

    /// Does the request, and notes what came of it.
    async fn work<E: Engine>(&self, front: &Checked<E>, id: OpId, request: Request) {
        let shape = self.history.borrow().shape();
        let bytes = shape.bytes(request.cells());
        let offset = bytes.start as u64;
        let range = offset..bytes.end as u64;
        let mut allowed = false;
        let result = match &request {
            Request::Read(_) => {
                let (mut memory, pattern) = unread(self.world, bytes.len());
                let mut lent = false;
                // Every other one as by a transport that takes what is lent.
                if id % 2 == 1 {
                    front.lend(range.clone(), &mut |bytes| {
                        memory.copy_from_slice(bytes);
                        lent = true;
                    });
                }
                let result = match lent {
                    true => Ok(()),
                    false => front.read(&mut ReadBuf::new(&mut memory), offset).await,
                };
                self.complain(id, &result, false);
                if result.is_ok()
                    && let Some(at) = left_alone(&memory, pattern)
                {
                    let at = offset + at as u64;
                    let what =
                        format!("#{id}, a read of {range:?}, did not fill its buffer: not at {at}");
                    self.note(Verdict::new(Clause::Operation, what));
                }
                let result = result.map(|()| memory);
                return self.history.borrow_mut().end_read(id, &result);
            }
            Request::Extents(_) => {
                let mut out = Extents::new(16);
                let result = front.extents(range.clone(), &mut out).await;
                self.complain(id, &result, false);
                if result.is_ok() && (out.covered() == 0 || out.covered() > range.end - offset) {
                    let what = format!(
                        "the extents of {range:?} cover {} bytes: {out:?}",
                        out.covered()
                    );
                    self.note(Verdict::new(Clause::Operation, what));
                }
                let result = result.map(|()| out);
                return self.history.borrow_mut().end_extents(id, &result);
            }
            Request::Write(_, flags) => {
                let content = self.history.borrow().content(id);
                let buf = WriteBuf::new(&content);
                // Every other one as by a transport that does not wait where it need not: of its own memory, or to the engine's.
                let now = match id % 4 {
                    1 => front.write_nowait(&buf, offset, *flags),
                    3 => {
                        // Some senders fail half-way, and then nobody is told that all was written.
                        let unit = front.geometry().atomic_write_unit.max(shape.cell as u32);
                        let half = offset + content.len() as u64 / 2;
                        let half = (half - half % u64::from(unit)).saturating_sub(offset) as usize;
                        let mut from = match id % 8 {
                            7 => &content[..half],
                            _ => &content[..],
                        };
                        let fails = from.len() < content.len();
                        let put = &mut |memory: &mut [u8]| put(&mut from, memory);
                        let lent = front.lend_mut(range, *flags, put);
                        if fails && let Some(Ok(())) = lent {
                            let failed = Err(Error::new(ErrorKind::Io, "the sender failed"));
                            return self.history.borrow_mut().end(id, &failed);
                        }
                        lent
                    }
                    _ => None,
                };
                match now {
                    Some(result) => result,
                    None => front.write(&buf, offset, *flags).await,
                }
            }
            Request::Zeroes(_, flags) => {
                allowed = flags.contains(WriteFlags::FAST_ONLY);
                front.write_zeroes(range, *flags).await
            }
            Request::Discard(..) => front.discard(range).await,
            Request::Flush | Request::Close => front.flush().await,
        };
        self.complain(id, &result, allowed);
        self.history.borrow_mut().end(id, &result);
    }

    /// An error for which nothing below gave a reason.
    fn complain(&self, id: OpId, result: &Result, unsupported_allowed: bool) {
        let Err(error) = result else { return };
        let refused = unsupported_allowed && error.kind() == ErrorKind::Unsupported;
        if !self.may_fail && !refused {
            let what = format!("#{id} failed, though nothing below it did: {error}");
            self.note(Verdict::new(Clause::Operation, what));
        }
    }

    fn note(&self, verdict: Verdict) {
        self.complaint.borrow_mut().get_or_insert(verdict);
    }
}

/// What an operation of a script is on this disk, if it has it.
pub(crate) fn request(op: Op, shape: Shape, geometry: &Geometry) -> Option<Request> {
    let cells = shape.cells();
    if cells == 0 && op != Op::Flush {
        return None;
    }
    let place = |at: u16, len: u16| -> Range<usize> {
        let at = usize::from(at) % cells;
        at..(at + usize::from(len).max(1)).min(cells)
    };
    let request = match op {
        Op::Read(at, len) => Request::Read(place(at, len)),
        Op::Extents(at, len) => Request::Extents(place(at, len)),
        Op::Flush => Request::Flush,
        _ if geometry.is_read_only() => return None,
        Op::Write(at, len, flags) => Request::Write(place(at, len), flags & WriteFlags::FUA),
        Op::Zeroes(at, len, flags) => Request::Zeroes(place(at, len), flags),
        Op::Discard(..) if geometry.discard == Discard::None => return None,
        Op::Discard(at, len) => discard(place(at, len), shape, geometry),
    };
    Some(request)
}

/// A discard's edges are trimmed to whole granules, of which the last may be short.
fn discard(cells: Range<usize>, shape: Shape, geometry: &Geometry) -> Request {
    let bytes = shape.bytes(cells);
    let granule = geometry.discard_granule() as usize;
    let start = bytes.start.next_multiple_of(granule);
    let end = match bytes.end as u64 == geometry.size {
        true => bytes.end,
        false => bytes.end - bytes.end % granule,
    };
    let inner = match start < end {
        true => start.div_ceil(shape.cell)..(end / shape.cell).max(start.div_ceil(shape.cell)),
        false => 0..0,
    };
    let inner = match end == shape.len && start < end {
        true => inner.start..shape.cells(),
        false => inner,
    };
    // Exactly the granules: the edges are no business of the discard's.
    let touched = match start < end {
        true => start / shape.cell..end.div_ceil(shape.cell),
        false => 0..0,
    };
    Request::Discard(touched, inner, geometry.discard)
}
