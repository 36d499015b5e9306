//! The NBD handshake as clients see it, and as broken ones drive it.
//!
//! Where time does not matter the server's side runs in memory, over bytes that
//! are known in advance (`fuzz::handshake`: exports `a`, the default, and `b`,
//! read-only, 1 MiB, blocks of 512 bytes, context `x-fuzz:one`).

#![cfg(feature = "nbd")]

use userland_io::transports::nbd::session::{ContextKind, MetaContext, ReplyMode};
use userland_io::transports::nbd::wire::{
    BlockSizes, ClientFlags, ExportInfo, TransmissionFlags, info, opt, rep,
};
#[path = "common/handshake.rs"]
mod handshake;
use handshake::{ALL_INFOS, Client, everything, meta, mutate, request};

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
