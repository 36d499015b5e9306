//! What the NBD server answers: chunks, holes, block status, and the error for each
//! request that makes no sense, after which the connection goes on.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use userland_io::engines::Memory;
use userland_io::transports::nbd::session::{ReplyMode, Session};
use userland_io::transports::nbd::wire::{CommandFlags, TransmissionFlags, chunk, cmd, error};
use userland_io::{
    Device, Engine, Error, ErrorKind, ExtentKind, Extents, Features, Geometry, ReadBuf, Result,
};

#[path = "common/nbd_peer.rs"]
mod nbd_peer;
use nbd_peer::{MIB, MODES, Peer, Rig, both_contexts, pattern, session};

const NONE: CommandFlags = CommandFlags::empty();
const SIZE: u64 = 8 << 20;

async fn rig() -> (Rig, Device<Rig>) {
    let rig = Rig::new(SIZE);
    let device = Device::open(rig.clone()).await.unwrap();
    rig.taken();
    (rig, device)
}

async fn peer(mode: ReplyMode, change: impl FnOnce(&mut Session)) -> (Rig, Peer) {
    let (rig, device) = rig().await;
    let mut session = session(mode, SIZE);
    change(&mut session);
    let peer = Peer::new(&device, session);
    (rig, peer)
}

/// Reads and writes a block: the connection is still in order.
async fn goes_on(peer: &mut Peer) {
    let data = pattern(9, 0, 4096);
    assert_eq!(peer.write(0, &data).await.error, 0);
    assert!(peer.read(0, 4096).await.data == data);
}

#[tokio::test]
async fn every_invalid_request_gets_its_error_and_the_connection_goes_on() {
    use CommandFlags as F;
    use error::*;
    for mode in MODES {
        let compact = mode != ReplyMode::Extended;
        // Command, flags, offset, length, bytes of payload, error.
        let mut cases: Vec<(u16, F, u64, u64, usize, u32)> = vec![
            // Unknown commands and flags.
            (8, F::empty(), 0, 0, 0, EINVAL),
            (u16::MAX, F::empty(), 0, 512, 0, EINVAL),
            (cmd::READ, F::from_bits_retain(1 << 9), 0, 512, 0, EINVAL),
            (cmd::READ, F::NO_HOLE, 0, 512, 0, EINVAL),
            (cmd::READ, F::REQ_ONE, 0, 512, 0, EINVAL),
            (cmd::READ, F::FAST_ZERO, 0, 512, 0, EINVAL),
            (cmd::WRITE, F::DF, 0, 512, 512, EINVAL),
            (cmd::WRITE, F::NO_HOLE, 0, 512, 512, EINVAL),
            (cmd::FLUSH, F::DF, 0, 0, 0, EINVAL),
            (cmd::TRIM, F::NO_HOLE, 0, 512, 0, EINVAL),
            (cmd::CACHE, F::DF, 0, 512, 0, EINVAL),
            (cmd::WRITE_ZEROES, F::DF, 0, 512, 0, EINVAL),
            // Ranges outside the export, and ones that wrap.
            (cmd::READ, F::empty(), SIZE, 1, 0, EINVAL),
            (cmd::READ, F::empty(), SIZE - 1, 2, 0, EINVAL),
            (cmd::READ, F::empty(), u64::MAX, 512, 0, EINVAL),
            (cmd::READ, F::empty(), u64::MAX - 511, 512, 0, EINVAL),
            (cmd::WRITE, F::empty(), SIZE, 512, 512, ENOSPC),
            (cmd::WRITE, F::empty(), SIZE - 1, 512, 512, ENOSPC),
            (cmd::WRITE, F::empty(), u64::MAX - 255, 512, 512, ENOSPC),
            (cmd::WRITE_ZEROES, F::empty(), SIZE, 512, 0, ENOSPC),
            (cmd::WRITE_ZEROES, F::empty(), u64::MAX, 512, 0, ENOSPC),
            (cmd::TRIM, F::empty(), SIZE - 511, 512, 0, EINVAL),
            (cmd::CACHE, F::empty(), SIZE, 512, 0, EINVAL),
            (cmd::WRITE, F::empty(), SIZE + 1, 0, 0, ENOSPC),
            (cmd::READ, F::empty(), SIZE + 1, 0, 0, EINVAL),
            // Lengths beyond everything.
            (cmd::READ, F::empty(), 0, u32::MAX.into(), 0, EINVAL),
            (cmd::WRITE_ZEROES, F::empty(), 0, u32::MAX.into(), 0, ENOSPC),
            (cmd::TRIM, F::empty(), 4096, u32::MAX.into(), 0, EINVAL),
            // A flush has no range.
            (cmd::FLUSH, F::empty(), 0, 512, 0, EINVAL),
            (cmd::FLUSH, F::empty(), 512, 0, 0, EINVAL),
        ];
        if compact {
            cases.push((cmd::WRITE, F::PAYLOAD_LEN, 0, 512, 512, EINVAL));
            cases.push((cmd::READ, F::PAYLOAD_LEN, 0, 512, 0, EINVAL));
        } else {
            for command in [
                cmd::READ,
                cmd::FLUSH,
                cmd::TRIM,
                cmd::CACHE,
                cmd::WRITE_ZEROES,
                99,
            ] {
                cases.push((command, F::PAYLOAD_LEN, 0, 512, 512, EINVAL));
            }
            cases.push((cmd::READ, F::empty(), 0, u64::MAX, 0, EINVAL));
            cases.push((cmd::WRITE_ZEROES, F::empty(), 1, u64::MAX, 0, ENOSPC));
            cases.push((cmd::BLOCK_STATUS, F::empty(), 0, u64::MAX, 0, EINVAL));
        }
        match mode {
            ReplyMode::Simple => {
                cases.push((cmd::READ, F::DF, 0, 512, 0, EINVAL));
                cases.push((cmd::BLOCK_STATUS, F::empty(), 0, 512, 0, EINVAL));
            }
            _ => {
                cases.push((cmd::BLOCK_STATUS, F::empty(), 0, 0, 0, EINVAL));
                cases.push((cmd::BLOCK_STATUS, F::empty(), SIZE, 512, 0, EINVAL));
                cases.push((cmd::BLOCK_STATUS, F::DF, 0, 512, 0, EINVAL));
            }
        }
        let (rig, mut peer) = peer(mode, |_| {}).await;
        for (command, flags, offset, length, payload, expected) in cases {
            rig.taken();
            let answer = peer
                .call(command, flags, offset, length, &vec![1; payload])
                .await;
            let case = format!("{mode:?}: {command} {flags:?} {offset}+{length}");
            assert_eq!(answer.error, expected, "{case}");
            assert!(answer.data.is_empty(), "{case}");
            assert_eq!(rig.taken().concat(), "", "{case}");
            if mode != ReplyMode::Simple {
                assert!(!answer.text.is_empty(), "{case}");
            }
            goes_on(&mut peer).await;
        }
        peer.leave().await;
    }
}

