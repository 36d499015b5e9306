//! The arguments: what each command takes, and the examples in its help.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::styling::{AnsiColor, Styles};
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use clap_complete::Shell;
#[cfg(target_os = "linux")]
use userland_io::attach::Via;
use userland_io::copy::CopyOptions;
use userland_io::stack::{parse_duration, parse_size};
use userland_io::transports::nbd::{Uri, UriError};
use userland_io_testing::Script;

use crate::files;

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().bold())
    .usage(AnsiColor::Green.on_default().bold())
    .literal(AnsiColor::Cyan.on_default().bold())
    .placeholder(AnsiColor::Cyan.on_default());

/// Serve, inspect and copy userland disks
///
/// A disk is written as a stack of words, bottom first: an engine, then any layers over it, each as
/// `name:value,key=value,flag`. `ulio engines` lists them. The URI of an NBD server is a stack, too.
#[derive(Debug, Parser)]
#[command(name = "ulio", version, styles = STYLES, after_help = "\
Examples:
  ulio serve file:disk.img,size=10G
  ulio info nbd://127.0.0.1:10809
  ulio copy nbd://127.0.0.1:10809 file:backup.img
  ulio attach memory:1G
  ulio engines file")]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,

    /// What to log on stderr, such as `debug` or `userland_io=trace`; the default is the variable ULIO_LOG, else `warn` and
    /// what `stats` layers count
    #[arg(long, global = true, value_name = "FILTER")]
    pub(crate) log: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Serve(Serve),
    Info(Info),
    Copy(Copy),
    #[cfg(target_os = "linux")]
    Attach(Attach),
    #[cfg(target_os = "linux")]
    List(List),
    #[cfg(target_os = "linux")]
    Detach(Detach),
    Torture(Torture),
    Engines(Engines),
    Completions(Completions),
    Man(Man),
}

/// Serve disks to NBD clients, or as files
///
/// Prints the URI of each export, or the file's path, on stdout, and commands to try on stderr. Ctrl-C or SIGTERM ends it: requests
/// in flight are finished, the disks flushed and closed, and the exit code tells whether that went well. A second
/// signal leaves at once. Started by systemd's socket activation it takes the sockets that it is handed.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ulio serve file:disk.img,size=10G
  ulio serve memory:1G --listen unix:/run/disk.sock
  ulio serve file:disk.img --listen fuse:/tmp/disk
  ulio serve --export a=file:a.img --export b='file:b.img delay:read=5ms' --listen nbd://[::1]:10810")]
pub(crate) struct Serve {
    /// The words of the default export's stack, bottom first, one argument each
    #[arg(value_name = "STACK", required_unless_present = "export")]
    pub(crate) stack: Vec<String>,

    /// A further export: a name, and the words of its stack separated by spaces
    #[arg(long, short, value_name = "NAME=STACK", value_parser = export)]
    pub(crate) export: Vec<Export>,

    /// Where to listen: `nbd://HOST[:PORT]` or `unix:PATH`; `fuse:PATH` is a file
    ///
    /// `fuse:PATH` makes the one disk that is served appear as a file there, by FUSE (Linux; as root, or with fusermount3
    /// installed). The file is made if nothing is there, and gone in the end. With it alone, there is no NBD server.
    ///
    /// `HOST:PORT` is short for `nbd://HOST:PORT`, and `unix:PATH` for `nbd+unix:///?socket=PATH`; port 0 takes a free
    /// one. May be given several times. The default is port 10809 of this machine only, `nbd://127.0.0.1:10809` and
    /// `nbd://[::1]:10809`; or, started by socket activation, the sockets handed over, which `systemd:NAME` means, too.
    #[arg(long, short, value_name = "URI", value_parser = listen)]
    pub(crate) listen: Vec<String>,

    /// Refuse writes, whatever the stacks allow
    #[arg(long, short)]
    pub(crate) read_only: bool,

    /// The permissions of Unix sockets, in octal
    #[arg(long, value_name = "MODE", default_value = "0600", value_parser = mode)]
    pub(crate) socket_mode: u32,

    /// How long a client may take to choose its export
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    pub(crate) handshake_timeout: Duration,

    /// How many clients may be connected at once
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = count::<1_000_000>)]
    pub(crate) max_connections: usize,

    /// Print the exports and their URIs as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// A named stack.
#[derive(Clone, Debug)]
pub(crate) struct Export {
    pub(crate) name: String,
    pub(crate) stack: String,
}

