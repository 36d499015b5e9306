//! The plainest NBD client: sends what it is told, all at once, and puts replies together again.
//!
//! It keeps no state beside the connection, retries nothing and splits nothing, so
//! that what a test sees is what the server did.
#![allow(dead_code)]

use std::collections::HashMap;
use std::ops::Range;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use userland_io::transports::nbd::session::ReplyMode;
use userland_io::transports::nbd::wire::*;

/// A connection that is through the handshake.
pub(crate) struct Plain {
    read: Box<dyn AsyncRead + Send + Unpin>,
    write: Box<dyn AsyncWrite + Send + Unpin>,
    mode: ReplyMode,
    cookie: u64,
    /// What the server told about the export.
    pub(crate) info: ExportInfo,
}

/// A request, with what it carries.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    pub(crate) command: u16,
    pub(crate) flags: CommandFlags,
    pub(crate) range: Range<u64>,
    pub(crate) payload: Vec<u8>,
}

impl Ask {
    pub(crate) fn new(command: u16, flags: CommandFlags, range: Range<u64>) -> Self {
        Ask {
            command,
            flags,
            range,
            payload: Vec::new(),
        }
    }
}

/// A whole reply.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reply {
    /// 0, or an NBD error.
    pub(crate) error: u32,
    /// What was read.
    pub(crate) data: Vec<u8>,
    /// Block status: length and status.
    pub(crate) status: Vec<(u64, u64)>,
    /// How many bytes chunks have covered.
    filled: u64,
}

impl Plain {
    /// Shakes hands over `stream` for `export`, with replies as `mode`, and `base:allocation` unless they are simple.
    pub(crate) async fn connect<S>(stream: S, export: &str, mode: ReplyMode) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (read, write) = tokio::io::split(stream);
        let info = ExportInfo {
            size: 0,
            flags: TransmissionFlags::empty(),
        };
        let mut plain = Plain {
            read: Box::new(read),
            write: Box::new(write),
            mode,
            cookie: 0,
            info,
        };
        Greeting::decode(&plain.take().await).unwrap();
        let flags = ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES;
        plain
            .write
            .write_all(&flags.bits().to_be_bytes())
            .await
            .unwrap();
        let name = [&(export.len() as u32).to_be_bytes()[..], export.as_bytes()].concat();
        match mode {
            ReplyMode::Simple => {}
            ReplyMode::Structured => plain.option(opt::STRUCTURED_REPLY, &[]).await,
            ReplyMode::Extended => plain.option(opt::EXTENDED_HEADERS, &[]).await,
        }
        if mode != ReplyMode::Simple {
            let context = BASE_ALLOCATION.as_bytes();
            let numbers = [1u32, context.len() as u32].map(u32::to_be_bytes);
            let query = [&name[..], numbers.as_flattened(), context].concat();
            plain.option(opt::SET_META_CONTEXT, &query).await;
        }
        plain.option(opt::GO, &[&name[..], &[0, 0]].concat()).await;
        plain
    }

    /// Sends an option and reads replies up to its ACK.
    async fn option(&mut self, option: u32, data: &[u8]) {
        let head = OptionHeader {
            option,
            length: data.len() as u32,
        };
        self.write
            .write_all(&[&head.encode()[..], data].concat())
            .await
            .unwrap();
        loop {
            let reply = OptionReply::decode(&self.take().await).unwrap();
            let data = self.take_vec(reply.length.into()).await;
            assert_eq!(reply.option, option);
            match reply.kind {
                rep::ACK => return,
                rep::INFO if data[..2] == info::EXPORT.to_be_bytes() => {
                    self.info = ExportInfo::decode(data[2..].try_into().unwrap());
                }
                kind if kind & rep::ERROR != 0 => {
                    panic!("{} answered {kind:#x}", opt::name(option))
                }
                _ => {}
            }
        }
    }

    /// Sends all of `asks` without waiting, and answers their replies in the order of the asks.
    pub(crate) async fn ask(&mut self, asks: &[Ask]) -> Vec<Reply> {
        let first = self.cookie;
        self.cookie += asks.len() as u64;
        let mut bytes = Vec::new();
        let mut open = HashMap::new();
        for (cookie, ask) in (first..).zip(asks) {
            let length = ask.range.end - ask.range.start;
            let (command, offset) = (ask.command, ask.range.start);
            let mut request = Request {
                flags: ask.flags,
                command,
                cookie,
                offset,
                length,
            };
            match self.mode {
                ReplyMode::Extended => {
                    if command == cmd::WRITE {
                        request.flags |= CommandFlags::PAYLOAD_LEN;
                    }
                    bytes.extend(request.encode_extended());
                }
                _ => bytes.extend(request.encode_compact()),
            }
            bytes.extend(&ask.payload);
            let data = if command == cmd::READ {
                length as usize
            } else {
                0
            };
            open.insert(
                cookie,
                Reply {
                    data: vec![0xee; data],
                    ..Reply::default()
                },
            );
        }
        let mode = self.mode;
        let (read, write) = (&mut self.read, &mut self.write);
        // At the same time: a server that waits for us to read must not wait for ever.
        let sent = async { write.write_all(&bytes).await.unwrap() };
        let received = async {
            let mut done = HashMap::new();
            while !open.is_empty() {
                if let Some((cookie, reply)) = receive(read, mode, asks, first, &mut open).await {
                    done.insert(cookie, reply);
                }
            }
            done
        };
        let ((), mut done) = tokio::join!(sent, received);
        let cookies = first..first + asks.len() as u64;
        cookies
            .map(|cookie| done.remove(&cookie).unwrap())
            .collect()
    }

    /// Says goodbye and waits for the server to close.
    pub(crate) async fn disconnect(mut self) {
        let request = Request {
            flags: CommandFlags::empty(),
            command: cmd::DISC,
            cookie: 0,
            offset: 0,
            length: 0,
        };
        match self.mode {
            ReplyMode::Extended => self
                .write
                .write_all(&request.encode_extended())
                .await
                .unwrap(),
            _ => self
                .write
                .write_all(&request.encode_compact())
                .await
                .unwrap(),
        }
        assert_eq!(
            self.read.read(&mut [0]).await.unwrap(),
            0,
            "something came after the goodbye"
        );
    }

    async fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.read.read_exact(&mut bytes).await.unwrap();
        bytes
    }

    async fn take_vec(&mut self, length: u64) -> Vec<u8> {
        take_vec(&mut self.read, length).await
    }
}

