//! A raw client: keeps a fixed number of requests in flight on a connection,
//! with as few system calls as it can, so that what is measured is the server.

use std::io::{self, Read, Write};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use userland_io::transports::nbd::wire::{
    BadMagic, ClientFlags, CommandFlags, ExportInfo, Greeting, HandshakeFlags, OptionHeader,
    Request, SimpleReply, cmd, opt,
};

use super::endpoint::{Endpoint, Stream};

/// What each connection does.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Writes, not reads.
    pub write: bool,
    /// Requests in flight.
    pub depth: usize,
    /// Bytes of a request.
    pub block: usize,
    /// How many connections do it at once.
    pub connections: usize,
    /// After so many writes comes a flush; 0: never.
    pub flush_every: usize,
}

const REQUEST: usize = Request::COMPACT_LEN;
const REPLY: usize = SimpleReply::LEN;
/// What one receive takes at most. More would only leave the cache again.
const RECEIVE: usize = 256 << 10;
/// Shorter writes are gathered to be sent together.
const GATHERED: usize = 64 << 10;

/// An open connection in the transmission phase, without structured replies.
#[derive(Debug)]
pub struct Client {
    stream: Stream,
    size: u64,
}

/// What came of a load.
#[derive(Clone, Debug)]
pub struct Tally {
    /// Requests that were answered, by connection.
    pub done: Vec<u64>,
    /// In how long.
    pub took: Duration,
}

impl Tally {
    /// Requests that were answered on all connections.
    pub fn total(&self) -> u64 {
        self.done.iter().sum()
    }
}

fn bad(magic: BadMagic) -> io::Error {
    io::Error::other(format!("not an NBD server: {magic:?}"))
}

impl Client {
    /// Connects to `export` of the server at `endpoint`.
    ///
    /// # Errors
    /// If it cannot be had.
    pub fn connect(endpoint: &Endpoint, export: &str) -> io::Result<Self> {
        let mut stream = endpoint.connect()?;
        let mut greeting = [0; Greeting::LEN];
        stream.read_exact(&mut greeting)?;
        let greeting = Greeting::decode(&greeting).map_err(bad)?;
        if !greeting.flags.contains(HandshakeFlags::NO_ZEROES) {
            return Err(io::Error::other("the server is too old: no NO_ZEROES"));
        }
        let flags = ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES;
        let header = OptionHeader {
            option: opt::EXPORT_NAME,
            length: export.len() as u32,
        };
        let hello = [
            &flags.bits().to_be_bytes()[..],
            &header.encode(),
            export.as_bytes(),
        ];
        stream.write_all(&hello.concat())?;
        let mut info = [0; ExportInfo::LEN];
        stream.read_exact(&mut info)?;
        let size = ExportInfo::decode(&info).size;
        Ok(Client { stream, size })
    }

    /// Writes the whole disk once, so that nothing is answered from holes.
    ///
    /// # Errors
    /// If the server fails.
    pub fn fill(&mut self) -> io::Result<()> {
        let block = 1 << 20;
        let mut message = vec![0x5a; REQUEST + block];
        for offset in (0..self.size).step_by(block) {
            let len = block.min((self.size - offset) as usize);
            header(&mut message, cmd::WRITE, offset, len);
            self.stream.write_all(&message[..REQUEST + len])?;
            self.reply(0)?;
        }
        Ok(())
    }

    /// Reads `len` bytes at `offset`, alone.
    ///
    /// # Errors
    /// If the server fails.
    pub fn read_once(&mut self, offset: u64, len: usize) -> io::Result<()> {
        let mut message = [0; REQUEST];
        header(&mut message, cmd::READ, offset, len);
        self.stream.write_all(&message)?;
        self.reply(len)
    }

    fn reply(&mut self, payload: usize) -> io::Result<()> {
        let mut reply = [0; REPLY];
        self.stream.read_exact(&mut reply)?;
        check(&reply)?;
        self.stream.read_exact(&mut vec![0; payload])
    }

    /// Runs `load` for `time`, on this connection alone; how many requests were answered.
    ///
    /// # Errors
    /// If the server fails.
    pub fn run(&mut self, load: Load, time: Duration) -> io::Result<u64> {
        let blocks = self.size / load.block as u64;
        let mut requests = Requests::new(load, blocks.max(1));
        let mut replies = Replies::new(if load.write { 0 } else { load.block });
        let (mut sent, mut done) = (load.depth, 0);
        let mut ask = load.depth;
        let start = Instant::now();
        loop {
            requests.send(&mut self.stream, ask)?;
            let came = replies.receive(&mut self.stream)?;
            done += came;
            ask = if start.elapsed() < time { came } else { 0 };
            sent += ask;
            if done == sent {
                return Ok(done as u64);
            }
        }
    }
}

