//! Counts a program's system calls with `perf stat`, from outside and without stopping it.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::NamedTempFile;

use crate::process::Process;

const EVENT: &str = "raw_syscalls:sys_enter";

/// True if this machine lets us count.
pub fn can_count() -> bool {
    let mut perf = Command::new("perf");
    perf.args(["stat", "-e", EVENT, "true"]);
    let quiet = perf.stdout(Stdio::null()).stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

/// A count that has begun.
#[derive(Debug)]
pub struct Counting {
    perf: Child,
    control: ChildStdin,
    answers: BufReader<ChildStdout>,
    result: NamedTempFile,
}

impl Counting {
    /// Begins to count what `process`, and all its threads from now on, call.
    ///
    /// # Errors
    /// If perf cannot.
    pub fn start(process: &Process) -> io::Result<Self> {
        let result = NamedTempFile::new()?;
        let ids: Vec<String> = process.tree().iter().map(u32::to_string).collect();
        let mut perf = Command::new("perf")
            .args([
                "stat",
                "-x,",
                "-e",
                EVENT,
                "-D",
                "-1",
                "--control",
                "fd:0,1",
                "-o",
            ])
            .arg(result.path())
            .args(["-p", &ids.join(",")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let missing = || io::Error::other("perf without its pipes");
        let control = perf.stdin.take().ok_or_else(missing)?;
        let answers = BufReader::new(perf.stdout.take().ok_or_else(missing)?);
        let mut counting = Counting {
            perf,
            control,
            answers,
            result,
        };
        counting.tell("enable")?;
        Ok(counting)
    }

    fn tell(&mut self, what: &str) -> io::Result<()> {
        writeln!(self.control, "{what}")?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        match answer.trim_matches(['\0', '\n']) {
            "ack" => Ok(()),
            other => Err(io::Error::other(format!("perf answered {other:?}"))),
        }
    }

    /// How many calls there were.
    ///
    /// # Errors
    /// If perf does not tell.
    pub fn stop(mut self) -> io::Result<u64> {
        self.tell("disable")?;
        // It has no command to end by; so it writes its result when it is interrupted.
        let id = i32::try_from(self.perf.id()).map_err(io::Error::other)?;
        kill(Pid::from_raw(id), Signal::SIGINT)?;
        self.perf.wait()?;
        let text = fs::read_to_string(self.result.path())?;
        let line = text.lines().find(|line| line.contains(EVENT));
        let count = line.and_then(|line| line.split(',').next()?.parse().ok());
        count.ok_or_else(|| io::Error::other(format!("perf told no count: {text:?}")))
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        // Already gone after `stop`.
        let _ = self.perf.kill();
        let _ = self.perf.wait();
    }
}
