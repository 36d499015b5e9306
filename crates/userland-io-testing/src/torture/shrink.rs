//! Makes a failing script smaller, as long as it fails by the same clause.

use super::Subject;
use super::run::run;
use crate::Script;
use crate::check::Verdict;
use crate::script::{End, Round};
use crate::sim::Keep;

/// How many scripts are run at most.
const BUDGET: u32 = 30_000;
/// How many seeds are tried for each smaller script: one operation less is another interleaving.
const SEEDS: u64 = 24;

pub(super) fn shrink(subject: &Subject, script: &Script, verdict: Verdict) -> (Script, Verdict) {
    let mut search = Search {
        subject,
        best: script.clone(),
        verdict,
        budget: BUDGET,
    };
    while search.pass() && search.budget > 0 {}
    (search.best, search.verdict)
}

struct Search<'s> {
    subject: &'s Subject,
    best: Script,
    verdict: Verdict,
    budget: u32,
}

impl Search<'_> {
    /// Tries every way to make it smaller once. True if one worked.
    fn pass(&mut self) -> bool {
        let mut smaller = false;
        let mut at = 0;
        while at < self.best.rounds.len() {
            let mut next = self.best.clone();
            next.rounds.remove(at);
            match !next.rounds.is_empty() && self.fails(&next) {
                true => smaller = true,
                false => at += 1,
            }
        }
        for round in 0..self.best.rounds.len() {
            smaller |= self.fewer(round) | self.simpler(round);
        }
        smaller
    }

    /// Takes away operations: halves first, then ever shorter runs.
    fn fewer(&mut self, round: usize) -> bool {
        let mut smaller = false;
        let mut run = self.best.rounds[round].actions.len() / 2;
        while run > 0 {
            let mut at = 0;
            while at + run <= self.best.rounds[round].actions.len() {
                let mut next = self.best.clone();
                next.rounds[round].actions.drain(at..at + run);
                match self.fails(&next) {
                    true => smaller = true,
                    false => at += 1,
                }
            }
            run /= 2;
        }
        smaller
    }

    fn simpler(&mut self, round: usize) -> bool {
        let mut smaller = false;
        let mut change = |search: &mut Self, change: &dyn Fn(&mut Round)| {
            let mut next = search.best.clone();
            change(&mut next.rounds[round]);
            smaller |= next != search.best && search.fails(&next);
        };
        change(self, &|r| r.fault = None);
        change(self, &|r| r.end = End::Done);
        change(self, &|r| {
            if let End::Crash { again, .. } = &mut r.end {
                *again = None;
            }
        });
        change(self, &|r| {
            if let End::Crash { keep, .. } = &mut r.end {
                *keep = match keep {
                    Keep::Everything => Keep::Everything,
                    _ => Keep::Nothing,
                };
            }
        });
        change(self, &|r| match &mut r.end {
            End::Crash { at, .. } | End::Kill { at } => *at = u32::MAX,
            _ => {}
        });
        for action in 0..self.best.rounds[round].actions.len() {
            change(self, &|r| r.actions[action].abandon = None);
            change(self, &|r| r.actions[action].client = 0);
            change(self, &|r| {
                if let Some((_, len)) = r.actions[action].op.place() {
                    *len = 1;
                }
            });
            change(self, &|r| {
                if let Some((at, _)) = r.actions[action].op.place() {
                    *at = 0;
                }
            });
        }
        smaller
    }

    /// Tries the script with its own seed and with others. If one fails by the same clause, that is the best now.
    fn fails(&mut self, script: &Script) -> bool {
        let own = script.seed;
        for seed in std::iter::once(own).chain(0..SEEDS) {
            if self.budget == 0 {
                return false;
            }
            self.budget -= 1;
            let script = Script {
                seed,
                ..script.clone()
            };
            if let Err(verdict) = run(self.subject, &script).verdict
                && verdict.clause == self.verdict.clause
            {
                self.best = script;
                self.verdict = verdict;
                return true;
            }
        }
        false
    }
}
