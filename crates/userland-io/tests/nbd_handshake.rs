//! The NBD handshake as clients see it, and as broken ones drive it.
//!
//! Where time does not matter the server's side runs in memory, over bytes that
//! are known in advance (`fuzz::handshake`: exports `a`, the default, and `b`,
//! read-only, 1 MiB, blocks of 512 bytes, context `x-fuzz:one`).

#![cfg(feature = "nbd")]

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use userland_io::transports::nbd::fuzz::{self, Handshake};
use userland_io::transports::nbd::session::{ContextKind, MetaContext, ReplyMode, Session};
use userland_io::transports::nbd::wire::{
    self, BlockSizes, ClientFlags, ExportInfo, Greeting, HandshakeFlags, OptionHeader, OptionReply,
    TransmissionFlags, info, opt, rep,
};
use userland_io::transports::nbd::{Address, Limits, Server, ServerHandle};
use userland_io::{Device, Engine, Geometry, ReadBuf, Result};

/// The bytes that a client sends.
#[derive(Clone)]
struct Client(Vec<u8>);

impl Client {
    fn new() -> Self {
        Client::with_flags(ClientFlags::all().bits())
    }
    fn with_flags(flags: u32) -> Self {
        Client(flags.to_be_bytes().to_vec())
    }
    fn option(self, option: u32, data: &[u8]) -> Self {
        self.announce(option, data.len() as u32).raw(data)
    }
    fn announce(self, option: u32, length: u32) -> Self {
        self.raw(&OptionHeader { option, length }.encode())
    }
    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }
    fn structured(self) -> Self {
        self.option(opt::STRUCTURED_REPLY, b"")
    }
    fn extended(self) -> Self {
        self.option(opt::EXTENDED_HEADERS, b"")
    }
    fn go(self, name: &str) -> Self {
        self.option(opt::GO, &request(name, &[]))
    }
    fn run(&self) -> Outcome {
        Outcome::parse(fuzz::handshake(&self.0))
    }
}

/// The data of INFO and GO.
fn request(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(infos.len() as u16).to_be_bytes());
    data.extend(infos.iter().flat_map(|info| info.to_be_bytes()));
    data
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
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
struct Reply {
    option: u32,
    kind: u32,
    data: Vec<u8>,
}

#[derive(Debug)]
struct Outcome {
    replies: Vec<Reply>,
    /// What is no reply: the answer to EXPORT_NAME.
    rest: Vec<u8>,
    session: Option<Session>,
    input: Vec<u8>,
}

