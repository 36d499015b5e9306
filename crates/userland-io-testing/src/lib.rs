//! Proves that a userland-io engine keeps its promises.
//!
//! An engine, or a stack of them, runs over [`sim::SimDisk`]: a disk that keeps
//! every version of each block that no flush has made durable yet, and from which
//! a crash picks. A seeded executor interleaves the requests, [`check::History`] records
//! them, and its rules decide whether what was read, and what a crash left, is
//! legal under the contract (`docs/semantics.md`). A run takes microseconds, needs
//! no root and no kernel module, and repeats exactly from its seed.
//!
//! * [`sim`]: the world: executor, clock, disk, faults, crashes.
//! * [`check`]: the history of a disk and the verdicts on it.
//! * [`mod@reference`]: three engines, one for each crash level, written to be read.
//! * [`script`]: what the clients of a disk do, as a value, as text, at random.
//! * [`mod@conformance`]: the suite for any engine, one line for its author.
//! * [`torture`]: runs scripts against a [`Subject`], at random or exhaustively, and shrinks what fails.
//! * [`mod@live`]: the same on a real executor, with real concurrency, against any engine.
//! * [`mod@stack`]: subjects from words, such as `file:disk.img,size=1M offset:4K`.
#![forbid(unsafe_code)]

pub mod check;
pub mod conformance;
pub mod live;
#[cfg(feature = "nbd")]
pub mod nbd;
pub mod reference;
pub mod script;
pub mod sim;
pub mod stack;
pub mod torture;

pub use script::Script;
pub use torture::{Failure, Report, Subject, Torture};
