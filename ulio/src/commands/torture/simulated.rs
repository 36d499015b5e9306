//! In the simulated world: many seeds on all cores.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use userland_io_testing::stack::Simulation;
use userland_io_testing::{Failure as Found, Report, Subject, Torture as Runs, torture};

use super::meter::Meter;
use super::report::Told;
use crate::cli::Torture;
use crate::errors::Failure;
use crate::signals::Signals;

/// How many seeds a job takes at a time.
const CHUNK: u64 = 64;

/// What the jobs share.
struct Work {
    subject: Subject,
    gentle: bool,
    next: AtomicU64,
    end: u64,
    stop: AtomicBool,
}

pub(super) async fn run(
    simulation: Simulation,
    arguments: &Torture,
    signals: &mut Signals,
) -> Result<(), Failure> {
    let subject = simulation.subject(arguments.claim.map(Into::into));
    let told = Told {
        arguments,
        name: subject.name().to_owned(),
        live: false,
        simulated: true,
    };
    let began = Instant::now();
    let mut total = Report {
        runs: 0,
        crashes: 0,
        took: Duration::ZERO,
    };
    if let Some(script) = &arguments.script {
        let result = torture::replay(&subject, &script.to_string());
        total.runs = 1;
        total.took = began.elapsed();
        return match result {
            Ok(()) => told.well(&total),
            Err(found) => Err(told.failed(&found)),
        };
    }
    let seeds = super::seeds(arguments, 10_000);
    let work = Arc::new(Work {
        subject,
        gentle: arguments.gentle,
        next: AtomicU64::new(seeds.start),
        end: seeds.end,
        stop: AtomicBool::new(false),
    });
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (tell, mut news) = mpsc::channel(64);
    for _ in 0..arguments.jobs.unwrap_or(cores) {
        let (work, tell) = (work.clone(), tell.clone());
        // Not the runtime's: these never wait.
        std::thread::spawn(move || job(&work, &tell));
    }
    drop(tell);
    let meter = Meter::new();
    let deadline = super::deadline(arguments);
    let mut found: Option<Box<Found>> = None;
    let mut interrupted = false;
    loop {
        let step = tokio::select! {
            step = news.recv() => step,
            () = signals.next(), if !interrupted => {
                interrupted = true;
                work.stop.store(true, Ordering::Relaxed);
                continue;
            }
        };
        match step {
            None => break,
            Some(Ok(report)) => {
                total.runs += report.runs;
                total.crashes += report.crashes;
                total.took = began.elapsed();
                meter.tell(&total);
            }
            Some(Err(failure)) => {
                work.stop.store(true, Ordering::Relaxed);
                // The first seed, whoever came first.
                if found
                    .as_ref()
                    .is_none_or(|f| failure.found.seed < f.found.seed)
                {
                    found = Some(failure);
                }
            }
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            work.stop.store(true, Ordering::Relaxed);
        }
    }
    meter.end();
    total.took = began.elapsed();
    match found {
        Some(mut failure) => {
            failure.before = total;
            Err(told.failed(&failure))
        }
        None if interrupted => told.interrupted(&total),
        None => told.well(&total),
    }
}

fn job(work: &Work, tell: &mpsc::Sender<Result<Report, Box<Found>>>) {
    while !work.stop.load(Ordering::Relaxed) {
        let start = work.next.fetch_add(CHUNK, Ordering::Relaxed);
        if start >= work.end {
            return;
        }
        let seeds = start..start.saturating_add(CHUNK).min(work.end);
        let runs = Runs::new(&work.subject).seeds(seeds);
        let runs = match work.gentle {
            true => runs,
            false => runs.hostile(),
        };
        if tell.blocking_send(runs.run()).is_err() {
            return;
        }
    }
}
