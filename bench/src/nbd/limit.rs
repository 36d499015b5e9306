//! The limit: a server that does nothing but move the protocol's bytes.
//!
//! A thread for each connection. One receive takes as many requests as have come, one send answers
//! them all; what is longer goes through in pieces that stay in the cache, and a long payload is
//! received straight to its place. The disk is memory in chunks, of which each has a lock that
//! nobody contends for. There are no checks beyond the end of memory and nothing may be refused, so no
//! real server can be expected to do the same work in less. At depth 1 two context switches decide, and a
//! server that stays awake for the next request can beat it.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::UnixListener;
use std::sync::{Mutex, PoisonError};
use std::thread;

use userland_io::transports::nbd::wire::{
    ClientFlags, ExportInfo, Greeting, HandshakeFlags, OptionHeader, OptionReply, Request,
    SimpleReply, TransmissionFlags, cmd, opt, rep,
};

use super::endpoint::{Endpoint, Stream};

/// What one receive or send takes.
const BATCH: usize = 256 << 10;
/// The bytes behind one lock.
const CHUNK: usize = 1 << 20;

/// The disk.
struct Memory(Vec<Mutex<Box<[u8]>>>);

impl Memory {
    fn new(size: u64) -> Self {
        let chunks = size.div_ceil(CHUNK as u64);
        let chunk = |_| Mutex::new(vec![0x5a; CHUNK].into());
        Memory((0..chunks).map(chunk).collect())
    }

    fn size(&self) -> u64 {
        (self.0.len() * CHUNK) as u64
    }

    /// Calls `each` with the memory of each part of a range, as long as all goes well.
    fn parts(
        &self,
        mut offset: u64,
        mut len: usize,
        mut each: impl FnMut(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        while len > 0 {
            let start = (offset % CHUNK as u64) as usize;
            let part = len.min(CHUNK - start);
            let chunk = self.0.get((offset / CHUNK as u64) as usize);
            let chunk = chunk.ok_or_else(|| io::Error::other("beyond the end"))?;
            let mut chunk = chunk.lock().unwrap_or_else(PoisonError::into_inner);
            each(&mut chunk[start..start + part])?;
            offset += part as u64;
            len -= part;
        }
        Ok(())
    }
}

/// Serves at `endpoint`, for ever.
///
/// # Errors
/// If it cannot listen.
pub fn serve(endpoint: &Endpoint, size: u64) -> io::Result<()> {
    let memory: &'static Memory = Box::leak(Box::new(Memory::new(size)));
    let serve = |stream| {
        thread::spawn(move || {
            // A client that leaves is not the server's error.
            let _ = handshake(stream, memory);
        });
    };
    match endpoint {
        Endpoint::Unix(path) => {
            for stream in UnixListener::bind(path)?.incoming() {
                serve(Stream::Unix(stream?));
            }
        }
        Endpoint::Tcp(port) => {
            for stream in TcpListener::bind((Ipv4Addr::LOCALHOST, *port))?.incoming() {
                let stream = stream?;
                stream.set_nodelay(true)?;
                serve(Stream::Tcp(stream));
            }
        }
    }
    Ok(())
}

fn bad<E: std::fmt::Debug>(error: E) -> io::Error {
    io::Error::other(format!("the client lost its place: {error:?}"))
}

fn handshake(mut stream: Stream, memory: &Memory) -> io::Result<()> {
    let flags = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
    stream.write_all(&Greeting { flags }.encode())?;
    stream.read_exact(&mut [0; size_of::<ClientFlags>()])?;
    loop {
        let mut header = [0; OptionHeader::LEN];
        stream.read_exact(&mut header)?;
        let OptionHeader { option, length } = OptionHeader::decode(&header).map_err(bad)?;
        stream.read_exact(&mut vec![0; length.min(4096) as usize])?;
        if option == opt::EXPORT_NAME {
            break;
        }
        // Clients go on without structured replies, and with the oldest way to choose an export.
        let reply = OptionReply {
            option,
            kind: rep::ERR_UNSUP,
            length: 0,
        };
        stream.write_all(&reply.encode())?;
    }
    let info = ExportInfo {
        size: memory.size(),
        flags: TransmissionFlags::HAS_FLAGS | TransmissionFlags::CAN_MULTI_CONN,
    };
    stream.write_all(&info.encode())?;
    transmit(stream, memory)
}

fn transmit(mut stream: Stream, memory: &Memory) -> io::Result<()> {
    let mut input = vec![0; BATCH];
    let mut out = Vec::with_capacity(BATCH);
    let mut filled = 0;
    loop {
        match stream.read(&mut input[filled..])? {
            0 => return Ok(()),
            n => filled += n,
        }
        let mut at = 0;
        while let Some(header) = input[at..filled].first_chunk() {
            let request = Request::decode_compact(header).map_err(bad)?;
            let (offset, len) = (request.offset, request.length as usize);
            at += Request::COMPACT_LEN;
            match request.command {
                cmd::READ => {
                    answer(&mut out, &mut stream, request.cookie)?;
                    memory.parts(offset, len, |bytes| append(&mut out, &mut stream, bytes))?;
                }
                cmd::WRITE => {
                    memory.parts(offset, len, |bytes| {
                        let here = bytes.len().min(filled - at);
                        let (first, rest) = bytes.split_at_mut(here);
                        first.copy_from_slice(&input[at..at + here]);
                        at += here;
                        if rest.is_empty() {
                            return Ok(());
                        }
                        // The client may be waiting for these before it sends more.
                        send(&mut out, &mut stream)?;
                        stream.read_exact(rest)
                    })?;
                    answer(&mut out, &mut stream, request.cookie)?;
                }
                cmd::DISC => return send(&mut out, &mut stream),
                _ => answer(&mut out, &mut stream, request.cookie)?,
            }
        }
        input.copy_within(at..filled, 0);
        filled -= at;
        send(&mut out, &mut stream)?;
    }
}

fn answer(out: &mut Vec<u8>, stream: &mut Stream, cookie: u64) -> io::Result<()> {
    append(out, stream, &SimpleReply { error: 0, cookie }.encode())
}

fn append(out: &mut Vec<u8>, stream: &mut Stream, mut bytes: &[u8]) -> io::Result<()> {
    while out.len() + bytes.len() > BATCH {
        let (first, rest) = bytes.split_at(BATCH - out.len());
        out.extend_from_slice(first);
        send(out, stream)?;
        bytes = rest;
    }
    out.extend_from_slice(bytes);
    Ok(())
}

fn send(out: &mut Vec<u8>, stream: &mut Stream) -> io::Result<()> {
    stream.write_all(out)?;
    out.clear();
    Ok(())
}
