//! Tables as markdown.

use std::fmt::Write;

use crate::figures::{Cell, Table};

const MIB: f64 = (1 << 20) as f64;
/// Requests from this length on are told by their bytes.
const LONG: u64 = 64 << 10;

/// `table` in markdown: in each cell the rate and the server's processor time, medians over the rounds.
pub fn markdown(table: &Table) -> String {
    let mut text = String::new();
    line(&mut text, &table.title, table.columns.iter().cloned());
    line(&mut text, "---", table.columns.iter().map(|_| "---".into()));
    for row in &table.rows {
        let cells = table
            .columns
            .iter()
            .map(|server| match row.cells.get(server) {
                Some(found) => cell(found, row.block),
                None => "-".into(),
            });
        line(&mut text, &row.work, cells);
    }
    if !table.peak_memory.is_empty() {
        let cells = table.columns.iter().map(|server| {
            let peak = table.peak_memory.get(server);
            peak.map_or("-".into(), |&peak| format!("{:.0}", peak as f64 / MIB))
        });
        line(&mut text, "peak memory, MiB", cells);
    }
    text
}

/// The system calls for each request, for rows where they were counted; empty if they were not.
pub fn syscalls(table: &Table) -> String {
    let mut text = String::new();
    let counted = |cell: &Cell| cell.syscalls.is_some();
    for row in table
        .rows
        .iter()
        .filter(|row| row.cells.values().any(counted))
    {
        if text.is_empty() {
            let title = format!("{}: system calls", table.title);
            line(&mut text, &title, table.columns.iter().cloned());
            line(&mut text, "---", table.columns.iter().map(|_| "---".into()));
        }
        let cells = table.columns.iter().map(|server| {
            let calls = row.cells.get(server).and_then(|cell| cell.syscalls);
            calls.map_or("-".into(), |calls| format!("{calls:.2}"))
        });
        line(&mut text, &row.work, cells);
    }
    text
}

/// One line of a table.
pub fn line(text: &mut String, first: &str, cells: impl Iterator<Item = String>) {
    let _ = write!(text, "| {first} |");
    for cell in cells {
        let _ = write!(text, " {cell} |");
    }
    text.push('\n');
}

fn cell(cell: &Cell, block: u64) -> String {
    let rate = cell.median(|figure| figure.rate);
    let cpu = cell.median(|figure| figure.cpu);
    match block {
        LONG.. => {
            let mib = block as f64 / MIB;
            format!("{:.0} / {:.0}", rate * mib, cpu / mib)
        }
        _ => format!("{:.0} / {cpu:.1}", rate / 1e3),
    }
}
