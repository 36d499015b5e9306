//! Runs scripts against a stack: at random, or all there are of a small kind.

pub(crate) mod desk;
mod exhaustive;
mod run;
mod shrink;
mod subject;

use std::fmt;
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::Script;
use crate::check::Verdict;
use crate::script::Mix;

pub use exhaustive::{Scope, exhaustive};
pub use subject::Subject;

/// Random scripts against a subject, one for each seed.
///
/// ```
/// use userland_io_testing::{Subject, Torture, reference::SyncDisk, sim::DiskConfig};
///
/// let subject = Subject::new("sync", DiskConfig::new(16 * 64, 64), |disk| async {
///     SyncDisk::open(disk).await
/// });
/// Torture::new(&subject).seeds(0..100).run().unwrap();
/// ```
#[derive(Debug)]
pub struct Torture<'s> {
    subject: &'s Subject,
    mix: Mix,
    seeds: Range<u64>,
    shrink: bool,
}

/// What was done, and found to be in order.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    /// Scripts run.
    pub runs: u64,
    /// Crashes and kills in them, each with a recovery.
    pub crashes: u64,
    /// How long it took.
    pub took: Duration,
}

/// A script that shows that something is wrong.
#[derive(Debug)]
pub struct Failure {
    /// The subject's name.
    pub subject: String,
    /// The first script that failed.
    pub found: Script,
    /// A smaller one that fails in the same way.
    pub script: Script,
    /// What is wrong, in the smaller script.
    pub verdict: Verdict,
    /// What was in order before.
    pub before: Report,
}

impl<'s> Torture<'s> {
    /// Everything but errors from below and abandoned futures, seeds 0 to 1000.
    pub fn new(subject: &'s Subject) -> Self {
        Torture {
            subject,
            mix: Mix::default().over(subject.disks.len()),
            seeds: 0..1000,
            shrink: true,
        }
    }

    /// Which seeds.
    #[must_use]
    pub fn seeds(mut self, seeds: Range<u64>) -> Self {
        self.seeds = seeds;
        self
    }

    /// What the scripts are made of.
    #[must_use]
    pub fn mix(mut self, mix: Mix) -> Self {
        self.mix = mix;
        self
    }

    /// With errors of the disks below and with abandoned futures.
    #[must_use]
    pub fn hostile(mut self) -> Self {
        self.mix = self.mix.hostile();
        self
    }

    /// Leaves the first failing script as it is.
    #[must_use]
    pub fn as_found(mut self) -> Self {
        self.shrink = false;
        self
    }

    /// Runs one of them, whether it is among the seeds or not.
    ///
    /// # Errors
    /// What is wrong.
    pub fn run_one(&self, seed: u64) -> Result<(), Verdict> {
        run::run(self.subject, &Script::random(seed, &self.mix)).verdict
    }

    /// Runs them all, up to the first that fails.
    ///
    /// # Errors
    /// That failure, shrunk.
    pub fn run(&self) -> Result<Report, Box<Failure>> {
        let start = Instant::now();
        let mut report = Report::default();
        for seed in self.seeds.clone() {
            let script = Script::random(seed, &self.mix);
            let outcome = run::run(self.subject, &script);
            report.crashes += outcome.crashes;
            report.took = start.elapsed();
            if let Err(verdict) = outcome.verdict {
                let (small, verdict) = match self.shrink {
                    true => shrink::shrink(self.subject, &script, verdict),
                    false => (script.clone(), verdict),
                };
                return Err(Failure::of(self.subject, script, small, verdict, report));
            }
            report.runs += 1;
        }
        Ok(report)
    }
}

/// Runs one script.
///
/// # Errors
/// The verdict on it, and the script.
///
/// # Panics
/// If `script` is a text that is no script: it says which word.
pub fn replay(subject: &Subject, script: &str) -> Result<(), Box<Failure>> {
    let script: Script = match script.parse() {
        Ok(script) => script,
        Err(error) => panic!("{error}"),
    };
    let outcome = run::run(subject, &script);
    let report = Report {
        crashes: outcome.crashes,
        ..Report::default()
    };
    outcome
        .verdict
        .map_err(|verdict| Failure::of(subject, script.clone(), script, verdict, report))
}

impl Failure {
    pub(crate) fn of(
        subject: &Subject,
        found: Script,
        script: Script,
        verdict: Verdict,
        before: Report,
    ) -> Box<Self> {
        Box::new(Failure {
            subject: subject.name.clone(),
            found,
            script,
            verdict,
            before,
        })
    }
}

impl Report {
    /// Crashes, each with its recovery, in a second.
    pub fn rate(&self) -> f64 {
        self.crashes as f64 / self.took.as_secs_f64().max(1e-9)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} runs, {} crashes in {:.2?}: {:.0} crashes a second",
            self.runs,
            self.crashes,
            self.took,
            self.rate()
        )
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Failure {
            subject,
            script,
            verdict,
            ..
        } = self;
        let found = self.found.seed;
        let name = subject.replace(|c: char| !c.is_ascii_alphanumeric(), "_");
        write!(
            f,
            "{subject}: {verdict}\n\
             Found with seed {found} after {} runs. The smallest script that shows it:\n\n    {script}\n\n\
             As a test:\n\n\
             #[test]\n\
             fn {name}_seed_{found}() {{\n    \
                 userland_io_testing::torture::replay(&{name}(), \"{script}\").unwrap();\n\
             }}\n\n\
             As a command:\n\n    ulio torture {subject} --script '{script}'\n",
            self.before.runs
        )
    }
}

impl std::error::Error for Failure {}
