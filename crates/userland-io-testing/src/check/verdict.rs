//! What was broken, in words.

use std::fmt::{self, Write as _};

use super::history::{History, INITIAL, NEVER, Outcome, Seen};
use super::stamp::Stamp;
use super::{OpId, Shape};

/// The clause of the contract that was broken (see `docs/semantics.md`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Clause {
    /// L: each block is a linearizable register.
    Live,
    /// E: a failed or abandoned mutation acted later.
    Error,
    /// Bytes that nobody wrote there.
    Foreign,
    /// C1: what a flush covered survives a crash.
    Flush,
    /// C2: what survives is a prefix.
    Prefix,
    /// C3: every mutation that answered survives.
    Sync,
    /// R: recovery is durable and stable.
    Recovery,
    /// No block, and no atomic unit, tears.
    Tearing,
    /// The caller's half: a request that the engine below did not ask for.
    Edge,
    /// An operation that answers what it must not.
    Operation,
    /// An operation that never answers.
    Answer,
}

impl Clause {
    /// What bytes break that nobody wrote as they are.
    pub(super) fn of_bytes(bytes: &[u8]) -> Clause {
        match (Stamp::decode(bytes), Stamp::decode_torn(bytes)) {
            (None, Some(_)) => Clause::Tearing,
            _ => Clause::Foreign,
        }
    }
}

impl fmt::Display for Clause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Clause::Live => "L (each block is a linearizable register)",
            Clause::Error => "E (what failed or was abandoned never acts later)",
            Clause::Foreign => "foreign bytes",
            Clause::Flush => "C1 (what a flush covered survives a crash)",
            Clause::Prefix => "C2 (what survives a crash is a prefix)",
            Clause::Sync => "C3 (what answered survives a crash)",
            Clause::Recovery => "R (recovery is durable and stable)",
            Clause::Tearing => "tearing",
            Clause::Edge => "the caller's half of the contract",
            Clause::Operation => "what operations answer",
            Clause::Answer => "every operation answers",
        })
    }
}

/// A clause that was broken: where, by what, and when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The clause.
    pub clause: Clause,
    /// The cell that shows it.
    pub cell: Option<usize>,
    /// The operations involved.
    pub ops: Vec<OpId>,
    /// What is wrong, in a sentence or two.
    pub what: String,
    /// What happened to the cell, operation by operation.
    pub timeline: String,
}

impl Verdict {
    /// A verdict about no cell in particular.
    pub fn new(clause: Clause, what: impl Into<String>) -> Self {
        Verdict {
            clause,
            cell: None,
            ops: Vec::new(),
            what: what.into(),
            timeline: String::new(),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "broken: {}", self.clause)?;
        if let Some(cell) = self.cell {
            write!(f, ", block {cell}")?;
        }
        write!(f, "\n  {}", self.what)?;
        if !self.timeline.is_empty() {
            write!(f, "\n{}", self.timeline)?;
        }
        Ok(())
    }
}

impl std::error::Error for Verdict {}

const BAR: u32 = 32;

impl History {
    pub(super) fn verdict(
        &self,
        clause: Clause,
        cell: usize,
        entries: &[usize],
        what: String,
    ) -> Verdict {
        let real = entries.iter().filter(|&&entry| entry != INITIAL);
        Verdict {
            clause,
            cell: Some(cell),
            ops: real.map(|&entry| self.id(entry)).collect(),
            what,
            timeline: self.timeline(cell, entries),
        }
    }

    /// An entry in a sentence.
    pub(super) fn name(&self, entry: usize) -> String {
        match entry {
            INITIAL => "the initial content".to_owned(),
            _ => format!("#{} ({})", self.id(entry), self.entries[entry].request),
        }
    }

    pub(super) fn names(&self, entries: &[usize]) -> String {
        let names: Vec<String> = entries.iter().map(|&entry| self.name(entry)).collect();
        names.join(" or ")
    }

    /// Every operation that touches `cell`, every flush, and the `others`, as lines with bars.
    fn timeline(&self, cell: usize, others: &[usize]) -> String {
        let times = self.entries.iter().flat_map(|e| [e.start, e.end]);
        let last = times.filter(|&time| time != NEVER).max().unwrap_or(0) + 1;
        let column = |time: u32| (u64::from(time) * u64::from(BAR) / u64::from(last)) as u32;
        let mut text = String::new();
        for (index, entry) in self.entries.iter().enumerate().skip(1) {
            let cells = entry.request.cells();
            if !cells.is_empty() && !cells.contains(&cell) && !others.contains(&index) {
                continue;
            }
            let answered = entry.end != NEVER;
            let (from, to) = (column(entry.start), column(entry.end.min(last)));
            let bar = (0..=BAR).map(|at| match at {
                at if at == from => '[',
                at if at == to && answered => ']',
                at if at > from && at < to && answered => '=',
                at if at > from && !answered => '.',
                _ => ' ',
            });
            let bar: String = bar.collect();
            let mark = match others.contains(&index) {
                true => '>',
                false => ' ',
            };
            let end = match entry.outcome {
                Outcome::Open => "unanswered".to_owned(),
                Outcome::Ok => "ok".to_owned(),
                Outcome::Failed(kind) => format!("failed, {kind}"),
                Outcome::Abandoned(_) => "abandoned".to_owned(),
                Outcome::Killed => "killed".to_owned(),
            };
            let seen = entry.seen.iter().find(|seen| seen.0 == cell);
            let seen = seen.map_or_else(String::new, |(_, seen)| {
                format!(", block {cell}: {}", self.describe(seen))
            });
            let (client, request) = (entry.client, &entry.request);
            let id = format!("#{}", self.id(index));
            _ = writeln!(
                text,
                "  {mark}{id:>5} client {client} {bar} {request}: {end}{seen}"
            );
        }
        text
    }

    pub(super) fn describe(&self, seen: &Seen) -> String {
        match seen {
            Seen::One(INITIAL) => "what was there at first".to_owned(),
            Seen::One(entry) => format!("the value of {}", self.name(*entry)),
            Seen::Several(entries) => format!("the value of {}", self.names(entries)),
            Seen::Noise => "noise".to_owned(),
            Seen::Bytes(bytes) => describe_bytes(bytes, &self.shape),
        }
    }
}

/// What bytes that nobody wrote there look like.
fn describe_bytes(bytes: &[u8], shape: &Shape) -> String {
    if let Some(stamp) = Stamp::decode(bytes) {
        return format!(
            "what #{} of the run with seed {} wrote to block {} (of {} bytes)",
            stamp.op, stamp.seed, stamp.cell, shape.cell
        );
    }
    if let Some(stamp) = Stamp::decode_torn(bytes) {
        let good = (0..bytes.len()).take_while(|&len| stamp.matches(&bytes[..=len]));
        return format!(
            "a mix: bytes 0..{} are what #{} wrote to block {}, the rest is not",
            good.count(),
            stamp.op,
            stamp.cell
        );
    }
    if bytes.iter().all(|&byte| byte == 0) {
        return "zeroes, which nobody wrote there".to_owned();
    }
    let head: Vec<String> = bytes.iter().take(24).map(|b| format!("{b:02x}")).collect();
    format!("bytes that nobody wrote there: {} ..", head.join(" "))
}
