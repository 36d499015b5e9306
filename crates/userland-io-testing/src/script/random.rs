//! Scripts at random.

use userland_io::{ErrorKind, WriteFlags};

use super::{Abandon, Action, End, Fault, Op, Round, Script};
use crate::sim::Keep;

/// What random scripts are made of.
#[derive(Clone, Debug)]
pub struct Mix {
    /// How many clients work at the same time, at most.
    pub clients: u8,
    /// How many operations a round has, at most.
    pub ops: u8,
    /// How many rounds a script has, at most.
    pub rounds: u8,
    /// In how many blocks the operations fall.
    pub blocks: u16,
    /// Processes are killed, too.
    pub kills: bool,
    /// Disks are closed and opened again, too.
    pub closes: bool,
    /// One round in so many has an error of a disk below (0: none).
    pub faults: u8,
    /// One operation in so many is given up half-way (0: none).
    pub abandons: u8,
    /// Operations that are given up are also forgotten, not only dropped. The disk may then never answer again.
    pub forgets: bool,
    /// One crash in so many is followed by another during the recovery (0: none).
    pub recovery_crashes: u8,
    /// How many disks are below.
    pub disks: u8,
}

impl Default for Mix {
    fn default() -> Self {
        Mix {
            clients: 3,
            ops: 16,
            rounds: 2,
            blocks: 12,
            kills: true,
            closes: true,
            faults: 0,
            abandons: 0,
            forgets: false,
            recovery_crashes: 3,
            disks: 1,
        }
    }
}

impl Mix {
    /// The same with errors of the disks below and with abandoned futures.
    #[must_use]
    pub fn hostile(mut self) -> Self {
        self.faults = 2;
        self.abandons = 8;
        self
    }

    /// The same for so many disks below.
    pub(crate) fn over(mut self, disks: usize) -> Self {
        self.disks = disks as u8;
        self
    }
}

impl Script {
    /// The script that `seed` draws from `mix`.
    pub fn random(seed: u64, mix: &Mix) -> Self {
        let mut rng = fastrand::Rng::with_seed(crate::check::stamp::mix(seed));
        let rounds = 1 + below(&mut rng, mix.rounds);
        let mut rounds: Vec<Round> = (0..rounds).map(|_| round(&mut rng, mix)).collect();
        if rng.bool() {
            // On a blank disk many things read as zeroes. On one that is full they differ.
            let fill = Action {
                client: 0,
                op: Op::Write(0, mix.blocks, WriteFlags::empty()),
                abandon: None,
            };
            rounds[0].actions.insert(0, fill);
        }
        Script { seed, rounds }
    }
}

fn below(rng: &mut fastrand::Rng, limit: u8) -> u8 {
    rng.u8(..limit.max(1))
}

fn one_in(rng: &mut fastrand::Rng, n: u8) -> bool {
    n > 0 && below(rng, n) == 0
}

fn round(rng: &mut fastrand::Rng, mix: &Mix) -> Round {
    // Many rounds have one client: what is sequential is also easier to read.
    let clients = 1 + below(rng, mix.clients);
    let ops = 1 + below(rng, mix.ops);
    // A round that works on few blocks overwrites more.
    let blocks = match rng.bool() {
        true => mix.blocks.max(1),
        false => rng.u16(1..=mix.blocks.max(1)),
    };
    let action = |rng: &mut fastrand::Rng| Action {
        client: below(rng, clients),
        op: op(rng, blocks),
        abandon: one_in(rng, mix.abandons).then(|| Abandon {
            polls: rng.u8(1..8),
            forget: mix.forgets && rng.bool(),
        }),
    };
    let actions: Vec<Action> = (0..ops).map(|_| action(rng)).collect();
    let fault = one_in(rng, mix.faults).then(|| Fault {
        disk: below(rng, mix.disks),
        flush: rng.bool(),
        call: match rng.bool() {
            true => rng.u32(..3),
            false => rng.u32(..u32::from(ops) * 2),
        },
        kind: match rng.bool() {
            true => ErrorKind::Io,
            false => ErrorKind::NoSpace,
        },
    });
    Round {
        end: end(rng, mix, ops),
        actions,
        fault,
    }
}

fn op(rng: &mut fastrand::Rng, blocks: u16) -> Op {
    let at = rng.u16(..blocks);
    let len = match rng.u8(..4) {
        0 => rng.u16(1..=blocks - at),
        1 => rng.u16(1..=(blocks - at).min(3)),
        _ => 1,
    };
    let mut flags = WriteFlags::empty();
    flags.set(WriteFlags::FUA, rng.u8(..5) == 0);
    match rng.u8(..20) {
        0..9 => Op::Write(at, len, flags),
        9..12 => Op::Read(at, len),
        12..15 => Op::Flush,
        15..17 => {
            flags.set(WriteFlags::NO_UNMAP, rng.bool());
            flags.set(WriteFlags::FAST_ONLY, rng.u8(..4) == 0);
            Op::Zeroes(at, len, flags)
        }
        17..19 => Op::Discard(at, len),
        _ => Op::Extents(at, len),
    }
}

fn end(rng: &mut fastrand::Rng, mix: &Mix, ops: u8) -> End {
    // Most operations are one to four events. Some crashes come when all is quiet.
    let at = match rng.u8(..5) {
        0 => u32::MAX,
        _ => rng.u32(..u32::from(ops) * 4 + 2),
    };
    match rng.u8(..10) {
        0 if mix.closes => End::Close,
        1 => End::Done,
        2..4 if mix.kills => End::Kill { at },
        _ => End::Crash {
            at,
            keep: match rng.u8(..8) {
                0 => Keep::Nothing,
                1 => Keep::Everything,
                2..5 => Keep::Subset,
                5..7 => Keep::Prefix,
                _ => Keep::Torn,
            },
            again: one_in(rng, mix.recovery_crashes).then(|| rng.u32(..30)),
        },
    }
}
