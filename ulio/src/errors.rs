//! Why a command fails. `output` tells it.

use userland_io::stack::StackError;

/// What ends a command other than well.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It was asked wrongly: exit code 2. May be several lines, to point at the characters.
    Usage(String),
    /// It did not work: exit code 1.
    Failed(String),
    /// Another process has told why, and ended with this exit code.
    #[cfg(target_os = "linux")]
    Told(u8),
    /// Whoever read the output has gone (`ulio engines | head -1`): no fault.
    OutputGone,
}

impl Failure {
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
