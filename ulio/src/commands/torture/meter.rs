//! How far it is: a line that changes, on a terminal.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use userland_io_testing::Report;

/// Shows the runs so far.
pub(super) struct Meter(Option<ProgressBar>);

impl Meter {
    pub(super) fn new() -> Self {
        if !std::io::stderr().is_terminal() {
            return Meter(None);
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        let bar = match ProgressStyle::with_template("{spinner} {msg}") {
            Ok(style) => bar.with_style(style),
            Err(_) => bar,
        };
        Meter(Some(bar))
    }

    pub(super) fn tell(&self, report: &Report) {
        if let Some(bar) = &self.0 {
            bar.set_message(super::report::line(report));
            bar.tick();
        }
    }

    /// Takes the line away, for what is written after it.
    pub(super) fn end(&self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
