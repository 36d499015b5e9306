//! Histories by hand, each legal or not, for each rule of the contract.

use userland_io::{CrashLevel, Discard, ErrorKind, WriteFlags};

use super::*;

const FUA: WriteFlags = WriteFlags::FUA;
const NONE: WriteFlags = WriteFlags::empty();

fn shape() -> Shape {
    Shape {
        cell: 32,
        len: 96,
        whole: true,
        atomic_reads: false,
        atomic_cells: 0,
    }
}

fn history() -> History {
    History::new(1, 1, shape(), vec![7; 96])
}

impl History {
    fn ok(&mut self, id: OpId) {
        self.end(id, &Ok(()));
    }

    fn write(&mut self, cell: usize, flags: WriteFlags) -> OpId {
        let id = self.start(0, Request::Write(cell..cell + 1, flags));
        self.ok(id);
        id
    }

    fn flush(&mut self) {
        let id = self.start(0, Request::Flush);
        self.ok(id);
    }

    /// The cell as `writer` wrote it, 0 for the initial content.
    fn value(&self, writer: OpId, cell: usize) -> Vec<u8> {
        match writer {
            0 => vec![7; 32],
            _ => self.bytes_of(writer as usize, cell),
        }
    }

    fn read(&mut self, cell: usize, writer: OpId) {
        let id = self.start(1, Request::Read(cell..cell + 1));
        let bytes = self.value(writer, cell);
        self.end_read(id, &Ok(bytes));
    }

    fn crash(&self, level: CrashLevel, writers: [OpId; 3]) -> Option<Clause> {
        let cells = writers.iter().enumerate();
        let image: Vec<u8> = cells.flat_map(|(cell, &w)| self.value(w, cell)).collect();
        self.check_crash(level, &image).err().map(|v| v.clause)
    }

    fn live(&self) -> Option<Clause> {
        self.check_live().err().map(|v| v.clause)
    }
}

#[test]
fn a_read_sees_the_last_write_that_ended_or_one_in_flight() {
    let mut h = history();
    let a = h.write(0, NONE);
    let b = h.start(0, Request::Write(0..1, NONE));
    h.read(0, a);
    h.read(0, b);
    assert_eq!(h.live(), None);
    // Once it was seen, it stays seen.
    h.read(0, a);
    assert_eq!(h.live(), Some(Clause::Live));
    let mut h = history();
    h.write(0, NONE);
    h.read(0, 0);
    assert_eq!(h.live(), Some(Clause::Live));
}

#[test]
fn a_mix_is_legal_only_beside_a_write_in_flight() {
    let mut h = history();
    let a = h.start(0, Request::Write(0..1, NONE));
    let mut mix = h.value(a, 0);
    mix[16..].fill(7);
    let id = h.start(1, Request::Read(0..1));
    h.end_read(id, &Ok(mix.clone()));
    assert_eq!(h.live(), None);
    h.ok(a);
    let id = h.start(1, Request::Read(0..1));
    h.end_read(id, &Ok(mix.clone()));
    assert_eq!(h.live(), Some(Clause::Foreign));
    let image = [&mix[..], &[7; 64]].concat();
    assert!(h.check_crash(CrashLevel::Flush, &image).is_err());
}

#[test]
fn what_failed_acts_before_it_answers_or_never() {
    for abandoned in [false, true] {
        let mut h = history();
        let old = h.write(0, NONE);
        let a = h.start(0, Request::Write(0..1, NONE));
        match abandoned {
            true => h.abandon(a),
            false => h.end(a, &Err(ErrorKind::Io.into())),
        }
        h.flush();
        h.read(0, old);
        assert_eq!(h.live(), None);
        // A crash now must not bring it either: a read said that it had not acted, and a flush settled that.
        assert_eq!(h.crash(CrashLevel::Flush, [old, 0, 0]), None);
        assert_eq!(h.crash(CrashLevel::Flush, [a, 0, 0]), Some(Clause::Flush));
        h.read(0, a);
        assert_eq!(h.live(), Some(Clause::Error));
    }
    // An abandoned one may act until a flush.
    let mut h = history();
    let a = h.start(0, Request::Write(0..1, NONE));
    h.abandon(a);
    h.read(0, 0);
    let b = h.write(0, NONE);
    h.read(0, b);
    h.read(0, a);
    assert_eq!(h.live(), None);
}

#[test]
fn a_flush_covers_what_had_answered_before_it_began() {
    let mut h = history();
    let a = h.write(0, NONE);
    let flush = h.start(1, Request::Flush);
    let b = h.write(1, NONE);
    h.ok(flush);
    let level = CrashLevel::Flush;
    assert_eq!(h.crash(level, [a, b, 0]), None);
    assert_eq!(h.crash(level, [a, 0, 0]), None);
    assert_eq!(h.crash(level, [0, b, 0]), Some(Clause::Flush));
    let c = h.write(2, FUA);
    assert_eq!(h.crash(level, [a, 0, 0]), Some(Clause::Flush));
    assert_eq!(h.crash(level, [a, 0, c]), None);
}

