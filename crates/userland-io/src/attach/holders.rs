//! Who uses a block device: mounts in every mount namespace, swap, devices on top of it, open files.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crate::transports::node;

/// One who uses a device, or a partition of it.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// A file system on it is mounted.
    Mount {
        /// Where.
        at: PathBuf,
        /// A process in whose mount namespace that is, unless it is that of this process or of process 1.
        pid: Option<u32>,
    },
    /// It is swap space.
    Swap,
    /// A device is made of it: `dm-0`, `md0`.
    Device(String),
    /// A process has it open.
    Process {
        /// Its number.
        pid: u32,
        /// What it is called.
        name: String,
    },
    /// A process waits in the kernel to open or close a disk, which may be this one. Meanwhile nobody is told who else has
    /// that one open.
    Waiting {
        /// Its number.
        pid: u32,
        /// What it is called.
        name: String,
    },
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Holder::Mount { at, pid: None } => write!(f, "mounted on {}", at.display()),
            Holder::Mount { at, pid: Some(pid) } => {
                write!(
                    f,
                    "mounted on {} in the mount namespace of process {pid}",
                    at.display()
                )
            }
            Holder::Swap => f.write_str("used as swap"),
            Holder::Device(name) => write!(f, "part of /dev/{name}"),
            Holder::Process { pid, name } => write!(f, "open in process {pid} ({name})"),
            Holder::Waiting { pid, name } => {
                write!(
                    f,
                    "perhaps, by process {pid} ({name}), which waits to open or close a disk"
                )
            }
        }
    }
}

/// True if somebody has claimed the block device at `path`, or a partition of it: a mount, swap, a device
/// on top, or a program that opened it exclusively; or has a loop device over it. A plain open is no claim. May wait for the device.
///
/// # Errors
/// If it cannot be opened: then nothing is known.
pub fn in_use(path: &Path) -> io::Result<bool> {
    match node::claim(path) {
        Ok(_) => Ok(is_under_a_loop_device(path)),
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(true),
        Err(error) => Err(error),
    }
}

/// Everyone who uses the block device at `path` or a partition of it, as far as this process may see.
///
/// # Errors
/// If there is no such block device.
pub fn holders(path: &Path) -> io::Result<Vec<Holder>> {
    holders_besides(path, None)
}

/// True if a loop device is over the block device at `path`, or over a partition of it. It makes no claim, and no process has
/// that open.
pub(super) fn is_under_a_loop_device(path: &Path) -> bool {
    Family::of(path).is_ok_and(|family| family.loops().next().is_some())
}

/// As [`holders`], not counting what the process `daemon` has open: it serves the device.
pub(super) fn holders_besides(path: &Path, daemon: Option<u32>) -> io::Result<Vec<Holder>> {
    let family = Family::of(path)?;
    let mut found = Vec::new();
    mounts(&family, &mut found);
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    if swaps.lines().skip(1).any(|line| family.is_named(line)) {
        found.push(Holder::Swap);
    }
    for member in &family.directories {
        for above in names(&member.join("holders")) {
            found.push(Holder::Device(above));
        }
    }
    found.extend(family.loops().map(Holder::Device));
    for pid in processes().filter(|pid| Some(*pid) != daemon) {
        let files = names(Path::new(&format!("/proc/{pid}/fd")));
        // By name: to look at the file itself could wait for a dead server.
        let has = files.iter().any(|fd| {
            let to = fs::read_link(format!("/proc/{pid}/fd/{fd}"));
            to.is_ok_and(|to| family.nodes.contains(&to))
        });
        if has {
            let name = name_of(pid);
            found.push(Holder::Process { pid, name });
        }
    }
    Ok(found)
}

fn name_of(pid: u32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    name.trim_end().to_owned()
}

/// How often, and at what distance, those are looked at that wait: who soon goes on waits for another disk.
const LOOKS: u32 = 4;
const STEP: Duration = Duration::from_millis(50);