/// Runs `load` on all of `clients` at once.
///
/// # Errors
/// If the server fails one of them.
pub fn run(clients: &mut [Client], load: Load, time: Duration) -> io::Result<Tally> {
    let barrier = Barrier::new(clients.len() + 1);
    std::thread::scope(|scope| {
        let start = |client| {
            let barrier = &barrier;
            scope.spawn(move || {
                barrier.wait();
                Client::run(client, load, time)
            })
        };
        let threads: Vec<_> = clients.iter_mut().map(start).collect();
        barrier.wait();
        let start = Instant::now();
        let ended = threads.into_iter().map(|thread| thread.join());
        let done: io::Result<Vec<u64>> = ended
            .map(|done| done.unwrap_or_else(|_| Err(io::Error::other("the client panicked"))))
            .collect();
        Ok(Tally {
            done: done?,
            took: start.elapsed(),
        })
    })
}

/// Makes requests at random offsets.
struct Requests {
    load: Load,
    blocks: u64,
    /// As many messages as go out together, back to back.
    out: Vec<u8>,
    since_flush: usize,
}

impl Requests {
    fn new(load: Load, blocks: u64) -> Self {
        let mut requests = Requests {
            load,
            blocks,
            out: Vec::new(),
            since_flush: 0,
        };
        let together = match requests.is_gathered() {
            true => load.depth,
            false => 1,
        };
        requests.out = vec![0xa5; requests.message() * together];
        requests
    }

    fn message(&self) -> usize {
        REQUEST + if self.load.write { self.load.block } else { 0 }
    }

    fn is_gathered(&self) -> bool {
        !self.load.write || (self.load.block < GATHERED && self.load.flush_every == 0)
    }

    fn send(&mut self, stream: &mut Stream, count: usize) -> io::Result<()> {
        let message = self.message();
        if self.is_gathered() {
            for at in 0..count {
                let (load, offset) = (self.load, self.offset());
                let command = if load.write { cmd::WRITE } else { cmd::READ };
                header(&mut self.out[at * message..], command, offset, load.block);
            }
            return stream.write_all(&self.out[..count * message]);
        }
        for _ in 0..count {
            if self.load.flush_every > 0 && self.since_flush == self.load.flush_every {
                self.since_flush = 0;
                let mut flush = [0; REQUEST];
                header(&mut flush, cmd::FLUSH, 0, 0);
                stream.write_all(&flush)?;
                continue;
            }
            self.since_flush += 1;
            let offset = self.offset();
            header(&mut self.out, cmd::WRITE, offset, self.load.block);
            stream.write_all(&self.out[..message])?;
        }
        Ok(())
    }

    fn offset(&self) -> u64 {
        fastrand::u64(..self.blocks) * self.load.block as u64
    }
}

/// Takes replies, and throws away what was read.
struct Replies {
    payload: usize,
    input: Vec<u8>,
    /// The start of a header whose rest has yet to come.
    held: usize,
    /// What is left of a payload.
    skip: usize,
}

impl Replies {
    fn new(payload: usize) -> Self {
        Replies {
            payload,
            input: vec![0; RECEIVE],
            held: 0,
            skip: 0,
        }
    }

    /// Receives once; how many replies that completed.
    fn receive(&mut self, stream: &mut Stream) -> io::Result<usize> {
        let came = stream.read(&mut self.input[self.held..])?;
        if came == 0 {
            return Err(io::Error::other("the server closed the connection"));
        }
        let end = self.held + came;
        let (mut at, mut whole) = (0, 0);
        loop {
            if self.skip > 0 {
                let part = self.skip.min(end - at);
                self.skip -= part;
                at += part;
                if self.skip > 0 {
                    break;
                }
                whole += 1;
            }
            let Some(reply) = self.input[at..end].first_chunk() else {
                break;
            };
            check(reply)?;
            at += REPLY;
            self.skip = self.payload;
            whole += usize::from(self.payload == 0);
        }
        self.input.copy_within(at..end, 0);
        self.held = end - at;
        Ok(whole)
    }
}

fn header(message: &mut [u8], command: u16, offset: u64, len: usize) {
    let request = Request {
        flags: CommandFlags::empty(),
        command,
        cookie: offset,
        offset,
        length: len as u64,
    };
    message[..REQUEST].copy_from_slice(&request.encode_compact());
}

fn check(reply: &[u8; REPLY]) -> io::Result<()> {
    match SimpleReply::decode(reply).map_err(bad)?.error {
        0 => Ok(()),
        error => Err(io::Error::other(format!(
            "the server answered errno {error}"
        ))),
    }
}
