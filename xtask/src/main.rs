//! Everything that CI and a developer run: `cargo xtask test`, `cargo xtask fuzz`,
//! `cargo xtask vm`, `cargo xtask bench`, `cargo xtask instructions`.
//!
//! A run is a list of steps (`test`), each a command whose output streams through
//! and whose tests are counted (`report`). What a step needs from the machine is
//! put there where that is allowed (`packages`, `targets`); what cannot be had is
//! a skip, named with its reason.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod features;
mod fuzz;
mod instructions;
mod licences;
mod outsider;
mod packages;
mod report;
mod targets;
mod test;
#[cfg(target_os = "linux")]
mod vm;

/// Checks, tests and fuzzing of this workspace.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run every check and test; the last line counts them.
    Test(test::Options),
    /// Measure: NBD servers side by side, or another program of `bench/src/bin`.
    Bench(bench::Options),
    /// Count the instructions of requests, and compare them with what is recorded.
    Instructions(instructions::Options),
    /// Fuzz one target, or all of them in turn.
    Fuzz(fuzz::Options),
    /// Run a command in a guest with a kernel of its own, over this machine's files.
    #[cfg(target_os = "linux")]
    Vm(vm::Options),
}

fn main() -> ExitCode {
    #[cfg(target_os = "linux")]
    vm::guest();
    let done = match Cli::parse().command {
        Command::Test(options) => test::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Instructions(options) => instructions::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        #[cfg(target_os = "linux")]
        Command::Vm(options) => match vm::run(options) {
            Ok(status) => return status,
            Err(error) => Err(error),
        },
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The workspace's root directory.
fn root() -> PathBuf {
    let mut root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.pop();
    root
}
