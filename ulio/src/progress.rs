//! How far a copy is: a bar on a terminal, now and then a line elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use userland_io::copy::{CopyPhase, CopyProgress};

use crate::output;

/// Between two lines.
const PAUSE: Duration = Duration::from_secs(5);

/// Shows the progress it is told.
pub(crate) enum Meter {
    Bar(ProgressBar, CopyPhase),
    Lines(Pace),
    Silent,
}

/// When the phase began, and when of it was last told.
pub(crate) struct Pace {
    phase: CopyPhase,
    began: Instant,
    told: Option<Instant>,
}

impl Meter {
    /// `wanted` by the arguments; if they say nothing, on a terminal.
    pub(crate) fn new(wanted: Option<bool>) -> Self {
        let terminal = std::io::stderr().is_terminal();
        match (wanted.unwrap_or(terminal), terminal) {
            (false, _) => Meter::Silent,
            (true, true) => Meter::Bar(bar(), CopyPhase::Copying),
            (true, false) => Meter::Lines(Pace {
                phase: CopyPhase::Copying,
                began: Instant::now(),
                told: None,
            }),
        }
    }

    /// Shows where it is now.
    pub(crate) fn tell(&mut self, step: CopyProgress) {
        match self {
            Meter::Silent => {}
            Meter::Bar(bar, phase) => {
                if step.phase != *phase {
                    *phase = step.phase;
                    bar.reset();
                }
                if bar.length() != Some(step.total) || step.done == 0 {
                    bar.set_length(step.total);
                    bar.set_message(verb(step.phase));
                }
                bar.set_position(step.done);
            }
            Meter::Lines(pace) => {
                let now = Instant::now();
                if step.phase != pace.phase {
                    (pace.phase, pace.began) = (step.phase, now);
                } else if pace.told.is_some_and(|told| now - told < PAUSE) && step.done < step.total
                {
                    return;
                }
                pace.told = Some(now);
                output::note(&line(step, now - pace.began));
            }
        }
    }

    /// Takes the bar away, for what is written after it.
    pub(crate) fn end(&mut self) {
        if let Meter::Bar(bar, _) = self {
            bar.finish_and_clear();
        }
    }
}

fn bar() -> ProgressBar {
    let template = "{msg} {wide_bar} {percent:>3}%  {binary_bytes} of {binary_total_bytes}  \
                    {binary_bytes_per_sec}  {eta} left";
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

fn verb(phase: CopyPhase) -> &'static str {
    match phase {
        CopyPhase::Copying => "copying",
        CopyPhase::Flushing => "flushing",
        CopyPhase::Verifying => "verifying",
    }
}

fn line(step: CopyProgress, took: Duration) -> String {
    let percent = match step.total {
        0 => 100,
        total => u128::from(step.done) * 100 / u128::from(total),
    };
    let mut text = format!(
        "{}: {percent}%, {} of {}",
        verb(step.phase),
        output::size(step.done),
        output::size(step.total)
    );
    let rate = step.done as f64 / took.as_secs_f64().max(1e-3);
    if step.phase != CopyPhase::Flushing && rate >= 1.0 {
        let left = (step.total - step.done.min(step.total)) as f64 / rate;
        text.push_str(&format!(
            ", {}/s, {} s left",
            output::size(rate as u64),
            left.ceil() as u64
        ));
    }
    text
}