#[test]
fn a_failed_flush_covers_nothing() {
    let mut h = history();
    let a = h.write(0, NONE);
    let flush = h.start(0, Request::Flush);
    h.end(flush, &Err(ErrorKind::Io.into()));
    assert_eq!(h.crash(CrashLevel::Flush, [0, 0, 0]), None);
    h.flush();
    assert_eq!(h.crash(CrashLevel::Flush, [0, 0, 0]), Some(Clause::Flush));
    assert_eq!(h.crash(CrashLevel::Flush, [a, 0, 0]), None);
}

#[test]
fn what_was_seen_before_a_flush_is_covered_by_it() {
    let mut h = history();
    let a = h.start(0, Request::Write(0..1, NONE));
    h.read(0, a);
    h.flush();
    assert_eq!(h.crash(CrashLevel::Flush, [0, 0, 0]), Some(Clause::Flush));
}

#[test]
fn a_prefix_has_no_gaps() {
    let mut h = history();
    let a = h.write(0, NONE);
    let b = h.write(1, NONE);
    let c = h.start(0, Request::Write(2..3, NONE));
    let level = CrashLevel::Prefix;
    for legal in [[0, 0, 0], [a, 0, 0], [a, b, 0], [a, b, c]] {
        assert_eq!(h.crash(level, legal), None, "{legal:?}");
    }
    for illegal in [[0, b, 0], [0, 0, c], [a, 0, c]] {
        assert_eq!(h.crash(level, illegal), Some(Clause::Prefix), "{illegal:?}");
        assert_eq!(h.crash(CrashLevel::Flush, illegal), None, "{illegal:?}");
    }
}

#[test]
fn a_prefix_is_in_an_order_that_exists() {
    // Two pairs of overlapping writes to the same two blocks: either order, but the same for both.
    let mut h = history();
    let a = h.start(0, Request::Write(0..1, NONE));
    let b = h.start(1, Request::Write(0..1, NONE));
    h.ok(a);
    let c = h.start(0, Request::Write(1..2, NONE));
    h.ok(b);
    let d = h.start(1, Request::Write(1..2, NONE));
    h.ok(c);
    h.ok(d);
    let level = CrashLevel::Prefix;
    assert_eq!(h.crash(level, [a, d, 0]), None);
    assert_eq!(h.crash(level, [b, c, 0]), None);
    assert_eq!(h.crash(level, [a, c, 0]), None);
    // Once b was seen it is known to come after a. Who shows d, which began after b had ended, must show b.
    h.read(0, b);
    assert_eq!(h.crash(level, [a, c, 0]), None);
    assert_eq!(h.crash(level, [a, d, 0]), Some(Clause::Prefix));
}

#[test]
fn sync_needs_no_flush() {
    let mut h = history();
    let a = h.write(0, NONE);
    assert_eq!(h.crash(CrashLevel::Sync, [0, 0, 0]), Some(Clause::Sync));
    assert_eq!(h.crash(CrashLevel::Sync, [a, 0, 0]), None);
    assert_eq!(h.crash(CrashLevel::None, [0, 0, 0]), None);
}

#[test]
fn a_discard_does_as_it_claims_and_no_more() {
    let zero = vec![0; 32];
    let see = |claim, bytes: &[u8]| {
        let mut h = history();
        let d = h.start(0, Request::Discard(0..1, 0..1, claim));
        h.ok(d);
        let id = h.start(0, Request::Read(0..1));
        h.end_read(id, &Ok(bytes.to_vec()));
        h.live()
    };
    for (claim, old, zeroes, noise) in [
        (
            Discard::Zeroes,
            Some(Clause::Live),
            None,
            Some(Clause::Foreign),
        ),
        (Discard::OldOrZero, None, None, Some(Clause::Foreign)),
        (Discard::Unspecified, None, None, None),
    ] {
        assert_eq!(see(claim, &[7; 32]), old, "{claim:?}");
        assert_eq!(see(claim, &zero), zeroes, "{claim:?}");
        assert_eq!(see(claim, &[9; 32]), noise, "{claim:?}");
    }
    // Noise is noise of one kind.
    let mut h = history();
    let d = h.start(0, Request::Discard(0..1, 0..1, Discard::Unspecified));
    h.ok(d);
    for noise in [9, 8] {
        let id = h.start(0, Request::Read(0..1));
        h.end_read(id, &Ok(vec![noise; 32]));
    }
    assert_eq!(h.live(), Some(Clause::Foreign));
}

#[test]
fn an_atomic_unit_is_all_there_or_not_at_all() {
    let shape = Shape {
        atomic_cells: 2,
        ..shape()
    };
    let mut h = History::new(1, 1, shape, vec![7; 96]);
    let a = h.start(0, Request::Write(0..3, NONE));
    let level = CrashLevel::Flush;
    assert_eq!(h.crash(level, [a, a, 0]), None);
    assert_eq!(h.crash(level, [0, 0, a]), None);
    assert_eq!(h.crash(level, [a, 0, a]), Some(Clause::Tearing));
}

#[test]
fn the_bytes_of_another_block_are_called_so() {
    let mut h = history();
    let a = h.write(0, NONE);
    let id = h.start(0, Request::Read(1..2));
    let bytes = h.value(a, 0);
    h.end_read(id, &Ok(bytes));
    let verdict = h.check_live().unwrap_err();
    assert_eq!(verdict.clause, Clause::Foreign);
    assert!(
        verdict
            .what
            .contains("what #1 of the run with seed 1 wrote to block 0")
    );
}
