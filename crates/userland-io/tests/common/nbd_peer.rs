//! A raw NBD client for the transmission phase, and an engine that does as it is told.
//!
//! The client speaks to the request loop over a pipe in memory, with a session made
//! by hand, so that it can send what no real client sends.
#![allow(dead_code)]

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::{Arc, atomic};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use userland_io::engines::Memory;
use userland_io::transports::nbd::limits::{Environment, Limits, Shutdown};
use userland_io::transports::nbd::session::{ContextKind, MetaContext, ReplyMode, Session};
use userland_io::transports::nbd::socket::Socket;
#[cfg(unix)]
use userland_io::transports::nbd::socket::Stream;
use userland_io::transports::nbd::transmission::{self, Budget, Chairs};
use userland_io::transports::nbd::wire::{
    self, BlockSizes, CommandFlags, ReplyChunk, ReplyFlags, Request, SimpleReply,
    TransmissionFlags, chunk, cmd,
};
use userland_io::{
    Device, Engine, Error, Extents, Geometry, ReadBuf, Result, WriteBuf, WriteFlags,
};

pub(crate) const MIB: usize = 1 << 20;

/// Where requests fail, and with what.
pub(crate) type Bad = (Range<u64>, fn() -> Error);

/// A memory disk whose requests can be delayed, held back, and made to fail or panic.
#[derive(Clone)]
pub(crate) struct Rig(Arc<RigState>);

pub(crate) struct RigState {
    memory: Memory,
    pub(crate) geometry: Mutex<Geometry>,
    /// How long each read and write takes.
    pub(crate) delay: Mutex<Duration>,
    /// Requests that touch it fail.
    pub(crate) bad: Mutex<Option<Bad>>,
    /// Reads of this offset panic.
    pub(crate) panic_at: Mutex<Option<u64>>,
    /// Writes wait for a permit.
    pub(crate) gate: Mutex<Option<Arc<Semaphore>>>,
    /// What was asked for, as text.
    pub(crate) log: Mutex<Vec<String>>,
    pub(crate) in_flight: atomic::AtomicUsize,
    pub(crate) most_in_flight: atomic::AtomicUsize,
    pub(crate) finished: atomic::AtomicUsize,
}

impl std::ops::Deref for Rig {
    type Target = RigState;
    fn deref(&self) -> &RigState {
        &self.0
    }
}

impl Rig {
    pub(crate) fn new(size: u64) -> Self {
        let memory = Memory::new(size);
        let geometry = memory.geometry();
        Rig(Arc::new(RigState {
            memory,
            geometry: geometry.into(),
            delay: Mutex::default(),
            bad: Mutex::default(),
            panic_at: Mutex::default(),
            gate: Mutex::default(),
            log: Mutex::default(),
            in_flight: 0.into(),
            most_in_flight: 0.into(),
            finished: 0.into(),
        }))
    }

    pub(crate) fn taken(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    async fn pass(&self, what: String, range: Range<u64>, waits: bool) -> Result {
        use atomic::Ordering::SeqCst;
        self.log.lock().unwrap().push(what);
        let now = self.in_flight.fetch_add(1, SeqCst) + 1;
        self.most_in_flight.fetch_max(now, SeqCst);
        let delay = *self.delay.lock().unwrap();
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        let gate = self.gate.lock().unwrap().clone();
        if let (Some(gate), true) = (gate, waits) {
            gate.acquire().await.unwrap().forget();
        }
        self.in_flight.fetch_sub(1, SeqCst);
        self.finished.fetch_add(1, SeqCst);
        match &*self.bad.lock().unwrap() {
            Some((bad, error)) if range.start < bad.end && bad.start < range.end => Err(error()),
            _ => Ok(()),
        }
    }
}

impl Engine for Rig {
    fn geometry(&self) -> Geometry {
        *self.geometry.lock().unwrap()
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        let range = offset..offset + buf.len() as u64;
        self.pass(format!("read {offset}+{}", buf.len()), range, false)
            .await?;
        assert!(
            *self.panic_at.lock().unwrap() != Some(offset),
            "as was asked for"
        );
        self.memory.read(buf, offset).await
    }
    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        let range = offset..offset + buf.len() as u64;
        self.pass(
            format!("write {offset}+{} {}", buf.len(), flags.bits()),
            range,
            true,
        )
        .await?;
        self.memory.write(buf, offset, WriteFlags::empty()).await
    }
    async fn flush(&self) -> Result {
        self.pass("flush".into(), 0..u64::MAX, false).await?;
        self.memory.flush().await
    }
    async fn discard(&self, range: Range<u64>) -> Result {
        self.pass(format!("discard {range:?}"), range.clone(), true)
            .await?;
        self.memory.discard(range).await
    }
    async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        self.pass(
            format!("zeroes {range:?} {}", flags.bits()),
            range.clone(),
            true,
        )
        .await?;
        self.memory.write_zeroes(range, WriteFlags::empty()).await
    }
    async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        self.pass(format!("extents {range:?}"), range.clone(), false)
            .await?;
        self.memory.extents(range, out).await
    }
    fn contexts(&self) -> Vec<String> {
        vec!["test:parity".into()]
    }
    async fn status(&self, context: &str, range: Range<u64>, out: &mut Extents<u64>) -> Result {
        assert_eq!(context, "test:parity");
        // Blocks of 4 KiB, even and odd, with a status beyond 32 bits.
        let mut at = range.start;
        while at < range.end && !out.is_full() {
            let end = (at / 4096 + 1) * 4096;
            out.push(end.min(range.end) - at, (1 << 40) + at / 4096 % 2);
            at = end;
        }
        Ok(())
    }
    async fn prefetch(&self, range: Range<u64>) -> Result {
        self.pass(format!("prefetch {range:?}"), range, false).await
    }
}

