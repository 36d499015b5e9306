//! `ulio man`: the manual pages, made of the same arguments as the help.

use clap::CommandFactory;

use crate::cli::{Cli, Man};
use crate::errors::Failure;
use crate::output::Results;

pub(crate) fn run(arguments: Man) -> Result<(), Failure> {
    let mut results = Results::begin();
    let Some(directory) = arguments.directory else {
        let mut page = Vec::new();
        clap_mangen::Man::new(Cli::command())
            .render(&mut page)
            .map_err(|error| Failure::of("writing the page", error))?;
        results.bytes(&page)?;
        return results.end();
    };
    if directory.is_file() {
        return Err(Failure::Usage(format!(
            "`{}` is a file: name the directory that the pages are to be written to",
            directory.display()
        )));
    }
    let told = format!("writing the pages to {}", directory.display());
    std::fs::create_dir_all(&directory).map_err(|error| Failure::of(&told, error))?;
    let command = Cli::command().disable_help_subcommand(true);
    clap_mangen::generate_to(command, &directory).map_err(|error| Failure::of(&told, error))?;
    results.line(directory.display())?;
    results.end()
}
