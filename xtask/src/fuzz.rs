//! `cargo xtask fuzz`: builds and runs the targets of `fuzz/`.
//!
//! The layout is cargo-fuzz's, and `cargo fuzz run` works where it and a nightly
//! compiler are installed. Here the stable compiler does: the coverage that
//! libFuzzer wants is an LLVM pass, and the code under test has next to no unsafe
//! code for an address sanitizer to watch.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use clap::Args;

use crate::report::Report;
use crate::root;

/// Options of `cargo xtask fuzz`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The target; left out: each of them in turn.
    target: Option<String>,
    /// How long to run each target.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Put inputs that reach new code into the kept corpus instead of the build directory.
    #[arg(long)]
    keep: bool,
}

/// How long a CI run fuzzes, all targets together.
const SMOKE_SECONDS: u64 = 60;
/// How long a long run fuzzes each target.
const LONG_SECONDS: u64 = 600;

const FLAGS: &[&str] = &[
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
];

/// Fuzzes as asked. True if nothing was found.
pub(crate) fn run(options: &Options) -> Result<bool, String> {
    let known = targets()?;
    let chosen = match &options.target {
        Some(name) if known.contains(name) => vec![name.clone()],
        Some(name) => {
            return Err(format!(
                "no fuzz target {name:?}; there are: {}",
                known.join(", ")
            ));
        }
        None => known,
    };
    let mut report = Report::default();
    fuzz(&mut report, &chosen, options.seconds, options.keep)?;
    Ok(report.finish(false))
}

/// The part of `cargo xtask test`.
pub(crate) fn smoke(report: &mut Report, long: bool) {
    let done = targets().and_then(|targets| {
        let seconds = if long {
            LONG_SECONDS
        } else {
            SMOKE_SECONDS / targets.len().max(1) as u64
        };
        fuzz(report, &targets, seconds, false)
    });
    if let Err(error) = done {
        report.check("fuzz", || Err(error));
    }
}

fn fuzz(report: &mut Report, targets: &[String], seconds: u64, keep: bool) -> Result<(), String> {
    let host = host()?;
    let dir = root().join("fuzz");
    let mut build = Command::new("cargo");
    build
        .args(["build", "--release", "--target", &host, "--manifest-path"])
        .arg(dir.join("Cargo.toml"));
    // With an explicit target these flags stay away from build scripts, which have no libFuzzer to link to.
    build.env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\u{1f}"));
    build.env("CARGO_TARGET_DIR", dir.join("target"));
    report.step("fuzz targets build", &mut build);
    for target in targets {
        let binary = dir.join("target").join(&host).join("release").join(target);
        let (found, kept, crashes) = (
            dir.join("target/corpus").join(target),
            dir.join("corpus").join(target),
            dir.join("artifacts").join(target),
        );
        for path in [&found, &kept, &crashes] {
            std::fs::create_dir_all(path)
                .map_err(|error| format!("{}: {error}", path.display()))?;
        }
        let mut command = Command::new(binary);
        command.arg(format!("-max_total_time={seconds}"));
        command.arg(format!("-artifact_prefix={}/", crashes.display()));
        command.args([
            "-timeout=10",
            "-rss_limit_mb=1024",
            "-print_final_stats=1",
            "-verbosity=0",
        ]);
        // New inputs go into the first directory.
        let corpora: &[&PathBuf] = if keep {
            &[&kept, &found]
        } else {
            &[&found, &kept]
        };
        command.args(corpora);
        report.step(&format!("fuzz {target}, {seconds} s"), &mut command);
    }
    Ok(())
}

/// The names of all targets: the files in `fuzz/fuzz_targets`.
fn targets() -> Result<Vec<String>, String> {
    let dir = root().join("fuzz/fuzz_targets");
    let entries = std::fs::read_dir(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let rust = paths.filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    let mut names: Vec<String> = rust
        .filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    Ok(names)
}

fn host() -> Result<String, String> {
    let output = Command::new("rustc")
        .arg("-vV")
        .stderr(Stdio::inherit())
        .output();
    let output = output.map_err(|error| format!("cannot run rustc: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned)
        .ok_or_else(|| "rustc -vV names no host".to_owned())
}