/// Show a disk's size, limits, claims and allocation
///
/// The stack is opened as its words say. The URI of a server that has several exports lists them.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ulio info file:disk.img
  ulio info --map nbd://127.0.0.1:10809/a
  ulio info --json nbd://127.0.0.1:10809")]
pub(crate) struct Info {
    /// The words of a stack, bottom first, one argument each, or a server's URI
    #[arg(value_name = "STACK|URI", required = true)]
    pub(crate) stack: Vec<String>,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,

    /// Print each run of data, zeroes and holes
    #[arg(long)]
    pub(crate) map: bool,
}

/// Copy one disk onto another
///
/// Holes stay holes. Where the source is zero the target is made zero, unless it says that it is already.
/// A target that is shorter is refused; one that is longer keeps what lies beyond. A `file:` that does not exist
/// is created with the source's size. The target is flushed at the end, and only then the exit code is 0.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ulio copy nbd://127.0.0.1:10809 file:backup.img
  ulio copy --verify file:backup.img nbd://127.0.0.1:10809
  ulio copy 'file:disk.img partition:1' file:root.img")]
pub(crate) struct Copy {
    /// A stack (its words in one argument, separated by spaces) or a server's URI; opened read-only where it can be
    #[arg(value_name = "SOURCE")]
    pub(crate) source: String,

    /// Likewise
    #[arg(value_name = "TARGET")]
    pub(crate) target: String,

    /// Read both disks again afterwards, and compare
    #[arg(long)]
    pub(crate) verify: bool,

    /// How many requests are in flight at once
    #[arg(long, short, value_name = "N", default_value_t = 16, value_parser = count::<{ CopyOptions::MAX_IN_FLIGHT }>)]
    pub(crate) jobs: usize,

    /// How long a request is at most, up to 64M
    #[arg(long, value_name = "SIZE", default_value = "1M", value_parser = request_size)]
    pub(crate) request_size: u32,

    /// Show progress, even if stderr is no terminal
    #[arg(long, overrides_with = "no_progress")]
    pub(crate) progress: bool,

    /// Show no progress, even if stderr is a terminal
    #[arg(long)]
    pub(crate) no_progress: bool,
}

/// Make a block device under /dev of a disk
///
/// Prints the device's path alone on stdout once it is ready, and on stderr by which way: ublk, else the kernel's NBD client, else
/// FUSE and a loop device, each with the reason why the better ones were not taken. Ctrl-C or SIGTERM waits until nobody uses the
/// device, telling who does, flushes and detaches; a second signal leaves at once and says what it left. Needs root.
#[cfg(target_os = "linux")]
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ulio attach memory:1G
  ulio attach --background file:disk.img,size=10G
  ulio attach --via ublk --recoverable file:/var/lib/disk.img
  ulio attach --resume /dev/ublkb0 file:/var/lib/disk.img")]
pub(crate) struct Attach {
    /// The words of the stack, bottom first, one argument each
    #[arg(value_name = "STACK", required = true)]
    pub(crate) stack: Vec<String>,

    /// By this way alone: `ublk`, `nbd` or `fuse`; the default is the first of them that works here
    #[arg(long, value_name = "WAY", value_parser = via())]
    pub(crate) via: Option<Via>,

    /// How many queues serve it at once; the default suits the way and the machine
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) queues: Option<u16>,

    /// How many requests each queue has in flight at most; the default suits the way
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) depth: Option<u16>,

    /// How long a request may hang if this process dies, or its disk is slow: 3s at least, 60s by default (nbd only)
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) timeout: Option<Duration>,

    /// Make a device that takes no writes, whatever the stack allows
    #[arg(long, short)]
    pub(crate) read_only: bool,

    /// Make a device that waits if this process dies: run again, the same command resumes it (ublk only)
    #[arg(long)]
    pub(crate) recoverable: bool,

    /// Take over this device, whose process died, with the same stack (ublk only)
    #[arg(long, value_name = "DEVICE", value_hint = ValueHint::FilePath)]
    pub(crate) resume: Option<PathBuf>,

    /// Return as soon as the device is ready, and serve it in the background; `ulio detach` ends that
    ///
    /// What is logged from then on goes to the kernel's log, where the kernel's own words about the device are.
    #[arg(long, short)]
    pub(crate) background: bool,
}

/// List what is attached
///
/// Each device with its way, state, size, how much of it is data, its process, what it has done, and its stack. Without root
/// everything but the data and what was done is there.
#[cfg(target_os = "linux")]
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ulio list
  ulio list --stale
  ulio list --json")]