impl Outcome {
    fn parse(handshake: Handshake) -> Self {
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
    fn kinds(&self) -> Vec<(u32, u32)> {
        self.replies.iter().map(|r| (r.option, r.kind)).collect()
    }
    /// The infos among the replies to `option`.
    fn infos(&self, option: u32) -> Vec<(u16, Vec<u8>)> {
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
    fn info(&self, option: u32, kind: u16) -> Option<Vec<u8>> {
        let mut found = self.infos(option).into_iter().filter(|(k, _)| *k == kind);
        let first = found.next();
        assert!(found.next().is_none(), "info {kind} came twice");
        first.map(|(_, data)| data)
    }
    fn session(&self) -> &Session {
        self.session.as_ref().expect("a session")
    }
    /// Names and ids of the contexts in the replies to `option`.
    fn contexts(&self, option: u32) -> Vec<(u32, String)> {
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

fn parse_replies(output: &[u8]) -> (Vec<Reply>, Vec<u8>) {
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

const ALL_INFOS: [u16; 4] = [
    info::EXPORT,
    info::NAME,
    info::DESCRIPTION,
    info::BLOCK_SIZE,
];

#[test]
fn export_name_is_answered_with_and_without_zeroes() {
    for (flags, zeroes) in [
        (ClientFlags::all(), 0),
        (ClientFlags::FIXED_NEWSTYLE, 124),
        // Not even fixed newstyle.
        (ClientFlags::empty(), 124),
    ] {
        let client = Client::with_flags(flags.bits()).option(opt::EXPORT_NAME, b"b");
        let outcome = client.raw(b"request").run();
        assert_eq!(outcome.rest.len(), 10 + zeroes);
        let info = ExportInfo::decode(outcome.rest.first_chunk().unwrap());
        assert_eq!(info.size, 1 << 20);
        assert!(
            info.flags
                .contains(TransmissionFlags::READ_ONLY | TransmissionFlags::HAS_FLAGS)
        );
        assert!(outcome.rest[10..].iter().all(|byte| *byte == 0));
        let session = outcome.session();
        assert_eq!(
            (session.export.as_str(), session.replies),
            ("b", ReplyMode::Simple)
        );
        assert_eq!(session.flags, info.flags);
        assert_eq!(session.blocks.minimum, 1);
        assert_eq!(outcome.input, b"request");
    }
}

#[test]
fn export_name_closes_where_it_cannot_succeed() {
    let long = "x".repeat(4097);
    for client in [
        Client::new().option(opt::EXPORT_NAME, b"nowhere"),
        Client::new().option(opt::EXPORT_NAME, b"a\0"),
        Client::new().option(opt::EXPORT_NAME, b"\xff"),
        Client::new().option(opt::EXPORT_NAME, long.as_bytes()),
        Client::new().announce(opt::EXPORT_NAME, u32::MAX),
        Client::new().option(opt::EXPORT_NAME, &vec![b'x'; 100_000]),
        // Extended headers want GO.
        Client::new().extended().option(opt::EXPORT_NAME, b"a"),
    ] {
        // What follows is not answered.
        let outcome = client.option(opt::LIST, b"").run();
        assert_eq!((outcome.session, outcome.rest), (None, vec![]));
        assert!(
            outcome
                .replies
                .iter()
                .all(|reply| reply.option != opt::LIST)
        );
    }
}

#[test]
fn unknown_client_flags_close() {
    for flags in [4, 1 << 31, u32::MAX] {
        let outcome = Client::with_flags(flags).option(opt::LIST, b"").run();
        assert!(outcome.replies.is_empty() && outcome.session.is_none());
    }
}

#[test]
fn abort_is_acknowledged_and_ends_the_session() {
    for data in [&b""[..], b"with data", &[0; 100_000]] {
        let client = Client::new()
            .option(opt::ABORT, data)
            .option(opt::LIST, b"");
        assert_eq!(client.run().kinds(), [(opt::ABORT, rep::ACK)]);
    }
}

#[test]
fn list_names_and_describes_every_export() {
    let outcome = Client::new().option(opt::LIST, b"").run();
    let data: Vec<_> = outcome
        .replies
        .iter()
        .map(|r| (r.kind, r.data.as_slice()))
        .collect();
    assert_eq!(
        data,
        [
            (rep::SERVER, &b"\0\0\0\x01athe first"[..]),
            (rep::SERVER, b"\0\0\0\x01b"),
            (rep::ACK, b""),
        ]
    );
}

#[test]
fn info_and_go_tell_what_was_asked_for() {
    let outcome = Client::new()
        .option(opt::INFO, &request("a", &ALL_INFOS))
        .option(opt::GO, &request("a", &ALL_INFOS))
        .run();
    assert_eq!(outcome.infos(opt::INFO), outcome.infos(opt::GO));
    assert_eq!(outcome.replies.last().unwrap().kind, rep::ACK);
    let export = outcome.info(opt::GO, info::EXPORT).unwrap();
    let export = ExportInfo::decode(export.as_slice().try_into().unwrap());
    assert_eq!(export.size, 1 << 20);
    assert_eq!(outcome.info(opt::GO, info::NAME).unwrap(), b"a");
    assert_eq!(
        outcome.info(opt::GO, info::DESCRIPTION).unwrap(),
        b"the first"
    );
    let sizes = outcome.info(opt::GO, info::BLOCK_SIZE).unwrap();
    let sizes = BlockSizes::decode(sizes.as_slice().try_into().unwrap());
    let expected = BlockSizes {
        minimum: 512,
        preferred: 4096,
        maximum: 64 << 20,
    };
    assert_eq!(sizes, expected);
    let session = outcome.session();
    assert_eq!(
        (session.blocks, session.flags, session.size),
        (sizes, export.flags, 1 << 20)
    );
}

#[test]
fn a_client_that_does_not_ask_for_block_sizes_need_not_keep_to_any() {
    let outcome = Client::new().go("a").run();
    let sizes = outcome.info(opt::GO, info::BLOCK_SIZE).unwrap();
    assert_eq!(
        BlockSizes::decode(sizes.as_slice().try_into().unwrap()).minimum,
        1
    );
    assert_eq!(outcome.session().blocks.minimum, 1);
    // Having asked in INFO is no promise either.
    let client = Client::new().option(opt::INFO, &request("a", &[info::BLOCK_SIZE]));
    assert_eq!(client.go("a").run().session().blocks.minimum, 1);
    assert_eq!(outcome.info(opt::GO, info::NAME), None);
    assert_eq!(outcome.info(opt::GO, info::DESCRIPTION), None);
}

#[test]
fn info_requests_that_are_unknown_or_repeated_do_no_harm() {
    let infos = [9, 0xffff, info::NAME, info::NAME];
    let outcome = Client::new().option(opt::GO, &request("b", &infos)).run();
    assert_eq!(outcome.info(opt::GO, info::NAME).unwrap(), b"b");
    assert_eq!(outcome.session().export, "b");
}

#[test]
fn an_info_is_no_go() {
    let outcome = Client::new().option(opt::INFO, &request("a", &[])).run();
    assert_eq!(outcome.session, None);
}

#[test]
fn the_empty_name_is_the_default_export() {
    let outcome = Client::new()
        .option(opt::GO, &request("", &[info::NAME]))
        .run();
    assert_eq!(outcome.info(opt::GO, info::NAME).unwrap(), b"a");
    assert_eq!(outcome.session().export, "a");
    let outcome = Client::new().option(opt::EXPORT_NAME, b"").run();
    assert_eq!(outcome.session().export, "a");
}

#[test]
fn an_export_that_is_not_there_is_unknown_and_the_session_goes_on() {
    let outcome = Client::new()
        .structured()
        .go("nowhere")
        .option(opt::INFO, &request("A", &[]))
        .option(opt::LIST_META_CONTEXT, &meta("c", &[]))
        .option(opt::SET_META_CONTEXT, &meta("c", &["base:allocation"]))
        .go("b")
        .run();
    assert_eq!(
        outcome.kinds()[1..5],
        [
            (opt::GO, rep::ERR_UNKNOWN),
            (opt::INFO, rep::ERR_UNKNOWN),
            (opt::LIST_META_CONTEXT, rep::ERR_UNKNOWN),
            (opt::SET_META_CONTEXT, rep::ERR_UNKNOWN),
        ]
    );
    let text = String::from_utf8(outcome.replies[1].data.clone()).unwrap();
    assert!(text.contains("nowhere"), "{text}");
    assert_eq!(outcome.session().export, "b");
}

#[test]
fn what_is_malformed_is_invalid_and_the_session_goes_on() {
    let mut cases: Vec<(u32, Vec<u8>)> = Vec::new();
    let none = [
        opt::LIST,
        opt::STARTTLS,
        opt::STRUCTURED_REPLY,
        opt::EXTENDED_HEADERS,
    ];
    cases.extend(none.map(|option| (option, b"x".to_vec())));
    for option in [opt::INFO, opt::GO] {
        let good = request("a", &ALL_INFOS);
        cases.extend((0..good.len()).map(|cut| (option, good[..cut].to_vec())));
        cases.push((option, [&good[..], b"x"].concat()));
        cases.push((option, b"\xff\xff\xff\xff".to_vec()));
        cases.push((option, [&[0xff, 0xff, 0xff, 0xff], &good[4..]].concat()));
        cases.push((option, request("a\0", &[])));
        cases.push((option, b"\0\0\0\x01\xff\0\0".to_vec()));
        cases.push((option, request(&"x".repeat(4097), &[])));
    }
    for option in [opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT] {
        let good = meta("a", &["base:allocation", "x-fuzz:one"]);
        cases.extend((0..good.len()).map(|cut| (option, good[..cut].to_vec())));
        cases.push((option, [&good[..], b"x"].concat()));
        cases.push((option, b"\0\0\0\x01a\xff\xff\xff\xff".to_vec()));
        cases.push((option, meta("a", &["nocolon"])));
        cases.push((option, meta("a", &[":leaf"])));
        cases.push((option, meta("a", &["x:\0"])));
        cases.push((option, meta("a", &[&format!("x:{}", "y".repeat(4095))])));
    }
    for (option, data) in cases {
        let outcome = Client::new()
            .structured()
            .option(option, &data)
            .go("b")
            .run();
        assert_eq!(
            outcome.kinds()[1],
            (option, rep::ERR_INVALID),
            "{option} {data:?}"
        );
        assert_eq!(outcome.session().replies, ReplyMode::Structured);
    }
}

#[test]
fn tls_and_unknown_options_are_unsupported() {
    for (option, data) in [
        (opt::STARTTLS, &b""[..]),
        (opt::PEEK_EXPORT, b""),
        (0, b""),
        (12, b"data"),
        (u32::MAX, b""),
        (99, &[0; 100_000]),
    ] {
        let outcome = Client::new().option(option, data).go("a").run();
        assert_eq!(outcome.kinds()[0], (option, rep::ERR_UNSUP));
        assert_eq!(outcome.session().export, "a");
    }
}

#[test]
fn reply_modes_are_what_was_asked_for() {
    for (client, mode) in [
        (Client::new(), ReplyMode::Simple),
        (Client::new().structured(), ReplyMode::Structured),
        (
            Client::new().structured().structured(),
            ReplyMode::Structured,
        ),
        (Client::new().extended(), ReplyMode::Extended),
        (Client::new().structured().extended(), ReplyMode::Extended),
    ] {
        let outcome = client.go("a").run();
        assert!(outcome.replies.iter().all(|r| r.kind & rep::ERROR == 0));
        let session = outcome.session();
        assert_eq!(session.replies, mode);
        let df = session.flags.contains(TransmissionFlags::SEND_DF);
        assert_eq!(df, mode != ReplyMode::Simple);
    }
}

#[test]
fn there_is_no_way_back_from_extended_headers() {
    let outcome = Client::new().extended().structured().go("a").run();
    let refused = (opt::STRUCTURED_REPLY, rep::ERR_EXT_HEADER_REQD);
    assert_eq!(outcome.kinds()[1], refused);
    assert_eq!(outcome.session().replies, ReplyMode::Extended);
}

#[test]
fn too_much_data_is_too_big_and_read_past() {
    for option in [
        opt::LIST,
        opt::GO,
        opt::LIST_META_CONTEXT,
        opt::SET_META_CONTEXT,
    ] {
        let outcome = Client::new().option(option, &[0; 65_537]).go("a").run();
        assert_eq!(outcome.kinds()[0], (option, rep::ERR_TOO_BIG));
        assert_eq!(outcome.session().export, "a");
    }
    // The most that fits is looked at.
    let outcome = Client::new().option(opt::GO, &[0; 65_536]).go("a").run();
    assert_eq!(outcome.kinds()[0], (opt::GO, rep::ERR_INVALID));
}

#[test]
fn data_beyond_any_bound_are_refused_and_close() {
    for option in [opt::GO, 99] {
        // What follows is data, whatever it looks like.
        for data in [Client(vec![]).option(opt::LIST, b"").0, vec![0; 1 << 16]] {
            let client = Client::new().announce(option, u32::MAX).raw(&data);
            let outcome = client.run();
            assert_eq!(outcome.replies.len(), 1);
            assert_ne!(outcome.replies[0].kind & rep::ERROR, 0);
            assert_eq!(outcome.session, None);
        }
    }
}

#[test]
fn an_option_without_its_magic_number_closes() {
    let client = Client::new()
        .option(opt::LIST, b"")
        .raw(b"IHAVEOPTIHAVEOPT");
    let outcome = client.raw(&[0; 16]).option(opt::ABORT, b"").run();
    assert!(
        outcome
            .kinds()
            .iter()
            .all(|(option, _)| *option != opt::ABORT)
    );
    assert_eq!(outcome.session, None);
}

#[test]
fn options_without_end_close() {
    let mut client = Client::new();
    for _ in 0..2_000 {
        client = client.option(99, b"");
    }
    let outcome = client.go("a").run();
    assert!((1_000..2_000).contains(&outcome.replies.len()));
    assert_eq!(outcome.session, None);
}

#[test]
fn contexts_are_set_for_the_export_that_is_chosen() {
    let set = |name, queries: &[&str]| {
        let client = Client::new().structured();
        client.option(opt::SET_META_CONTEXT, &meta(name, queries))
    };
    let both = ["x-fuzz:one", "base:allocation"];
    let outcome = set("a", &both).go("a").run();
    let told = outcome.contexts(opt::SET_META_CONTEXT);
    let names: Vec<_> = told.iter().map(|(_, name)| name.as_str()).collect();
    assert_eq!(names, ["base:allocation", "x-fuzz:one"]);
    assert_ne!(told[0].0, told[1].0);
    let agreed = [
        MetaContext {
            id: told[0].0,
            kind: ContextKind::Allocation,
        },
        MetaContext {
            id: told[1].0,
            kind: ContextKind::Engine("x-fuzz:one".into()),
        },
    ];
    assert_eq!(outcome.session().contexts, agreed);
    // The default export by its other name is the same export; so is EXPORT_NAME's.
    assert_eq!(set("", &both).go("a").run().session().contexts, agreed);
    let client = set("a", &both).option(opt::EXPORT_NAME, b"a");
    assert_eq!(client.run().session().contexts, agreed);
    // Another one drops them.
    let outcome = set("a", &both).go("b").run();
    assert!(outcome.session().contexts.is_empty());
}

#[test]
fn the_last_set_counts_even_if_it_fails() {
    let first = || {
        let client = Client::new().structured();
        client.option(opt::SET_META_CONTEXT, &meta("a", &["base:allocation"]))
    };
    let chosen = |client: Client| client.go("a").run().session().contexts.clone();
    assert_eq!(chosen(first()).len(), 1);
    let second = meta("a", &["x-fuzz:one"]);
    let replaced = chosen(first().option(opt::SET_META_CONTEXT, &second));
    assert_eq!(replaced.len(), 1);
    assert_eq!(replaced[0].kind, ContextKind::Engine("x-fuzz:one".into()));
    for failing in [
        meta("nowhere", &["base:allocation"]),
        b"malformed".to_vec(),
        vec![0; 65_537],
        meta("a", &[]),
    ] {
        let client = first().option(opt::SET_META_CONTEXT, &failing);
        assert_eq!(chosen(client), []);
    }
}

#[test]
fn queries_that_select_nothing_are_ignored() {
    let queries = [
        "base:",
        "x-fuzz:",
        "base:nothing",
        "qemu:dirty-bitmap:x",
        "base:allocation",
        "base:allocation",
    ];
    let client = Client::new().structured();
    let client = client.option(opt::SET_META_CONTEXT, &meta("a", &queries));
    let outcome = client.go("a").run();
    assert_eq!(outcome.contexts(opt::SET_META_CONTEXT).len(), 1);
    assert_eq!(outcome.session().contexts.len(), 1);
}

#[test]
fn contexts_need_structured_replies_first() {
    let set = meta("a", &["base:allocation"]);
    let outcome = Client::new()
        .option(opt::SET_META_CONTEXT, &set)
        .structured()
        .go("a")
        .run();
    assert_eq!(
        outcome.kinds()[0],
        (opt::SET_META_CONTEXT, rep::ERR_INVALID)
    );
    assert!(outcome.session().contexts.is_empty());
    let outcome = Client::new()
        .extended()
        .option(opt::SET_META_CONTEXT, &set)
        .go("a")
        .run();
    assert_eq!(outcome.session().contexts.len(), 1);
}

#[test]
fn a_payload_may_select_contexts_where_there_are_some() {
    let has = |client: Client| {
        let flags = client.go("a").run().session().flags;
        flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD)
    };
    let set = |client: Client, name| {
        client.option(opt::SET_META_CONTEXT, &meta(name, &["base:allocation"]))
    };
    assert!(has(set(Client::new().extended(), "a")));
    assert!(!has(Client::new().extended()));
    assert!(!has(set(Client::new().extended(), "b")));
    assert!(!has(set(Client::new().structured(), "a")));
    // INFO says the same as the GO that follows.
    let client = set(Client::new().extended(), "a");
    let outcome = client.option(opt::INFO, &request("a", &[])).go("a").run();
    assert_eq!(outcome.infos(opt::INFO), outcome.infos(opt::GO));
}

#[test]
fn contexts_are_listed_by_name_wildcard_or_all() {
    let list = |queries: &[&str]| {
        let client = Client::new().option(opt::LIST_META_CONTEXT, &meta("a", queries));
        let outcome = client.run();
        assert_eq!(outcome.replies.last().unwrap().kind, rep::ACK);
        let contexts = outcome.contexts(opt::LIST_META_CONTEXT);
        assert!(contexts.iter().all(|(id, _)| *id == 0));
        contexts
            .into_iter()
            .map(|(_, name)| name)
            .collect::<Vec<_>>()
    };
    assert_eq!(list(&[]), ["base:allocation", "x-fuzz:one"]);
    assert_eq!(list(&["base:"]), ["base:allocation"]);
    assert_eq!(list(&["x-fuzz:"]), ["x-fuzz:one"]);
    assert_eq!(list(&["x-fuzz:one"]), ["x-fuzz:one"]);
    assert_eq!(list(&["base:", "base:allocation", "x-fuzz:one"]).len(), 2);
    assert!(list(&["other:", "base:allo", "x-fuzz:one:two"]).is_empty());
}

/// A valid session with every option in it.
fn everything() -> Client {
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

#[test]
fn wherever_a_client_ends_nothing_is_agreed_on_too_early() {
    let whole = everything();
    let complete = whole.run();
    assert!(complete.session.is_some());
    for cut in 0..whole.0.len() {
        let outcome = Client(whole.0[..cut].to_vec()).run();
        assert_eq!(outcome.session, None, "after {cut} bytes");
        assert!(complete.replies.starts_with(&outcome.replies));
    }
}

fn mutate(random: &mut fastrand::Rng, bytes: &mut Vec<u8>) {
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

#[test]
fn mutated_handshakes_get_whole_replies_or_none() {
    let mut random = fastrand::Rng::with_seed(0x4e42_444d);
    let mut sessions = 0;
    for _ in 0..20_000 {
        let mut bytes = everything().0;
        mutate(&mut random, &mut bytes);
        let outcome = Client(bytes).run();
        // Whatever is behind the last whole reply can only be EXPORT_NAME's answer.
        assert!(matches!(outcome.rest.len(), 0 | 10 | 134));
        if let Some(session) = &outcome.session {
            sessions += 1;
            assert!(["a", "b"].contains(&session.export.as_str()));
            assert!(session.contexts.is_empty() || session.replies != ReplyMode::Simple);
        }
    }
    // The mutations neither break everything nor nothing.
    assert!((1_000..19_000).contains(&sessions), "{sessions}");
}

// What follows needs time, and a server.

struct Zeroes;

impl Engine for Zeroes {
    fn geometry(&self) -> Geometry {
        Geometry::read_only(1 << 20)
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, _: u64) -> Result {
        buf.fill(0);
        Ok(())
    }
}

async fn serve(limits: Limits) -> (ServerHandle, u16) {
    let disk = Device::open(Zeroes).await.unwrap();
    let server = Server::new().export("only", disk).limits(limits);
    let server = server.bind(["127.0.0.1:0"]).await.unwrap();
    let Address::Tcp { port, .. } = server.addresses()[0] else {
        panic!("not TCP")
    };
    (server, port)
}

async fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// Reads until the other side closes, however it does.
async fn read_all(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes).await;
    bytes
}

#[tokio::test]
async fn a_single_export_also_answers_to_the_empty_name() {
    let (server, port) = serve(Limits::default()).await;
    let mut stream = connect(port).await;
    let client = Client::new().option(opt::INFO, &request("", &[info::NAME]));
    stream
        .write_all(&client.option(opt::ABORT, b"").0)
        .await
        .unwrap();
    let (replies, _) = parse_replies(&read_all(&mut stream).await);
    assert!(replies.iter().any(|reply| reply.data == b"\0\x01only"));
    server.shutdown().await.unwrap();
}

#[tokio::test]
async fn the_largest_request_is_never_less_than_every_client_may_send() {
    for (wish, told) in [(1, 32 << 20), (100 << 20, 100 << 20)] {
        let mut limits = Limits::default();
        limits.max_request = wish;
        let (server, port) = serve(limits).await;
        let mut stream = connect(port).await;
        let client = Client::new().option(opt::INFO, &request("only", &[info::BLOCK_SIZE]));
        stream
            .write_all(&client.option(opt::ABORT, b"").0)
            .await
            .unwrap();
        let (replies, _) = parse_replies(&read_all(&mut stream).await);
        let sizes = replies
            .iter()
            .find(|reply| reply.data.starts_with(&[0, 3]))
            .unwrap();
        let sizes = BlockSizes::decode(sizes.data[2..].try_into().unwrap());
        assert_eq!(sizes.maximum, told);
        server.shutdown().await.unwrap();
    }
}

#[tokio::test]
async fn a_handshake_may_come_byte_by_byte() {
    let (server, port) = serve(Limits::default()).await;
    let client = Client::new()
        .structured()
        .option(opt::SET_META_CONTEXT, &meta("only", &["base:allocation"]))
        .option(opt::INFO, &request("only", &ALL_INFOS))
        .option(opt::LIST, b"")
        .option(opt::ABORT, b"");
    let mut whole = connect(port).await;
    whole.write_all(&client.0).await.unwrap();
    let expected = read_all(&mut whole).await;
    let mut stream = connect(port).await;
    for byte in &client.0 {
        stream.write_all(std::slice::from_ref(byte)).await.unwrap();
        tokio::task::yield_now().await;
    }
    assert_eq!(read_all(&mut stream).await, expected);
    assert!(parse_replies(&expected).0.len() > 7);
    server.shutdown().await.unwrap();
}

#[tokio::test]
async fn silent_and_dawdling_clients_are_cut_off() {
    let mut limits = Limits::default();
    limits.handshake_timeout = Duration::from_millis(300);
    let (server, port) = serve(limits).await;
    let start = Instant::now();
    let mut silent = connect(port).await;
    let mut half = connect(port).await;
    half.write_all(&Client::new().announce(opt::GO, 100).0)
        .await
        .unwrap();
    let mut dawdling = connect(port).await;
    let dawdle = async {
        dawdling.write_all(&Client::new().0).await.unwrap();
        // Always busy, never done.
        while dawdling
            .write_all(&Client(vec![]).option(99, b"").0)
            .await
            .is_ok()
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let all = async {
        tokio::join!(read_all(&mut silent), read_all(&mut half), dawdle);
    };
    tokio::time::timeout(Duration::from_secs(10), all)
        .await
        .unwrap();
    assert!(start.elapsed() >= Duration::from_millis(300));
    server.shutdown().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_silent_handshake_has_ten_seconds_by_default() {
    let (server, port) = serve(Limits::default()).await;
    let start = tokio::time::Instant::now();
    let greeting = read_all(&mut connect(port).await).await;
    assert_eq!(greeting.len(), Greeting::LEN);
    let took = start.elapsed().as_secs();
    assert!((10..20).contains(&took), "{took} s");
    server.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_client_that_never_reads_is_cut_off() {
    let mut limits = Limits::default();
    limits.handshake_timeout = Duration::from_millis(500);
    limits.max_options = usize::MAX;
    let (server, port) = serve(limits).await;
    let mut stream = connect(port).await;
    stream.write_all(&Client::new().0).await.unwrap();
    // Each asks for a reply several times its own length.
    let flood = Client(vec![]).option(opt::LIST, b"").0.repeat(1_000);
    let flooding = async { while stream.write_all(&flood).await.is_ok() {} };
    tokio::time::timeout(Duration::from_secs(10), flooding)
        .await
        .unwrap();
    server.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_handshake_under_way_ends_when_the_server_shuts_down() {
    let (server, port) = serve(Limits::default()).await;
    let mut stream = connect(port).await;
    let client = Client::new().option(opt::LIST, b"");
    stream.write_all(&client.0).await.unwrap();
    let mut greeting = [0; Greeting::LEN];
    stream.read_exact(&mut greeting).await.unwrap();
    let shutdown = tokio::time::timeout(Duration::from_secs(5), server.shutdown());
    shutdown
        .await
        .expect("no waiting for the handshake")
        .unwrap();
    let rest = tokio::time::timeout(Duration::from_secs(5), read_all(&mut stream)).await;
    assert!(rest.is_ok());
    assert!(TcpStream::connect(("127.0.0.1", port)).await.is_err());
}

#[tokio::test]
async fn mutated_handshakes_end_at_once_and_disturb_nobody() {
    let (server, port) = serve(Limits::default()).await;
    let info = Client(vec![]).option(opt::INFO, &request("only", &[])).0;
    let mut bystander = connect(port).await;
    bystander.write_all(&Client::new().0).await.unwrap();
    let mut greeting = [0; Greeting::LEN];
    bystander.read_exact(&mut greeting).await.unwrap();

    let mut random = fastrand::Rng::with_seed(300);
    for round in 0..300 {
        let mut bytes = everything().0;
        mutate(&mut random, &mut bytes);
        let mut stream = connect(port).await;
        // The server may have closed already.
        let _ = stream.write_all(&bytes).await;
        let _ = stream.shutdown().await;
        let ended = tokio::time::timeout(Duration::from_secs(1), read_all(&mut stream)).await;
        assert!(ended.is_ok(), "round {round}: {bytes:?}");

        if round % 10 == 0 {
            bystander.write_all(&info).await.unwrap();
            let mut kinds = Vec::new();
            while kinds.last() != Some(&rep::ACK) {
                let mut head = [0; OptionReply::LEN];
                bystander.read_exact(&mut head).await.unwrap();
                let head = OptionReply::decode(&head).unwrap();
                let mut data = vec![0; head.length as usize];
                bystander.read_exact(&mut data).await.unwrap();
                kinds.push(head.kind);
            }
            assert_eq!(kinds, [rep::INFO, rep::INFO, rep::ACK]);
        }
    }
    server.shutdown().await.unwrap();
}

#[test]
fn the_port_is_the_registered_one() {
    assert_eq!(wire::PORT, 10809);
}