/// Processes that have waited for a moment to open or close a disk. One that opens it does not have it yet, and one
/// that closes it, which may have a lot to write, has it no longer among its files.
pub(super) fn waiting() -> Vec<Holder> {
    let mut found: Vec<u32> = processes().collect();
    for look in 0..LOOKS {
        found.retain(|pid| waits(*pid));
        if found.is_empty() {
            return Vec::new();
        }
        if look + 1 < LOOKS {
            thread::sleep(STEP);
        }
    }
    let waiting = found.into_iter().map(|pid| Holder::Waiting {
        pid,
        name: name_of(pid),
    });
    waiting.collect()
}

/// The kernel's functions that open and close block devices, of which a stack has one: of 5.x, and of 6.8 and later.
const OPEN_OR_CLOSE: [&str; 7] = [
    " blkdev_get",
    " blkdev_put",
    " blkdev_open",
    " blkdev_close",
    " blkdev_release",
    " bdev_open",
    " bdev_release",
];
/// A thread of the kernel's own (`PF_KTHREAD` of proc_pid_stat(5)'s flags).
const KERNEL_THREAD: u64 = 0x20_0000;

/// True if a thread of the process waits, where no signal gets it out, in the opening or closing of a block device. Where the
/// kernel does not show stacks: if it waits so for anything.
fn waits(pid: u32) -> bool {
    let tasks = format!("/proc/{pid}/task");
    names(Path::new(&tasks)).iter().any(|task| {
        let read = |name| fs::read_to_string(format!("{tasks}/{task}/{name}"));
        let stat = read("stat").unwrap_or_default();
        // The state follows the name, which may have anything in it; the flags are the seventh from there.
        let mut fields = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_ascii_whitespace();
        let waits = fields.next() == Some("D");
        let flags: u64 = fields
            .nth(5)
            .and_then(|flags| flags.parse().ok())
            .unwrap_or(0);
        waits && flags & KERNEL_THREAD == 0 && {
            let stack = read("stack").unwrap_or_default();
            stack.is_empty() || OPEN_OR_CLOSE.iter().any(|name| stack.contains(name))
        }
    })
}

/// A device and its partitions.
struct Family {
    /// As `major:minor`.
    numbers: Vec<String>,
    nodes: Vec<PathBuf>,
    /// In sysfs.
    directories: Vec<PathBuf>,
}

impl Family {
    fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        if !metadata.file_type().is_block_device() {
            let error = format!("{} is no block device", path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
        }
        let of = metadata.rdev();
        let number = format!("{}:{}", rustix::fs::major(of), rustix::fs::minor(of));
        let directory = fs::canonicalize(format!("/sys/dev/block/{number}"))?;
        let mut family = Family {
            numbers: vec![number],
            nodes: vec![fs::canonicalize(path)?],
            directories: vec![directory.clone()],
        };
        for name in names(&directory) {
            let part = directory.join(&name);
            if part.join("partition").exists()
                && let Ok(number) = fs::read_to_string(part.join("dev"))
            {
                family.numbers.push(number.trim_end().to_owned());
                family.nodes.push(Path::new("/dev").join(&name));
                family.directories.push(part);
            }
        }
        Ok(family)
    }

    /// The loop devices over it, which are not among its holders in sysfs.
    fn loops(&self) -> impl Iterator<Item = String> {
        let all = names(Path::new("/sys/block")).into_iter();
        all.filter(move |name| {
            let over = fs::read_to_string(format!("/sys/block/{name}/loop/backing_file"));
            over.is_ok_and(|over| self.nodes.contains(&over.trim_end().into()))
        })
    }

    /// True if the line's first word is one of the nodes.
    fn is_named(&self, line: &str) -> bool {
        let first = line.split_ascii_whitespace().next().map(unescaped);
        first.is_some_and(|first| self.nodes.contains(&first))
    }
}

/// Where the device or a partition of it is mounted in this process's own mount namespace.
pub(super) fn mounted_here(path: &Path) -> Vec<PathBuf> {
    match Family::of(path) {
        Ok(family) => mounts_of("self", &family),
        Err(_) => Vec::new(),
    }
}

