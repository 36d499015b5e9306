//! `ulio list`: what is attached on this machine, and what dead processes have left.

use serde::Serialize;
use userland_io::Op;
use userland_io::attach::{self, Counters, Listed, State};

use crate::cli::List;
use crate::errors::Failure;
use crate::output::{Results, note, one_line, size};

pub(crate) fn run(arguments: List) -> Result<(), Failure> {
    let mut listed = all()?;
    if arguments.stale {
        listed.retain(|listed| is_without_process(listed.state()));
    }
    let mut results = Results::begin();
    if arguments.json {
        let devices: Vec<_> = listed.iter().map(About::new).collect();
        results.json(&serde_json::json!({ "devices": devices }))?;
        return results.end();
    }
    if listed.is_empty() {
        note(match arguments.stale {
            true => "nothing is left of a process that died",
            false => "nothing is attached",
        });
        return Ok(());
    }
    let mut rows = vec![TITLES.map(str::to_owned)];
    rows.extend(listed.iter().map(row));
    for line in lines(&rows) {
        results.line(line)?;
    }
    results.end()
}

/// Every device on record.
pub(super) fn all() -> Result<Vec<Listed>, Failure> {
    attach::list().map_err(|error| Failure::of("listing what is attached", error))
}

fn is_without_process(state: State) -> bool {
    matches!(state, State::Stale | State::Waiting)
}

const TITLES: [&str; 11] = [
    "DEVICE", "VIA", "STATE", "SIZE", "DATA", "PID", "OPS", "READ", "WRITTEN", "ERRORS", "STACK",
];

fn row(listed: &Listed) -> [String; TITLES.len()] {
    let counters = listed.counters();
    let count = |of: &dyn Fn(&Counters) -> String| match &counters {
        Some(counters) => of(counters),
        None => UNKNOWN.to_owned(),
    };
    let sum = |counters: &Counters, part: fn((u64, u64, u64)) -> u64| -> u64 {
        OPERATIONS.map(|op| part(counters.of(op))).iter().sum()
    };
    let data = counters.as_ref().and_then(Counters::data);
    [
        device(listed),
        listed.via().to_string(),
        state(listed),
        size(listed.size()),
        data.map_or(UNKNOWN.to_owned(), size),
        listed.pid().to_string(),
        count(&|counters| sum(counters, |(ops, _, _)| ops).to_string()),
        count(&|counters| size(counters.of(Op::Read).1)),
        count(&|counters| size(counters.of(Op::Write).1)),
        count(&|counters| sum(counters, |(_, _, errors)| errors).to_string()),
        one_line(listed.label()),
    ]
}

/// What a block device asks of a disk; the rest is the daemon's own doing.
const OPERATIONS: [Op; 5] = [Op::Read, Op::Write, Op::Flush, Op::Discard, Op::WriteZeroes];
const UNKNOWN: &str = "-";

/// The device's path, as far as there is one.
pub(super) fn device(listed: &Listed) -> String {
    let path = listed.path().map(|path| path.display().to_string());
    path.map_or(UNKNOWN.to_owned(), |path| one_line(&path))
}

fn state(listed: &Listed) -> String {
    let read_only = if listed.is_read_only() { ",ro" } else { "" };
    format!("{}{read_only}", listed.state().name())
}

/// The rows as a table. The last column may be of any width.
fn lines<const N: usize>(rows: &[[String; N]]) -> Vec<String> {
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max();
    let widths: [usize; N] = std::array::from_fn(|column| width(column).unwrap_or(0));
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(widths);
        let text: String = cells
            .map(|(cell, width)| format!("{cell:width$}  "))
            .collect();
        text.trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

#[derive(Serialize)]
struct About<'a> {
    device: Option<String>,
    stack: &'a str,
    via: &'static str,
    state: &'static str,
    size: u64,
    read_only: bool,
    recoverable: bool,
    pid: u32,
    /// Null if its process cannot be asked.
    counters: Option<serde_json::Map<String, serde_json::Value>>,
    /// How many bytes are data; null if nobody can tell.
    data: Option<u64>,
}

impl<'a> About<'a> {
    fn new(listed: &'a Listed) -> Self {
        let counters = listed.counters();
        let by_operation = counters.as_ref().map(|counters| {
            let each = OPERATIONS.into_iter().map(|op| {
                let (ops, bytes, errors) = counters.of(op);
                let of = serde_json::json!({ "ops": ops, "bytes": bytes, "errors": errors });
                (op.name().to_owned(), of)
            });
            each.collect()
        });
        About {
            device: listed.path().map(|path| path.display().to_string()),
            stack: listed.label(),
            via: listed.via().name(),
            state: listed.state().name(),
            size: listed.size(),
            read_only: listed.is_read_only(),
            recoverable: listed.is_recoverable(),
            pid: listed.pid(),
            data: counters.as_ref().and_then(Counters::data),
            counters: by_operation,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_below_each_other() {
        let rows = [["A", "B"], ["long", "x y"], ["-", ""]];
        let rows = rows.map(|row| row.map(str::to_owned));
        assert_eq!(lines(&rows), ["A     B", "long  x y", "-"]);
    }
}
