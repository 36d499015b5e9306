//! A test's child process: a test of the same program that is ignored, whose name begins with `child_`.
#![allow(dead_code)]

use std::fmt::Display;
use std::io::{BufRead, BufReader, Read};
use std::process::{ChildStdout, Command, Stdio};

/// Begins a line that a child says to its parent.
const MARK: &str = "<child>";

/// A child process, killed when this is dropped.
pub(crate) struct Child {
    process: std::process::Child,
    output: BufReader<ChildStdout>,
    /// What it said that nobody asked for yet.
    first: Option<(String, String)>,
}

impl Child {
    /// Starts the test `name`; `None` if it says that it is `skipped`, after it has said why.
    pub(crate) fn start(name: &str) -> Option<Self> {
        Self::with(name, |command| command)
    }

    /// As [`start`](Self::start), with more of its environment set.
    pub(crate) fn with(name: &str, set: impl FnOnce(&mut Command) -> &mut Command) -> Option<Self> {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", name, "--ignored", "--nocapture"]);
        set(&mut command)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let mut child = Child {
            process,
            output,
            first: None,
        };
        let first = child.line();
        let is_there = first.0 != "skipped";
        child.first = Some(first);
        is_there.then_some(child)
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// Waits until it says `what`, and gives the rest of that line.
    pub(crate) fn said(&mut self, what: &str) -> String {
        let (found, rest) = match self.first.take() {
            Some(first) => first,
            None => self.line(),
        };
        assert_eq!(found, what, "{rest}");
        rest
    }

    fn line(&mut self) -> (String, String) {
        let mut lines = self.output.by_ref().lines().map(|line| line.unwrap());
        let line = lines.find_map(|line| Some(line.split_once(MARK)?.1.to_owned()));
        let line = line.expect("the child has ended");
        let (what, rest) = line.split_once(' ').unwrap();
        (what.to_owned(), rest.to_owned())
    }

    /// Ends it as nothing else does.
    pub(crate) fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Says something to the parent.
pub(crate) fn say(what: &str, rest: impl Display) {
    println!("{MARK}{what} {rest}");
}
