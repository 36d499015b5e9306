//! Running the real binary, and looking at what it leaves.
#![allow(dead_code)] // each test file uses a part of it

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

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