pub(crate) struct List {
    /// Only those whose process has died
    #[arg(long)]
    pub(crate) stale: bool,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Detach devices
///
/// One that is in use is left alone, and it is said who uses it. Else its process flushes the disk and ends; if that has died, what it
/// left is removed. The path of each device that is gone is printed on stdout. Needs root.
#[cfg(target_os = "linux")]
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ulio detach /dev/loop0
  ulio detach --stale")]
pub(crate) struct Detach {
    /// The devices, as `ulio list` has them
    #[arg(value_name = "DEVICE", required_unless_present = "stale", value_hint = ValueHint::FilePath)]
    pub(crate) devices: Vec<PathBuf>,

    /// Remove what dead processes have left and nobody uses; not a device that waits to be resumed
    #[arg(long, conflicts_with = "devices")]
    pub(crate) stale: bool,
}

/// Look for a way to make a disk break its promises
///
/// Random clients write, read, zero, discard and flush at the same time; every block says who wrote it, so every read can
/// be judged. Where it is possible the stack runs over a simulated disk that stands in for `file:` or `memory:`: it fails,
/// it stops at any moment, and what is left then is judged by what the stack claims. Nothing real is touched then. Where it is
/// not possible, or with --real, the checks run on the disk itself, without crashes. The report is on stdout;
/// when a promise was broken it has what happened, the smallest script that shows it, and the exit code is 1.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ulio torture memory:64M
  ulio torture --claim prefix file:disk.img,size=1M offset:64K
  ulio torture --through nbd --connections 4 file:disk.img,size=1M
  ulio torture --uri nbd://127.0.0.1:10809 --overwrite --clients 4 --minutes 10")]
pub(crate) struct Torture {
    /// The words of the stack, bottom first
    #[arg(value_name = "STACK", required_unless_present = "uri")]
    pub(crate) stack: Vec<String>,

    /// Torture a running NBD server's export instead; what it holds is overwritten
    #[arg(long, value_name = "URI", conflicts_with = "stack", value_parser = nbd_uri)]
    pub(crate) uri: Option<String>,

    /// Allow what a disk that exists holds to be overwritten
    #[arg(long)]
    pub(crate) overwrite: bool,

    /// Judge crashes by this claim rather than by the stack's own
    #[arg(long, value_enum)]
    pub(crate) claim: Option<Claim>,

    /// Which seeds: how many, or from one to before another; the default is 10000 simulated or 300 on a real disk
    #[arg(long, value_name = "N|A..B", value_parser = seeds)]
    pub(crate) seeds: Option<Range<u64>>,

    /// Only this seed
    #[arg(long, value_name = "N", conflicts_with_all = ["seeds", "minutes"])]
    pub(crate) seed: Option<u64>,

    /// Only this script, as a report has it
    #[arg(long, conflicts_with_all = ["seeds", "seed", "minutes"])]
    pub(crate) script: Option<Script>,

    /// How long to go on, whatever the number of seeds
    #[arg(long, value_name = "N", value_parser = count::<1_000_000>)]
    pub(crate) minutes: Option<usize>,

    /// How many simulations run at once; the default is one for each core
    #[arg(long, short, value_name = "N", value_parser = count::<1024>)]
    pub(crate) jobs: Option<usize>,

    /// Go through a real server and client
    #[arg(long, value_enum, conflicts_with = "uri")]
    pub(crate) through: Option<Through>,

    /// How many clients of the server write to the disk
    ///
    /// One alone keeps what is not flushed, to tell it again after an error. Several tell nothing twice, and are opened anew.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count::<64>)]
    pub(crate) clients: usize,

    /// How many connections each client has, where the server can have several
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count::<64>)]
    pub(crate) connections: usize,

    /// Use the disk itself, even if it could be simulated
    #[arg(long)]
    pub(crate) real: bool,

    /// Without errors of the simulated disk and without abandoned requests
    #[arg(long)]
    pub(crate) gentle: bool,
}

/// What a crash leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Claim {
    /// What a flush covered
    Flush,
    /// All up to some moment, and what a flush covered
    Prefix,
    /// Everything that was answered
    Sync,
    /// Nothing
    None,
}

/// A way to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Through {
    /// An NBD server and client of this library, and a socket between them
    Nbd,
}

/// List the engines and layers that stacks are made of, with every key
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ulio engines
  ulio engines file
  ulio engines --json")]
