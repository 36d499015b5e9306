//! A client: it takes its operations from a script, and notes when each began and what came of it.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use userland_io::{
    AnyEngine, Checked, Engine, ErrorKind, Extents, Geometry, ReadBuf, Result, WriteBuf, WriteFlags,
};

use super::record::Record;
use crate::check::{OpId, Request, Shape};
use crate::script::{Abandon, Action};
use crate::torture::desk::{left_alone, put, request};

/// A client and what it works on.
pub(super) struct Client {
    pub(super) record: Arc<Record>,
    pub(super) front: Arc<Checked<AnyEngine>>,
    pub(super) number: usize,
    /// The window's place on the disk.
    pub(super) base: u64,
    pub(super) shape: Shape,
    /// As if the disk began at the window.
    pub(super) geometry: Geometry,
    /// Errors are nobody's fault.
    pub(super) may_fail: bool,
}

impl Client {
    pub(super) async fn run(self, actions: Vec<Action>) {
        for action in actions {
            let Some(request) = request(action.op, self.shape, &self.geometry) else {
                continue;
            };
            let begun = self.record.event(|history| {
                let id = history.start(self.number, request.clone());
                let content = match request {
                    Request::Write(..) => history.content(id),
                    _ => Vec::new(),
                };
                (id, content)
            });
            let Some((id, content)) = begun else { return };
            let work = self.work(id, request, content);
            let going = match action.abandon {
                None => work.await,
                Some(abandon) => self.give_up(id, work, abandon).await,
            };
            if going.is_none() {
                return;
            }
        }
    }

    /// Polls `work` so often, and then drops it.
    async fn give_up(
        &self,
        id: OpId,
        work: impl Future<Output = Option<()>> + Send,
        abandon: Abandon,
    ) -> Option<()> {
        let mut work: Pin<Box<dyn Future<Output = Option<()>> + Send + '_>> = Box::pin(work);
        let mut polls = abandon.polls;
        let answered = poll_fn(|cx| {
            if polls == 0 {
                return Poll::Ready(None);
            }
            polls -= 1;
            match work.as_mut().poll(cx) {
                Poll::Ready(going) => Poll::Ready(Some(going)),
                Poll::Pending => {
                    cx.waker().wake_by_ref();
                    Poll::Pending
                }
            }
        });
        if let Some(going) = answered.await {
            return going;
        }
        drop(work);
        self.record.event(|history| history.abandon(id))
    }

    /// Does the request, and notes what came of it. `None`: the history was cut.
    async fn work(&self, id: OpId, request: Request, content: Vec<u8>) -> Option<()> {
        let bytes = self.shape.bytes(request.cells());
        let offset = self.base + bytes.start as u64;
        let range = offset..self.base + bytes.end as u64;
        let front = &self.front;
        let mut refusable = false;
        let result = match &request {
            Request::Read(_) => {
                let read = self.read(id, offset, bytes.len()).await;
                return self.record.event(|history| history.end_read(id, &read));
            }
            Request::Extents(_) => {
                let mut out = Extents::new(16);
                let result = front.extents(range.clone(), &mut out).await;
                self.judge(id, &result, false);
                if result.is_ok() && (out.covered() == 0 || out.covered() > range.end - offset) {
                    let covered = out.covered();
                    self.record.complain(format!(
                        "#{id}: the extents of {range:?} cover {covered} bytes: {out:?}"
                    ));
                }
                let result = result.map(|()| out);
                return self
                    .record
                    .event(|history| history.end_extents(id, &result));
            }
            Request::Write(_, flags) => write(front, &content, offset, *flags).await,
            Request::Zeroes(_, flags) => {
                refusable = flags.contains(WriteFlags::FAST_ONLY);
                front.write_zeroes(range, *flags).await
            }
            // Nothing is left of it once its edges are trimmed.
            Request::Discard(..) if range.is_empty() => Ok(()),
            Request::Discard(..) => front.discard(range).await,
            Request::Flush | Request::Close => front.flush().await,
        };
        self.judge(id, &result, refusable);
        self.record.event(|history| history.end(id, &result))
    }

    async fn read(&self, id: OpId, offset: u64, len: usize) -> Result<Vec<u8>> {
        let result = read(&self.front, offset, len).await;
        self.judge(
            id,
            &result.as_ref().map(drop).map_err(|e| e.kind().into()),
            false,
        );
        let (memory, hole) = result?;
        if let Some(at) = hole {
            self.record.complain(format!(
                "#{id}, a read of {len} bytes from {offset}, did not fill its buffer: not at {}",
                offset + at as u64
            ));
        }
        Ok(memory)
    }

    /// An error for which there was no reason.
    fn judge(&self, id: OpId, result: &Result, refusable: bool) {
        let Err(error) = result else { return };
        let refused = refusable && error.kind() == ErrorKind::Unsupported;
        if !refused && !self.may_fail {
            self.record.complain(format!("#{id} failed: {error}"));
        }
    }
}

/// Writes.
async fn write(front: &Checked<AnyEngine>, bytes: &[u8], offset: u64, flags: WriteFlags) -> Result {
    let buf = WriteBuf::new(bytes);
    // Half of them as by a transport that does not wait where it need not: of its own memory, or to the engine's.
    let now = match fastrand::u8(..4) {
        0 => front.write_nowait(&buf, offset, flags),
        1 => {
            let mut from = bytes;
            let range = offset..offset + bytes.len() as u64;
            front.lend_mut(range, flags, &mut |memory| put(&mut from, memory))
        }
        _ => None,
    };
    match now {
        Some(result) => result,
        None => front.write(&buf, offset, flags).await,
    }
}

/// Reads, and tells what the read left as it was.
pub(super) async fn read(
    front: &Checked<AnyEngine>,
    offset: u64,
    len: usize,
) -> Result<(Vec<u8>, Option<usize>)> {
    let pattern = fastrand::u64(..).to_le_bytes();
    let mut memory: Vec<u8> = pattern.iter().copied().cycle().take(len).collect();
    let mut lent = false;
    // Half of them as by a transport that takes what is lent.
    if fastrand::bool() {
        front.lend(offset..offset + len as u64, &mut |bytes| {
            memory.copy_from_slice(bytes);
            lent = true;
        });
    }
    if !lent {
        front.read(&mut ReadBuf::new(&mut memory), offset).await?;
    }
    let hole = left_alone(&memory, pattern);
    Ok((memory, hole))
}
