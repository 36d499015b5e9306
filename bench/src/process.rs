//! A server under test as the system sees it: its processor time and its memory.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

/// A running program, ended when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    /// The process that serves, where the program has left the one that was started.
    daemon: Option<u32>,
}

impl Process {
    /// Starts `command`, without a terminal. `name` is for messages.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(name: &str, command: &mut Command) -> io::Result<Self> {
        let quiet = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = quiet.spawn().map_err(|error| {
            io::Error::new(error.kind(), format!("cannot start {name}: {error}"))
        })?;
        Ok(Process {
            name: name.to_owned(),
            child,
            daemon: None,
        })
    }

    /// As [`start`](Self::start), for a program that goes into the background and leaves its process's number in
    /// `file`.
    ///
    /// # Errors
    /// If it cannot be started, or leaves no number.
    pub fn start_daemon(name: &str, command: &mut Command, file: &Path) -> io::Result<Self> {
        let mut process = Process::start(name, command)?;
        process.child.wait()?;
        let start = Instant::now();
        while process.daemon.is_none() {
            let text = fs::read_to_string(file).unwrap_or_default();
            process.daemon = text.trim().parse().ok();
            if start.elapsed() > Duration::from_secs(5) {
                return Err(io::Error::other(format!(
                    "{name}: no process in {}",
                    file.display()
                )));
            }
        }
        Ok(process)
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.daemon.unwrap_or(self.child.id())
    }

    /// An error if it has ended, which no server does by itself.
    ///
    /// # Errors
    /// If it has ended.
    pub fn check(&mut self) -> io::Result<()> {
        match self.child.try_wait()? {
            _ if self.daemon.is_some() => Ok(()),
            None => Ok(()),
            Some(status) => Err(io::Error::other(format!("{} ended: {status}", self.name))),
        }
    }

    /// It, and the processes that it has started (one server makes one for each connection).
    pub fn tree(&self) -> Vec<u32> {
        tree(self.id())
    }

    /// The processor time used so far, threads and children that have ended included (of the latter, in steps of 10 ms).
    ///
    /// # Errors
    /// If it has ended.
    pub fn cpu(&self) -> io::Result<Duration> {
        cpu(self.id())
    }

    /// The most memory it has had resident, in bytes.
    pub fn peak_memory(&self) -> u64 {
        self.memory("VmHWM:")
    }

    /// The memory that is resident now, in bytes.
    pub fn resident_memory(&self) -> u64 {
        self.memory("VmRSS:")
    }

    fn memory(&self, field: &str) -> u64 {
        let of = |id: u32| -> Option<u64> {
            let status = fs::read_to_string(format!("/proc/{id}/status")).ok()?;
            let line = status.lines().find_map(|line| line.strip_prefix(field))?;
            let kib: u64 = line.trim().trim_end_matches(" kB").parse().ok()?;
            Some(kib << 10)
        };
        self.tree().into_iter().filter_map(of).sum()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Its answer does not matter: it is gone, or going.
        match self.daemon.and_then(|id| i32::try_from(id).ok()) {
            Some(id) => {
                let _ = kill(Pid::from_raw(id), Signal::SIGTERM);
            }
            None => {
                let _ = self.child.kill();
            }
        }
        let _ = self.child.wait();
    }
}

/// A process, and those that it has started.
fn tree(id: u32) -> Vec<u32> {
    let mut all = vec![id];
    let mut at = 0;
    while at < all.len() {
        let path = format!("/proc/{0}/task/{0}/children", all[at]);
        let children = fs::read_to_string(path).unwrap_or_default();
        let children = children.split_whitespace();
        all.extend(children.filter_map(|id| id.parse::<u32>().ok()));
        at += 1;
    }
    all
}

/// As [`Process::cpu`], of any process.
///
/// # Errors
/// If it has ended.
pub fn cpu(process: u32) -> io::Result<Duration> {
    let mut sum = Duration::ZERO;
    for id in tree(process) {
        let pid = i32::try_from(id).map_err(io::Error::other)?;
        let clock = clock_getcpuclockid(Pid::from_raw(pid));
        match clock.and_then(clock_gettime) {
            Ok(time) => sum += Duration::from(time),
            // A child may have ended meanwhile.
            Err(error) if id == process => return Err(error.into()),
            Err(_) => {}
        }
    }
    Ok(sum + ended_children(process))
}

fn ended_children(process: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // Behind the name, which may hold anything: the 16th and 17th field, in ticks (proc(5): cutime, cstime).
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let ticks = fields.split_whitespace().skip(13).take(2);
    let ticks = ticks.map_while(|field| field.parse::<u64>().ok());
    Duration::from_millis(ticks.sum::<u64>() * 10)
}
