//! One run's figures as text, as a picture and as JSON.

use std::collections::BTreeMap;

use serde::Serialize;

use super::crowd::Crowd;
use super::targets::{self, Target};
use crate::figures::Table;
use crate::machine::Machine;
use crate::plot::{self, Bar, Colour, Group};
use crate::table;

/// All that a run has measured.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Where.
    pub machine: Machine,
    /// With which command line.
    pub command: String,
    /// The programs' own words for their versions.
    pub versions: BTreeMap<String, String>,
    /// The figures.
    pub tables: Vec<Table>,
    /// What many connections make of servers.
    pub crowds: Vec<Crowd>,
    /// What was to be reached.
    pub targets: Vec<Target>,
}

impl Report {
    /// Judges what was measured.
    pub fn judge(&mut self) {
        self.targets = targets::judge(&self.tables, &self.crowds);
    }

    /// As markdown.
    pub fn markdown(&self) -> String {
        let mut text = format!("`{}`: {}.\n", self.command, self.machine.describe());
        let versions = self.versions.iter();
        let versions: Vec<_> = versions
            .map(|(name, version)| format!("{name}: {version}"))
            .collect();
        text += &format!("{}.\n", versions.join("; "));
        if !self.targets.is_empty() {
            text += "\n| target | wanted | measured, worst case | |\n|---|---|---|---|\n";
            for target in &self.targets {
                let holds = if target.holds { "holds" } else { "**missed**" };
                let cells = [&target.wanted, &target.measured, holds].map(str::to_owned);
                table::line(&mut text, &target.work, cells.into_iter());
            }
        }
        for measured in &self.tables {
            text += &format!("\n{}", table::markdown(measured));
        }
        let calls: String = self.tables.iter().map(table::syscalls).collect();
        if !calls.is_empty() {
            text += &format!("\n{calls}");
        }
        if !self.crowds.is_empty() {
            text += "\n| many connections | alone, MiB | 1000 at rest | the same after a burst | of 200 at work, slowest by median | fastest |\n";
            text += "|---|---|---|---|---|---|\n";
            let mib = |bytes: u64| format!("{:.0}", bytes as f64 / f64::from(1 << 20));
            for crowd in &self.crowds {
                let cells = [
                    mib(crowd.alone),
                    mib(crowd.idle),
                    mib(crowd.after_burst),
                    format!("{:.2}", crowd.slowest),
                    format!("{:.2}", crowd.fastest),
                ];
                table::line(&mut text, &crowd.server, cells.into_iter());
            }
        }
        text
    }

    /// The picture: what each server does with 4 KiB, from memory and from a file.
    pub fn plot(&self) -> String {
        let mut groups = Vec::new();
        for (start, works) in [
            (
                "memory, Unix",
                &[
                    "4 KiB read, depth 1",
                    "4 KiB read, depth 64",
                    "4 KiB write, depth 64",
                ][..],
            ),
            (
                "file, buffered",
                &["4 KiB read, depth 64", "4 KiB write, depth 64"],
            ),
        ] {
            let table = self
                .tables
                .iter()
                .find(|table| table.title.starts_with(start));
            for work in works {
                groups.extend(table.and_then(|table| group(table, work)));
            }
        }
        plot::svg(
            "Requests a second, and the server's processor time for each",
            &groups,
        )
    }
}

fn group(table: &Table, work: &str) -> Option<Group> {
    let row = table.row(work)?;
    let bars = table.columns.iter().filter_map(|server| {
        let cell = row.cells.get(server)?;
        let rate = cell.median(|figure| figure.rate);
        let cpu = cell.median(|figure| figure.cpu);
        Some(Bar {
            label: server.clone(),
            value: rate,
            note: format!("{:.0} k/s, {cpu:.1} us", rate / 1e3),
            colour: match server {
                server if server.starts_with("ulio") => Colour::Ours,
                server if server == "limit" => Colour::Limit,
                _ => Colour::Peer,
            },
        })
    });
    Some(Group {
        title: format!("{}: {work}", table.title),
        bars: bars.collect(),
    })
}