/// A session of `mode` on a disk of `size` bytes, with everything offered.
pub(crate) fn session(mode: ReplyMode, size: u64) -> Session {
    let mut flags = TransmissionFlags::all()
        - TransmissionFlags::READ_ONLY
        - TransmissionFlags::ROTATIONAL
        - TransmissionFlags::SEND_RESIZE;
    if mode == ReplyMode::Simple {
        flags -= TransmissionFlags::SEND_DF;
    }
    if mode != ReplyMode::Extended {
        flags -= TransmissionFlags::BLOCK_STATUS_PAYLOAD;
    }
    Session {
        export: "test".into(),
        size,
        flags,
        replies: mode,
        contexts: match mode {
            ReplyMode::Simple => Vec::new(),
            _ => vec![MetaContext {
                id: 1,
                kind: ContextKind::Allocation,
            }],
        },
        blocks: BlockSizes {
            minimum: 1,
            preferred: 4096,
            maximum: 64 << 20,
        },
    }
}

/// The two contexts of a [`Rig`].
pub(crate) fn both_contexts() -> Vec<MetaContext> {
    vec![
        MetaContext {
            id: 1,
            kind: ContextKind::Allocation,
        },
        MetaContext {
            id: 7,
            kind: ContextKind::Engine("test:parity".into()),
        },
    ]
}

pub(crate) fn environment(limits: Limits) -> (watch::Sender<bool>, Environment) {
    let (sender, shutdown) = Shutdown::channel();
    let environment = Environment {
        budget: Budget::new(limits.max_server_bytes),
        chairs: Chairs::default(),
        limits: Arc::new(limits),
        shutdown,
    };
    (sender, environment)
}

/// A reply to one request, put together from its chunks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) error: u32,
    pub(crate) text: String,
    /// The offset of an `ERROR_OFFSET`.
    pub(crate) at: Option<u64>,
    /// What was read, with zeroes for holes.
    pub(crate) data: Vec<u8>,
    /// The content chunks: kind, offset, length.
    pub(crate) chunks: Vec<(u16, u64, usize)>,
    /// By context: lengths and status words.
    pub(crate) status: HashMap<u32, Vec<(u64, u64)>>,
}

/// The client's end of a connection.
pub(crate) struct Peer {
    pub(crate) reader: Box<dyn AsyncRead + Send + Unpin>,
    pub(crate) writer: Box<dyn AsyncWrite + Send + Unpin>,
    pub(crate) server: JoinHandle<io::Result<()>>,
    pub(crate) mode: ReplyMode,
    pub(crate) shutdown: watch::Sender<bool>,
    cookie: u64,
    /// What has been sent and not been answered.
    open: HashMap<u64, Request>,
    partial: HashMap<u64, Answer>,
}

impl Peer {
    /// Serves `device` with `session` and default limits.
    pub(crate) fn new<E: Engine>(device: &Device<E>, session: Session) -> Self {
        let (shutdown, environment) = environment(Limits::default());
        Peer::with(device, session, shutdown, environment)
    }

    pub(crate) fn with<E: Engine>(
        device: &Device<E>,
        session: Session,
        shutdown: watch::Sender<bool>,
        environment: Environment,
    ) -> Self {
        let (ours, theirs) = tokio::io::duplex(256 << 10);
        Peer::over(ours, theirs, device, session, shutdown, environment)
    }

    /// As [`new`](Self::new), through a Unix socket.
    #[cfg(unix)]
    pub(crate) fn through_unix<E: Engine>(device: &Device<E>, session: Session) -> Self {
        Peer::with_socket(device, session).0
    }

