//! What the server is to reach, and whether it did, from one run's tables.

use serde::Serialize;

use super::crowd::Crowd;
use crate::figures::{Figure, Row, Table};

const OURS: &str = "ulio memory";
const FILE: &str = "ulio file";
const LIMIT: &str = "limit";

/// One thing to reach.
#[derive(Clone, Debug, Serialize)]
pub struct Target {
    /// At which work.
    pub work: String,
    /// What is to be reached.
    pub wanted: String,
    /// What was.
    pub measured: String,
    /// Whether that is enough.
    pub holds: bool,
}

/// All targets of which the figures are there.
pub fn judge(tables: &[Table], crowds: &[Crowd]) -> Vec<Target> {
    let mut all = Targets {
        tables,
        list: Vec::new(),
    };
    all.memory();
    all.tools();
    all.files();
    all.stacks();
    crowds.iter().for_each(|crowd| all.crowd(crowd));
    all.list
}

fn rate(figure: &Figure) -> f64 {
    figure.rate
}

fn cpu(figure: &Figure) -> f64 {
    figure.cpu
}

struct Targets<'a> {
    tables: &'a [Table],
    list: Vec<Target>,
}

impl<'a> Targets<'a> {
    /// The rows of the tables that `table` picks, which `row` picks.
    fn rows(
        &self,
        table: impl Fn(&str) -> bool,
        row: impl Fn(&str) -> bool,
    ) -> Vec<(&'a Table, &'a Row)> {
        let tables = self.tables.iter().filter(|found| table(&found.title));
        let rows = tables.flat_map(|table| table.rows.iter().map(move |row| (table, row)));
        rows.filter(|(_, found)| row(&found.work)).collect()
    }

    fn add(
        &mut self,
        work: &str,
        wanted: String,
        measured: Option<(f64, String)>,
        holds: impl Fn(f64) -> bool,
    ) {
        if let Some((value, place)) = measured {
            let place = match place.is_empty() {
                true => place,
                false => format!(" ({place})"),
            };
            self.list.push(Target {
                work: work.to_owned(),
                wanted,
                measured: format!("{value:.2}{place}"),
                holds: holds(value),
            });
        }
    }

    fn at_least(&mut self, work: &str, what: &str, least: f64, measured: Vec<(f64, String)>) {
        let worst = measured.into_iter().min_by(|a, b| a.0.total_cmp(&b.0));
        self.add(work, format!("{what} >= {least}"), worst, |value| {
            value >= least
        });
    }

    fn at_most(&mut self, work: &str, what: &str, most: f64, measured: Vec<(f64, String)>) {
        let worst = measured.into_iter().max_by(|a, b| a.0.total_cmp(&b.0));
        self.add(work, format!("{what} <= {most}"), worst, |value| {
            value <= most
        });
    }

    fn memory(&mut self) {
        let deep = self.rows(
            |table| table.starts_with("memory"),
            |row| {
                row.starts_with("4 KiB") && (row.ends_with("depth 16") || row.ends_with("depth 64"))
            },
        );
        let work = "memory, 4 KiB, depth 16 and 64, Unix and TCP";
        self.at_least(
            work,
            "rate by the limit's",
            0.9,
            against(&deep, OURS, LIMIT, rate),
        );
        self.at_most(
            work,
            "CPU by the limit's",
            1.25,
            against(&deep, OURS, LIMIT, cpu),
        );
        let calls = deep.iter().filter(|(_, row)| row.work.ends_with("64"));
        let calls = calls.filter_map(|(table, row)| {
            let calls = row.cells.get(OURS)?.syscalls?;
            Some((calls, place(table, row)))
        });
        let calls = calls.collect();
        self.at_most("memory, 4 KiB, depth 64", "system calls", 0.1, calls);
        let single = self.rows(
            |table| table.starts_with("memory") || table.starts_with("fio"),
            |row| row.starts_with("4 KiB") && row.ends_with("depth 1"),
        );
        let best = against(&single, OURS, "nbdkit memory", rate);
        self.at_least(
            "memory, 4 KiB, depth 1, raw client and fio",
            "rate by nbdkit's",
            1.15,
            best,
        );
        for (shape, least) in [("depth 16 x 4", 0.9), ("depth 1 x 16", 0.8)] {
            let rows = self.rows(
                |table| table.starts_with("memory"),
                |row| row.starts_with("4 KiB") && row.ends_with(shape),
            );
            let work = format!("memory, 4 KiB, {shape}");
            self.at_least(
                &work,
                "rate by the limit's",
                least,
                against(&rows, OURS, LIMIT, rate),
            );
        }
    }

