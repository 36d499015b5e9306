//! The servers that are compared: ours, those of others that are installed, and the limit.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A server under test. Each gets a socket, and a file image of the size if it wants one.
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    program: Program,
    arguments: fn(&Place) -> Vec<String>,
}

enum Program {
    /// This program itself.
    Own,
    /// Built from this workspace, beside this program.
    Ulio,
    Installed(&'static str),
}

/// Where a server puts things.
pub(crate) struct Place {
    pub(crate) socket: PathBuf,
    pub(crate) image: PathBuf,
    pub(crate) size: u64,
}

impl Place {
    fn socket(&self) -> String {
        self.socket.display().to_string()
    }
    fn image(&self) -> String {
        self.image.display().to_string()
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| word.to_string()).collect()
}

/// All servers, the limit first.
pub(crate) const KINDS: &[Kind] = &[
    Kind {
        name: "limit",
        program: Program::Own,
        arguments: |at| words(&["--limit", &at.socket(), &at.size.to_string()]),
    },
    Kind {
        name: "ulio memory",
        program: Program::Ulio,
        arguments: |at| {
            let stack = format!("memory:{}", at.size);
            words(&[
                "serve",
                &stack,
                "--listen",
                &format!("unix:{}", at.socket()),
            ])
        },
    },
    Kind {
        name: "nbdkit memory",
        program: Program::Installed("nbdkit"),
        arguments: |at| words(&["-f", "-U", &at.socket(), "memory", &at.size.to_string()]),
    },
    Kind {
        name: "ulio file",
        program: Program::Ulio,
        arguments: |at| {
            let stack = format!("file:{}", at.image());
            words(&[
                "serve",
                &stack,
                "--listen",
                &format!("unix:{}", at.socket()),
            ])
        },
    },
    Kind {
        name: "nbdkit file",
        program: Program::Installed("nbdkit"),
        arguments: |at| words(&["-f", "-U", &at.socket(), "file", &at.image()]),
    },
    Kind {
        name: "qemu-nbd file",
        program: Program::Installed("qemu-nbd"),
        arguments: |at| {
            let socket = at.socket();
            words(&[
                "-t",
                "-f",
                "raw",
                "--cache=writeback",
                "-k",
                &socket,
                &at.image(),
            ])
        },
    },
];

/// A running server, ended when dropped.
pub(crate) struct Running(Child);

impl Kind {
    fn program(&self) -> io::Result<PathBuf> {
        let own = std::env::current_exe()?;
        Ok(match self.program {
            Program::Own => own,
            Program::Ulio => own.with_file_name("ulio"),
            Program::Installed(name) => PathBuf::from(name),
        })
    }

    /// The program's own word for its version, `None` if it is not there.
    pub(crate) fn version(&self) -> Option<String> {
        if matches!(self.program, Program::Own) {
            return Some(String::new());
        }
        let answer = Command::new(self.program().ok()?)
            .arg("--version")
            .output()
            .ok()?;
        let text = String::from_utf8_lossy(&answer.stdout);
        Some(text.lines().next().unwrap_or_default().to_string())
    }

    /// Starts it, and waits until its socket is there.
    pub(crate) fn start(&self, at: &Place) -> io::Result<Running> {
        if at.socket.exists() {
            fs::remove_file(&at.socket)?;
        }
        fs::File::create(&at.image)?.set_len(at.size)?;
        let mut command = Command::new(self.program()?);
        command
            .args((self.arguments)(at))
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command.stderr(Stdio::null());
        let mut child = Running(command.spawn()?);
        let start = Instant::now();
        while !at.socket.exists() {
            if let Some(status) = child.0.try_wait()? {
                return Err(io::Error::other(format!("{}: {status}", self.name)));
            }
            if start.elapsed() > Duration::from_secs(10) {
                return Err(io::Error::other(format!(
                    "{}: no socket after 10 s",
                    self.name
                )));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(child)
    }
}

impl Running {
    /// The CPU time that the server has used, its ended threads included.
    pub(crate) fn cpu(&self) -> io::Result<Duration> {
        let stat = fs::read_to_string(
            Path::new("/proc")
                .join(self.0.id().to_string())
                .join("stat"),
        )?;
        // proc(5): the fields after the name in parentheses; user and system time are 14 and 15, in ticks of 10 ms.
        let fields: Vec<_> = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .collect();
        let ticks = |n: usize| fields.get(n).and_then(|field| field.parse::<u64>().ok());
        match (ticks(11), ticks(12)) {
            (Some(user), Some(system)) => Ok(Duration::from_millis((user + system) * 10)),
            _ => Err(io::Error::other("unreadable /proc/PID/stat")),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Its answer does not matter: it is gone, or going.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
