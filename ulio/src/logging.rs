//! The log: on stderr, as `--log` or `ULIO_LOG` say.

use std::io;

use tracing_subscriber::EnvFilter;

use crate::errors::Failure;
use crate::output::Told;

/// Where the filter comes from if there is no `--log`.
const VARIABLE: &str = "ULIO_LOG";

/// What a server logs unless told otherwise: failed requests too, since only its clients hear of them else; and what
/// `stats` counts, which is in a stack for nothing else.
pub(crate) const SERVER: &str = "warn,userland_io::stats=info";
/// What other commands do: the request that fails is their own failure, and told as such.
pub(crate) const OTHERS: &str = "warn,userland_io::stats=info,userland_io::io=off";

/// Starts it, with the filter `default` if nobody gives one.
pub(crate) fn start(option: Option<&str>, default: &str) -> Result<(), Failure> {
    let variable = std::env::var(VARIABLE).ok().filter(|text| !text.is_empty());
    let (origin, text) = match (option, &variable) {
        (Some(text), _) => ("--log", text),
        (None, Some(text)) => (VARIABLE, text.as_str()),
        (None, None) => ("", default),
    };
    let filter = EnvFilter::try_new(text).map_err(|error| {
        Failure::Usage(format!(
            "{origin} `{text}`: {error}; write a level (error, warn, info, debug, trace), or \
             TARGET=LEVEL pairs with commas between, such as userland_io=debug"
        ))
    })?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| Told)
        .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
        // Else it would panic when stderr has gone.
        .log_internal_errors(false)
        .init();
    Ok(())
}
