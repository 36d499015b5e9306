//! Runs a guest: a directory that both sides see, pipes for its output, and a watch over its time.
//!
//! The guest's processes live in a process namespace of their own, whose first process is killed with
//! us, and all of them with it: whatever ends this program, no guest stays behind.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::{FdFlags, fcntl_setfd};

use super::{Kernel, Task, cache};

/// The guest was ended because it took too long.
const TOO_LONG: u8 = 124;
/// The guest ended without having told a status.
const NO_STATUS: u8 = 125;
/// A guest that is told to end gets so long.
const END: Duration = Duration::from_secs(10);

/// What a kernel's command line is made of.
#[derive(Debug)]
pub(super) struct Guest<'a> {
    /// The directory shared with the guest.
    pub(super) share: &'a Path,
    /// Where the kernel's own messages go.
    pub(super) console: &'a Path,
    /// Descriptors that the guest's two outputs are written to.
    pub(super) outputs: [i32; 2],
    /// Directories that the guest may write to.
    pub(super) writable: &'a [PathBuf],
    pub(super) cpus: u32,
    pub(super) memory: u32,
}

/// Runs the task, passes its output on, and gives its exit status.
pub(super) fn run(kernel: &Kernel, task: &Task) -> Result<u8, String> {
    let start = Instant::now();
    let dir = Dir::new()?;
    let writable = absolute(&task.writable)?;
    dir.write("argv", &join(task.command.iter().map(OsString::as_os_str)))?;
    dir.write("env", &environment(kernel))?;
    dir.write(
        "writable",
        &join(writable.iter().map(|dir| dir.as_os_str())),
    )?;
    let here = std::env::current_dir().map_err(|error| format!("current directory: {error}"))?;
    dir.write("cwd", here.as_os_str().as_bytes())?;
    let (out, out_end) = pipe()?;
    let (err, err_end) = pipe()?;
    let console = dir.0.join("console");
    let mut command = kernel.command(&Guest {
        share: &dir.0,
        console: &console,
        outputs: [out_end.as_raw_fd(), err_end.as_raw_fd()],
        writable: &writable,
        cpus: task.cpus,
        memory: task.memory,
    })?;
    // A pipe, since User-Mode Linux waits for its console to take more.
    let said = dir.0.join("said");
    let mut log = File::create(&said).map_err(|error| format!("{}: {error}", said.display()))?;
    let (said_out, said_end) = pipe()?;
    command.stdin(Stdio::null());
    command.stdout(said_end.try_clone().map_err(|error| error.to_string())?);
    command.stderr(said_end);
    let mut child = command
        .spawn()
        .map_err(|error| format!("cannot run a guest: {:?}: {error}", command.get_program()))?;
    drop((out_end, err_end));
    // And its other end of the third one.
    drop(command);
    let (done, copied) = mpsc::channel();
    thread::spawn(move || copy(said_out, &mut log));
    for (from, is_out) in [(out, true), (err, false)] {
        let done = done.clone();
        thread::spawn(move || {
            match is_out {
                true => copy(from, io::stdout()),
                false => copy(from, io::stderr()),
            }
            // Nobody waits any more if it took too long.
            done.send(()).ok();
        });
    }
    drop(done);
    // Both pipes end when the last process of the guest has.
    let mut is_late = false;
    for _ in 0..2 {
        let left = task.timeout.saturating_sub(start.elapsed());
        if copied.recv_timeout(left).is_err() {
            is_late = true;
            child.kill().map_err(|error| error.to_string())?;
            break;
        }
    }
    if is_late {
        for _ in 0..2 {
            copied.recv_timeout(END).ok();
        }
    }
    let ended = child.wait().map_err(|error| error.to_string())?;
    let status = dir.read("status").and_then(|text| text.trim().parse().ok());
    let took = start.elapsed();
    if task.verbose || status.is_none_or(|status: u8| status != 0) {
        complaints(&dir);
    }
    let status = match status {
        Some(status) => status,
        None => {
            let tail = [&console, &said].map(|path| tail(path, 40)).concat();
            let why = match is_late {
                true => format!("ended after {} s", task.timeout.as_secs()),
                false => format!("the guest told no exit status ({ended})"),
            };
            eprintln!("{tail}xtask: {why}");
            if is_late { TOO_LONG } else { NO_STATUS }
        }
    };
    if task.verbose {
        let boot = dir.read("boot").unwrap_or_default();
        eprintln!(
            "xtask: status {status} after {:.1} s; the guest's clock said {} s when the command began",
            took.as_secs_f64(),
            boot.split_whitespace().next().unwrap_or("?")
        );
    }
    Ok(status)
}