fn mounts_of(process: &str, family: &Family) -> Vec<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap_or_default();
    text.lines()
        .filter_map(|line| mount(line, family))
        .collect()
}

/// Mounts in all namespaces, each namespace looked at once: those that need no name first, of the first process and of
/// this one. What is there at the same place in several is named once.
fn mounts(family: &Family, found: &mut Vec<Holder>) {
    let mut seen = BTreeSet::new();
    let mut look = |process: &str, pid: Option<u32>| {
        let namespace = fs::read_link(format!("/proc/{process}/ns/mnt"));
        if !namespace.is_ok_and(|namespace| seen.insert(namespace)) {
            return;
        }
        for at in mounts_of(process, family) {
            let is_it =
                |holder: &Holder| matches!(holder, Holder::Mount { at: known, .. } if *known == at);
            if !found.iter().any(is_it) {
                found.push(Holder::Mount { at, pid });
            }
        }
    };
    look("1", None);
    look("self", None);
    for pid in processes() {
        look(&pid.to_string(), Some(pid));
    }
}

/// Where the mount of this line of mountinfo is, if it is of the family (proc_pid_mountinfo(5)).
fn mount(line: &str, family: &Family) -> Option<PathBuf> {
    let mut fields = line.split(' ');
    let number = fields.nth(2)?;
    let at = fields.nth(1)?;
    // btrfs has numbers of its own, and names the device behind the lone dash.
    let source = fields.skip_while(|field| *field != "-").nth(2)?;
    let known = |known: &String| known == number;
    let is_of = family.numbers.iter().any(known) || family.nodes.contains(&unescaped(source));
    is_of.then(|| unescaped(at))
}

/// Undoes the kernel's escapes: a backslash and three octal digits.
fn unescaped(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let octal = |digit: &u8| {
            (b'0'..=b'7')
                .contains(digit)
                .then(|| u32::from(digit - b'0'))
        };
        let escaped = match tail {
            [a, b, c, ..] if *first == b'\\' => match (octal(a), octal(b), octal(c)) {
                (Some(a), Some(b), Some(c)) => u8::try_from(a * 64 + b * 8 + c).ok(),
                _ => None,
            },
            _ => None,
        };
        bytes.push(escaped.unwrap_or(*first));
        rest = match escaped {
            Some(_) => &tail[3..],
            None => tail,
        };
    }
    std::ffi::OsString::from_vec(bytes).into()
}

fn processes() -> impl Iterator<Item = u32> {
    let all = names(Path::new("/proc")).into_iter();
    all.filter_map(|name| name.parse().ok())
}

/// The names in a directory; none if it cannot be read.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn family() -> Family {
        Family {
            numbers: vec!["7:3".to_owned(), "259:1".to_owned()],
            nodes: vec!["/dev/loop3".into(), "/dev/loop3p1".into()],
            directories: Vec::new(),
        }
    }

    #[test]
    fn a_mount_is_known_by_its_number_or_its_source() {
        let at = |line| mount(line, &family());
        assert_eq!(
            at("40 29 7:3 / /mnt/a\\040b rw,relatime shared:1 - ext4 /dev/x rw"),
            Some("/mnt/a b".into())
        );
        assert_eq!(
            at("40 29 259:1 / /mnt rw - ext4 /dev/x rw"),
            Some("/mnt".into())
        );
        assert_eq!(
            at("40 29 0:51 / /b rw shared:1 master:2 - btrfs /dev/loop3p1 rw"),
            Some("/b".into())
        );
        assert_eq!(at("40 29 7:33 / /mnt rw - ext4 /dev/loop33 rw"), None);
        assert_eq!(at("40 29"), None);
    }

    #[test]
    fn swap_is_known_by_its_node() {
        assert!(family().is_named("/dev/loop3   partition 1024 0 -2"));
        assert!(!family().is_named("/dev/loop33 partition 1024 0 -2"));
    }

    #[test]
    fn what_is_no_block_device_is_refused() {
        let error = holders(Path::new("/dev/null")).unwrap_err();
        assert_eq!(error.to_string(), "/dev/null is no block device");
    }
}
