//! The command line of userland-io: serve, attach, inspect and copy userland disks.
//!
//! `cli` reads the arguments, `commands` has one module for each command, and the
//! rest is what they share. What a disk does, and how, is the library's business.
#![forbid(unsafe_code)]

mod cli;
mod commands;
mod errors;
mod files;
mod logging;
mod output;
mod process;
mod progress;
#[cfg(target_os = "linux")]
mod service;
mod signals;
mod stacks;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let arguments = cli::Cli::parse();
    match process::run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => output::report(failure),
    }
}
