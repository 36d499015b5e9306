//! `ulio completions`: what a shell needs to complete the arguments.

use clap::CommandFactory;

use crate::cli::{Cli, Completions};
use crate::errors::Failure;
use crate::output::Results;

pub(crate) fn run(arguments: Completions) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Cli::command(), "ulio", &mut script);
    let mut results = Results::begin();
    results.bytes(&script)?;
    results.end()
}