    fn tools(&mut self) {
        for (tool, work) in [
            ("fio", "fio, 1 MiB sequential"),
            ("nbdcopy", "nbdcopy, four connections"),
        ] {
            let rows = self.rows(
                |table| table.starts_with(tool),
                |row| !row.starts_with("4 KiB"),
            );
            self.at_least(
                work,
                "rate by the limit's",
                0.9,
                against(&rows, OURS, LIMIT, rate),
            );
            self.at_most(
                work,
                "CPU by the limit's",
                1.2,
                against(&rows, OURS, LIMIT, cpu),
            );
        }
    }

    fn files(&mut self) {
        let buffered = |table: &str| table.starts_with("file, buffered");
        let is_deep = |row: &str| row.ends_with("depth 16") || row.ends_with("depth 64");
        let deep = self.rows(buffered, is_deep);
        let best = against_best(&deep, FILE, rate);
        self.at_least(
            "file, buffered, depth 16 and 64",
            "rate by the best peer's",
            1.8,
            best,
        );
        let other = self.rows(buffered, |row| !is_deep(row));
        let direct = self.rows(|table| table.starts_with("file, direct"), |_| true);
        for (work, rows, ours) in [
            ("file, buffered, depth 1 or with flushes", other, FILE),
            ("file, direct", direct, "ulio file direct"),
        ] {
            self.at_least(
                work,
                "rate by the best peer's",
                0.97,
                against_best(&rows, ours, rate),
            );
            self.at_most(
                work,
                "CPU by that peer's",
                1.0,
                against_best(&rows, ours, cpu),
            );
        }
    }

    fn stacks(&mut self) {
        let rows = self.rows(|table| table.starts_with("stacks"), |_| true);
        let layers = against(&rows, "ulio memory, five layers", OURS, cpu);
        self.at_most(
            "five erased layers over memory",
            "CPU by none's",
            1.15,
            layers,
        );
        let late = "ulio memory, 5 ms late";
        let of = |work: &str| {
            let mut rows = rows.iter().filter(|(_, row)| row.work.ends_with(work));
            rows.find_map(|(_, row)| Some(row.cells.get(late)?.median(rate)))
        };
        if let (Some(one), Some(many)) = (of("read, depth 1"), of("read, depth 64")) {
            let measured = vec![(many / one / 64.0, "read".into())];
            let what = "rate by 64 times that of depth 1";
            self.at_least("an engine that takes 5 ms, depth 64", what, 0.95, measured);
        }
    }

    fn crowd(&mut self, crowd: &Crowd) {
        if crowd.server != OURS {
            return;
        }
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let idle = vec![
            (mib(crowd.idle), "after one read each".into()),
            (mib(crowd.after_burst), "after 64 reads at once each".into()),
        ];
        self.at_most("1000 connections at rest", "MiB resident", 64.0, idle);
        let slowest = vec![(crowd.slowest, String::new())];
        self.at_least(
            "200 connections at work",
            "the slowest by the median",
            0.5,
            slowest,
        );
    }
}

fn place(table: &Table, row: &Row) -> String {
    format!("{}: {}", table.title, row.work)
}

fn against(
    rows: &[(&Table, &Row)],
    ours: &str,
    theirs: &str,
    each: impl Fn(&Figure) -> f64,
) -> Vec<(f64, String)> {
    let ratios = rows.iter().filter_map(|(table, row)| {
        let ratio = row.ratio(ours, theirs, &each)?;
        Some((ratio, place(table, row)))
    });
    ratios.collect()
}

/// Against whoever is fastest in that row.
fn against_best(
    rows: &[(&Table, &Row)],
    ours: &str,
    each: impl Fn(&Figure) -> f64,
) -> Vec<(f64, String)> {
    let ratios = rows.iter().filter_map(|(table, row)| {
        let peers = row
            .cells
            .iter()
            .filter(|(name, _)| !name.starts_with("ulio"));
        let rated = peers.map(|(name, cell)| (cell.median(rate), name));
        let (_, best) = rated.max_by(|a, b| a.0.total_cmp(&b.0))?;
        let ratio = row.ratio(ours, best, &each)?;
        Some((ratio, format!("{}, {best}", place(table, row))))
    });
    ratios.collect()
}