    /// As [`through_unix`](Self::through_unix), with a second handle to the client's socket.
    #[cfg(unix)]
    pub(crate) fn with_socket<E: Engine>(
        device: &Device<E>,
        session: Session,
    ) -> (Self, std::os::unix::net::UnixStream) {
        let (shutdown, environment) = environment(Limits::default());
        let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
        let ours = ours.into_std().unwrap();
        let second = ours.try_clone().unwrap();
        let ours = tokio::net::UnixStream::from_std(ours).unwrap();
        let theirs = Stream::from(theirs);
        let peer = Peer::over(ours, theirs, device, session, shutdown, environment);
        (peer, second)
    }

    fn over<E: Engine>(
        ours: impl AsyncRead + AsyncWrite + Send + 'static,
        theirs: impl Socket,
        device: &Device<E>,
        session: Session,
        shutdown: watch::Sender<bool>,
        environment: Environment,
    ) -> Self {
        let (reader, writer) = tokio::io::split(ours);
        let mode = session.replies;
        let device = device.clone();
        let server = tokio::spawn(transmission::run(
            theirs,
            Vec::new(),
            session,
            device,
            environment,
        ));
        Peer {
            reader: Box::new(reader),
            writer: Box::new(writer),
            server,
            mode,
            shutdown,
            cookie: 0x1234_5678_0000_0000,
            open: HashMap::new(),
            partial: HashMap::new(),
        }
    }

    /// Sends a request, with the flags that its command needs in this mode. Answers its cookie.
    pub(crate) async fn send(
        &mut self,
        command: u16,
        flags: CommandFlags,
        offset: u64,
        length: u64,
        payload: &[u8],
    ) -> u64 {
        let (cookie, head) = self.head(command, flags, offset, length);
        self.writer.write_all(&head).await.unwrap();
        self.writer.write_all(payload).await.unwrap();
        cookie
    }

    /// The header of a request that is about to be sent.
    pub(crate) fn head(
        &mut self,
        command: u16,
        mut flags: CommandFlags,
        offset: u64,
        length: u64,
    ) -> (u64, Vec<u8>) {
        self.cookie += 1;
        if command == cmd::WRITE && self.mode == ReplyMode::Extended {
            flags |= CommandFlags::PAYLOAD_LEN;
        }
        let request = Request {
            flags,
            command,
            cookie: self.cookie,
            offset,
            length,
        };
        self.open.insert(self.cookie, request);
        let head = match self.mode {
            ReplyMode::Extended => request.encode_extended().to_vec(),
            _ => request.encode_compact().to_vec(),
        };
        (self.cookie, head)
    }

    /// Receives until some request is answered; its cookie and answer.
    pub(crate) async fn receive(&mut self) -> (u64, Answer) {
        self.try_receive().await.expect("the server closed")
    }

    pub(crate) async fn try_receive(&mut self) -> io::Result<(u64, Answer)> {
        loop {
            let magic = self.reader.read_u32().await?;
            if magic == wire::SIMPLE_REPLY_MAGIC {
                assert_ne!(self.mode, ReplyMode::Extended, "simple reply");
                let mut head = [0; SimpleReply::LEN];
                head[..4].copy_from_slice(&magic.to_be_bytes());
                self.reader.read_exact(&mut head[4..]).await?;
                let reply = SimpleReply::decode(&head).unwrap();
                let request = self.open.remove(&reply.cookie).expect("a cookie of ours");
                let mut answer = Answer {
                    error: reply.error,
                    ..Answer::default()
                };
                if request.command == cmd::READ && reply.error == 0 {
                    assert_eq!(self.mode, ReplyMode::Simple, "simple reply to a read");
                    answer.data = vec![0; request.length as usize];
                    self.reader.read_exact(&mut answer.data).await?;
                }
                return Ok((reply.cookie, answer));
            }
            let head = match self.mode {
                ReplyMode::Extended => {
                    let mut head = [0; ReplyChunk::EXTENDED_LEN];
                    head[..4].copy_from_slice(&magic.to_be_bytes());
                    self.reader.read_exact(&mut head[4..]).await?;
                    ReplyChunk::decode_extended(&head).unwrap()
                }
                _ => {
                    let mut head = [0; ReplyChunk::STRUCTURED_LEN];
                    head[..4].copy_from_slice(&magic.to_be_bytes());
                    self.reader.read_exact(&mut head[4..]).await?;
                    ReplyChunk::decode_structured(&head).unwrap()
                }
            };
            let mut payload = vec![0; head.length as usize];
            self.reader.read_exact(&mut payload).await?;
            self.chunk(head, &payload);
            if head.flags.contains(ReplyFlags::DONE) {
                self.open.remove(&head.cookie);
                let mut answer = self.partial.remove(&head.cookie).unwrap_or_default();
                answer.chunks.sort_by_key(|chunk| chunk.1);
                return Ok((head.cookie, answer));
            }
        }
    }

