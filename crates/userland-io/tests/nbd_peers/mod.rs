//! Servers for the tests of the NBD client: real ones as child processes, and one that does
//! what a test says, lies included.
#![allow(dead_code, unreachable_pub, missing_docs)]

pub mod requests;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use userland_io::transports::nbd::session::ReplyMode;
use userland_io::transports::nbd::wire::{
    ExportInfo, Greeting, HandshakeFlags, OptionHeader, OptionReply, ReplyChunk, ReplyFlags,
    Request, SimpleReply, TransmissionFlags, chunk, cmd, info, opt, rep,
};

#[path = "../common/need.rs"]
mod need;

/// Long enough on a loaded machine; a test that waits this long has failed.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A server as a child process, on a Unix socket in a directory of its own.
pub struct Peer {
    child: Option<Child>,
    command: Vec<String>,
    socket: PathBuf,
    dir: tempfile::TempDir,
}

impl Peer {
    /// Starts `nbdkit` with these arguments; `None`, once the skip is told, if it is not installed.
    pub fn nbdkit(args: &[&str]) -> Option<Self> {
        let mut command = vec!["nbdkit".to_owned(), "-f".to_owned(), "-U".to_owned()];
        command.push("{socket}".to_owned());
        command.extend(args.iter().map(|arg| (*arg).to_owned()));
        Self::start(command)
    }

    /// Starts `qemu-nbd` with these arguments.
    pub fn qemu_nbd(args: &[&str]) -> Option<Self> {
        let mut command = vec!["qemu-nbd".to_owned(), "-t".to_owned(), "-k".to_owned()];
        command.push("{socket}".to_owned());
        command.extend(args.iter().map(|arg| (*arg).to_owned()));
        Self::start(command)
    }

    /// `{socket}` and `{dir}` in the arguments stand for the paths; `{dir}/disk` is made, 64 MiB of holes.
    fn start(command: Vec<String>) -> Option<Self> {
        need::program(&command[0])?;
        let dir = tempfile::tempdir().unwrap();
        let image = std::fs::File::create(dir.path().join("disk")).unwrap();
        image.set_len(64 << 20).unwrap();
        let mut peer = Peer {
            child: None,
            command,
            socket: dir.path().join("socket"),
            dir,
        };
        peer.restart();
        Some(peer)
    }

    pub fn uri(&self) -> String {
        self.uri_of("")
    }