pub(crate) struct Engines {
    /// Only this engine or layer
    pub(crate) name: Option<String>,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Print a shell's completions
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ulio completions bash > ~/.local/share/bash-completion/completions/ulio
  ulio completions zsh > ~/.zfunc/_ulio
  ulio completions fish > ~/.config/fish/completions/ulio.fish")]
pub(crate) struct Completions {
    /// Which shell
    pub(crate) shell: Shell,
}

/// Write the manual pages
///
/// One page for ulio and one for each command; without a directory, ulio's own on stdout.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ulio man ~/.local/share/man/man1
  ulio man | man -l -")]
pub(crate) struct Man {
    /// Where to write them; created if need be
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) directory: Option<PathBuf>,
}

fn export(text: &str) -> Result<Export, String> {
    let (name, stack) = text
        .split_once('=')
        // Else `file:disk.img,size=1G` would be an export named `file:disk.img,size`.
        .filter(|(name, _)| !name.contains(':'))
        .ok_or("write NAME=STACK, such as backup=file:backup.img, with no colon in the name")?;
    if stack.trim().is_empty() {
        return Err(format!(
            "the export `{name}` has no stack: write {name}=file:disk.img, say"
        ));
    }
    Ok(Export {
        name: name.to_owned(),
        stack: stack.to_owned(),
    })
}

/// Checks an address, so that a slip in it is a usage error and comes before anything is opened.
fn listen(text: &str) -> Result<String, String> {
    if let Some(path) = files::path(text) {
        files::check(path)?;
    } else if !text.starts_with("systemd:") {
        let uri: Uri = text.parse().map_err(|error: UriError| error.to_string())?;
        if !uri.export().is_empty() {
            return Err(format!(
                "it names the export `{}`, and one address serves all of them: leave the name out",
                uri.export()
            ));
        }
    }
    Ok(text.to_owned())
}

/// The ways' names, so that help and completions have them.
#[cfg(target_os = "linux")]
fn via() -> impl clap::builder::TypedValueParser<Value = Via> {
    use clap::builder::{PossibleValuesParser, TypedValueParser};
    let names = PossibleValuesParser::new(Via::ALL.map(Via::name));
    names.try_map(|name| name.parse::<Via>())
}

fn nbd_uri(text: &str) -> Result<String, String> {
    let uri: Result<Uri, UriError> = text.parse();
    uri.map(|_| text.to_owned())
        .map_err(|error| error.to_string())
}

fn seeds(text: &str) -> Result<Range<u64>, String> {
    let number = |text: &str| text.parse::<u64>().ok();
    let range = match text.split_once("..") {
        Some((from, to)) => number(from).zip(number(to)).map(|(from, to)| from..to),
        None => number(text).map(|count| 0..count),
    };
    range.filter(|range| !range.is_empty()).ok_or_else(|| {
        "write how many, such as 10000, or from where to where, such as 500..600".to_owned()
    })
}

fn mode(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|&mode| mode <= 0o777)
        .ok_or_else(|| "write three octal digits, such as 0660".to_owned())
}

fn duration(text: &str) -> Result<Duration, String> {
    let time = parse_duration(text).map_err(|error| error.to_string())?;
    match time.is_zero() {
        true => Err("it must be longer than nothing, such as 10s".to_owned()),
        false => Ok(time),
    }
}

fn count<const MOST: usize>(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|count| (1..=MOST).contains(count))
        .ok_or_else(|| format!("write a number from 1 to {MOST}"))
}

fn request_size(text: &str) -> Result<u32, String> {
    let size = parse_size(text).map_err(|error| error.to_string())?;
    match u32::try_from(size) {
        Ok(size) if (4096..=CopyOptions::MAX_REQUEST).contains(&size) => Ok(size),
        _ => Err("write a size from 4K to 64M".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_contradict_nothing() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_shows_an_example() {
        for command in Cli::command().get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string);
            let example = format!("  ulio {}", command.get_name());
            assert!(help.unwrap_or_default().contains(&example), "{example}");
        }
    }

    #[test]
    fn an_export_is_a_name_and_a_stack() {
        let named = export("a=file:x,size=1G delay:read=5ms").unwrap();
        assert_eq!(
            (&*named.name, &*named.stack),
            ("a", "file:x,size=1G delay:read=5ms")
        );
        assert_eq!(export("=null").unwrap().name, "");
        // A stack without a name, whose first `=` is a key's.
        assert!(export("file:x,size=1G").is_err());
        assert!(export("a=").unwrap_err().contains("`a` has no stack"));
    }
}
