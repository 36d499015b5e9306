//! A disk's size, limits and claims, as text and as JSON.
//!
//! Behind an NBD server nobody knows what a crash leaves, or what a discarded range
//! reads as: the client assumes what is safe, which is not for showing as known.

use serde::Serialize;
use userland_io::{CrashLevel, Discard, Geometry};

use super::walk::Sums;
use super::{Listed, text_of};
use crate::errors::Failure;
use crate::output::{Results, one_line, size};

/// What is shown apart from where the data lies.
pub(super) struct About<'a> {
    pub(super) stack: &'a str,
    pub(super) geometry: &'a Geometry,
    /// It rests on an NBD server.
    pub(super) is_remote: bool,
    pub(super) contexts: Vec<String>,
    pub(super) exports: &'a [Listed],
}

/// `None`: nobody knows.
#[derive(Serialize)]
struct Json<'a> {
    stack: &'a str,
    size: u64,
    read_only: bool,
    logical_block_size: u32,
    physical_block_size: Option<u32>,
    io_min: u32,
    io_opt: u32,
    max_transfer: u32,
    memory_alignment: u32,
    discard_granularity: Option<u32>,
    max_discard: u32,
    max_write_zeroes: u32,
    atomic_write_unit: Option<u32>,
    features: Vec<String>,
    discard: Option<&'a str>,
    crash: Option<&'a str>,
    contexts: &'a [String],
    #[serde(skip_serializing_if = "<[Listed]>::is_empty")]
    exports: &'a [Listed],
}

impl About<'_> {
    /// Begins an object; [`json_end`] ends it.
    pub(super) fn json_head(&self, results: &mut Results) -> Result<(), Failure> {
        let text =
            serde_json::to_string_pretty(&self.json()).map_err(|e| Failure::of("JSON", e))?;
        results.bytes(text.strip_suffix("\n}").unwrap_or(&text).as_bytes())
    }

    fn json(&self) -> Json<'_> {
        let geometry = self.geometry;
        let known = !self.is_remote;
        let discard = match geometry.discard {
            Discard::None => Some("none"),
            _ if !known => None,
            Discard::Unspecified => Some("unspecified"),
            Discard::OldOrZero => Some("old-or-zero"),
            Discard::Zeroes => Some("zeroes"),
        };
        let crash = match geometry.crash {
            CrashLevel::None => "none",
            CrashLevel::Flush => "flush",
            CrashLevel::Prefix => "prefix",
            CrashLevel::Sync => "sync",
        };
        Json {
            stack: self.stack,
            size: geometry.size,
            read_only: geometry.is_read_only(),
            logical_block_size: geometry.logical_block_size,
            physical_block_size: known.then(|| geometry.physical_block()),
            io_min: geometry.io_min,
            io_opt: geometry.io_opt,
            max_transfer: geometry.max_transfer,
            memory_alignment: geometry.memory_alignment,
            discard_granularity: known.then(|| geometry.discard_granule()),
            max_discard: geometry.max_discard,
            max_write_zeroes: geometry.max_write_zeroes,
            atomic_write_unit: known.then_some(geometry.atomic_write_unit),
            features: features(geometry),
            discard,
            crash: known.then_some(crash),
            contexts: &self.contexts,
            exports: self.exports,
        }
    }

    pub(super) fn text(&self, results: &mut Results) -> Result<(), Failure> {
        let geometry = self.geometry;
        let limit = |bytes: u32| match bytes {
            0 => "no limit".to_owned(),
            bytes => size(bytes.into()),
        };
        results.line(self.stack)?;
        let mut row = |label: &str, text: &str| row(label, text, results);
        row(
            "size",
            &match geometry.size {
                bytes @ ..1024 => size(bytes),
                bytes => format!("{} ({bytes} bytes)", size(bytes)),
            },
        )?;
        row(
            "access",
            match geometry.is_read_only() {
                true => "read-only",
                false => "read and write",
            },
        )?;
        let physical = match self.is_remote {
            true => "physical unknown".to_owned(),
            false => format!("{} physical", size(geometry.physical_block().into())),
        };
        let logical = size(geometry.logical_block_size.into());
        row("blocks", &format!("{logical} logical, {physical}"))?;
        row("transfers", &limit(geometry.max_transfer))?;
        if geometry.io_min != 0 || geometry.io_opt != 0 {
            let (least, best) = (size(geometry.io_min.into()), size(geometry.io_opt.into()));
            row("preferred", &format!("{least} at least, {best} best"))?;
        }
        if !geometry.is_read_only() {
            row("discard", &discard(geometry, self.is_remote))?;
            row(
                "a crash",
                match self.is_remote {
                    true => "unknown: NBD does not tell",
                    false => crash(geometry),
                },
            )?;
        }
        let features = features(geometry);
        if !features.is_empty() {
            row("features", &features.join(", "))?;
        }
        if !self.contexts.is_empty() {
            row("contexts", &one_line(&self.contexts.join(", ")))?;
        }
        Ok(())
    }

    /// What else there is. A single one is what is shown already.
    pub(super) fn text_of_exports(&self, results: &mut Results) -> Result<(), Failure> {
        match self.exports.len() {
            0 | 1 => Ok(()),
            _ => text_of(self.exports, results),
        }
    }
}

/// Ends the object that [`About::json_head`] began.
pub(super) fn json_end(sums: Option<Sums>, results: &mut Results) -> Result<(), Failure> {
    let rest = serde_json::json!({ "extents": sums });
    let text = serde_json::to_string_pretty(&rest).map_err(|e| Failure::of("JSON", e))?;
    results.line(format_args!(",{}", text.strip_prefix('{').unwrap_or(&text)))
}

/// How much of the disk is what.
pub(super) fn allocation(sums: Option<Sums>, results: &mut Results) -> Result<(), Failure> {
    let text = match sums {
        None => "not told: all counts as data".to_owned(),
        Some(sums) => format!(
            "{} data, {} zero, {} hole, in {} run{}",
            size(sums.data),
            size(sums.zero),
            size(sums.hole),
            sums.runs,
            if sums.runs == 1 { "" } else { "s" }
        ),
    };
    row("allocation", &text, results)
}

/// What stands above the runs.
pub(super) fn map_head(results: &mut Results) -> Result<(), Failure> {
    results.line("")?;
    results.line(format_args!("{:>20} {:>20}  kind", "offset", "length"))
}

fn row(label: &str, text: &str, results: &mut Results) -> Result<(), Failure> {
    results.line(format_args!("  {label:<12}{text}"))
}

/// The features' names, as the library spells them but in lower case.
fn features(geometry: &Geometry) -> Vec<String> {
    let names = geometry.features.iter_names();
    names.map(|(name, _)| name.to_lowercase()).collect()
}

fn discard(geometry: &Geometry, is_remote: bool) -> String {
    let reads = match geometry.discard {
        Discard::None => return "none".to_owned(),
        _ if is_remote => {
            return "yes; NBD does not tell what it reads as, nor its granules".to_owned();
        }
        Discard::Unspecified => "reads as anything",
        Discard::OldOrZero => "reads as before or as zeroes",
        Discard::Zeroes => "reads as zeroes",
    };
    format!(
        "{reads}, in granules of {}",
        size(geometry.discard_granule().into())
    )
}

fn crash(geometry: &Geometry) -> &'static str {
    match geometry.crash {
        CrashLevel::None => "leaves nothing",
        CrashLevel::Flush => "keeps what a flush covered",
        CrashLevel::Prefix => "keeps what a flush covered, and of the rest a prefix",
        CrashLevel::Sync => "keeps every completed write",
    }
}
