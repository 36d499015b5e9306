//! `cargo xtask bench`: builds everything as it is shipped, and runs one of the programs of `bench/src/bin`.

use std::process::Command;

use clap::Args;

use crate::root;

/// Options of `cargo xtask bench`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The program, `nbd` if left out, and its own options; `nbd --help` shows them.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<String>,
}

/// Runs it. True if it could measure.
pub(crate) fn run(options: &Options) -> Result<bool, String> {
    std::env::set_current_dir(root()).map_err(|error| format!("{}: {error}", root().display()))?;
    let mut words = &options.words[..];
    let program = match words.split_first() {
        Some((first, rest)) if !first.starts_with('-') => {
            words = rest;
            first
        }
        _ => "nbd",
    };
    build()?;
    let path = root().join("target/release").join(program);
    let status = Command::new(&path).args(words).status();
    let status = status.map_err(|error| {
        format!(
            "cannot run {}: {error}; programs are in bench/src/bin",
            path.display()
        )
    })?;
    Ok(status.success())
}

/// Builds ulio and the programs that measure as they are shipped.
pub(crate) fn build() -> Result<(), String> {
    let mut cargo = Command::new("cargo");
    // Together, whatever is wanted: alone each of them has other features of its dependencies, and builds them anew.
    cargo.args(["build", "--release", "-p", "ulio", "-p", "bench"]);
    match cargo.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("cargo build --release: {status}")),
        Err(error) => Err(format!("cannot run cargo: {error}")),
    }
}
