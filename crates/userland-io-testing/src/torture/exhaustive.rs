//! All there is of a small kind: every crash point of a script, every image that a crash there can leave.

use std::ops::Range;

use super::run::Run;
use super::{Failure, Report, Subject};
use crate::Script;
use crate::check::Verdict;
use crate::script::{End, Fault, Mix, Round};
use crate::sim::{Keep, SimDisk};
use std::time::Instant;
use userland_io::ErrorKind;

/// What is tried exhaustively.
#[derive(Clone, Debug)]
pub struct Scope {
    /// Which random scripts: one round each.
    pub seeds: Range<u64>,
    /// What they are made of.
    pub mix: Mix,
    /// Up to so many images are all tried at each crash point; of more, so many at random.
    pub images: u64,
    /// The recovery from one image of each crash point is itself stopped at each of its events.
    pub recoveries: bool,
    /// Each call to a disk below fails once, too.
    pub faults: bool,
}

impl Default for Scope {
    fn default() -> Self {
        Scope {
            seeds: 0..10,
            mix: Mix {
                ops: 20,
                rounds: 1,
                blocks: 6,
                ..Mix::default()
            },
            images: 1 << 12,
            recoveries: true,
            faults: true,
        }
    }
}

/// Takes each script of `scope` apart: stops it at every event, and opens every image that is possible then.
///
/// # Errors
/// The first that is not legal. The script says the event and, where one disk is below, the number of the image.
pub fn exhaustive(subject: &Subject, scope: &Scope) -> Result<Report, Box<Failure>> {
    let start = Instant::now();
    let mut report = Report::default();
    for seed in scope.seeds.clone() {
        let mut script = Script::random(seed, &scope.mix);
        script.rounds.truncate(1);
        let mut search = Search {
            subject,
            scope,
            script,
            crashes: 0,
            runs: 0,
        };
        let result = search.all();
        report.runs += search.runs;
        report.crashes += search.crashes;
        report.took = start.elapsed();
        if let Err(verdict) = result {
            let found = search.script.clone();
            return Err(Failure::of(subject, found, search.script, verdict, report));
        }
    }
    Ok(report)
}

struct Search<'s> {
    subject: &'s Subject,
    scope: &'s Scope,
    script: Script,
    crashes: u64,
    runs: u64,
}

impl<'s> Search<'s> {
    fn all(&mut self) -> Result<(), Verdict> {
        let plain = Round {
            fault: None,
            end: End::Done,
            ..self.script.rounds[0].clone()
        };
        let calls = self.every_event(&plain)?;
        if !self.scope.faults {
            return Ok(());
        }
        for (disk, &calls) in calls.iter().enumerate() {
            for call in 0..calls {
                let fault = Fault {
                    disk: disk as u8,
                    flush: false,
                    call: call as u32,
                    kind: match call % 2 {
                        0 => ErrorKind::Io,
                        _ => ErrorKind::NoSpace,
                    },
                };
                let round = Round {
                    fault: Some(fault),
                    ..plain.clone()
                };
                // An error may change all that follows: some moments after it, not all.
                let run = self.begin(&round, None)?;
                self.every_image(&run, &round, u32::MAX, 64)?;
            }
        }
        Ok(())
    }

    /// Stops at each event in turn. Answers how many calls each disk got.
    fn every_event(&mut self, round: &Round) -> Result<Vec<u64>, Verdict> {
        let mut run = Run::begin(self.subject, self.script.seed)?;
        let before: Vec<u64> = run.disks.iter().map(SimDisk::calls).collect();
        let first = run.world.events();
        self.remember(round, u32::MAX, 0);
        run.act(round, None)?;
        let events = run.world.events() - first;
        let calls = run.disks.iter().zip(before);
        let calls = calls.map(|(disk, before)| disk.calls() - before);
        let calls: Vec<u64> = calls.collect();
        for at in 0..=events {
            let run = self.begin(round, Some(at))?;
            self.every_image(&run, round, at as u32, self.scope.images)?;
        }
        Ok(calls)
    }

    fn begin(&mut self, round: &Round, stop: Option<u64>) -> Result<Run<'s>, Verdict> {
        let at = stop.map_or(u32::MAX, |at| at as u32);
        self.remember(round, at, 0);
        self.runs += 1;
        let mut run = Run::begin(self.subject, self.script.seed)?;
        run.act(round, stop)?;
        run.history.check_live()?;
        Ok(run)
    }

    /// Opens every image that a crash now can leave, or `most` of them.
    fn every_image(
        &mut self,
        run: &Run<'s>,
        round: &Round,
        at: u32,
        most: u64,
    ) -> Result<(), Verdict> {
        let counts: Vec<u64> = run.disks.iter().map(SimDisk::images).collect();
        let total = counts.iter().copied().fold(1, u64::saturating_mul);
        for n in 0..total.min(most) {
            let image = match total <= most {
                true => n,
                false => run.world.draw(total),
            };
            let mut rest = image;
            let disks = run.disks.iter().zip(&counts);
            let disks = disks.map(|(disk, count)| {
                let number = rest % count;
                rest /= count;
                disk.crash(Keep::Image(number))
            });
            self.crashes += 1;
            if let Err(verdict) = run.judge_image(disks.collect()) {
                self.remember(round, at, image);
                return Err(verdict);
            }
        }
        match self.scope.recoveries {
            true => self.every_recovery(run),
            false => Ok(()),
        }
    }

    /// Stops the recovery from one crash at each of its events.
    fn every_recovery(&mut self, run: &Run<'s>) -> Result<(), Verdict> {
        let crash = |disks: &[SimDisk], keep| -> Vec<SimDisk> {
            disks.iter().map(|disk| disk.crash(keep)).collect()
        };
        let first = crash(&run.disks, Keep::Subset);
        let events = run.recovery_events(&first)?;
        for stop in 0..events {
            let disks = crash(&first, Keep::Nothing);
            run.open_until(&disks, stop);
            self.crashes += 2;
            run.judge_image(crash(&disks, Keep::Subset))?;
        }
        Ok(())
    }

    fn remember(&mut self, round: &Round, at: u32, image: u64) {
        let end = End::Crash {
            at,
            keep: Keep::Image(image),
            again: None,
        };
        self.script.rounds = vec![Round {
            end,
            ..round.clone()
        }];
    }
}
