//! A disk as a plain array of bytes, and random histories to hold a real one against it.
//!
//! A history is a list of batches. The operations of one batch run at the same
//! time; those that would make its outcome ambiguous (they overlap, and one of
//! them writes) are left out, so the array always knows what must be read.
#![allow(dead_code)]

use std::ops::Range;

use proptest::prelude::*;
use userland_io::{Discard, Geometry};

/// One operation.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Read(Range<u64>),
    /// Writes `pattern(seed, range)`.
    Write {
        range: Range<u64>,
        seed: u8,
        fua: bool,
    },
    Zeroes {
        range: Range<u64>,
        no_unmap: bool,
        fua: bool,
    },
    Discard(Range<u64>),
    Extents(Range<u64>),
    Flush,
}

/// What an operation answered, beside success.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Done,
    Bytes(Vec<u8>),
    /// Runs from the start of the range: length, and whether it reads as zeroes.
    Runs(Vec<(u64, bool)>),
}

/// The bytes that a write of `range` with `seed` stores: neighbours differ, and so do other offsets and seeds.
pub(crate) fn pattern(seed: u8, range: &Range<u64>) -> Vec<u8> {
    let byte = |at: u64| (at.wrapping_mul(0x9e37_79b9) >> 13) as u8 ^ seed | 1;
    range.clone().map(byte).collect()
}

impl Op {
    pub(crate) fn range(&self) -> Range<u64> {
        match self {
            Op::Read(range) | Op::Discard(range) | Op::Extents(range) => range.clone(),
            Op::Write { range, .. } | Op::Zeroes { range, .. } => range.clone(),
            Op::Flush => 0..0,
        }
    }

    fn mutates(&self) -> bool {
        matches!(self, Op::Write { .. } | Op::Zeroes { .. } | Op::Discard(_))
    }
}

/// The array.
#[derive(Debug)]
pub(crate) struct Model {
    bytes: Vec<u8>,
    granule: u64,
}

impl Model {
    /// A disk like one that claims `geometry`, holding zeroes.
    pub(crate) fn new(geometry: &Geometry) -> Self {
        Model {
            bytes: vec![0; geometry.size as usize],
            granule: match geometry.discard {
                Discard::None => 0,
                _ => geometry.discard_granule().into(),
            },
        }
    }

    /// The operations of `batch` whose outcome is certain.
    pub(crate) fn certain(&self, batch: &[Op]) -> Vec<Op> {
        let mut chosen: Vec<Op> = Vec::new();
        for op in batch {
            let range = op.range();
            let meets =
                |other: &Op| range.start < other.range().end && other.range().start < range.end;
            let clash = |other: &&Op| (op.mutates() || other.mutates()) && meets(other);
            let discards = !matches!(op, Op::Discard(_)) || self.granule > 0;
            if discards && chosen.iter().find(clash).is_none() {
                chosen.push(op.clone());
            }
        }
        chosen
    }

    /// Checks what `op` answered, and takes over what it did.
    pub(crate) fn apply(&mut self, op: &Op, answer: &Answer) {
        let range = op.range();
        let bytes = &mut self.bytes[range.start as usize..range.end as usize];
        match (op, answer) {
            (Op::Read(_), Answer::Bytes(read)) => assert_same(bytes, read, range.start, op),
            (Op::Write { seed, .. }, Answer::Done) => {
                bytes.copy_from_slice(&pattern(*seed, &range))
            }
            (Op::Zeroes { .. }, Answer::Done) => bytes.fill(0),
            // Its whole granules; `settle` sees to the edges.
            (Op::Discard(_), Answer::Done) => {
                let start = range.start.next_multiple_of(self.granule);
                let end = range.end - range.end % self.granule;
                if start < end {
                    self.bytes[start as usize..end as usize].fill(0);
                }
            }
            (Op::Extents(_), Answer::Runs(runs)) => {
                let mut at = 0;
                for &(len, zero) in runs {
                    let run = &bytes[at as usize..(at + len) as usize];
                    assert!(
                        !zero || run.iter().all(|&byte| byte == 0),
                        "{op:?} calls data zeroes: {runs:?}"
                    );
                    at += len;
                }
                assert!(at > 0, "{op:?} told nothing");
            }
            (Op::Flush, Answer::Done) => {}
            _ => panic!("{op:?} answered {answer:?}"),
        }
    }