#[tokio::test]
async fn what_was_not_offered_is_refused() {
    use TransmissionFlags as T;
    for mode in MODES {
        let offered = T::SEND_FLUSH | T::SEND_FUA | T::SEND_TRIM | T::SEND_WRITE_ZEROES;
        let offered = offered | T::SEND_CACHE | T::SEND_DF | T::SEND_FAST_ZERO;
        let (_, mut peer) = peer(mode, |session| session.flags -= offered).await;
        for (command, flags, length, payload) in [
            (cmd::FLUSH, NONE, 0, 0),
            (cmd::TRIM, NONE, 512, 0),
            (cmd::CACHE, NONE, 512, 0),
            (cmd::WRITE_ZEROES, NONE, 512, 0),
            (cmd::WRITE, CommandFlags::FUA, 512, 512),
            (cmd::READ, CommandFlags::FUA, 512, 0),
            (cmd::READ, CommandFlags::DF, 512, 0),
        ] {
            let answer = peer
                .call(command, flags, 0, length, &vec![1; payload])
                .await;
            assert_eq!(answer.error, error::EINVAL, "{mode:?} {command} {flags:?}");
        }
        goes_on(&mut peer).await;
        peer.leave().await;
    }
    let (_, mut peer) = peer(MODES[1], |session| session.flags -= T::SEND_FAST_ZERO).await;
    let fast = CommandFlags::FAST_ZERO;
    let answer = peer.call(cmd::WRITE_ZEROES, fast, 0, 512, &[]).await;
    assert_eq!(answer.error, error::EINVAL);
    peer.leave().await;
}