/// A command that dies with this process, and takes its children along.
pub(super) fn warded(program: &OsStr) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]);
    let unshare = ["unshare", "--fork", "--pid", "--kill-child=KILL"];
    let user = ["--user", "--map-current-user"];
    let works = |args: &[&str]| {
        let mut probe = Command::new(args[0]);
        probe.args(&args[1..]).arg("true");
        probe.stderr(Stdio::null()).stdin(Stdio::null());
        probe.status().is_ok_and(|status| status.success())
    };
    // Without either, only the guest's first process dies with us; the others notice.
    if works(&unshare) {
        command.args(unshare);
    } else if works(&[&unshare[..], &user].concat()) {
        command.args(unshare).args(user);
    }
    command.arg(program);
    command
}

impl Kernel {
    fn command(&self, guest: &Guest<'_>) -> Result<Command, String> {
        match self {
            Kernel::Uml(kernel) => kernel.command(guest),
            Kernel::Tcg(kernel) => kernel.command(guest),
        }
    }
}

/// The directory of one guest, removed with it.
#[derive(Debug)]
struct Dir(PathBuf);

impl Dir {
    fn new() -> Result<Self, String> {
        let all = cache()?.join("guests");
        let fail = |error: io::Error| format!("{}: {error}", all.display());
        fs::create_dir_all(&all).map_err(fail)?;
        // What a killed run has left.
        for entry in fs::read_dir(&all).map_err(fail)?.flatten() {
            let name = entry.file_name();
            let pid = name.to_str().and_then(|name| name.parse::<u32>().ok());
            if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
                fs::remove_dir_all(entry.path()).ok();
            }
        }
        let dir = all.join(std::process::id().to_string());
        fs::create_dir_all(dir.join("root")).map_err(fail)?;
        Ok(Dir(dir))
    }

    fn write(&self, name: &str, data: &[u8]) -> Result<(), String> {
        let path = self.0.join(name);
        fs::write(&path, data).map_err(|error| format!("{}: {error}", path.display()))
    }

    fn read(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.0.join(name)).ok()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

fn absolute(dirs: &[PathBuf]) -> Result<Vec<PathBuf>, String> {
    let each = dirs.iter().map(|dir| {
        let path = dir.canonicalize();
        let path = path.map_err(|error| format!("--writable {}: {error}", dir.display()))?;
        match path.is_dir() {
            true => Ok(path),
            false => Err(format!("--writable {}: not a directory", dir.display())),
        }
    });
    each.collect()
}

/// This process's environment, and which kind of guest it is.
fn environment(kernel: &Kernel) -> Vec<u8> {
    let kind = match kernel {
        Kernel::Uml(_) => "uml",
        Kernel::Tcg(_) => "tcg",
    };
    let pairs = std::env::vars_os()
        .filter(|(key, _)| key != "TMPDIR")
        .chain([("ULIO_GUEST".into(), kind.into())]);
    let pairs = pairs.map(|(key, value)| [key.as_bytes(), b"=", value.as_bytes()].concat());
    let pairs: Vec<OsString> = pairs.map(OsString::from_vec).collect();
    join(pairs.iter().map(OsString::as_os_str))
}

fn join<'a>(words: impl Iterator<Item = &'a OsStr>) -> Vec<u8> {
    words
        .flat_map(|word| [word.as_bytes(), b"\0"].concat())
        .collect()
}

/// A pipe whose second end a child process inherits.
fn pipe() -> Result<(File, OwnedFd), String> {
    let (from, to) = io::pipe().map_err(|error| format!("pipe: {error}"))?;
    let to = OwnedFd::from(to);
    fcntl_setfd(&to, FdFlags::empty()).map_err(|error| format!("pipe: {error}"))?;
    Ok((OwnedFd::from(from).into(), to))
}

fn copy(mut from: File, mut to: impl Write) {
    let mut buffer = [0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        // Whoever reads us may have gone; the guest is not to stop for it.
        let _ = to.write_all(&buffer[..count]).and_then(|()| to.flush());
    }
}

/// Prints what the guest's kernel said, while the command ran, that is worse than a notice.
fn complaints(dir: &Dir) {
    let Some(messages) = dir.read("dmesg") else {
        return;
    };
    let began = dir
        .read("boot")
        .and_then(|text| text.split(' ').next()?.parse::<f64>().ok());
    let began = began.unwrap_or_default();
    // "<priority>,<number>,<microseconds>,<flags>;<text>": the lowest three bits are the level.
    for line in messages.lines() {
        let Some((head, text)) = line.split_once(';') else {
            continue;
        };
        let mut fields = head.split(',');
        let level = fields.next().and_then(|field| field.parse::<u32>().ok());
        let at = fields.nth(1).and_then(|field| field.parse::<u64>().ok());
        if let (Some(level), Some(at)) = (level, at) {
            let at = Duration::from_micros(at).as_secs_f64();
            if level & 7 <= 4 && at >= began {
                eprintln!("guest's kernel at {at:.2} s: {text}");
            }
        }
    }
}

/// The last lines of a file.
fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    let last = &all[all.len().saturating_sub(lines)..];
    last.iter().flat_map(|line| [line, "\n"]).collect()
}
