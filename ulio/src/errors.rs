//! Why a command fails, and how that is told: one line on stderr, and an exit code.

use std::process::ExitCode;

use userland_io::stack::StackError;

use crate::output;

/// What ends a command other than well.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It was asked wrongly: exit code 2. May be several lines, to point at the characters.
    Usage(String),
    /// It did not work: exit code 1.
    Failed(String),
    /// Whoever read the output has gone (`ulio engines | head -1`): no fault.
    OutputGone,
}

impl Failure {
    /// Tells it, and gives the exit code.
    pub(crate) fn report(self) -> ExitCode {
        let (text, code) = match self {
            Failure::Usage(text) => (text, 2),
            Failure::Failed(text) => (output::one_line(&text), 1),
            Failure::OutputGone => return ExitCode::SUCCESS,
        };
        output::note(&format!("error: {}", output::printable(&text)));
        ExitCode::from(code)
    }

    /// The failure of `what`, for the reason `error`.
    pub(crate) fn of(what: impl std::fmt::Display, error: impl std::fmt::Display) -> Self {
        Failure::Failed(format!("{what}: {error}"))
    }
}

impl From<StackError> for Failure {
    fn from(error: StackError) -> Self {
        match error.is_usage() {
            true => {
                let text = error.render().to_string();
                let text = text.strip_prefix("error: ").unwrap_or(&text);
                Failure::Usage(text.to_owned())
            }
            false => Failure::Failed(error.to_string()),
        }
    }
}