    /// After a discard of `range`, of which `read` is there now. The last bytes of a disk may be less than a
    /// granule, and a discard may or may not take them.
    pub(crate) fn settle(&mut self, range: &Range<u64>, read: &[u8]) {
        let size = self.bytes.len() as u64;
        let tail = size - size % self.granule;
        let reached = range.start <= tail && range.end == size;
        if reached
            && read[(tail - range.start) as usize..]
                .iter()
                .all(|&byte| byte == 0)
        {
            self.bytes[tail as usize..].fill(0);
        }
    }

    /// Holds the whole disk against the array.
    pub(crate) fn check_all(&self, read: &[u8]) {
        assert_same(&self.bytes, read, 0, &"the whole disk");
    }
}

fn assert_same(expected: &[u8], found: &[u8], start: u64, what: &dyn std::fmt::Debug) {
    assert_eq!(expected.len(), found.len(), "{what:?}: wrong length");
    if let Some(at) = (0..expected.len()).find(|&at| expected[at] != found[at]) {
        let (expected, found) = (expected[at], found[at]);
        panic!(
            "{what:?}: byte {} is {found:#x}, not {expected:#x}",
            start + at as u64
        );
    }
}

/// `cases` histories, or as many as `PROPTEST_CASES` asks for.
pub(crate) fn config(cases: u32) -> ProptestConfig {
    let default = match std::env::var_os("PROPTEST_CASES") {
        Some(_) => ProptestConfig::default(),
        None => ProptestConfig::with_cases(cases),
    };
    // The seed is printed; a file of seeds beside the tests is not wanted.
    ProptestConfig {
        failure_persistence: None,
        ..default
    }
}

/// Histories on a disk of `size` bytes: up to `batches`, each of up to `width` operations at once.
pub(crate) fn histories(
    size: u64,
    batches: usize,
    width: usize,
) -> impl Strategy<Value = Vec<Vec<Op>>> {
    let op = ops(size);
    prop::collection::vec(prop::collection::vec(op, 1..=width), 1..=batches)
}

fn ops(size: u64) -> impl Strategy<Value = Op> {
    let range = move || ranges(size);
    prop_oneof![
        4 => range().prop_map(Op::Read),
        6 => (range(), any::<u8>(), any::<bool>()).prop_map(|(range, seed, fua)| Op::Write { range, seed, fua }),
        2 => (range(), any::<bool>(), any::<bool>())
            .prop_map(|(range, no_unmap, fua)| Op::Zeroes { range, no_unmap, fua }),
        2 => range().prop_map(Op::Discard),
        1 => range().prop_map(Op::Extents),
        1 => Just(Op::Flush),
    ]
}

/// Ranges as likely around the edges of blocks and of the disk as anywhere, and many short ones in a few
/// blocks, where neighbours that write at the same time meet.
fn ranges(size: u64) -> impl Strategy<Value = Range<u64>> {
    let blocks = size / 4096;
    let near_edge =
        (0..=blocks, 0..=4u64).prop_map(|(block, shift)| (block * 4096 + shift).saturating_sub(2));
    let start = prop_oneof![0..size, near_edge, Just(0)];
    let edge = (1..=32u64, 0..=4u64).prop_map(|(blocks, shift)| blocks * 4096 + shift - 2);
    let len = prop_oneof![6 => 1..=16u64, 6 => edge, 6 => 1..=(256u64 << 10), 1 => Just(size)];
    let crowd = (8192..8192 + 12000u64, 1..=700u64);
    prop_oneof![(start, len), crowd].prop_map(move |(start, len)| {
        let start = start.min(size - 1);
        start..(start + len).min(size)
    })
}
