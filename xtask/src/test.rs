//! `cargo xtask test`: the steps, in order.

use std::process::Command;

use clap::Args;
use serde_json::Value;

use crate::report::Report;
use crate::{features, fuzz, instructions, licences, outsider, packages, root, targets};

/// Options of `cargo xtask test`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Install missing packages without asking.
    #[arg(long)]
    yes: bool,
    /// Also run what takes longer than a CI run may.
    #[arg(long)]
    long: bool,
    /// Count a skip as a failure, but for what no package brings: a Rust target that rustup
    /// cannot fetch, or what this kernel or user cannot do.
    #[arg(long)]
    no_skips: bool,
}

/// Runs everything. True if nothing failed.
pub(crate) fn run(options: &Options) -> Result<bool, String> {
    std::env::set_current_dir(root()).map_err(|error| format!("{}: {error}", root().display()))?;
    packages::install(options.yes, options.long);
    let metadata = metadata()?;
    let mut report = Report::default();
    report.step("format", cargo("fmt").args(["--all", "--check"]));
    report.check("licences", || licences::check(&metadata));
    report.step(
        "lints",
        cargo("clippy").args([
            "--workspace",
            "--all-targets",
            "--all-features",
            "--",
            "-D",
            "warnings",
        ]),
    );
    features::run(&mut report, &metadata);
    let mut doc = cargo("doc");
    // Libraries only: the doc comments of ulio's arguments are its help, not rustdoc's markup.
    doc.env("RUSTDOCFLAGS", "-D warnings").args([
        "--workspace",
        "--lib",
        "--all-features",
        "--no-deps",
    ]);
    report.step("documentation", &mut doc);
    tests(&mut report, options.long);
    #[cfg(target_os = "linux")]
    crate::vm::suites::run(&mut report, options.long);
    instructions::step(&mut report);
    outsider::run(&mut report);
    targets::run(&mut report);
    fuzz::smoke(&mut report, options.long);
    if options.long {
        report.step("cargo-deny builds", &mut licences::install_cargo_deny());
        report.step("cargo-deny", &mut licences::cargo_deny());
    }
    Ok(report.finish(options.no_skips))
}

fn tests(report: &mut Report, long: bool) {
    let mut bare = cargo("test");
    bare.args(["-p", "userland-io", "--lib", "--no-default-features"]);
    report.step("unit tests without features", &mut bare);
    let mut loom = cargo("test");
    loom.args(["-p", "userland-io", "--lib", "--no-default-features"]);
    loom.args(["--features", "ublk", "--target-dir", "target/loom"]);
    loom.arg("interleavings");
    loom.env("RUSTFLAGS", "--cfg userland_io_loom");
    report.step("wakes under every interleaving", &mut loom);
    let mut all = cargo("test");
    all.args(["--workspace", "--all-features", "--no-fail-fast"]);
    if long {
        // A test named so is another test's child process, and nothing by itself.
        all.args(["--", "--include-ignored", "--skip", "child_"]);
        all.env("PROPTEST_CASES", "2000");
    }
    report.step("tests", &mut all);
}

fn cargo(command: &str) -> Command {
    let mut cargo = Command::new("cargo");
    cargo.arg(command);
    cargo
}

/// `cargo metadata`, with every dependency on every platform.
fn metadata() -> Result<Value, String> {
    let mut cargo = cargo("metadata");
    let output = cargo
        .args(["--format-version", "1", "--all-features"])
        .output();
    let output = output.map_err(|error| format!("cannot run cargo: {error}"))?;
    if !output.status.success() {
        return Err(format!(
            "cargo metadata: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        ));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| format!("cargo metadata: {error}"))
}
