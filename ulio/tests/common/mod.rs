//! Running the real binary, and looking at what it leaves.
#![allow(dead_code)] // each test file uses a part of it

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tempfile::TempDir;

#[path = "../../../crates/userland-io/tests/common/need.rs"]
pub(crate) mod need;

/// A directory of its own for each test, where the binary runs.
pub(crate) struct Ulio {
    dir: TempDir,
}

impl Ulio {
    pub(crate) fn new() -> Self {
        // Short, for the sake of Unix sockets' paths.
        let dir = tempfile::Builder::new().prefix("ulio").tempdir();
        Ulio {
            dir: dir.expect("a temporary directory"),
        }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// The binary, in that directory, whatever the caller's environment says about logs.
    pub(crate) fn command<S: AsRef<str>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ulio"));
        for argument in arguments {
            command.arg(argument.as_ref());
        }
        command
            .current_dir(self.dir())
            .stdin(Stdio::null())
            .env_remove("ULIO_LOG")
            .env_remove("RUST_BACKTRACE")
            .env("COLUMNS", "200");
        command
    }

    /// Runs `line`, its arguments separated by spaces.
    pub(crate) fn run(&self, line: &str) -> Ran {
        self.run_all(line.split_whitespace())
    }

    pub(crate) fn run_all<S: AsRef<str>>(&self, arguments: impl IntoIterator<Item = S>) -> Ran {
        let output = self.command(arguments).output().expect("the binary runs");
        Ran::from(output)
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }
}

/// How a run ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Ran {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).expect("stdout is text"),
            err: String::from_utf8(output.stderr).expect("stderr is text"),
        }
    }
}

impl Ran {
    /// It went well. Gives stdout.
    #[track_caller]
    pub(crate) fn ok(&self) -> &str {
        assert_eq!(self.code, Some(0), "{self:#?}");
        &self.out
    }

    /// It failed with `code` and one line that holds each of `parts`.
    #[track_caller]
    pub(crate) fn fails(&self, code: i32, parts: &[&str]) {
        self.fails_at_length(code, parts);
        assert_eq!(self.err.lines().count(), 1, "{self:#?}");
    }

    /// Likewise, with more than one line.
    #[track_caller]
    pub(crate) fn fails_at_length(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:#?}");
        assert!(self.err.starts_with("error: "), "{self:#?}");
        for part in parts {
            assert!(self.err.contains(part), "`{part}` is missing: {self:#?}");
        }
        // How Debug looks, and panics.
        for slip in ["Error {", "Error(", "Os {", "panicked", "Some(", "kind:"] {
            assert!(!self.err.contains(slip), "`{slip}`: {self:#?}");
        }
        assert_eq!(self.out, "", "{self:#?}");
    }
}

/// How long anything may take on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(120);

/// A server that runs, and is killed if a test ends without [`stop`](Self::stop).
pub(crate) struct Server {
    child: Child,
    out: BufReader<ChildStdout>,
    err: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
    /// What it told on stdout when it was ready.
    pub(crate) uris: Vec<String>,
}

impl Server {
    /// Starts `line`, and waits for `lines` of stdout.
    #[track_caller]
    pub(crate) fn start(ulio: &Ulio, line: &str, lines: usize) -> Self {
        Self::start_all(ulio, line.split(' '), lines)
    }

    /// Likewise; with `usize::MAX`, to the end of a JSON object.
    #[track_caller]
    pub(crate) fn start_all<S: AsRef<str>>(
        ulio: &Ulio,
        arguments: impl IntoIterator<Item = S>,
        lines: usize,
    ) -> Self {
        Self::spawn(ulio.command(arguments), lines)
    }

    #[track_caller]
    pub(crate) fn spawn(mut command: Command, lines: usize) -> Self {
        command
            .env_remove("ULIO_LOG")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().expect("the binary runs");
        let out = BufReader::new(child.stdout.take().unwrap());
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let err = Arc::new(Mutex::new(String::new()));
        let told = err.clone();
        let reader = std::thread::spawn(move || {
            let mut line = String::new();
            while stderr.read_line(&mut line).is_ok_and(|n| n > 0) {
                told.lock().unwrap().push_str(&line);
                line.clear();
            }
        });
        let mut server = Server {
            child,
            out,
            err,
            reader: Some(reader),
            uris: Vec::new(),
        };
        while server.uris.len() < lines && server.uris.last().is_none_or(|line| line != "}") {
            let mut line = String::new();
            if server.out.read_line(&mut line).unwrap() == 0 {
                panic!("it ended: {:#?}", server.wait());
            }
            server.uris.push(line.trim_end().to_owned());
        }
        server
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The TCP port of its first address.
    pub(crate) fn port(&self) -> u16 {
        let rest = self.uris[0].strip_prefix("nbd://127.0.0.1:").unwrap();
        rest.trim_end_matches('/').parse().unwrap()
    }

    /// Sends it `INT`, `TERM` or `KILL`.
    #[cfg(unix)]
    pub(crate) fn signal(&self, name: &str) {
        send(&self.child, name);
    }

    /// Waits until stderr has `part`.
    #[track_caller]
    pub(crate) fn wait_for(&self, part: &str) {
        let began = Instant::now();
        while !self.err.lock().unwrap().contains(part) {
            assert!(began.elapsed() < PATIENCE, "no `{part}`: {:?}", self.err);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends it in order.
    #[cfg(unix)]
    pub(crate) fn stop(self) -> Ran {
        self.signal("TERM");
        self.wait()
    }

    /// Waits for its end.
    #[track_caller]
    pub(crate) fn wait(mut self) -> Ran {
        let mut out = String::new();
        self.out.read_to_string(&mut out).unwrap();
        let status = self.child.wait().unwrap();
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        let err = self.err.lock().unwrap().clone();
        Ran {
            code: status.code(),
            out,
            err,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Only if it still runs: else its number is no longer ours.
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

#[cfg(unix)]
pub(crate) fn send(child: &Child, name: &str) {
    use rustix::process::{Pid, Signal, kill_process};
    let signal = match name {
        "INT" => Signal::INT,
        "TERM" => Signal::TERM,
        "KILL" => Signal::KILL,
        other => panic!("{other}"),
    };
    let pid = Pid::from_raw(child.id() as i32).unwrap();
    kill_process(pid, signal).unwrap();
}

/// Bytes that differ from place to place.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
