//! Runs steps, streams what they print, and counts what they tested.
//!
//! Two kinds of line are read out of a step's output: libtest's
//! `test result: ok. 3 passed; 0 failed; ...`, and `SKIP name: reason`, which a
//! test prints (past libtest's capture) when a program that it needs is missing.
//! A reason that begins with `this machine cannot: ` is forgiven where skips are forbidden; one that begins with
//! `in a guest: ` is no skip: the test is counted where it runs, in a guest's step.
//! A step without any `test result:` line counts as one test of its own.

use std::collections::BTreeSet;
use std::io::{self, BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Results so far.
#[derive(Debug, Default)]
pub(crate) struct Report {
    steps: Vec<Step>,
    skips: BTreeSet<String>,
    excused: BTreeSet<String>,
}

#[derive(Debug)]
struct Step {
    name: String,
    count: Count,
    took: Duration,
    cpu: Duration,
}

/// When a step began: by the clock, and by the processor time of all steps before it.
struct Start(Instant, Duration);

impl Start {
    fn now() -> Self {
        Start(Instant::now(), children_cpu())
    }
}

/// Tests of one step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Count {
    passed: u64,
    failed: u64,
    skipped: u64,
    ignored: u64,
}

impl Report {
    /// Runs `command` as the step `name`.
    pub(crate) fn step(&mut self, name: &str, command: &mut Command) {
        announce(name);
        println!("    {}", shell(command));
        let start = Start::now();
        let mut output = Output::default();
        let ok = match stream(command, |line| output.line(line)) {
            Ok(ok) => ok,
            Err(error) => {
                println!("cannot run {:?}: {error}", command.get_program());
                false
            }
        };
        for skip in &output.skips {
            match skip.contains(": this machine cannot: ") {
                true => self.excused.insert(skip.clone()),
                false => self.skips.insert(skip.clone()),
            };
        }
        self.push(name, output.count(ok), start);
    }

    /// Runs a check of our own as the step `name`: an `Err` is what is wrong, to be printed.
    pub(crate) fn check(&mut self, name: &str, check: impl FnOnce() -> Result<String, String>) {
        announce(name);
        let start = Start::now();
        let result = check();
        let ok = result.is_ok();
        let (Ok(text) | Err(text)) = result;
        println!("{text}");
        self.push(name, Output::default().count(ok), start);
    }

    /// Notes that the step `name` could not be run.
    pub(crate) fn skip(&mut self, name: &str, reason: &str) {
        println!("\nSKIP {name}: {reason}");
        self.skips.insert(format!("{name}: {reason}"));
        self.steps.push(Step::skipped(name));
    }

    /// Notes that the step `name` could not be run, for a reason outside of anybody's reach here: counted, but
    /// forgiven where skips are forbidden.
    pub(crate) fn excuse(&mut self, name: &str, reason: &str) {
        println!("\nSKIP {name}: {reason}");
        self.excused.insert(format!("{name}: {reason}"));
        self.steps.push(Step::skipped(name));
    }

    /// Prints times, skips and, as the last line, the counts. True if nothing failed.
    pub(crate) fn finish(self, no_skips: bool) -> bool {
        println!("\n==> summary");
        let mut total = Count::default();
        let (mut took, mut cpu) = (Duration::ZERO, Duration::ZERO);
        println!("     time  processor");
        for step in &self.steps {
            let Count {
                passed,
                failed,
                skipped,
                ignored,
            } = step.count;
            let left = match ignored {
                0 => String::new(),
                n => format!(", {n} left to --long"),
            };
            println!(
                "{:8.1} s {:8.1} s  {:<44} {passed} passed, {failed} failed, {skipped} skipped{left}",
                step.took.as_secs_f64(),
                step.cpu.as_secs_f64(),
                step.name
            );
            total = total.plus(step.count);
            took += step.took;
            cpu += step.cpu;
        }
        println!(
            "{:8.1} s {:8.1} s  in all",
            took.as_secs_f64(),
            cpu.as_secs_f64()
        );
        for skip in self.skips.iter().chain(&self.excused) {
            println!("skipped: {skip}");
        }
        if no_skips && !self.skips.is_empty() {
            println!(
                "skips are forbidden here: {} counted as failed",
                self.skips.len()
            );
            let excused = names(&self.excused).difference(&names(&self.skips)).count() as u64;
            total.failed += total.skipped.saturating_sub(excused);
            total.skipped = excused;
        }
        println!(
            "{} passed, {} failed, {} skipped",
            total.passed, total.failed, total.skipped
        );
        total.failed == 0
    }

