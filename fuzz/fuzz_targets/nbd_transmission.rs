//! Whatever a client sends once it has a disk, each request is answered once, in whole and well-formed replies.
//!
//! The first bytes of an input choose how the session was agreed on and how the
//! bytes come in pieces. The rest is either what the client sends, as it is, or a
//! list of requests to be put into bytes, so that fuzzing need not guess cookies
//! and lengths. Of these all must be answered.
#![no_main]

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use tokio::runtime::{Builder, Runtime};
use userland_io::engines::Memory;
use userland_io::transports::nbd::limits::{Environment, Limits, Shutdown};
use userland_io::transports::nbd::session::{ContextKind, MetaContext, ReplyMode, Session};
use userland_io::transports::nbd::transmission::{self, Budget, Chairs};
use userland_io::transports::nbd::wire::*;
use userland_io::{Device, Engine, Extents, Geometry, ReadBuf, Result, WriteBuf, WriteFlags};

#[path = "../recorded.rs"]
mod recorded;
use recorded::Recorded;

const SIZE: u64 = 300_000;
const MAX_REQUEST: u32 = 64 << 10;

thread_local! {
    static RUNTIME: RefCell<Runtime> =
        RefCell::new(Builder::new_current_thread().enable_time().build().expect("a runtime"));
}

fuzz_target!(|input: &[u8]| {
    let Some((&[shape, piece, low, high], body)) = input.split_first_chunk() else {
        return;
    };
    let replies = match shape & 3 {
        0 => ReplyMode::Simple,
        1 => ReplyMode::Structured,
        _ => ReplyMode::Extended,
    };
    let kinds = [
        ContextKind::Allocation,
        ContextKind::Engine("x-fuzz:one".into()),
    ];
    let contexts = (7..).zip(kinds).map(|(id, kind)| MetaContext { id, kind });
    let session = Session {
        export: "disk".into(),
        size: SIZE,
        flags: TransmissionFlags::from_bits_truncate(!u16::from_le_bytes([low, high])),
        replies,
        contexts: contexts
            .filter(|_| shape & 4 == 0 && replies != ReplyMode::Simple)
            .collect(),
        blocks: BlockSizes {
            minimum: if shape & 8 == 0 { 1 } else { 512 },
            preferred: 4096,
            maximum: MAX_REQUEST,
        },
    };
    let (bytes, asked) = match shape & 16 {
        0 => build(body, replies),
        _ => (body.to_vec(), HashMap::new()),
    };
    // From a few bytes to more than the longest request.
    let piece = usize::from(piece).pow(2) * 4 + 7;
    let output = serve(session, bytes, piece);
    let Ok(output) = output else { return };
    let mut open = asked.clone();
    let mut rest = &output[..];
    while !rest.is_empty() {
        let reply = take_reply(&mut rest, replies, &asked).expect("whole, well-formed replies");
        if !asked.is_empty() && reply.is_last {
            assert!(
                open.remove(&reply.cookie).is_some(),
                "{reply:?} answers nothing that is open"
            );
        }
    }
    assert!(open.is_empty(), "unanswered: {open:?}");
});

/// Lets a server answer `bytes`, and takes what it sent. An error if it found the protocol broken.
fn serve(session: Session, bytes: Vec<u8>, piece: usize) -> std::io::Result<Vec<u8>> {
    let mut limits = Limits::default();
    limits.max_request = MAX_REQUEST;
    limits.max_in_flight = 8;
    limits.max_connection_bytes = 2 * MAX_REQUEST as usize;
    limits.max_server_bytes = 3 * MAX_REQUEST as usize;
    limits.max_payload_drain = 4 * u64::from(MAX_REQUEST);
    let (stop, shutdown) = Shutdown::channel();
    let budget = Budget::new(limits.max_server_bytes);
    let environment = Environment {
        limits: Arc::new(limits),
        budget,
        chairs: Chairs::default(),
        shutdown,
    };
    let (stream, output) = Recorded::new(bytes, piece);
    let work = async {
        let device = Device::open(Disk(Memory::new(SIZE))).await.expect("a disk");
        let served = transmission::run(stream, Vec::new(), session, device, environment);
        let served = tokio::time::timeout(Duration::from_secs(5), served).await;
        served.expect("an end within seconds")
    };
    let result = RUNTIME.with_borrow(|runtime| runtime.block_on(work));
    drop(stop);
    result.map(|()| output.take())
}

#[derive(Clone, Debug)]
struct Asked {
    command: u16,
    range: Range<u64>,
}

/// Puts a list of requests into bytes: each from 8 bytes of `body`.
fn build(body: &[u8], mode: ReplyMode) -> (Vec<u8>, HashMap<u64, Asked>) {
    let mut bytes = Vec::new();
    let mut asked = HashMap::new();
    for (cookie, words) in (1..).zip(body.as_chunks::<8>().0) {
        let &[
            command,
            flags,
            offset_low,
            offset_high,
            shift,
            length_low,
            length_high,
            fill,
        ] = words;
        let command = u16::from(command % 10);
        let offset = u64::from(u16::from_le_bytes([offset_low, offset_high])) << (shift & 0x3f);
        let mut length =
            u64::from(u16::from_le_bytes([length_low, length_high])) << (shift >> 6 << 1);
        let mut flags = CommandFlags::from_bits_retain(u16::from(flags));
        let extended = mode == ReplyMode::Extended;
        if extended && command == cmd::WRITE {
            flags.insert(CommandFlags::PAYLOAD_LEN);
        }
        let carries =
            command == cmd::WRITE || (extended && flags.contains(CommandFlags::PAYLOAD_LEN));
        if carries {
            length = length.min(2 * u64::from(MAX_REQUEST));
        }
        let request = Request {
            flags,
            command,
            cookie,
            offset,
            length,
        };
        match mode {
            ReplyMode::Extended => bytes.extend(request.encode_extended()),
            _ => bytes.extend(request.encode_compact()),
        }
        if carries {
            // Small numbers, so that the payload of a block status may make sense.
            let payload = (0..length).map(|at| if at % 4 == 3 { fill & 15 } else { 0 });
            bytes.extend(payload);
        }
        if command == cmd::DISC {
            break;
        }
        let range = offset..offset.saturating_add(length);
        asked.insert(cookie, Asked { command, range });
    }
    (bytes, asked)
}

