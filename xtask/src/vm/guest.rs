//! The first process of a guest: makes its file system, runs the command, tells its status, and
//! switches the guest off.
//!
//! It starts on a read-only view of this machine's `/`. The directory that it is told of holds what to do
//! (`argv`, `env`, `cwd`, `writable`), and takes what came of it (`status`, `boot`, `dmesg`).

use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::{Resource, Rlimit, WaitOptions, setrlimit, wait};
use rustix::system::{RebootCommand, reboot, sethostname};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

/// The argument by which the first process knows what it is.
pub(super) const WORD: &str = "vm-guest";
/// What a guest has of its own.
pub(super) const OWN: &[&str] = &["/dev", "/proc", "/run", "/sys"];
/// What the command's children may still say after its end.
const AFTERWARDS: Duration = Duration::from_secs(2);

/// Does everything, and does not return.
pub(super) fn main(kind: &OsStr, dir: &Path) -> ! {
    match Kind::named(kind) {
        Some(kind) => {
            if let Err(error) = run(kind, dir) {
                eprintln!("xtask's guest: {error}");
            }
        }
        None => eprintln!("xtask's guest: there is no kind {}", kind.display()),
    }
    rustix::fs::sync();
    // If that fails, the end of the first process ends the kernel.
    let _ = reboot(RebootCommand::PowerOff);
    std::process::exit(1);
}

fn run(kind: Kind, dir: &Path) -> Result<(), String> {
    let read = |name: &str| at(name, fs::read(dir.join(name)));
    let argv = split(&read("argv")?);
    let env = split(&read("env")?);
    let cwd = PathBuf::from(OsStr::from_bytes(&read("cwd")?));
    let writable = split(&read("writable")?);
    let share = root(dir, kind, &writable)?;
    machine();
    let outputs = at("outputs", kind.outputs())?;
    let status = command(&argv, &env, &cwd, outputs, &share)?;
    at(
        "status",
        tell(&share.join("status"), status.to_string().as_bytes()),
    )?;
    at(
        "dmesg",
        messages().and_then(|text| tell(&share.join("dmesg"), &text)),
    )
}

/// Which kind of guest this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Uml,
    Emulated,
}

impl Kind {
    fn named(word: &OsStr) -> Option<Self> {
        match word.to_str()? {
            "uml" => Some(Kind::Uml),
            "tcg" => Some(Kind::Emulated),
            _ => None,
        }
    }

    /// Mounts a directory of the machine outside, the `index`th that it shares.
    fn share(self, dir: &Path, index: usize, to: &Path) -> Result<(), String> {
        at(to.display(), fs::create_dir_all(to))?;
        let (kind, source, options) = match self {
            Kind::Uml => (
                "hostfs",
                OsString::from("hostfs"),
                dir.as_os_str().to_owned(),
            ),
            Kind::Emulated => {
                let options = "trans=virtio,version=9p2000.L,msize=512000,cache=none";
                ("9p", format!("share{index}").into(), options.into())
            }
        };
        file_system(kind, &source, to, &options)
    }

    /// Where the command's two outputs go.
    fn outputs(self) -> io::Result<[File; 2]> {
        let open = |path: &Path| {
            let mut options = OpenOptions::new();
            options
                .write(true)
                .custom_flags(OFlags::NOCTTY.bits() as i32);
            options.open(path)
        };
        if self == Kind::Uml {
            // The consoles 1 and 2, given to us as bare bytes.
            let raw = |path: &str| {
                let file = open(Path::new(path))?;
                let mut settings = tcgetattr(&file)?;
                settings.make_raw();
                tcsetattr(&file, OptionalActions::Now, &settings)?;
                Ok::<_, io::Error>(file)
            };
            return Ok([raw("/dev/tty1")?, raw("/dev/tty2")?]);
        }
        let named = |name: &str| {
            for port in fs::read_dir("/sys/class/virtio-ports")?.flatten() {
                let found = fs::read_to_string(port.path().join("name"))?;
                if found.trim() == name {
                    return open(&Path::new("/dev").join(port.file_name()));
                }
            }
            Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("no port {name}"),
            ))
        };
        Ok([named("out")?, named("err")?])
    }
}

/// Makes the guest's `/`, and gives the shared directory in it.
fn root(dir: &Path, kind: Kind, writable: &[OsString]) -> Result<PathBuf, String> {
    let base = dir.join("root");
    memory(&base, "mode=755")?;
    let [upper, work, new] = ["upper", "work", "new"].map(|name| base.join(name));
    for each in [&upper, &work, &new] {
        at(each.display(), fs::create_dir(each))?;
    }
    let mut options = OsString::from("lowerdir=/,upperdir=");
    options.push(&upper);
    options.push(",workdir=");
    options.push(&work);
    file_system("overlay", "overlay", &new, &options)?;
    memory(&new.join("run"), "mode=755")?;
    let share = Path::new("/run/ulio-guest");
    kind.share(dir, 0, &inside(&new, share))?;
    for (index, writable) in writable.iter().enumerate() {
        let writable = Path::new(writable);
        kind.share(writable, index + 1, &inside(&new, writable))?;
    }
    file_system("devtmpfs", "dev", &new.join("dev"), "")?;
    at("/", std::env::set_current_dir(&new))?;
    at("/", mount_move(".", "/").map_err(io::Error::from))?;
    at("/", rustix::process::chroot(".").map_err(io::Error::from))?;
    at("/", std::env::set_current_dir("/"))?;
    Ok(share.to_owned())
}

