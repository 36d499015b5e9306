//! A raw client: keeps a fixed number of requests in flight on one connection,
//! with as few system calls as it can, so that what is measured is the server.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use userland_io::transports::nbd::wire::{
    BadMagic, ClientFlags, CommandFlags, ExportInfo, Greeting, HandshakeFlags, OptionHeader,
    Request, SimpleReply, cmd, opt,
};

/// What one connection does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) write: bool,
    pub(crate) depth: usize,
    pub(crate) block: usize,
}

const REQUEST: usize = Request::COMPACT_LEN;
const REPLY: usize = SimpleReply::LEN;

/// An open connection in the transmission phase, without structured replies.
pub(crate) struct Client {
    stream: UnixStream,
    size: u64,
}

fn bad(magic: BadMagic) -> io::Error {
    io::Error::other(format!("not an NBD server: {magic:?}"))
}

impl Client {
    /// Connects to the default export of the server at `socket`.
    pub(crate) fn connect(socket: &Path) -> io::Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        let mut greeting = [0; Greeting::LEN];
        stream.read_exact(&mut greeting)?;
        let no_zeroes = HandshakeFlags::NO_ZEROES;
        if !Greeting::decode(&greeting)
            .map_err(bad)?
            .flags
            .contains(no_zeroes)
        {
            return Err(io::Error::other("the server is too old: no NO_ZEROES"));
        }
        let flags = ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES;
        let header = OptionHeader {
            option: opt::EXPORT_NAME,
            length: 0,
        };
        stream.write_all(&[&flags.bits().to_be_bytes()[..], &header.encode()].concat())?;
        let mut info = [0; ExportInfo::LEN];
        stream.read_exact(&mut info)?;
        let size = ExportInfo::decode(&info).size;
        Ok(Client { stream, size })
    }

    /// Writes the whole disk once, so that nothing is answered from holes.
    pub(crate) fn fill(&mut self) -> io::Result<()> {
        let block = 1 << 20;
        let mut message = vec![0x5a; REQUEST + block];
        for offset in (0..self.size).step_by(block) {
            let len = block.min((self.size - offset) as usize);
            header(&mut message, true, offset, len);
            self.stream.write_all(&message[..REQUEST + len])?;
            self.reply(&mut [])?;
        }
        Ok(())
    }

    fn reply(&mut self, payload: &mut [u8]) -> io::Result<()> {
        let mut reply = [0; REPLY];
        self.stream.read_exact(&mut reply)?;
        check(&reply)?;
        self.stream.read_exact(payload)
    }

    /// Runs `load` for `time`; how many requests were answered in how long.
    pub(crate) fn run(&mut self, load: Load, time: Duration) -> io::Result<(u64, Duration)> {
        let blocks = self.size / load.block as u64;
        let message = REQUEST + if load.write { load.block } else { 0 };
        let answer = REPLY + if load.write { 0 } else { load.block };
        let mut out = vec![0xa5; message * load.depth];
        let mut input = vec![0; (answer * load.depth).max(256 << 10)];
        let (mut sent, mut done, mut filled) = (load.depth, 0, 0);
        let start = Instant::now();
        let mut ask = load.depth;
        let mut running = true;
        loop {
            for message in out.chunks_exact_mut(message).take(ask) {
                let offset = fastrand::u64(..blocks) * load.block as u64;
                header(message, load.write, offset, load.block);
            }
            self.stream.write_all(&out[..ask * message])?;
            // Answers that are whole; the start of the next one stays.
            filled += self.stream.read(&mut input[filled..])?;
            let whole = filled / answer;
            for reply in input[..whole * answer].chunks_exact(answer) {
                if let Some(header) = reply.first_chunk() {
                    check(header)?;
                }
            }
            input.copy_within(whole * answer..filled, 0);
            filled -= whole * answer;
            done += whole;
            running &= start.elapsed() < time;
            ask = if running { whole } else { 0 };
            sent += ask;
            if done == sent {
                return Ok((done as u64, start.elapsed()));
            }
        }
    }
}

fn header(message: &mut [u8], write: bool, offset: u64, len: usize) {
    let request = Request {
        flags: CommandFlags::empty(),
        command: if write { cmd::WRITE } else { cmd::READ },
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