    fn push(&mut self, name: &str, count: Count, Start(start, cpu): Start) {
        let took = start.elapsed();
        let cpu = children_cpu().saturating_sub(cpu);
        let word = if count.failed == 0 { "ok" } else { "FAILED" };
        println!("    {word}, {:.1} s", took.as_secs_f64());
        self.steps.push(Step {
            name: name.to_owned(),
            count,
            took,
            cpu,
        });
    }
}

impl Step {
    fn skipped(name: &str) -> Self {
        let count = Count {
            skipped: 1,
            ..Count::default()
        };
        Step {
            name: name.to_owned(),
            count,
            took: Duration::ZERO,
            cpu: Duration::ZERO,
        }
    }
}

impl Count {
    fn plus(self, other: Count) -> Count {
        Count {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
            skipped: self.skipped + other.skipped,
            ignored: self.ignored + other.ignored,
        }
    }
}

/// What the lines of one step's output add up to.
#[derive(Debug, Default)]
struct Output {
    results: Option<Count>,
    skips: BTreeSet<String>,
    /// What runs in a guest.
    elsewhere: BTreeSet<String>,
}

impl Output {
    fn line(&mut self, line: &str) {
        if let Some(count) = parse_result(line) {
            self.results = Some(self.results.unwrap_or_default().plus(count));
        } else if let Some(skip) = parse_skip(line) {
            match skip.contains(": in a guest: ") {
                true => self.elsewhere.insert(skip.to_owned()),
                false => self.skips.insert(skip.to_owned()),
            };
        }
    }

    /// The step's count, once its command has ended. A test that skipped itself is one that libtest calls passed, and
    /// so is one that leaves its work to a guest.
    fn count(&self, ok: bool) -> Count {
        let Some(mut count) = self.results else {
            return match ok {
                true => Count {
                    passed: 1,
                    ..Count::default()
                },
                false => Count {
                    failed: 1,
                    ..Count::default()
                },
            };
        };
        count.skipped = names(&self.skips).len() as u64;
        let elsewhere = names(&self.elsewhere).len() as u64;
        count.passed = count.passed.saturating_sub(count.skipped + elsewhere);
        // Something went wrong that no test reported: it did not compile, or a test process died.
        if !ok && count.failed == 0 {
            count.failed = 1;
        }
        count
    }
}

/// Whom `skips` name: one test may lack several things.
fn names(skips: &BTreeSet<String>) -> BTreeSet<&str> {
    let names = skips.iter().filter_map(|skip| skip.split(": ").next());
    names.collect()
}

/// `test result: ok. 12 passed; 0 failed; 3 ignored; 0 measured; 0 filtered out; ...`
fn parse_result(line: &str) -> Option<Count> {
    let (_, counts) = line
        .trim()
        .strip_prefix("test result: ")?
        .split_once(". ")?;
    let mut count = Count::default();
    for part in counts.split(';') {
        let mut words = part.split_whitespace();
        let (Some(number), Some(what)) = (words.next(), words.next()) else {
            continue;
        };
        let Ok(number) = number.parse() else { continue };
        match what {
            "passed" => count.passed = number,
            "failed" => count.failed = number,
            "ignored" => count.ignored = number,
            _ => {}
        }
    }
    Some(count)
}

/// `SKIP name: reason`, anywhere in the line: libtest may have begun the line with `test name ... `.
fn parse_skip(line: &str) -> Option<&str> {
    let at = line.find("SKIP ")?;
    let skip = &line[at + "SKIP ".len()..];
    let (name, reason) = skip.split_once(": ")?;
    (!name.is_empty() && !name.contains(' ') && !reason.is_empty()).then_some(skip)
}

fn announce(name: &str) {
    println!("\n==> {name}");
}

