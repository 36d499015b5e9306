//! Telling processes apart, and keeping this one out of trouble with its own devices.

use std::fs;
use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::CapabilitySet;

use super::namespace;

/// linux/prctl.h; Linux 5.6.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Nothing but what holds nine tenths of the memory is killed before others when memory is out.
const OOM_SCORE: i32 = -900;

/// Protects this process from waiting for its own devices; to be called by a program that attaches disks, on its main
/// thread, before others are started and before anything is opened.
///
/// * Marks the thread, and those it starts later, as ones that write back for others (`PR_SET_IO_FLUSHER`), so that
///   they get memory when there is none but what their own device could free.
/// * Locks memory once it is touched (`mlockall` with `MCL_ONFAULT`), so that no request waits for a page that is to be
///   read back. Memory that an engine keeps data in is locked with it: a disk in memory is never swapped out. What is freed goes
///   back to the system all the same.
/// * Asks the kernel to kill others first when memory is out.
/// * Leaves a mount namespace whose last process this may be: the kernel would unmount what is mounted there, this
///   process's own devices too, before it lets go of them, and wait for ever. The new namespace follows the old one.
///
/// The threads of attach mark themselves; the rest is left to the program because it is for the whole process.
///
/// # Errors
/// What the kernel refuses, all in one; the rest is done all the same.
pub fn protect() -> io::Result<()> {
    keep_heaps_small();
    let tried = [
        ("PR_SET_IO_FLUSHER", mark_thread()),
        ("locking memory", lock_memory()),
        ("oom_score_adj", stay_alive()),
        ("a mount namespace", namespace::leave()),
    ];
    let failed = tried.into_iter().filter_map(|(what, done)| {
        let error = done.err()?;
        Some((error.kind(), format!("{what}: {error}")))
    });
    let (kinds, texts): (Vec<_>, Vec<_>) = failed.unzip();
    match kinds.first() {
        None => Ok(()),
        Some(kind) => Err(io::Error::new(*kind, texts.join(", "))),
    }
}

/// Locks what is touched from now on.
fn lock_memory() -> io::Result<()> {
    // With a limit, later allocations would fail.
    let unlimited = Rlimit {
        current: None,
        maximum: None,
    };
    let may_lock = setrlimit(Resource::Memlock, unlimited).is_ok()
        || getrlimit(Resource::Memlock).current.is_none()
        || rustix::thread::capabilities(None)
            .is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
    if !may_lock {
        let why = "it is limited, and this process has not the capability IPC_LOCK";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    }
    let flags = libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT;
    // SAFETY: a system call that changes no memory's content and takes no pointer.
    match unsafe { libc::mlockall(flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The C library's allocator gives back no part of a locked heap. So what is long, such as a part of a disk in memory, has a
/// mapping of its own, now and after others like it were freed, and that goes when it does. So do the buffers of a FUSE file system's
/// threads, 16 MiB each, which would else be resident to the last byte from the second time on.
#[cfg(target_env = "gnu")]
fn keep_heaps_small() {
    const LONG: libc::c_int = 128 << 10;
    // SAFETY: it sets a number of the allocator's, under the allocator's lock.
    if unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LONG) } == 0 {
        tracing::debug!("mallopt: memory that is freed may stay with this process");
    }
}

#[cfg(not(target_env = "gnu"))]
fn keep_heaps_small() {}

/// Asks to be among the last that are killed for want of memory, unless somebody has asked for more.
fn stay_alive() -> io::Result<()> {
    const FILE: &str = "/proc/self/oom_score_adj";
    let score = fs::read_to_string(FILE)?;
    match score.trim_end().parse::<i32>() {
        Ok(score) if score <= OOM_SCORE => Ok(()),
        _ => fs::write(FILE, OOM_SCORE.to_string()),
    }
}

/// Marks this thread, and those it starts, as ones that write back for others.
pub(super) fn mark_thread() -> io::Result<()> {
    // SAFETY: this option takes a number and no pointer.
    match unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// When `pid` was started, in the kernel's own unit: with it a pid names one process for ever. `None` if
/// there is none.
pub(super) fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may have any character in it (proc_pid_stat(5)); the rest are fields 3 on.
    let (_, fields) = stat.rsplit_once(')')?;
    // A zombie holds nothing any more.
    let mut fields = fields.split_ascii_whitespace();
    match fields.next()? {
        "Z" | "X" => None,
        _ => fields.nth(18)?.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_start_time_names_one_process() {
        let own = started(std::process::id()).unwrap();
        assert_eq!(started(std::process::id()), Some(own));
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let its = started(child.id()).unwrap();
        assert!(its >= own);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(started(child.id()), None);
    }
}
