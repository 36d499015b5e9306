//! When to ask an engine for bytes that it has in memory: most lend nothing, and are asked ever less.

use super::output;

/// The most short reads in a row that are not asked for.
const MOST_SKIPPED: u32 = 63;

/// What a connection learned about its short reads.
#[derive(Debug, Default)]
pub(super) struct Lending {
    skip: u32,
    /// How many were skipped after the last refusal.
    pause: u32,
}

impl Lending {
    /// True if the engine should be asked to lend the `len` bytes of a read.
    pub(super) fn ask(&mut self, len: u64) -> bool {
        // A longer read is sent from a buffer of its own, which costs no copy either.
        if len > output::COPIED as u64 {
            return false;
        }
        let asks = self.skip == 0;
        self.skip = self.skip.saturating_sub(1);
        asks
    }

    /// Takes the answer.
    pub(super) fn learn(&mut self, lent: bool) {
        self.pause = match lent {
            true => 0,
            false => (2 * self.pause + 1).min(MOST_SKIPPED),
        };
        self.skip = self.pause;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_that_lends_nothing_is_asked_ever_less() {
        let mut lending = Lending::default();
        let mut asked = 0;
        for _ in 0..6400 {
            if lending.ask(4096) {
                asked += 1;
                lending.learn(false);
            }
        }
        assert!((100..110).contains(&asked), "{asked}");
        while !lending.ask(1) {}
        lending.learn(true);
        assert!(lending.ask(1), "what was lent brings the questions back");
        assert!(!lending.ask(output::COPIED as u64 + 1));
    }
}