#[tokio::test]
async fn fua_is_accepted_everywhere_once_offered() {
    for mode in MODES {
        let (_, mut peer) = peer(mode, |_| {}).await;
        let fua = CommandFlags::FUA;
        assert_eq!(peer.call(cmd::READ, fua, 0, 512, &[]).await.error, 0);
        assert_eq!(peer.call(cmd::FLUSH, fua, 0, 0, &[]).await.error, 0);
        assert_eq!(peer.call(cmd::CACHE, fua, 0, 512, &[]).await.error, 0);
        peer.leave().await;
    }
}

#[tokio::test]
async fn a_read_only_export_says_so_and_drains_the_payload() {
    for mode in MODES {
        let read_only = |session: &mut Session| session.flags |= TransmissionFlags::READ_ONLY;
        let (rig, mut peer) = peer(mode, read_only).await;
        for (command, payload) in [
            (cmd::WRITE, 300_000),
            (cmd::TRIM, 0),
            (cmd::WRITE_ZEROES, 0),
        ] {
            let answer = peer
                .call(command, NONE, 0, 300_000, &vec![1; payload])
                .await;
            assert_eq!(answer.error, error::EPERM);
        }
        assert_eq!(peer.read(0, 100).await.data, [0; 100]);
        assert_eq!(rig.taken(), ["read 0+100"]);
        peer.leave().await;
    }
}

#[tokio::test]
async fn requests_keep_to_the_block_size_that_the_client_asked_for() {
    for mode in MODES {
        let (_, device) = rig().await;
        let mut terms = session(mode, SIZE - 100);
        terms.blocks.minimum = 512;
        let mut peer = Peer::new(&device, terms);
        for (command, offset, length, payload) in [
            (cmd::READ, 1, 512, 0),
            (cmd::READ, 512, 513, 0),
            (cmd::WRITE, 511, 512, 512),
            (cmd::TRIM, 0, 100, 0),
            (cmd::WRITE_ZEROES, 256, 512, 0),
            (cmd::CACHE, 256, 512, 0),
        ] {
            let answer = peer
                .call(command, NONE, offset, length, &vec![1; payload])
                .await;
            assert_eq!(answer.error, error::EINVAL, "{command} {offset}+{length}");
        }
        assert_eq!(peer.read(512, 1024).await.data, [0; 1024]);
        // The odd end of the disk is a block too.
        assert_eq!(peer.read(SIZE - 512, 412).await.data, [0; 412]);
        peer.leave().await;
    }
}

