//! `cargo xtask vm`: a command in a guest with a kernel of its own.
//!
//! The guest's `/` is an overlay, kept in its memory, over this machine's `/`; so it has the same
//! programs and files at the same places, and what it changes is gone afterwards. Two kernels:
//! User-Mode Linux (`uml`), which starts in a second, and Debian's own under qemu's
//! emulation (`tcg`). `launch` runs either and brings the output back, `guest` is the first process inside, `suites`
//! says which tests run in guests. docs/testing-kernels.md tells the rest.

mod cpio;
mod debian;
mod guest;
mod launch;
pub(crate) mod suites;
mod tcg;
mod uml;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};

/// Options of `cargo xtask vm`.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit status: the command's; 124 if it took too long, 125 if the guest did not \
    come to run it.\n\nExample: cargo xtask vm -- sh -c 'uname -r; ls /dev/ublk-control /dev/nbd0'"
)]
pub(crate) struct Options {
    /// The kernel: `uml` where there is one, else `tcg`.
    #[arg(long)]
    engine: Option<Engine>,
    /// Processors of the guest.
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Memory of the guest, in MiB.
    #[arg(long, default_value_t = 2048)]
    memory: u32,
    /// Seconds until the guest is ended.
    #[arg(long, default_value_t = 600)]
    timeout: u64,
    /// A directory of this machine in which what the guest writes stays. May be repeated.
    #[arg(long, value_name = "DIR")]
    writable: Vec<PathBuf>,
    /// Build the User-Mode Linux kernel, from Debian's source: some 12 minutes of processor time.
    #[arg(long)]
    build_uml: bool,
    /// Say how long everything took, and what the guest's kernel complained of.
    #[arg(long, short)]
    verbose: bool,
    /// What to run, as root, in the current directory.
    #[arg(last = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// A kind of guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Engine {
    /// User-Mode Linux: a kernel that is a process.
    Uml,
    /// qemu, emulating a processor, with Debian's kernel.
    Tcg,
}

/// A kernel that can be started.
#[derive(Debug)]
pub(crate) enum Kernel {
    Uml(uml::Kernel),
    Tcg(tcg::Kernel),
}

/// What runs in a guest, and how.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) command: Vec<OsString>,
    pub(crate) cpus: u32,
    pub(crate) memory: u32,
    pub(crate) timeout: Duration,
    pub(crate) writable: Vec<PathBuf>,
    pub(crate) verbose: bool,
}

/// Runs `cargo xtask vm`.
pub(crate) fn run(options: Options) -> Result<ExitCode, String> {
    if options.build_uml {
        let path = uml::build()?;
        eprintln!("xtask: built {}", path.display());
    }
    if options.command.is_empty() {
        if options.build_uml {
            return Ok(ExitCode::SUCCESS);
        }
        return Err("nothing to run: cargo xtask vm -- CMD".into());
    }
    let kernel = Kernel::find(options.engine)?;
    eprintln!("xtask: {}", kernel.describe());
    let task = Task {
        command: options.command,
        cpus: options.cpus,
        memory: options.memory,
        timeout: Duration::from_secs(options.timeout),
        writable: options.writable,
        verbose: options.verbose,
    };
    launch::run(&kernel, &task).map(ExitCode::from)
}

/// If this is the first process of a guest, does what such a process does, and does not return.
pub(crate) fn guest() {
    let mut args = std::env::args_os().skip(1);
    if std::process::id() == 1
        && args.next().is_some_and(|word| word == guest::WORD)
        && let (Some(kind), Some(dir)) = (args.next(), args.next())
    {
        guest::main(&kind, Path::new(&dir));
    }
}

impl Kernel {
    /// The kernel asked for; if none is: User-Mode Linux where there is one, else Debian's.
    pub(crate) fn find(engine: Option<Engine>) -> Result<Self, String> {
        match engine {
            Some(Engine::Uml) => uml::Kernel::find()?.map(Kernel::Uml).ok_or_else(|| {
                format!(
                    "no User-Mode Linux here: name one in {}, or `cargo xtask vm --build-uml`",
                    uml::VARIABLE
                )
            }),
            Some(Engine::Tcg) => tcg::Kernel::prepare().map(Kernel::Tcg),
            None => match uml::Kernel::find()? {
                Some(kernel) => Ok(Kernel::Uml(kernel)),
                None => {
                    eprintln!(
                        "xtask: no User-Mode Linux (see `cargo xtask vm --build-uml`): Debian's kernel, emulated, is slower"
                    );
                    tcg::Kernel::prepare().map(Kernel::Tcg)
                }
            },
        }
    }

    /// Which kernel this is, and where it is from.
    pub(crate) fn describe(&self) -> String {
        match self {
            Kernel::Uml(kernel) => kernel.describe(),
            Kernel::Tcg(kernel) => kernel.describe(),
        }
    }
}

/// Where kernels and guests in progress are kept.
fn cache() -> Result<PathBuf, String> {
    let base = match (std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME")) {
        (Some(dir), _) if !dir.is_empty() => PathBuf::from(dir),
        (_, Some(home)) if !home.is_empty() => PathBuf::from(home).join(".cache"),
        _ => return Err("neither HOME nor XDG_CACHE_HOME is set".into()),
    };
    // What the guest has of its own hides this machine's.
    if let Some(top) = guest::OWN.iter().find(|top| base.starts_with(top)) {
        return Err(format!(
            "the cache is at {}, but a guest has its own {top}: set XDG_CACHE_HOME",
            base.display()
        ));
    }
    let dir = base.join("userland-io");
    std::fs::create_dir_all(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    Ok(dir)
}