/// Runs `command`, passes each line of its output on and to `each`. True if it exits with 0.
fn stream(command: &mut Command, mut each: impl FnMut(&str)) -> io::Result<bool> {
    let (reader, writer) = io::pipe()?;
    command
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer);
    let mut child = command.spawn()?;
    // The command holds the pipe's other end: without this the pipe would never end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    let mut stdout = io::stdout().lock();
    loop {
        line.clear();
        if reader.read_until(b'\n', &mut line)? == 0 {
            break;
        }
        stdout.write_all(&line)?;
        each(&String::from_utf8_lossy(&line));
    }
    drop(stdout);
    Ok(child.wait()?.success())
}

/// The processor time of all commands that have ended, where Linux tells; else zero.
fn children_cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Behind the name, which may hold anything: the 16th and 17th field, in ticks of 10 ms (proc(5): cutime, cstime).
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let ticks = fields
        .split_whitespace()
        .skip(13)
        .take(2)
        .map_while(|field| field.parse::<u64>().ok());
    Duration::from_millis(ticks.sum::<u64>() * 10)
}

fn shell(command: &Command) -> String {
    let mut text = String::new();
    for (key, value) in command.get_envs() {
        let value = value.unwrap_or_default().to_string_lossy();
        text += &format!("{}={} ", key.to_string_lossy(), quoted(&value));
    }
    text += &command.get_program().to_string_lossy();
    for arg in command.get_args() {
        text += &format!(" {}", quoted(&arg.to_string_lossy()));
    }
    text
}

fn quoted(text: &str) -> String {
    match text.contains([' ', '*', '$', '"']) {
        true => format!("'{text}'"),
        false => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count_of(text: &str, ok: bool) -> Count {
        let mut output = Output::default();
        text.lines().for_each(|line| output.line(line));
        output.count(ok)
    }

    #[test]
    fn results_of_several_test_programs_add_up() {
        let text = "running 3 tests\n\
            test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s\n\
            test result: FAILED. 4 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";
        let expected = Count {
            passed: 7,
            failed: 2,
            skipped: 0,
            ignored: 1,
        };
        assert_eq!(count_of(text, false), expected);
    }

    #[test]
    fn a_test_that_skipped_itself_is_not_a_passed_one() {
        let text = "test copies ... SKIP copies: needs nbdcopy\nok\ntest result: ok. 2 passed; 0 failed; 0 ignored";
        let expected = Count {
            passed: 1,
            skipped: 1,
            ..Count::default()
        };
        assert_eq!(count_of(text, true), expected);
    }

    #[test]
    fn a_test_that_lacks_two_things_is_one_skip() {
        let text = "SKIP copies: needs nbdcopy\nSKIP copies: needs mke2fs\ntest result: ok. 2 passed; 0 failed";
        let expected = Count {
            passed: 1,
            skipped: 1,
            ..Count::default()
        };
        assert_eq!(count_of(text, true), expected);
    }

    #[test]
    fn a_test_that_runs_in_a_guest_counts_there_alone() {
        let text = "SKIP mounts: in a guest: needs ublk\ntest result: ok. 2 passed; 0 failed";
        let expected = Count {
            passed: 1,
            ..Count::default()
        };
        assert_eq!(count_of(text, true), expected);
    }

    #[test]
    fn a_dead_test_program_is_a_failure_although_no_test_failed() {
        let text = "test result: ok. 2 passed; 0 failed; 0 ignored\nerror: test failed (signal: 6)";
        assert_eq!(count_of(text, false).failed, 1);
    }

    #[test]
    fn a_step_without_tests_counts_as_one() {
        assert_eq!(
            count_of("Finished", true),
            Count {
                passed: 1,
                ..Count::default()
            }
        );
        assert_eq!(
            count_of("error", false),
            Count {
                failed: 1,
                ..Count::default()
            }
        );
    }

    #[test]
    fn prose_is_not_a_skip() {
        assert_eq!(parse_skip("SKIP is a word"), None);
        assert_eq!(parse_skip("we SKIP this thing: always"), None);
        assert_eq!(parse_skip("SKIP a: b"), Some("a: b"));
    }

    #[test]
    fn a_forbidden_skip_fails_the_run_and_an_excused_one_does_not() {
        let mut report = Report::default();
        report.excuse("target", "cannot be fetched");
        assert!(report.finish(true));
        let mut report = Report::default();
        report.skip("client", "not installed");
        assert!(!report.finish(true));
        let mut report = Report::default();
        report.skip("client", "not installed");
        assert!(report.finish(false));
    }
}
