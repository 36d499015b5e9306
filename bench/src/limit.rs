//! The limit: a server that does nothing but move the protocol's bytes.
//!
//! One read takes as many requests as have come, one write answers them all.
//! There is no disk, no range check, and one connection at a time, so no real
//! server can be expected to do the same work in less. At depth 1 two context
//! switches decide, and a server that spins before it sleeps can beat it.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use userland_io::transports::nbd::wire::{
    ClientFlags, ExportInfo, Greeting, HandshakeFlags, OptionHeader, Request, SimpleReply,
    TransmissionFlags, cmd,
};

/// Serves one connection after another at `socket`, for ever.
pub(crate) fn serve(socket: &Path, size: u64) -> io::Result<()> {
    let memory = vec![0x5a; size as usize];
    for stream in UnixListener::bind(socket)?.incoming() {
        // A client that leaves is not the server's error.
        let _ = transmit(stream?, memory.clone());
    }
    Ok(())
}

fn transmit(mut stream: UnixStream, mut memory: Vec<u8>) -> io::Result<()> {
    let flags = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
    stream.write_all(&Greeting { flags }.encode())?;
    let mut hello = [0; size_of::<ClientFlags>() + OptionHeader::LEN];
    stream.read_exact(&mut hello)?;
    let info = ExportInfo {
        size: memory.len() as u64,
        flags: TransmissionFlags::HAS_FLAGS,
    };
    stream.write_all(&info.encode())?;

    let mut input = vec![0; 2 << 20];
    let mut out = Vec::with_capacity(2 << 20);
    let mut filled = 0;
    loop {
        match stream.read(&mut input[filled..])? {
            0 => return Ok(()),
            n => filled += n,
        }
        let mut at = 0;
        while let Some(header) = input[at..filled].first_chunk() {
            let request = Request::decode_compact(header)
                .map_err(|_| io::Error::other("the client lost its place"))?;
            let (offset, len) = (request.offset as usize, request.length as usize);
            let write = request.command == cmd::WRITE;
            let payload = at + Request::COMPACT_LEN;
            let end = payload + if write { len } else { 0 };
            if end > filled {
                break;
            }
            let cookie = request.cookie;
            out.extend_from_slice(&SimpleReply { error: 0, cookie }.encode());
            match write {
                true => memory[offset..offset + len].copy_from_slice(&input[payload..end]),
                false => out.extend_from_slice(&memory[offset..offset + len]),
            }
            at = end;
        }
        input.copy_within(at..filled, 0);
        filled -= at;
        stream.write_all(&out)?;
        out.clear();
    }
}
