//! Telling processes apart, and keeping this one out of trouble with its own devices.

use std::fs;
use std::io;

/// linux/prctl.h; Linux 5.6.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Protects this process from waiting for its own devices when memory is short; to be called by a program that
/// attaches disks, on its main thread before others are started.
///
/// Marks the thread, and those it starts later, as ones that write back for others (`PR_SET_IO_FLUSHER`), and
/// locks memory once it is touched (`mlockall` with `MCL_ONFAULT`), so that no request waits for a page
/// that is to be read back. Memory that an engine keeps data in is locked with it.
///
/// The threads of attach mark themselves; the locking is left to the program because it is for the whole process.
///
/// # Errors
/// If the kernel refuses either: then memory may be short for longer, and nothing else is wrong.
pub fn protect() -> io::Result<()> {
    mark_thread()?;
    let flags = libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT;
    // SAFETY: a system call that changes no memory's content and takes no pointer.
    match unsafe { libc::mlockall(flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
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
