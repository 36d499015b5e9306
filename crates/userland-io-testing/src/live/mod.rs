//! The checks of [`torture`](crate::torture) on a real executor: requests truly run at the same time, on any engine.
//!
//! Each client of a script is a task. The moments at which its requests begin and end are noted under one lock, around
//! each call, so what the history says came first did come first, and what it cannot tell is judged as concurrent. A run does not
//! repeat from its seed: the seed says what is asked, the machine decides the rest.
//!
//! A [`Subject`] with simulated disks below is crashed, too: at a moment the history is cut and the
//! disks keep what a crash leaves. One without (an engine that keeps its bytes elsewhere, another's server) gets everything
//! but crashes; what it held in the windows that are used is overwritten.
//!
//! The executor is the caller's, see [`Executor`].

mod client;
mod device;
mod record;
mod run;
mod shrink;

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::{Duration, Instant};

use crate::Script;
use crate::check::{Clause, Verdict};
use crate::script::Mix;
use crate::torture::{Failure, Report, Subject};

use run::Session;

pub use device::through_device;

/// What an [`Executor`] runs.
pub type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What runs the clients: with the feature `tokio` `Tokio` is one.
pub trait Executor {
    /// Runs a task to its end, beside all others.
    fn spawn(&self, task: Task);

    /// Ends after this time.
    fn sleep(&self, time: Duration) -> Task;
}

/// The tokio runtime that the checks are called on; of several threads, for requests that truly run at the same time.
#[cfg(feature = "tokio")]
#[derive(Clone, Copy, Debug)]
pub struct Tokio;

#[cfg(feature = "tokio")]
impl Executor for Tokio {
    fn spawn(&self, task: Task) {
        tokio::spawn(task);
    }

    fn sleep(&self, time: Duration) -> Task {
        Box::pin(tokio::time::sleep(time))
    }
}

/// Random scripts against a subject on a real executor.
#[derive(Debug)]
pub struct Live<'s, X> {
    subject: &'s Subject,
    executor: &'s X,
    mix: Mix,
    errors: bool,
    patience: Duration,
    shrinking: Duration,
}

impl<'s, X: Executor> Live<'s, X> {
    /// Up to 8 clients, everything but abandoned futures.
    pub fn new(subject: &'s Subject, executor: &'s X) -> Self {
        let mix = Mix {
            clients: 8,
            ops: 60,
            ..Mix::default()
        };
        Live {
            subject,
            executor,
            mix: mix.over(subject.disks.len()),
            errors: false,
            patience: Duration::from_secs(60),
            shrinking: Duration::from_secs(10),
        }
    }

    /// What the scripts are made of. Futures are never forgotten here, and no crash comes during a recovery.
    #[must_use]
    pub fn mix(mut self, mix: Mix) -> Self {
        self.mix = mix;
        self
    }

    /// With abandoned futures and, where there are simulated disks, with their errors.
    #[must_use]
    pub fn hostile(mut self) -> Self {
        self.mix = self.mix.hostile();
        self
    }

    /// The subject may fail requests for reasons of its own (it is made to), as long as they then act before they
    /// answer or not at all.
    #[must_use]
    pub fn errors_allowed(mut self) -> Self {
        self.errors = true;
        self
    }

    /// How long a request may take before it counts as never answered. If left out: a minute.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// How long a failing script is made smaller. If left out: 10 seconds.
    #[must_use]
    pub fn shrinking(mut self, time: Duration) -> Self {
        self.shrinking = time;
        self
    }