    fn chunk(&mut self, head: ReplyChunk, payload: &[u8]) {
        let request = self.open.get(&head.cookie).expect("a cookie of ours");
        if self.mode == ReplyMode::Extended {
            assert_eq!(head.offset, request.offset, "offset of the request");
        }
        let answer = self.partial.entry(head.cookie).or_default();
        let u64_at = |at: usize| u64::from_be_bytes(payload[at..at + 8].try_into().unwrap());
        let u32_at = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
        let mut content = |offset: u64, data: &[u8]| {
            let from = (offset - request.offset) as usize;
            assert!(from + data.len() <= request.length as usize, "outside");
            let end = answer.data.len().max(from + data.len());
            answer.data.resize(end, 0xee);
            answer.data[from..from + data.len()].copy_from_slice(data);
            answer.chunks.push((head.kind, offset, data.len()));
        };
        match head.kind {
            chunk::NONE => assert!(payload.is_empty()),
            chunk::OFFSET_DATA => {
                assert!(payload.len() > 8);
                content(u64_at(0), &payload[8..]);
            }
            chunk::OFFSET_HOLE => {
                assert_eq!(payload.len(), 12);
                assert!(u32_at(8) > 0);
                content(u64_at(0), &vec![0; u32_at(8) as usize]);
            }
            chunk::ERROR | chunk::ERROR_OFFSET => {
                answer.error = u32_at(0);
                assert_ne!(answer.error, 0);
                let text = u16::from_be_bytes(payload[4..6].try_into().unwrap()) as usize;
                answer.text = String::from_utf8(payload[6..6 + text].to_vec()).unwrap();
                let rest = &payload[6 + text..];
                match head.kind {
                    chunk::ERROR => assert!(rest.is_empty()),
                    _ => {
                        let at = u64::from_be_bytes(rest.try_into().unwrap());
                        assert!(at >= request.offset && at - request.offset <= request.length);
                        answer.at = Some(at);
                    }
                }
            }
            chunk::BLOCK_STATUS => {
                assert_ne!(self.mode, ReplyMode::Extended);
                assert!(payload.len() >= 12 && (payload.len() - 4).is_multiple_of(8));
                let all = (4..payload.len())
                    .step_by(8)
                    .map(|at| (u32_at(at).into(), u32_at(at + 4).into()));
                let before = answer.status.insert(u32_at(0), all.collect());
                assert!(before.is_none(), "a context twice");
            }
            chunk::BLOCK_STATUS_EXT => {
                assert_eq!(self.mode, ReplyMode::Extended);
                assert_eq!(payload.len(), 8 + 16 * u32_at(4) as usize);
                let all = (8..payload.len())
                    .step_by(16)
                    .map(|at| (u64_at(at), u64_at(at + 8)));
                let before = answer.status.insert(u32_at(0), all.collect());
                assert!(before.is_none(), "a context twice");
            }
            other => panic!("chunk of kind {other}"),
        }
    }

    /// Sends a request and receives its answer, which must be the next.
    pub(crate) async fn call(
        &mut self,
        command: u16,
        flags: CommandFlags,
        offset: u64,
        length: u64,
        payload: &[u8],
    ) -> Answer {
        let cookie = self.send(command, flags, offset, length, payload).await;
        let (answered, answer) = self.receive().await;
        assert_eq!(answered, cookie);
        answer
    }

    pub(crate) async fn read(&mut self, offset: u64, length: usize) -> Answer {
        self.call(cmd::READ, CommandFlags::empty(), offset, length as u64, &[])
            .await
    }

    pub(crate) async fn write(&mut self, offset: u64, data: &[u8]) -> Answer {
        let length = data.len() as u64;
        self.call(cmd::WRITE, CommandFlags::empty(), offset, length, data)
            .await
    }

    /// Leaves as a client should; the server must have ended well, and sent nothing more.
    pub(crate) async fn leave(mut self) {
        self.send(cmd::DISC, CommandFlags::empty(), 0, 0, &[]).await;
        let mut rest = Vec::new();
        self.reader.read_to_end(&mut rest).await.unwrap();
        assert!(rest.is_empty(), "{} bytes after the end", rest.len());
        self.server.await.unwrap().unwrap();
    }
}

/// Bytes that tell their offset and `seed`.
pub(crate) fn pattern(seed: u8, offset: u64, len: usize) -> Vec<u8> {
    (offset..)
        .take(len)
        .map(|at| (at as u8) ^ ((at >> 8) as u8).wrapping_mul(31) ^ seed)
        .collect()
}

pub(crate) const MODES: [ReplyMode; 3] = [
    ReplyMode::Simple,
    ReplyMode::Structured,
    ReplyMode::Extended,
];