    pub fn uri_of(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    pub fn image(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    /// SIGKILL, and the wait for its end.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Starts it again, on the same socket and image.
    pub fn restart(&mut self) {
        self.kill();
        let _ = std::fs::remove_file(&self.socket);
        let fill = |arg: &String| {
            arg.replace("{socket}", &self.socket.to_string_lossy())
                .replace("{dir}", &self.dir.path().to_string_lossy())
        };
        let args: Vec<String> = self.command[1..].iter().map(fill).collect();
        let mut child = Command::new(&self.command[0])
            .args(&args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        // A connection that says nothing does no harm to these servers, but `nbdkit` logs it: look for the file.
        while !listening(&self.socket) {
            assert!(
                start.elapsed() < PATIENCE,
                "{:?} does not listen",
                self.command
            );
            if let Some(status) = child.try_wait().unwrap() {
                panic!("{} {args:?} ended: {status}", self.command[0]);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.child = Some(child);
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.kill();
    }
}

fn listening(socket: &Path) -> bool {
    // The file appears at bind; a refused connection means that listen has not come yet.
    #[cfg(unix)]
    return socket.exists() && std::os::unix::net::UnixStream::connect(socket).is_ok();
    #[cfg(not(unix))]
    return socket.exists();
}

/// A server that does what the test says.
pub struct Fake {
    listener: TcpListener,
    pub size: u64,
    pub flags: TransmissionFlags,
    pub mode: ReplyMode,
    /// Granted, with ids from 1 on.
    pub contexts: Vec<&'static str>,
}

impl Fake {
    pub async fn new(mode: ReplyMode) -> Self {
        use TransmissionFlags as F;
        Fake {
            listener: TcpListener::bind(("127.0.0.1", 0)).await.unwrap(),
            size: 1 << 20,
            flags: F::HAS_FLAGS
                | F::SEND_FLUSH
                | F::SEND_FUA
                | F::SEND_TRIM
                | F::SEND_WRITE_ZEROES
                | F::SEND_FAST_ZERO,
            mode,
            contexts: vec!["base:allocation"],
        }
    }

    pub fn uri(&self) -> String {
        format!("nbd://{}/", self.listener.local_addr().unwrap())
    }

    pub async fn accept_raw(&self) -> TcpStream {
        let stream = within(self.listener.accept()).await.unwrap().0;
        stream.set_nodelay(true).unwrap();
        stream
    }

    /// True if nobody connects for a while.
    pub async fn is_left_alone(&self) -> bool {
        let next = self.listener.accept();
        tokio::time::timeout(Duration::from_millis(50), next)
            .await
            .is_err()
    }

    /// Accepts one connection and grants it the export.
    pub async fn accept(&self) -> FakeConn {
        let mut stream = self.accept_raw().await;
        let greeting = Greeting {
            flags: HandshakeFlags::all(),
        };
        stream.write_all(&greeting.encode()).await.unwrap();
        let mut flags = [0; 4];
        within(stream.read_exact(&mut flags)).await.unwrap();
        loop {
            let mut head = [0; OptionHeader::LEN];
            within(stream.read_exact(&mut head)).await.unwrap();
            let head = OptionHeader::decode(&head).unwrap();
            let mut data = vec![0; head.length as usize];
            within(stream.read_exact(&mut data)).await.unwrap();
            let mut replies: Vec<(u32, Vec<u8>)> = Vec::new();
            match head.option {
                opt::EXTENDED_HEADERS if self.mode == ReplyMode::Extended => {
                    replies.push((rep::ACK, vec![]));
                }
                opt::STRUCTURED_REPLY if self.mode != ReplyMode::Simple => {
                    replies.push((rep::ACK, vec![]));
                }
                opt::SET_META_CONTEXT => {
                    for (id, name) in (1u32..).zip(&self.contexts) {
                        let mut context = id.to_be_bytes().to_vec();
                        context.extend_from_slice(name.as_bytes());
                        replies.push((rep::META_CONTEXT, context));
                    }
                    replies.push((rep::ACK, vec![]));
                }
                opt::GO => {
                    let export = ExportInfo {
                        size: self.size,
                        flags: self.flags,
                    };
                    let mut data = info::EXPORT.to_be_bytes().to_vec();
                    data.extend_from_slice(&export.encode());
                    replies.push((rep::INFO, data));
                    replies.push((rep::ACK, vec![]));
                }
                _ => replies.push((rep::ERR_UNSUP, vec![])),
            }
            for (kind, data) in replies {
                let reply = OptionReply {
                    option: head.option,
                    kind,
                    length: data.len() as u32,
                };
                stream.write_all(&reply.encode()).await.unwrap();
                stream.write_all(&data).await.unwrap();
            }
            if head.option == opt::GO {
                return FakeConn {
                    stream,
                    mode: self.mode,
                };
            }
        }
    }
}

/// A connection of a [`Fake`] in the transmission phase.
pub struct FakeConn {
    pub stream: TcpStream,
    mode: ReplyMode,
}

impl FakeConn {
    /// The next request and its payload; `None` at the end.
    pub async fn request(&mut self) -> Option<(Request, Vec<u8>)> {
        let request = match self.mode {
            ReplyMode::Extended => {
                let mut head = [0; Request::EXTENDED_LEN];
                within(self.stream.read_exact(&mut head)).await.ok()?;
                Request::decode_extended(&head).unwrap()
            }
            _ => {
                let mut head = [0; Request::COMPACT_LEN];
                within(self.stream.read_exact(&mut head)).await.ok()?;
                Request::decode_compact(&head).unwrap()
            }
        };
        let mut payload = Vec::new();
        if request.command == cmd::WRITE {
            payload.resize(request.length as usize, 0);
            within(self.stream.read_exact(&mut payload)).await.ok()?;
        }
        Some((request, payload))
    }

    /// True if the client says nothing for a while.
    pub async fn is_quiet(&self) -> bool {
        let mut byte = [0];
        let word = self.stream.peek(&mut byte);
        tokio::time::timeout(Duration::from_millis(50), word)
            .await
            .is_err()
    }

    pub async fn simple(&mut self, request: &Request, error: u32) {
        let reply = SimpleReply {
            error,
            cookie: request.cookie,
        };
        self.raw(&reply.encode()).await;
    }

    /// A chunk with a payload, last or not.
    pub async fn chunk(&mut self, request: &Request, kind: u16, done: bool, payload: &[u8]) {
        let head = ReplyChunk {
            flags: match done {
                true => ReplyFlags::DONE,
                false => ReplyFlags::empty(),
            },
            kind,
            cookie: request.cookie,
            offset: request.offset,
            length: payload.len() as u64,
        };
        match self.mode {
            ReplyMode::Extended => self.raw(&head.encode_extended()).await,
            _ => self.raw(&head.encode_structured()).await,
        }
        self.raw(payload).await;
    }

    /// Success without bytes.
    pub async fn done(&mut self, request: &Request) {
        match self.mode {
            ReplyMode::Simple => self.simple(request, 0).await,
            _ => self.chunk(request, chunk::NONE, true, &[]).await,
        }
    }

    /// An error of this number.
    pub async fn fail(&mut self, request: &Request, error: u32) {
        match self.mode {
            ReplyMode::Simple => self.simple(request, error).await,
            _ => {
                let mut payload = error.to_be_bytes().to_vec();
                payload.extend_from_slice(&[0, 0]);
                self.chunk(request, chunk::ERROR, true, &payload).await;
            }
        }
    }

    /// The bytes of a read, all at once.
    pub async fn data(&mut self, request: &Request, bytes: &[u8]) {
        match self.mode {
            ReplyMode::Simple => {
                self.simple(request, 0).await;
                self.raw(bytes).await;
            }
            _ => {
                let mut payload = request.offset.to_be_bytes().to_vec();
                payload.extend_from_slice(bytes);
                self.chunk(request, chunk::OFFSET_DATA, true, &payload)
                    .await;
            }
        }
    }

    pub async fn raw(&mut self, bytes: &[u8]) {
        // The client may have hung up on a lie already.
        let _ = self.stream.write_all(bytes).await;
    }

    /// Answers everything from `disk` until the client goes; gives what was asked, in order.
    pub async fn serve(mut self, disk: &mut [u8]) -> Vec<Request> {
        let mut log = Vec::new();
        while let Some((request, payload)) = self.request().await {
            log.push(request);
            if !self.answer(&request, &payload, disk).await {
                break;
            }
        }
        log
    }

    /// Answers one request from `disk`; false at the end.
    pub async fn answer(&mut self, request: &Request, payload: &[u8], disk: &mut [u8]) -> bool {
        let range = request.offset as usize..(request.offset + request.length) as usize;
        match request.command {
            cmd::READ => {
                let bytes = disk[range].to_vec();
                self.data(request, &bytes).await;
            }
            cmd::WRITE => {
                disk[range].copy_from_slice(payload);
                self.done(request).await;
            }
            cmd::WRITE_ZEROES => {
                disk[range].fill(0);
                self.done(request).await;
            }
            cmd::DISC => return false,
            _ => self.done(request).await,
        }
        true
    }
}

/// Fails the test rather than hang.
pub async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future)
        .await
        .expect("nothing happened for a long time")
}
