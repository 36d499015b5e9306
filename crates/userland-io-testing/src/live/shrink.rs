//! Makes a script that failed smaller, where chance decides whether it fails again.

use std::time::Instant;

use super::run::Session;
use super::{Executor, Live};
use crate::Script;
use crate::check::Verdict;
use crate::script::End;

/// How often each smaller script gets the chance to fail.
const TIMES: u32 = 30;

pub(super) async fn shrink<X: Executor>(
    live: &Live<'_, X>,
    found: &Script,
    verdict: Verdict,
) -> (Script, Verdict) {
    let mut search = Search {
        live,
        best: found.clone(),
        verdict,
        until: Instant::now() + live.shrinking,
    };
    search.rounds().await;
    while search.actions().await {}
    search.ends().await;
    (search.best, search.verdict)
}

struct Search<'a, 's, X> {
    live: &'a Live<'s, X>,
    best: Script,
    verdict: Verdict,
    until: Instant,
}

impl<X: Executor> Search<'_, '_, X> {
    async fn rounds(&mut self) {
        let mut at = 0;
        while at < self.best.rounds.len() && self.best.rounds.len() > 1 {
            let mut next = self.best.clone();
            next.rounds.remove(at);
            if !self.fails(next).await {
                at += 1;
            }
        }
    }

    /// Takes away operations: halves first, then ever shorter runs. True if any could go.
    async fn actions(&mut self) -> bool {
        let mut smaller = false;
        for round in 0..self.best.rounds.len() {
            let mut run = self.best.rounds[round].actions.len().div_ceil(2);
            while run > 0 {
                let mut at = 0;
                while at + run <= self.best.rounds[round].actions.len() {
                    let mut next = self.best.clone();
                    next.rounds[round].actions.drain(at..at + run);
                    match self.fails(next).await {
                        true => smaller = true,
                        false => at += run,
                    }
                }
                run /= 2;
            }
        }
        smaller && Instant::now() < self.until
    }

    /// Takes away what rounds end with, and the errors below.
    async fn ends(&mut self) {
        for round in 0..self.best.rounds.len() {
            let mut next = self.best.clone();
            if next.rounds[round].fault.take().is_some() {
                self.fails(next).await;
            }
            let mut next = self.best.clone();
            if std::mem::replace(&mut next.rounds[round].end, End::Done) != End::Done {
                self.fails(next).await;
            }
        }
    }

    async fn fails(&mut self, script: Script) -> bool {
        let mut session = None;
        let mut verdict = Ok(());
        for _ in 0..TIMES {
            if Instant::now() >= self.until {
                break;
            }
            verdict = self.live.script(&mut session, &script, &mut 0).await;
            if verdict.is_err() {
                break;
            }
        }
        if let Some(session) = session {
            let _ = Session::end(session, self.live).await;
        }
        match verdict {
            Err(verdict) if verdict.clause == self.verdict.clause => {
                self.best = script;
                self.verdict = verdict;
                true
            }
            _ => false,
        }
    }
}