#[derive(Debug)]
struct Replied {
    cookie: u64,
    is_last: bool,
}

/// Takes one reply, or one chunk of one, off `rest`.
fn take_reply(rest: &mut &[u8], mode: ReplyMode, asked: &HashMap<u64, Asked>) -> Option<Replied> {
    let chunk = match mode {
        ReplyMode::Simple => {
            let reply = SimpleReply::decode(take(rest)?).ok()?;
            let cookie = reply.cookie;
            // What a raw input asked for is not known, nor then where its replies end.
            let Some(asked) = asked.get(&cookie) else {
                *rest = &[];
                return Some(Replied {
                    cookie,
                    is_last: true,
                });
            };
            if asked.command == cmd::READ && reply.error == 0 {
                *rest = rest.get((asked.range.end - asked.range.start) as usize..)?;
            }
            return Some(Replied {
                cookie,
                is_last: true,
            });
        }
        ReplyMode::Structured => ReplyChunk::decode_structured(take(rest)?).ok()?,
        ReplyMode::Extended => ReplyChunk::decode_extended(take(rest)?).ok()?,
    };
    let payload = rest.get(..chunk.length as usize)?;
    *rest = &rest[payload.len()..];
    if let Some(asked) = asked.get(&chunk.cookie) {
        check_chunk(&chunk, payload, asked)?;
    }
    let is_last = chunk.flags.contains(ReplyFlags::DONE);
    Some(Replied {
        cookie: chunk.cookie,
        is_last,
    })
}

/// That a chunk fits its request.
fn check_chunk(chunk: &ReplyChunk, payload: &[u8], asked: &Asked) -> Option<()> {
    let mut rest = payload;
    let reads = asked.command == cmd::READ;
    let covered = match chunk.kind {
        chunk::NONE => return payload.is_empty().then_some(()),
        chunk::OFFSET_DATA if reads => {
            let offset = u64::from_be_bytes(*take(&mut rest)?);
            offset..offset.checked_add(rest.len() as u64)?
        }
        chunk::OFFSET_HOLE if reads => {
            let offset = u64::from_be_bytes(*take(&mut rest)?);
            let length = u32::from_be_bytes(*take(&mut rest)?);
            rest.is_empty()
                .then_some(offset..offset.checked_add(length.into())?)?
        }
        chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT if asked.command == cmd::BLOCK_STATUS => {
            return Some(());
        }
        chunk::ERROR | chunk::ERROR_OFFSET => {
            let error = u32::from_be_bytes(*take(&mut rest)?);
            let length = u16::from_be_bytes(*take(&mut rest)?);
            rest = rest.get(usize::from(length)..)?;
            let tail = if chunk.kind == chunk::ERROR {
                0
            } else {
                payload::ERROR_OFFSET_TAIL
            };
            return (error != 0 && rest.len() == tail).then_some(());
        }
        _ => return None,
    };
    (asked.range.start <= covered.start && covered.end <= asked.range.end).then_some(())
}

fn take<'a, const N: usize>(rest: &mut &'a [u8]) -> Option<&'a [u8; N]> {
    let (head, tail) = rest.split_first_chunk()?;
    *rest = tail;
    Some(head)
}

/// A memory disk with a context of its own, where some requests wait a little.
struct Disk(Memory);

impl Disk {
    async fn wait(&self, offset: u64) {
        for _ in 0..waits(offset) {
            tokio::task::yield_now().await;
        }
    }
}

/// How often a request there waits.
fn waits(offset: u64) -> u64 {
    offset / 4096 % 3
}

impl Engine for Disk {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        self.wait(offset).await;
        self.0.read(buf, offset).await
    }
    fn lend(&self, range: Range<u64>, to: &mut dyn FnMut(&[u8])) {
        if waits(range.start) == 0 {
            self.0.lend(range, to);
        }
    }
    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        self.wait(offset).await;
        self.0.write(buf, offset, flags).await
    }
    fn write_nowait(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Option<Result> {
        match waits(offset) {
            0 => self.0.write_nowait(buf, offset, flags),
            _ => None,
        }
    }
    fn lend_mut(
        &self,
        range: Range<u64>,
        flags: WriteFlags,
        from: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Result> {
        match waits(range.start) {
            0 | 1 => self.0.lend_mut(range, flags, from),
            _ => None,
        }
    }
    async fn flush(&self) -> Result {
        self.0.flush().await
    }
    async fn discard(&self, range: Range<u64>) -> Result {
        self.wait(range.start).await;
        self.0.discard(range).await
    }
    async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        self.0.write_zeroes(range, flags).await
    }
    async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        self.0.extents(range, out).await
    }
    fn contexts(&self) -> Vec<String> {
        vec!["x-fuzz:one".into()]
    }
    async fn status(&self, _: &str, range: Range<u64>, out: &mut Extents<u64>) -> Result {
        self.wait(range.start).await;
        let half = (range.end - range.start) / 2;
        out.push(half, u64::MAX);
        out.push(range.end - range.start - half, 1);
        Ok(())
    }
}