#[tokio::test]
async fn errors_of_the_engine_come_with_their_number_and_text() {
    type Case = (fn() -> Error, u32, &'static str);
    let cases: [Case; 7] = [
        (|| ErrorKind::Io.into(), error::EIO, "input/output error"),
        (|| ErrorKind::NoSpace.into(), error::ENOSPC, "no space left"),
        (
            || ErrorKind::ReadOnly.into(),
            error::EPERM,
            "the disk is read-only",
        ),
        (
            || ErrorKind::Protection.into(),
            error::EIO,
            "integrity check failed",
        ),
        (|| Error::from_errno(122), error::ENOSPC, ""),
        (|| Error::from_errno(12), error::ENOMEM, ""),
        (
            || Error::new(ErrorKind::Io, "drive 3 is on fire"),
            error::EIO,
            "drive 3 is on fire",
        ),
    ];
    for mode in MODES {
        let (rig, mut peer) = peer(mode, |_| {}).await;
        for (make, number, text) in cases {
            *rig.bad.lock().unwrap() = Some((4096..8192, make));
            let read = peer.read(4000, 1000).await;
            let write = peer.write(4000, &[1; 1000]).await;
            let zeroes = peer.call(cmd::WRITE_ZEROES, NONE, 4000, 1000, &[]).await;
            for answer in [&read, &write, &zeroes] {
                assert_eq!(answer.error, number);
                if mode != ReplyMode::Simple {
                    assert!(answer.text.contains(text), "{}", answer.text);
                }
            }
            assert!(read.data.is_empty());
            assert_eq!(read.at, (mode != ReplyMode::Simple).then_some(4000));
            goes_on(&mut peer).await;
        }
        peer.leave().await;
    }
}

#[tokio::test]
async fn a_read_past_the_end_names_the_first_byte_that_is_not_there() {
    let (_, mut peer) = peer(ReplyMode::Structured, |_| {}).await;
    let answer = peer.read(SIZE - 10, 20).await;
    assert_eq!((answer.error, answer.at), (error::EINVAL, Some(SIZE)));
    let size = SIZE.to_string();
    assert!(answer.text.contains(&size) && answer.text.contains("20 bytes"));
    peer.leave().await;
}

#[tokio::test]
async fn a_panic_in_the_engine_is_an_error_of_that_request() {
    for mode in MODES {
        let (rig, mut peer) = peer(mode, |_| {}).await;
        *rig.panic_at.lock().unwrap() = Some(512);
        assert_eq!(peer.read(512, 512).await.error, error::EIO);
        assert_eq!(peer.read(0, 512).await.error, 0);
        peer.leave().await;
    }
}

#[tokio::test]
async fn long_texts_are_cut_between_characters() {
    let (rig, mut peer) = peer(ReplyMode::Extended, |_| {}).await;
    let long = || Error::new(ErrorKind::Io, "x".to_owned() + &"\u{e9}".repeat(5000));
    *rig.bad.lock().unwrap() = Some((0..1, long));
    let answer = peer.read(0, 1).await;
    assert!(answer.text.len() <= 4096 && answer.text.starts_with("x\u{e9}"));
    peer.leave().await;
}

/// Memory lends what lies in one chunk, holes and all.
#[tokio::test]
async fn holes_in_what_could_be_lent_are_told_too() {
    let device = Device::open(Memory::new(MIB as u64)).await.unwrap();
    let mut peer = Peer::new(&device, session(ReplyMode::Structured, MIB as u64));
    assert_eq!(peer.write(0, &[1; 4096]).await.error, 0);
    let answer = peer.read(0, 128 << 10).await;
    let (data, hole) = (chunk::OFFSET_DATA, chunk::OFFSET_HOLE);
    let rest = (128 << 10) - 4096;
    assert_eq!(answer.chunks, [(data, 0, 4096), (hole, 4096, rest)]);
    peer.leave().await;
}

#[tokio::test]
async fn holes_are_told_and_not_sent() {
    for mode in [ReplyMode::Structured, ReplyMode::Extended] {
        let (rig, mut peer) = peer(mode, |_| {}).await;
        // Data at both ends and in the middle.
        for offset in [0, 1 << 20, (2 << 20) - 65_536] {
            let data = pattern(1, offset, 65_536);
            assert_eq!(peer.write(offset, &data).await.error, 0);
        }
        rig.taken();
        let answer = peer.read(0, 2 * MIB).await;
        assert_eq!(answer.error, 0);
        let kinds: Vec<_> = answer.chunks.iter().map(|chunk| chunk.0).collect();
        let (data, hole) = (chunk::OFFSET_DATA, chunk::OFFSET_HOLE);
        assert_eq!(kinds, [data, hole, data, hole, data]);
        let sent: usize = answer
            .chunks
            .iter()
            .filter(|c| c.0 == data)
            .map(|c| c.2)
            .sum();
        assert!(sent < 2 * MIB / 4, "{sent} bytes");
        let mut expected = vec![0; 2 * MIB];
        for offset in [0, MIB, 2 * MIB - 65_536] {
            expected[offset..][..65_536].copy_from_slice(&pattern(1, offset as u64, 65_536));
        }
        assert!(answer.data == expected);
        // Nothing but a hole is one chunk, and not read.
        rig.taken();
        let answer = peer.read(4 << 20, MIB).await;
        assert_eq!(answer.chunks, [(hole, 4 << 20, MIB)]);
        assert!(!rig.taken().concat().contains("read"));
        peer.leave().await;
    }
}

#[tokio::test]
async fn df_gets_its_zeroes_in_one_chunk() {
    for mode in [ReplyMode::Structured, ReplyMode::Extended] {
        let (_, mut peer) = peer(mode, |_| {}).await;
        peer.write(MIB as u64, &[1; 65_536]).await;
        let answer = peer
            .call(cmd::READ, CommandFlags::DF, 0, 2 << 20, &[])
            .await;
        assert_eq!(answer.chunks, [(chunk::OFFSET_DATA, 0, 2 * MIB)]);
        let ones = answer.data.iter().filter(|&&b| b == 1).count();
        assert_eq!((answer.data.len(), ones), (2 * MIB, 65_536));
        peer.leave().await;
    }
}

#[tokio::test]
async fn a_disk_full_of_data_is_hardly_asked_for_holes() {
    let (rig, mut peer) = peer(ReplyMode::Structured, |_| {}).await;
    let all = pattern(1, 0, SIZE as usize);
    assert_eq!(peer.write(0, &all).await.error, 0);
    rig.taken();
    for offset in (0..SIZE).step_by(65_536) {
        let answer = peer.read(offset, 65_536).await;
        assert!(answer.data == all[offset as usize..][..65_536]);
    }
    let log = rig.taken();
    let asked = log.iter().filter(|what| what.contains("extents")).count();
    assert!((1..=4).contains(&asked), "{asked} questions for 128 reads");
    assert!(log.len() >= 128);
    peer.leave().await;
}

/// Tells of one byte, whatever it is asked, and counts how often that is.
#[derive(Clone, Default)]
struct Crumbs(Arc<AtomicUsize>);

impl Engine for Crumbs {
    fn geometry(&self) -> Geometry {
        let mut geometry = Geometry::read_only(SIZE);
        geometry.features |= Features::EXTENTS;
        geometry
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, _: u64) -> Result {
        buf.fill(7);
        Ok(())
    }
    async fn extents(&self, _: Range<u64>, out: &mut Extents) -> Result {
        self.0.fetch_add(1, Ordering::Relaxed);
        out.push(1, ExtentKind::Data);
        Ok(())
    }
}

#[tokio::test]
async fn a_disk_that_tells_holes_byte_by_byte_is_not_asked_for_ever() {
    let disk = Crumbs::default();
    let device = Device::open(disk.clone()).await.unwrap();
    let mut peer = Peer::new(&device, session(ReplyMode::Structured, SIZE));
    assert!(peer.read(0, MIB).await.data == vec![7; MIB]);
    let asked = disk.0.load(Ordering::Relaxed);
    assert!((1..=100).contains(&asked), "asked {asked} times");
    peer.leave().await;
}

#[tokio::test]
async fn block_status_covers_the_range_from_its_start() {
    for mode in [ReplyMode::Structured, ReplyMode::Extended] {
        let (_, mut peer) = peer(mode, |_| {}).await;
        peer.write(MIB as u64, &[1; MIB]).await;
        let answer = peer.call(cmd::BLOCK_STATUS, NONE, 0, SIZE, &[]).await;
        let mib = MIB as u64;
        assert_eq!(
            answer.status[&1],
            [(mib, 3), (mib, 0), (SIZE - 2 * mib, 3)],
            "{mode:?}"
        );
        // Cut to the range, at both ends.
        let answer = peer.call(cmd::BLOCK_STATUS, NONE, mib - 10, 30, &[]).await;
        assert_eq!(answer.status[&1], [(10, 3), (20, 0)]);
        let one = CommandFlags::REQ_ONE;
        let answer = peer.call(cmd::BLOCK_STATUS, one, mib - 10, 30, &[]).await;
        assert_eq!(answer.status[&1], [(10, 3)]);
        let answer = peer.call(cmd::BLOCK_STATUS, one, mib, 30, &[]).await;
        assert_eq!(answer.status[&1], [(30, 0)]);
        peer.leave().await;
    }
}

#[tokio::test]
async fn contexts_of_the_engine_have_their_own_chunk_and_a_cap() {
    let (_, mut peer) = peer(ReplyMode::Extended, |s| s.contexts = both_contexts()).await;
    let answer = peer
        .call(cmd::BLOCK_STATUS, NONE, 100, SIZE - 100, &[])
        .await;
    assert_eq!(answer.status.len(), 2);
    assert_eq!(answer.status[&1], [(SIZE - 100, 3)]);
    let parity = &answer.status[&7];
    assert_eq!(parity[..2], [(3996, 1 << 40), (4096, (1 << 40) + 1)]);
    assert!(
        parity.len() >= 512 && parity.len() <= 4096,
        "{}",
        parity.len()
    );
    let one = CommandFlags::REQ_ONE;
    let answer = peer
        .call(cmd::BLOCK_STATUS, one, 100, SIZE - 100, &[])
        .await;
    assert_eq!(answer.status[&7], [(3996, 1 << 40)]);
    peer.leave().await;
}

#[tokio::test]
async fn a_payload_selects_contexts() {
    let (_, mut peer) = peer(ReplyMode::Extended, |s| s.contexts = both_contexts()).await;
    let payload = |length: u64, ids: &[u32]| {
        let mut bytes = length.to_be_bytes().to_vec();
        ids.iter().for_each(|id| bytes.extend(id.to_be_bytes()));
        bytes
    };
    let select = CommandFlags::PAYLOAD_LEN;
    for (ids, expected) in [(&[7][..], vec![7]), (&[1], vec![1]), (&[7, 1], vec![1, 7])] {
        let bytes = payload(4096, ids);
        let length = bytes.len() as u64;
        let answer = peer
            .call(cmd::BLOCK_STATUS, select, 4096, length, &bytes)
            .await;
        let mut got: Vec<_> = answer.status.keys().copied().collect();
        got.sort_unstable();
        assert_eq!((answer.error, got), (0, expected));
        assert!(answer.status.values().all(|runs| runs[0].0 == 4096));
    }
    for bytes in [
        payload(4096, &[]),
        payload(4096, &[2]),
        payload(4096, &[1, 1]),
        payload(4096, &[1, 7, 1]),
        payload(0, &[1]),
        payload(SIZE, &[1]),
        payload(u64::MAX, &[1]),
        payload(4096, &[1])[..11].to_vec(),
        vec![1; 100_000],
    ] {
        let length = bytes.len() as u64;
        let answer = peer
            .call(cmd::BLOCK_STATUS, select, 4096, length, &bytes)
            .await;
        assert_eq!(answer.error, error::EINVAL, "{length} bytes");
        assert!(answer.status.is_empty());
        goes_on(&mut peer).await;
    }
    // Not where it was not offered.
    let (_, mut peer) = {
        let flag = TransmissionFlags::BLOCK_STATUS_PAYLOAD;
        self::peer(ReplyMode::Extended, |session| session.flags -= flag).await
    };
    let bytes = payload(4096, &[1]);
    let answer = peer.call(cmd::BLOCK_STATUS, select, 0, 12, &bytes).await;
    assert_eq!(answer.error, error::EINVAL);
    peer.leave().await;
}

#[tokio::test]
async fn an_extended_write_is_taken_without_its_flag_too() {
    use tokio::io::AsyncWriteExt;
    use userland_io::transports::nbd::wire::Request;
    let (_, mut peer) = peer(ReplyMode::Extended, |_| {}).await;
    let (cookie, _) = peer.head(cmd::WRITE, NONE, 0, 512);
    let request = Request {
        flags: NONE,
        command: cmd::WRITE,
        cookie,
        offset: 0,
        length: 512,
    };
    let head = request.encode_extended();
    peer.writer.write_all(&head).await.unwrap();
    peer.writer.write_all(&[3; 512]).await.unwrap();
    let (answered, answer) = peer.receive().await;
    assert_eq!((answered, answer.error), (cookie, 0));
    assert_eq!(peer.read(0, 512).await.data, [3; 512]);
    peer.leave().await;
}

#[tokio::test]
async fn effect_lengths_go_beyond_four_gibibytes() {
    const HUGE: u64 = 6 << 30;
    let rig = Rig::new(HUGE);
    let device = Device::open(rig.clone()).await.unwrap();
    let mut peer = Peer::new(&device, session(ReplyMode::Extended, HUGE));
    peer.write(5 << 30, &[1; 512]).await;
    rig.taken();
    for (command, name) in [
        (cmd::CACHE, "prefetch"),
        (cmd::WRITE_ZEROES, "zeroes"),
        (cmd::TRIM, "discard"),
    ] {
        let answer = peer.call(command, NONE, 0, HUGE, &[]).await;
        assert_eq!(answer.error, 0);
        assert!(rig.taken()[0].starts_with(&format!("{name} 0..{HUGE}")));
    }
    let answer = peer.call(cmd::BLOCK_STATUS, NONE, 0, HUGE, &[]).await;
    assert_eq!(answer.status[&1].iter().map(|run| run.0).sum::<u64>(), HUGE);
    peer.leave().await;
}

#[tokio::test]
async fn fast_zeroes_are_refused_by_number() {
    let (rig, mut peer) = peer(ReplyMode::Structured, |_| {}).await;
    *rig.bad.lock().unwrap() = Some((0..u64::MAX, || ErrorKind::Unsupported.into()));
    let fast = CommandFlags::FAST_ZERO;
    let answer = peer.call(cmd::WRITE_ZEROES, fast, 0, 512, &[]).await;
    assert_eq!(answer.error, error::ENOTSUP);
    peer.leave().await;
}
