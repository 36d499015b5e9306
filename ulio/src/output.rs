//! Results go to stdout, everything else to stderr.
//!
//! Nothing here panics when a reader has gone: a closed stdout ends the command
//! quietly, and a closed stderr is nobody's concern.

use std::io::{self, BufWriter, ErrorKind, StdoutLock, Write};
use std::process::ExitCode;
use std::sync::OnceLock;

use serde::Serialize;

use crate::errors::Failure;

/// Stdout, buffered. [`end`](Self::end) it.
pub(crate) struct Results(BufWriter<StdoutLock<'static>>);

impl Results {
    pub(crate) fn begin() -> Self {
        Results(BufWriter::new(io::stdout().lock()))
    }

    /// Writes a line.
    pub(crate) fn line(&mut self, text: impl std::fmt::Display) -> Result<(), Failure> {
        writeln!(self.0, "{text}").map_err(gone)
    }

    /// Writes what is text already.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.0.write_all(bytes).map_err(gone)
    }

    /// Writes JSON, for people to read as well.
    pub(crate) fn json(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        let text = serde_json::to_string_pretty(value).map_err(|e| Failure::of("JSON", e))?;
        self.line(text)
    }

    /// Makes sure that all of it has been written.
    pub(crate) fn end(mut self) -> Result<(), Failure> {
        self.0.flush().map_err(gone)
    }
}

fn gone(error: io::Error) -> Failure {
    match error.kind() {
        ErrorKind::BrokenPipe => Failure::OutputGone,
        _ => Failure::of("writing to stdout", error),
    }
}

/// Stderr, in one write a line: what a log that others write to needs.
pub(crate) struct Told;

/// What each line on stderr begins with.
static PREFIX: OnceLock<String> = OnceLock::new();

impl Told {
    /// Begins each line with the name and number of this process from now on.
    #[cfg(target_os = "linux")]
    pub(crate) fn name_lines() {
        PREFIX.get_or_init(|| format!("ulio[{}]: ", std::process::id()));
    }
}

impl Write for Told {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let prefix = PREFIX.get().map_or("", String::as_str).as_bytes();
        io::stderr().write_all(&[prefix, line].concat())?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Tells a person something, on stderr.
pub(crate) fn note(text: &str) {
    // If nobody can be told, there is nobody to tell that.
    let _ = Told.write_all(format!("{text}\n").as_bytes());
}

/// Tells why a command failed, on stderr, and gives the exit code.
pub(crate) fn report(failure: Failure) -> ExitCode {
    let (text, code) = match failure {
        Failure::Usage(text) => (text, 2),
        Failure::Failed(text) => (one_line(&text), 1),
        #[cfg(target_os = "linux")]
        Failure::Told(code) => return ExitCode::from(code),
        Failure::OutputGone => return ExitCode::SUCCESS,
    };
    note(&format!("error: {}", printable(&text)));
    ExitCode::from(code)
}

/// `text` without what would move a terminal's cursor: it may come from a server or a file's name. Lines stay.
pub(crate) fn printable(text: &str) -> String {
    let shown = |c: char| if c.is_control() && c != '\n' { '?' } else { c };
    text.chars().map(shown).collect()
}

/// Likewise, and all in one line.
pub(crate) fn one_line(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    printable(&lines.join(" "))
}

/// A length as a person says it: `1.5 GiB`, `4 KiB`, `12 bytes`.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        let s = if bytes == 1 { "" } else { "s" };
        return format!("{bytes} byte{s}");
    }
    let mut unit = (bytes.ilog2() / 10) as usize;
    // Rounded to the two digits shown; 1023.999 KiB is 1 MiB then.
    let mut hundredths = (u128::from(bytes) * 100) >> (10 * unit);
    if hundredths >= 102_400 {
        unit += 1;
        hundredths = 100;
    }
    let (whole, part) = (hundredths / 100, hundredths % 100);
    let text = format!("{whole}.{part:02}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    format!("{text} {}", UNITS[unit.clamp(1, UNITS.len()) - 1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_moves_the_cursor() {
        assert_eq!(printable("a\x1b[2Jb\nc\r"), "a?[2Jb\nc?");
    }

    #[test]
    fn sizes_read_well() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1, "1 byte"),
            (1023, "1023 bytes"),
            (1024, "1 KiB"),
            (1 << 30, "1 GiB"),
            (3 << 29, "1.5 GiB"),
            ((1 << 20) - 1, "1023.99 KiB"),
            ((1 << 30) + (1 << 29) + (1 << 26), "1.56 GiB"),
            (u64::MAX, "15.99 EiB"),
        ] {
            assert_eq!(size(bytes), text, "{bytes}");
        }
    }
}
