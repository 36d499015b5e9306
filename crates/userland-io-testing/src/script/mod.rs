//! What the clients of a disk do, and how it ends: a value that can be drawn at random, shrunk, printed and read.
//!
//! A script is a seed (which decides every choice of the simulated world) and rounds. In a round some clients, each
//! one operation after the other, work on the disk at the same time, and then the round ends: with a
//! crash, a kill, a clean close, or nothing. As text:
//!
//! ```text
//! seed=7 0:w4+2 1:f 0:z0+8n 0:r4+2~1 fail@9=io crash@17/subset/3 ; 0:f close
//! ```
//!
//! Client 0 writes 2 blocks from block 4, client 1 flushes, client 0 then zeroes 8 blocks (`n`: NO_UNMAP, `q`: FAST_ONLY,
//! `!`: FUA) and begins a read whose future is dropped after one poll (`~1`; `^1`: forgotten); call 9 to the disk
//! below fails (`failflush@0=io`: its first flush); the machine stops at event 17, any subset of what was not durable remains,
//! and stops again at event 3 of the recovery. The second round flushes and closes.

mod random;
mod text;

use userland_io::{ErrorKind, WriteFlags};

use crate::sim::Keep;

pub use random::Mix;
pub use text::ParseScriptError;

/// A run: what is done to a disk, and the seed that decides all else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Script {
    /// Decides the interleaving, what a crash keeps, and every other choice.
    pub seed: u64,
    /// One after the other.
    pub rounds: Vec<Round>,
}

/// Some operations, and an end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Round {
    /// The operations; each client does its own in this order.
    pub actions: Vec<Action>,
    /// A call to a disk below that fails.
    pub fault: Option<Fault>,
    /// How it ends.
    pub end: End,
}

/// An operation of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Action {
    /// Who does it.
    pub client: u8,
    /// What.
    pub op: Op,
    /// Whether its future is given up half-way.
    pub abandon: Option<Abandon>,
}

/// An operation. Places and lengths are in blocks, taken modulo the disk's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// A read.
    Read(u16, u16),
    /// A write.
    Write(u16, u16, WriteFlags),
    /// A `write_zeroes`.
    Zeroes(u16, u16, WriteFlags),
    /// A discard.
    Discard(u16, u16),
    /// A look at the extents.
    Extents(u16, u16),
    /// A flush.
    Flush,
}

/// How a future is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abandon {
    /// It is polled so often.
    pub polls: u8,
    /// Then it is forgotten, not dropped.
    pub forget: bool,
}

/// An error of a disk below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which disk.
    pub disk: u8,
    /// Only flushes count.
    pub flush: bool,
    /// Which of its calls, counted from the start of the round.
    pub call: u32,
    /// What it answers.
    pub kind: ErrorKind,
}

/// How a round ends. `at` counts events of the simulated world; if the operations end first, that is the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Everything answers, and the disk is read.
    Done,
    /// Everything answers, the disk is closed and opened again.
    Close,
    /// The machine stops.
    Crash {
        /// When.
        at: u32,
        /// What remains.
        keep: Keep,
        /// It stops again during the recovery, at that event of it.
        again: Option<u32>,
    },
    /// The process dies.
    Kill {
        /// When.
        at: u32,
    },
}

impl Op {
    /// Its place and length.
    pub(crate) fn place(&mut self) -> Option<(&mut u16, &mut u16)> {
        match self {
            Op::Read(at, len)
            | Op::Write(at, len, _)
            | Op::Zeroes(at, len, _)
            | Op::Discard(at, len)
            | Op::Extents(at, len) => Some((at, len)),
            Op::Flush => None,
        }
    }
}