    /// Runs the script of each seed, up to the first that fails, or until `go_on`, which is told after each, says no.
    ///
    /// # Errors
    /// That failure, shrunk as far as it repeats; not if something never answered.
    pub async fn run(
        &self,
        seeds: impl IntoIterator<Item = u64>,
        mut go_on: impl FnMut(&Report) -> bool,
    ) -> Result<Report, Box<Failure>> {
        let start = Instant::now();
        let mut report = Report::default();
        let mut session = None;
        for seed in seeds {
            let script = Script::random(seed, &self.mix);
            let verdict = self
                .script(&mut session, &script, &mut report.crashes)
                .await;
            report.took = start.elapsed();
            if let Err(verdict) = verdict {
                return Err(self.failure(script, verdict, report).await);
            }
            report.runs += 1;
            if !go_on(&report) {
                break;
            }
        }
        match self.end(session).await {
            Ok(()) => Ok(report),
            Err(verdict) => {
                let nothing = Script {
                    seed: 0,
                    rounds: Vec::new(),
                };
                Err(Failure::of(
                    self.subject,
                    nothing.clone(),
                    nothing,
                    verdict,
                    report,
                ))
            }
        }
    }

    /// Runs one script `times` over, up to the first failure.
    ///
    /// # Errors
    /// That failure, as it was found.
    pub async fn replay(&self, script: &Script, times: u64) -> Result<Report, Box<Failure>> {
        let start = Instant::now();
        let mut report = Report::default();
        let mut session = None;
        for _ in 0..times {
            let verdict = self.script(&mut session, script, &mut report.crashes).await;
            report.took = start.elapsed();
            if let Err(verdict) = verdict {
                return Err(self.replayed(script, verdict, report));
            }
            report.runs += 1;
        }
        let ended = self.end(session).await;
        ended.map_err(|verdict| self.replayed(script, verdict, report))?;
        Ok(report)
    }

    async fn script(
        &self,
        session: &mut Option<Session>,
        script: &Script,
        crashes: &mut u64,
    ) -> Result<(), Verdict> {
        let mut now = match session.take() {
            Some(session) => session,
            None => Session::begin(self, script.seed).await?,
        };
        // Simulated disks are new for each script.
        let is_kept = self.subject.disks.is_empty();
        let verdict = match now.script(self, script).await {
            Ok(()) if is_kept => now.settle(self).await,
            verdict => verdict.map(|()| false),
        };
        *crashes += std::mem::take(&mut now.crashes);
        match verdict {
            Ok(true) => {
                *session = Some(now);
                Ok(())
            }
            Ok(false) => now.end(self).await,
            // What is still under way would act beside the next script.
            Err(verdict) if is_kept && verdict.clause != Clause::Answer => {
                let _ = now.end(self).await;
                Err(verdict)
            }
            Err(verdict) => Err(verdict),
        }
    }

    /// What `future` answers, if it does in time.
    async fn in_time<T>(&self, what: &str, future: impl Future<Output = T>) -> Result<T, Verdict> {
        let mut future = pin!(future);
        let mut limit = self.executor.sleep(self.patience);
        let answered = poll_fn(|cx| match future.as_mut().poll(cx) {
            Poll::Ready(answer) => Poll::Ready(Some(answer)),
            Poll::Pending => limit.as_mut().poll(cx).map(|()| None),
        });
        answered.await.ok_or_else(|| {
            let what = format!("{what} has not answered after {:?}", self.patience);
            Verdict::new(Clause::Answer, what)
        })
    }

    async fn end(&self, session: Option<Session>) -> Result<(), Verdict> {
        match session {
            Some(session) => session.end(self).await,
            None => Ok(()),
        }
    }

    /// How often a read that must succeed is tried.
    fn tries(&self) -> u32 {
        match self.errors {
            true => 1000,
            false => 1,
        }
    }

    async fn failure(&self, found: Script, verdict: Verdict, before: Report) -> Box<Failure> {
        if verdict.clause == Clause::Answer {
            // What hangs keeps its disk open, and the smaller scripts from it.
            return self.replayed(&found, verdict, before);
        }
        let (script, verdict) = shrink::shrink(self, &found, verdict).await;
        Failure::of(self.subject, found, script, verdict, before)
    }

    fn replayed(&self, script: &Script, verdict: Verdict, before: Report) -> Box<Failure> {
        Failure::of(
            self.subject,
            script.clone(),
            script.clone(),
            verdict,
            before,
        )
    }
}
