//! The checker: what a disk did, and whether it was legal.
//!
//! A [`History`] notes when each operation began and ended and what it returned, for a
//! window of the disk that is cut into cells (a cell is a logical block, or a part of one, or
//! a few of them where blocks are tiny). Every cell that is written names its
//! writer (see [`stamp`]), so a read says which mutation it saw. From that,
//! [`History::check_live`] decides whether the disk was a set of linearizable registers, and
//! [`History::check_crash`] whether an image could be left by a crash under a claim. A
//! [`Verdict`] says what was broken, where, and by which operations, with a timeline.

mod crash;
mod history;
mod live;
mod order;
pub mod stamp;
mod verdict;

pub use history::{History, OpId, Request, Shape};
pub use verdict::{Clause, Verdict};

#[cfg(test)]
mod tests;
