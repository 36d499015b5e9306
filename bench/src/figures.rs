//! What was measured: tables of works by servers, each cell with a figure for each round.

use std::collections::BTreeMap;

use serde::Serialize;

/// One measurement.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Figure {
    /// Requests a second.
    pub rate: f64,
    /// The server's processor time for each, in microseconds.
    pub cpu: f64,
}

/// A server's cell in a work's row.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Cell {
    /// One for each round, in order.
    pub rounds: Vec<Figure>,
    /// System calls for each request, if they were counted.
    pub syscalls: Option<f64>,
}

impl Cell {
    /// The median of what `each` says about the rounds.
    pub fn median(&self, each: impl Fn(&Figure) -> f64) -> f64 {
        median(self.rounds.iter().map(each).collect())
    }
}

/// Works by servers.
#[derive(Clone, Debug, Serialize)]
pub struct Table {
    /// What its rows have in common.
    pub title: String,
    /// The servers.
    pub columns: Vec<String>,
    /// The works, in order.
    pub rows: Vec<Row>,
    /// The most memory that each server has had resident, in bytes.
    pub peak_memory: BTreeMap<String, u64>,
}

/// A work.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Which.
    pub work: String,
    /// Bytes of a request.
    pub block: u64,
    /// By server.
    pub cells: BTreeMap<String, Cell>,
}

impl Table {
    /// A table without figures.
    pub fn new(title: impl Into<String>, columns: Vec<String>) -> Self {
        Table {
            title: title.into(),
            columns,
            rows: Vec::new(),
            peak_memory: BTreeMap::new(),
        }
    }

    fn row_mut(&mut self, work: &str, block: u64) -> &mut Row {
        let at = self.rows.iter().position(|row| row.work == work);
        let at = at.unwrap_or_else(|| {
            self.rows.push(Row {
                work: work.to_owned(),
                block,
                cells: BTreeMap::new(),
            });
            self.rows.len() - 1
        });
        &mut self.rows[at]
    }

    /// The cell of `server` and `work`, whose requests have `block` bytes.
    pub fn cell_mut(&mut self, work: &str, block: u64, server: &str) -> &mut Cell {
        let row = self.row_mut(work, block);
        row.cells.entry(server.to_owned()).or_default()
    }

    /// The row of `work`, if it was measured.
    pub fn row(&self, work: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.work == work)
    }

    /// Notes how much memory `server` has had.
    pub fn peak(&mut self, server: &str, bytes: u64) {
        let peak = self.peak_memory.entry(server.to_owned()).or_default();
        *peak = bytes.max(*peak);
    }
}

impl Row {
    /// The median, over the rounds, of `ours` by `theirs`: what a slow minute does to both is left out.
    pub fn ratio(&self, ours: &str, theirs: &str, each: impl Fn(&Figure) -> f64) -> Option<f64> {
        let ratios = self.ratios(ours, theirs, each);
        (!ratios.is_empty()).then(|| median(ratios))
    }

    /// Those ratios, of each round; empty if one of the two was not measured.
    pub fn ratios(&self, ours: &str, theirs: &str, each: impl Fn(&Figure) -> f64) -> Vec<f64> {
        let (Some(ours), Some(theirs)) = (self.cells.get(ours), self.cells.get(theirs)) else {
            return Vec::new();
        };
        let rounds = ours.rounds.iter().zip(&theirs.rounds);
        rounds.map(|(a, b)| each(a) / each(b)).collect()
    }
}

/// The one in the middle; NaN if there is none.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let upper = values.get(values.len() / 2).copied();
    let lower = values.get(values.len().saturating_sub(1) / 2).copied();
    match (lower, upper) {
        (Some(lower), Some(upper)) => (lower + upper) / 2.0,
        _ => f64::NAN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_take_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(vec![]).is_nan());
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        let mut table = Table::new("t", vec!["a".into(), "b".into()]);
        // Every round is slower than the one before, and "a" is always twice as fast.
        for round in 1..=5 {
            for (server, factor) in [("a", 2.0), ("b", 1.0)] {
                let rate = factor / f64::from(round);
                let cell = table.cell_mut("w", 4096, server);
                cell.rounds.push(Figure { rate, cpu: 1.0 });
            }
        }
        let row = table.row("w").unwrap();
        assert_eq!(row.ratio("a", "b", |f| f.rate), Some(2.0));
        assert_eq!(row.ratio("a", "c", |f| f.rate), None);
    }
}
