//! Instructions per request, counted by callgrind: what no other program on the machine can move.
//!
//! `bench/src/bin/instructions.rs` runs one case a number of times. Each case is counted with few and with many
//! repetitions; the difference has no start and no end of the program in it. Counts depend on the compiler
//! and on the C library, so they are kept, in `bench/instructions.json`, for each pair of these.

use std::collections::BTreeMap;
use std::process::Command;

use clap::Args;

use crate::bench;
use crate::report::Report;
use crate::root;

/// How much a count may grow before somebody has to say why.
const GROWTH: f64 = 0.03;
/// How often a case is repeated: few times, and many.
const REPEATS: (u64, u64) = (2_000, 10_000);

/// Options of `cargo xtask instructions`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Keep what is counted as what is expected from now on with this compiler and C library.
    #[arg(long)]
    record: bool,
}

/// Instructions per request, by case.
type Counts = BTreeMap<String, f64>;
/// Counts, by compiler and C library.
type Records = BTreeMap<String, Counts>;

/// Counts, compares, and records if asked to. True if nothing has grown.
pub(crate) fn run(options: &Options) -> Result<bool, String> {
    let key = key()?;
    let counts = count()?;
    let mut records = records()?;
    let known = records.get(&key).cloned().unwrap_or_default();
    print!("{}", table(&counts, &known));
    if options.record {
        records.insert(key.clone(), counts);
        let text = serde_json::to_string_pretty(&records).map_err(|error| error.to_string())?;
        std::fs::write(path(), text + "\n").map_err(|error| error.to_string())?;
        println!("recorded for {key}: commit bench/instructions.json, and say why it changed");
        return Ok(true);
    }
    let grown = grown(&counts, &known);
    grown.iter().for_each(|line| println!("{line}"));
    if known.is_empty() {
        println!("nothing is recorded for {key}: `cargo xtask instructions --record` does");
    }
    Ok(grown.is_empty())
}

/// The step of `cargo xtask test`.
pub(crate) fn step(report: &mut Report) {
    const NAME: &str = "instructions per request";
    if Command::new("valgrind").arg("--version").output().is_err() {
        return report.skip(NAME, "needs valgrind");
    }
    let key = match key() {
        Ok(key) => key,
        Err(error) => return report.check(NAME, || Err(error)),
    };
    if records().is_ok_and(|records| !records.contains_key(&key)) {
        let why =
            format!("this machine cannot: nothing is recorded for {key}, see CONTRIBUTING.md");
        return report.excuse(NAME, &why);
    }
    report.check(NAME, || {
        let counts = count()?;
        let known = records()?.remove(&key).unwrap_or_default();
        let text = table(&counts, &known);
        let grown = grown(&counts, &known);
        match grown.is_empty() {
            true => Ok(text),
            false => Err(format!(
                "{text}{}\nmake it faster, or run `cargo xtask instructions --record` and say in the commit why",
                grown.join("\n")
            )),
        }
    });
}

/// What counts depend on.
fn key() -> Result<String, String> {
    let first = |program: &str| -> Result<String, String> {
        let output = Command::new(program).arg("--version").output();
        let output = output.map_err(|error| format!("cannot run {program}: {error}"))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(text.lines().next().unwrap_or_default().trim().to_owned())
    };
    let rustc = first("rustc")?;
    // "ldd (Debian GLIBC 2.36-9+deb12u10) 2.36"
    let libc = first("ldd")?;
    let libc = libc
        .split('(')
        .nth(1)
        .and_then(|rest| rest.split(')').next());
    let arch = std::env::consts::ARCH;
    Ok(format!(
        "{rustc}, {}, {arch}",
        libc.unwrap_or("unknown libc")
    ))
}

fn path() -> std::path::PathBuf {
    root().join("bench/instructions.json")
}

fn records() -> Result<Records, String> {
    let text = std::fs::read_to_string(path())
        .map_err(|error| format!("{}: {error}", path().display()))?;
    serde_json::from_str(&text).map_err(|error| format!("{}: {error}", path().display()))
}

fn count() -> Result<Counts, String> {
    bench::build()?;
    let program = root().join("target/release/instructions");
    let output = Command::new(&program).output();
    let output = output.map_err(|error| format!("{}: {error}", program.display()))?;
    let cases = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut counts = Counts::new();
    for case in cases.lines() {
        let few = collected(&program, case, REPEATS.0)?;
        let many = collected(&program, case, REPEATS.1)?;
        let repeats = (REPEATS.1 - REPEATS.0) as f64;
        let count = many.saturating_sub(few) as f64 / repeats;
        counts.insert(case.to_owned(), (count * 10.0).round() / 10.0);
    }
    Ok(counts)
}

/// The instructions of one run.
fn collected(program: &std::path::Path, case: &str, repeats: u64) -> Result<u64, String> {
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]);
    valgrind.arg(program).arg(case).arg(repeats.to_string());
    let output = valgrind
        .output()
        .map_err(|error| format!("cannot run valgrind: {error}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    let line = text.lines().find_map(|line| line.split_once("Collected :"));
    let count = line.and_then(|(_, count)| count.trim().parse().ok());
    count.ok_or_else(|| format!("{case}: callgrind told no count:\n{text}"))
}

fn grown(counts: &Counts, known: &Counts) -> Vec<String> {
    let grown = counts.iter().filter_map(|(case, &count)| {
        let before = *known.get(case)?;
        let is_grown = count > before * (1.0 + GROWTH);
        is_grown.then(|| format!("{case}: {count} instructions, {before} are recorded"))
    });
    grown.collect()
}

fn table(counts: &Counts, known: &Counts) -> String {
    let lines = counts.iter().map(|(case, count)| match known.get(case) {
        Some(before) => {
            let change = (count / before - 1.0) * 100.0;
            format!("{case:<40} {count:>10.1}  {change:>+6.1} %\n")
        }
        None => format!("{case:<40} {count:>10.1}  not recorded\n"),
    });
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_percent_are_forgiven_and_more_is_not() {
        let counts = |value| Counts::from([("a".to_owned(), value), ("new".to_owned(), 5.0)]);
        let known = Counts::from([("a".to_owned(), 100.0)]);
        assert!(grown(&counts(103.0), &known).is_empty());
        assert!(grown(&counts(50.0), &known).is_empty());
        assert_eq!(grown(&counts(103.1), &known).len(), 1);
    }
}