fn inside(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// What a system's start would do. What fails here fails the command that needs it.
fn machine() {
    for (kind, to) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("debugfs", "/sys/kernel/debug"),
        ("configfs", "/sys/kernel/config"),
        ("cgroup2", "/sys/fs/cgroup"),
        ("devpts", "/dev/pts"),
        ("tmpfs", "/dev/shm"),
    ] {
        if !Path::new(to).is_dir() {
            let _ = fs::create_dir(to);
        }
        let _ = file_system(kind, kind, Path::new(to), "");
    }
    for (name, to) in [
        ("fd", ""),
        ("stdin", "/0"),
        ("stdout", "/1"),
        ("stderr", "/2"),
    ] {
        let _ = symlink(format!("/proc/self/fd{to}"), format!("/dev/{name}"));
    }
    let _ = sethostname(b"guest");
    let _ = Command::new("busybox")
        .args(["ip", "link", "set", "lo", "up"])
        .status();
    let limit = |to| Rlimit {
        current: to,
        maximum: to,
    };
    let _ = setrlimit(Resource::Memlock, limit(None));
    let _ = setrlimit(Resource::Nofile, limit(Some(65536)));
}

/// Runs the command, and gives its exit status as a shell would.
fn command(
    argv: &[OsString],
    env: &[OsString],
    cwd: &Path,
    outputs: [File; 2],
    share: &Path,
) -> Result<i32, String> {
    let Some((program, args)) = argv.split_first() else {
        return Err("there is no command".into());
    };
    if let Ok(uptime) = fs::read("/proc/uptime") {
        at("boot", tell(&share.join("boot"), &uptime))?;
    }
    let [mut out, mut err] = outputs;
    let (from_out, to_out) = at("pipe", io::pipe())?;
    let (from_err, to_err) = at("pipe", io::pipe())?;
    let mut complain = at("pipe", to_err.try_clone())?;
    let mut command = Command::new(program);
    command.args(args).env_clear().current_dir(cwd);
    command.env(
        "PATH",
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    );
    for pair in env {
        let bytes = pair.as_bytes();
        if let Some(equals) = bytes.iter().position(|byte| *byte == b'=') {
            let (key, value) = (&bytes[..equals], &bytes[equals + 1..]);
            command.env(OsStr::from_bytes(key), OsStr::from_bytes(value));
        }
    }
    command.stdin(Stdio::null()).stdout(to_out).stderr(to_err);
    let spawned = command.spawn();
    // Its ends of the pipes are to be the command's alone.
    drop(command);
    let (done, copied) = mpsc::channel();
    let other = done.clone();
    thread::spawn(move || {
        copy(from_out, &mut out);
        other.send(()).ok();
    });
    thread::spawn(move || {
        copy(from_err, &mut err);
        done.send(()).ok();
    });
    let status = match spawned {
        Ok(child) => {
            drop(complain);
            reap(child.id())?
        }
        Err(error) => {
            let _ = writeln!(complain, "cannot run {}: {error}", program.display());
            drop(complain);
            match error.kind() {
                io::ErrorKind::NotFound => 127,
                _ => 126,
            }
        }
    };
    // Who still holds the pipes is of no interest after a while.
    for _ in 0..2 {
        if copied.recv_timeout(AFTERWARDS).is_err() {
            break;
        }
    }
    Ok(status)
}

/// Waits for the process `pid`, and on the way for all that lost their parents.
fn reap(pid: u32) -> Result<i32, String> {
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((ended, status))) if ended.as_raw_nonzero().get() as u32 == pid => {
                let signal = status.terminating_signal().unwrap_or_default();
                return Ok(status.exit_status().unwrap_or(128 + signal));
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(format!("wait: {error}")),
        }
    }
}

fn copy(mut from: impl Read, to: &mut File) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
}

/// Everything that the kernel has said.
fn messages() -> io::Result<Vec<u8>> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits() as i32);
    let mut log = options.open("/dev/kmsg")?;
    let (mut text, mut record) = (Vec::new(), [0; 8 << 10]);
    // One record a read; an error is the end, or a record that was overwritten.
    while let Ok(count @ 1..) = log.read(&mut record) {
        text.extend_from_slice(&record[..count]);
    }
    Ok(text)
}

/// Writes a file whole, so that whoever sees it outside sees all of it.
fn tell(path: &Path, data: &[u8]) -> io::Result<()> {
    let half = path.with_extension("half");
    let mut file = File::create(&half)?;
    file.write_all(data)?;
    file.sync_all()?;
    drop(file);
    fs::rename(half, path)
}

fn memory(to: &Path, options: &str) -> Result<(), String> {
    file_system("tmpfs", "tmpfs", to, options)
}

fn file_system(
    kind: &str,
    source: impl AsRef<OsStr>,
    to: &Path,
    options: impl AsRef<OsStr>,
) -> Result<(), String> {
    let options = options.as_ref();
    let data = match options.is_empty() {
        true => None,
        false => Some(CString::new(options.as_bytes()).map_err(|error| error.to_string())?),
    };
    let mounted = mount(
        source.as_ref(),
        to,
        kind,
        MountFlags::empty(),
        data.as_deref(),
    );
    at(to.display(), mounted.map_err(io::Error::from))
}

fn split(words: &[u8]) -> Vec<OsString> {
    let words = words.split_inclusive(|byte| *byte == 0);
    words
        .map(|word| OsStr::from_bytes(&word[..word.len() - 1]).to_owned())
        .collect()
}

fn at<T>(place: impl std::fmt::Display, result: io::Result<T>) -> Result<T, String> {
    result.map_err(|error| format!("{place}: {error}"))
}
