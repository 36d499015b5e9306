//! The client's side of a handshake as bytes, and the server's taken apart.
#![allow(dead_code)]

use userland_io::transports::nbd::fuzz::{self, Handshake};
use userland_io::transports::nbd::session::Session;
use userland_io::transports::nbd::wire::{
    ClientFlags, Greeting, HandshakeFlags, OptionHeader, OptionReply, info, opt, rep,
};

/// The bytes that a client sends.
#[derive(Clone)]
pub(crate) struct Client(pub(crate) Vec<u8>);

impl Client {
    pub(crate) fn new() -> Self {
        Client::with_flags(ClientFlags::all().bits())
    }
    pub(crate) fn with_flags(flags: u32) -> Self {
        Client(flags.to_be_bytes().to_vec())
    }
    pub(crate) fn option(self, option: u32, data: &[u8]) -> Self {
        self.announce(option, data.len() as u32).raw(data)
    }
    pub(crate) fn announce(self, option: u32, length: u32) -> Self {
        self.raw(&OptionHeader { option, length }.encode())
    }
    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }
    pub(crate) fn structured(self) -> Self {
        self.option(opt::STRUCTURED_REPLY, b"")
    }
    pub(crate) fn extended(self) -> Self {
        self.option(opt::EXTENDED_HEADERS, b"")
    }
    pub(crate) fn go(self, name: &str) -> Self {
        self.option(opt::GO, &request(name, &[]))
    }
    pub(crate) fn run(&self) -> Outcome {
        Outcome::parse(fuzz::handshake(&self.0))
    }
}

/// The data of INFO and GO.
pub(crate) fn request(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(infos.len() as u16).to_be_bytes());
    data.extend(infos.iter().flat_map(|info| info.to_be_bytes()));
    data
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub(crate) fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend_from_slice(&(query.len() as u32).to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    data
}

#[derive(Debug, PartialEq)]
pub(crate) struct Reply {
    pub(crate) option: u32,
    pub(crate) kind: u32,
    pub(crate) data: Vec<u8>,
}

#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) replies: Vec<Reply>,
    /// What is no reply: the answer to EXPORT_NAME.
    pub(crate) rest: Vec<u8>,
    pub(crate) session: Option<Session>,
    pub(crate) input: Vec<u8>,
}

impl Outcome {
    pub(crate) fn parse(handshake: Handshake) -> Self {
        let (replies, rest) = parse_replies(&handshake.output);
        let (session, input) = handshake.session.unzip();
        Outcome {
            replies,
            rest,
            session,
            input: input.unwrap_or_default(),
        }
    }
    /// Option and type of each reply.
    pub(crate) fn kinds(&self) -> Vec<(u32, u32)> {
        self.replies.iter().map(|r| (r.option, r.kind)).collect()
    }
    /// The infos among the replies to `option`.
    pub(crate) fn infos(&self, option: u32) -> Vec<(u16, Vec<u8>)> {
        let infos = self
            .replies
            .iter()
            .filter(|r| (r.option, r.kind) == (option, rep::INFO));
        infos
            .map(|r| {
                (
                    u16::from_be_bytes([r.data[0], r.data[1]]),
                    r.data[2..].to_vec(),
                )
            })
            .collect()
    }
    pub(crate) fn info(&self, option: u32, kind: u16) -> Option<Vec<u8>> {
        let mut found = self.infos(option).into_iter().filter(|(k, _)| *k == kind);
        let first = found.next();
        assert!(found.next().is_none(), "info {kind} came twice");
        first.map(|(_, data)| data)
    }
    pub(crate) fn session(&self) -> &Session {
        self.session.as_ref().expect("a session")
    }
    /// Names and ids of the contexts in the replies to `option`.
    pub(crate) fn contexts(&self, option: u32) -> Vec<(u32, String)> {
        let replies = self.replies.iter();
        let replies = replies.filter(|r| (r.option, r.kind) == (option, rep::META_CONTEXT));
        replies
            .map(|r| {
                let (id, name) = r.data.split_first_chunk().unwrap();
                (
                    u32::from_be_bytes(*id),
                    String::from_utf8(name.to_vec()).unwrap(),
                )
            })
            .collect()
    }
}

pub(crate) fn parse_replies(output: &[u8]) -> (Vec<Reply>, Vec<u8>) {
    let (greeting, mut rest) = output.split_first_chunk().expect("a greeting");
    let flags = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
    assert_eq!(Greeting::decode(greeting), Ok(Greeting { flags }));
    let mut replies = Vec::new();
    while let Some((head, after)) = rest.split_first_chunk()
        && let Ok(head) = OptionReply::decode(head)
    {
        let (data, after) = after.split_at(head.length as usize);
        replies.push(Reply {
            option: head.option,
            kind: head.kind,
            data: data.to_vec(),
        });
        rest = after;
    }
    (replies, rest.to_vec())
}

pub(crate) const ALL_INFOS: [u16; 4] = [
    info::EXPORT,
    info::NAME,
    info::DESCRIPTION,
    info::BLOCK_SIZE,
];

/// A valid session with every option in it.
pub(crate) fn everything() -> Client {
    Client::new()
        .option(opt::STARTTLS, b"")
        .option(opt::LIST, b"")
        .structured()
        .option(opt::LIST_META_CONTEXT, &meta("a", &[]))
        .option(opt::SET_META_CONTEXT, &meta("b", &["base:allocation"]))
        .option(opt::INFO, &request("", &ALL_INFOS))
        .extended()
        .option(
            opt::SET_META_CONTEXT,
            &meta("a", &["base:allocation", "x-fuzz:one"]),
        )
        .option(opt::GO, &request("a", &ALL_INFOS))
}

pub(crate) fn mutate(random: &mut fastrand::Rng, bytes: &mut Vec<u8>) {
    for _ in 0..random.usize(1..4) {
        let at = random.usize(..bytes.len());
        match random.u8(..6) {
            0 => bytes[at] ^= 1 << random.u8(..8),
            1 => bytes[at] = random.u8(..),
            2 => bytes[at] = [0, 0xff, 0x7f, 0x80][random.usize(..4)],
            3 => drop(bytes.remove(at)),
            4 => bytes.insert(at, random.u8(..)),
            _ => {
                let end = (at + random.usize(..40)).min(bytes.len());
                let copy = bytes[at..end].to_vec();
                bytes.splice(at..at, copy);
            }
        }
        if bytes.is_empty() {
            return;
        }
    }
}
