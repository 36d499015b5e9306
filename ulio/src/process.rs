//! What a run of the program needs whatever its command: a log, open files, a runtime.

use userland_io::stack::Registry;

use crate::cli::{Cli, Command};
use crate::commands;
use crate::errors::Failure;
use crate::logging;

/// Does what the arguments say.
pub(crate) fn run(arguments: Cli) -> Result<(), Failure> {
    let default = match arguments.command {
        Command::Serve(_) => logging::SERVER,
        #[cfg(target_os = "linux")]
        Command::Attach(_) => logging::SERVER,
        // What it makes fail is no news.
        Command::Torture(_) => "off",
        _ => logging::OTHERS,
    };
    logging::start(arguments.log.as_deref(), default)?;
    raise_open_files();
    let registry = Registry::builtin();
    match arguments.command {
        Command::Serve(serve) => block_on(commands::serve::run(serve, &registry)),
        Command::Info(info) => block_on(commands::info::run(info, &registry)),
        Command::Copy(copy) => block_on(commands::copy::run(copy, &registry)),
        #[cfg(target_os = "linux")]
        Command::Attach(attach) => commands::attach::run(attach, &registry),
        #[cfg(target_os = "linux")]
        Command::List(list) => commands::list::run(list),
        #[cfg(target_os = "linux")]
        Command::Detach(detach) => commands::detach::run(detach),
        Command::Torture(torture) => block_on(commands::torture::run(torture, &registry)),
        Command::Engines(engines) => commands::engines::run(engines, &registry),
        Command::Completions(completions) => commands::completions::run(completions),
        Command::Man(man) => commands::man::run(man),
    }
}

pub(crate) fn block_on(command: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // At least two, so that a busy one does not keep signals waiting.
        .worker_threads(cores.max(2))
        .enable_all()
        .build()
        .map_err(|error| Failure::of("starting the runtime", error))?;
    let ended = runtime.block_on(command);
    // The disks are closed; a name that is still looked up, say, is not waited for.
    runtime.shutdown_background();
    ended
}

/// Each connection and image is an open file, and the soft limit is often 1024 for the sake of `select`.
#[cfg(unix)]
fn raise_open_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            tracing::debug!(%error, "the limit of open files stays as it is");
        }
    }
}

#[cfg(not(unix))]
fn raise_open_files() {}