type Source = Box<dyn AsyncRead + Send + Unpin>;

async fn take_vec(read: &mut Source, length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    read.read_exact(&mut bytes).await.unwrap();
    bytes
}

/// Reads one reply or chunk, and answers the reply that it completes.
async fn receive(
    read: &mut Source,
    mode: ReplyMode,
    asks: &[Ask],
    first: u64,
    open: &mut HashMap<u64, Reply>,
) -> Option<(u64, Reply)> {
    let chunk = match mode {
        ReplyMode::Simple => {
            let head = take_vec(read, SimpleReply::LEN as u64).await;
            let head = SimpleReply::decode(head[..].try_into().unwrap()).unwrap();
            let mut reply = open
                .remove(&head.cookie)
                .expect("a reply to something asked");
            reply.error = head.error;
            if head.error == 0 {
                read.read_exact(&mut reply.data).await.unwrap();
            }
            return Some((head.cookie, reply));
        }
        ReplyMode::Structured => {
            let head = take_vec(read, ReplyChunk::STRUCTURED_LEN as u64).await;
            ReplyChunk::decode_structured(head[..].try_into().unwrap()).unwrap()
        }
        ReplyMode::Extended => {
            let head = take_vec(read, ReplyChunk::EXTENDED_LEN as u64).await;
            ReplyChunk::decode_extended(head[..].try_into().unwrap()).unwrap()
        }
    };
    let payload = take_vec(read, chunk.length).await;
    let reply = open
        .get_mut(&chunk.cookie)
        .expect("a chunk for something asked");
    let ask = &asks[(chunk.cookie - first) as usize];
    if mode == ReplyMode::Extended {
        assert_eq!(
            chunk.offset, ask.range.start,
            "an extended chunk repeats the request's offset"
        );
    }
    take_chunk(reply, ask, chunk.kind, &payload);
    if !chunk.flags.contains(ReplyFlags::DONE) {
        return None;
    }
    let reply = open.remove(&chunk.cookie)?;
    if reply.error == 0 {
        assert_eq!(
            reply.filled,
            reply.data.len() as u64,
            "{ask:?} was not answered whole"
        );
    }
    Some((chunk.cookie, reply))
}

fn take_chunk(reply: &mut Reply, ask: &Ask, kind: u16, payload: &[u8]) {
    let u32_at = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
    let u64_at = |at: usize| u64::from_be_bytes(payload[at..at + 8].try_into().unwrap());
    match kind {
        chunk::NONE => assert!(payload.is_empty()),
        chunk::OFFSET_DATA => {
            let bytes = &payload[payload::OFFSET_DATA_HEAD..];
            let at = (u64_at(0) - ask.range.start) as usize;
            reply.data[at..at + bytes.len()].copy_from_slice(bytes);
            reply.filled += bytes.len() as u64;
        }
        chunk::OFFSET_HOLE => {
            let (at, len) = ((u64_at(0) - ask.range.start) as usize, u32_at(8) as usize);
            reply.data[at..at + len].fill(0);
            reply.filled += len as u64;
        }
        chunk::BLOCK_STATUS => {
            let extents = payload[payload::STATUS_HEAD..].chunks(payload::STATUS_EXTENT);
            let pair = |bytes: &[u8]| {
                bytes
                    .as_chunks()
                    .0
                    .iter()
                    .map(|&b| u32::from_be_bytes(b).into())
                    .collect()
            };
            reply.status.extend(extents.map(|extent| two(pair(extent))));
        }
        chunk::BLOCK_STATUS_EXT => {
            let extents = payload[payload::STATUS_EXT_HEAD..].chunks(payload::STATUS_EXT_EXTENT);
            let pair = |bytes: &[u8]| {
                bytes
                    .as_chunks()
                    .0
                    .iter()
                    .map(|&b| u64::from_be_bytes(b))
                    .collect()
            };
            reply.status.extend(extents.map(|extent| two(pair(extent))));
        }
        kind if kind & chunk::IS_ERROR != 0 => reply.error = u32_at(0),
        kind => panic!("{ask:?}: unknown chunk {kind}"),
    }
}

fn two(numbers: Vec<u64>) -> (u64, u64) {
    (numbers[0], numbers[1])
}
