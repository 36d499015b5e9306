//! The servers that are compared: the limit, ours, and those of others that are installed.
//!
//! They run with their defaults, but for flags that make them equal: how files are cached, and that several
//! clients may come at once.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::Command;

use super::endpoint::Endpoint;
use super::server::Place;
use crate::machine;

/// A server.
#[derive(Debug)]
pub struct Kind {
    /// What tables call it.
    pub name: &'static str,
    /// Whose it is.
    pub program: Program,
    /// Where its bytes lie.
    pub disk: Disk,
    /// The export that clients ask for.
    pub export: &'static str,
    /// How it is called.
    pub arguments: fn(&Place) -> io::Result<Vec<String>>,
}

/// Whose a server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// The limit, a program of this package.
    Limit,
    /// Ours, built beside this program.
    Ulio,
    /// A program, and the Debian package that brings it.
    Installed(&'static str, &'static str),
}

/// Where a server's bytes lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disk {
    /// In memory.
    Memory,
    /// In memory, under something that is to be measured.
    Stack,
    /// In a file, through the page cache.
    Buffered,
    /// In a file, past the page cache.
    Direct,
}

const NBDKIT: Program = Program::Installed("nbdkit", "nbdkit");
const QEMU_NBD: Program = Program::Installed("qemu-nbd", "qemu-utils");
const QEMU_DAEMON: Program = Program::Installed("qemu-storage-daemon", "qemu-system-common");
const NBD_SERVER: Program = Program::Installed("nbd-server", "nbd-server");

/// All servers, the limit first.
pub static KINDS: &[Kind] = &[
    Kind {
        name: "limit",
        program: Program::Limit,
        disk: Disk::Memory,
        export: "",
        arguments: |at| Ok(words(&[&address(at), &at.size.to_string()])),
    },
    Kind {
        name: "ulio memory",
        program: Program::Ulio,
        disk: Disk::Memory,
        export: "",
        arguments: |at| ulio(at, &format!("memory:{}", at.size), &[]),
    },
    Kind {
        name: "nbdkit memory",
        program: NBDKIT,
        disk: Disk::Memory,
        export: "",
        arguments: |at| nbdkit(at, &["memory", &at.size.to_string()]),
    },
    Kind {
        name: "ulio file",
        program: Program::Ulio,
        disk: Disk::Buffered,
        export: "",
        arguments: |at| ulio(at, &format!("file:'{}'", at.image.display()), &[]),
    },
    Kind {
        name: "nbdkit file",
        program: NBDKIT,
        disk: Disk::Buffered,
        export: "",
        arguments: |at| nbdkit(at, &["file", &at.image.display().to_string()]),
    },
    Kind {
        name: "qemu-nbd threads",
        program: QEMU_NBD,
        disk: Disk::Buffered,
        export: "",
        arguments: |at| qemu_nbd(at, "writeback", "threads"),
    },
    Kind {
        name: "qemu-nbd io_uring",
        program: QEMU_NBD,
        disk: Disk::Buffered,
        export: "",
        arguments: |at| qemu_nbd(at, "writeback", "io_uring"),
    },
    Kind {
        name: "qemu-storage-daemon",
        program: QEMU_DAEMON,
        disk: Disk::Buffered,
        export: "disk",
        arguments: qemu_daemon,
    },
    Kind {
        name: "nbd-server",
        program: NBD_SERVER,
        disk: Disk::Buffered,
        export: "disk",
        arguments: nbd_server,
    },
    Kind {
        name: "ulio file direct",
        program: Program::Ulio,
        disk: Disk::Direct,
        export: "",
        arguments: |at| ulio(at, &format!("file:'{}',direct", at.image.display()), &[]),
    },
    Kind {
        name: "qemu-nbd threads direct",
        program: QEMU_NBD,
        disk: Disk::Direct,
        export: "",
        arguments: |at| qemu_nbd(at, "none", "threads"),
    },
    Kind {
        name: "qemu-nbd native direct",
        program: QEMU_NBD,
        disk: Disk::Direct,
        export: "",
        arguments: |at| qemu_nbd(at, "none", "native"),
    },
    Kind {
        name: "qemu-nbd io_uring direct",
        program: QEMU_NBD,
        disk: Disk::Direct,
        export: "",
        arguments: |at| qemu_nbd(at, "none", "io_uring"),
    },
    Kind {
        name: "ulio memory, five layers",
        program: Program::Ulio,
        disk: Disk::Stack,
        export: "",
        arguments: |at| ulio(at, &format!("memory:{}", at.size), &["offset:0"; 5]),
    },
    Kind {
        name: "ulio memory, 5 ms late",
        program: Program::Ulio,
        disk: Disk::Stack,
        export: "",
        arguments: |at| ulio(at, &format!("memory:{}", at.size), &["delay:5ms"]),
    },
];

/// The server that is called `name`.
///
/// # Errors
/// If there is none.
pub fn named(name: &str) -> io::Result<&'static Kind> {
    let kind = KINDS.iter().find(|kind| kind.name == name);
    kind.ok_or_else(|| io::Error::other(format!("no server is called {name:?}")))
}

impl Kind {
    /// The program to start.
    ///
    /// # Errors
    /// If nobody knows where this program is.
    pub fn program(&self) -> io::Result<PathBuf> {
        let own = std::env::current_exe()?;
        Ok(match self.program {
            Program::Limit => own.with_file_name("limit"),
            Program::Ulio => own.with_file_name("ulio"),
            Program::Installed(name, _) => PathBuf::from(name),
        })
    }

    /// True if its disk is a file.
    pub fn is_file(&self) -> bool {
        matches!(self.disk, Disk::Buffered | Disk::Direct)
    }

    /// True if the program goes into the background, and leaves its process's number in a file.
    pub fn is_daemon(&self) -> bool {
        self.program == NBD_SERVER
    }

    /// The program's own word for its version, `None` if it is not there.
    pub fn version(&self) -> Option<String> {
        if self.program == Program::Limit {
            return Some("limit".into());
        }
        let mut command = Command::new(self.program().ok()?);
        // One of them prints it to stderr, and nothing else.
        let flag = match self.program {
            NBD_SERVER => "-V",
            _ => "--version",
        };
        machine::first_line(command.arg(flag))
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| word.to_string()).collect()
}

fn address(at: &Place) -> String {
    match &at.endpoint {
        Endpoint::Unix(path) => path.display().to_string(),
        Endpoint::Tcp(port) => port.to_string(),
    }
}

fn ulio(at: &Place, engine: &str, layers: &[&str]) -> io::Result<Vec<String>> {
    let listen = match &at.endpoint {
        Endpoint::Unix(path) => format!("unix:{}", path.display()),
        Endpoint::Tcp(port) => format!("127.0.0.1:{port}"),
    };
    Ok([
        &words(&["serve", engine])[..],
        &words(layers),
        &words(&["--listen", &listen]),
    ]
    .concat())
}

fn nbdkit(at: &Place, plugin: &[&str]) -> io::Result<Vec<String>> {
    let address = address(at);
    let listen = match &at.endpoint {
        Endpoint::Unix(_) => words(&["-U", &address]),
        Endpoint::Tcp(_) => words(&["-i", "127.0.0.1", "-p", &address]),
    };
    Ok([&words(&["-f"])[..], &listen, &words(plugin)].concat())
}

fn qemu_nbd(at: &Place, cache: &str, aio: &str) -> io::Result<Vec<String>> {
    let address = address(at);
    let listen = match &at.endpoint {
        Endpoint::Unix(_) => words(&["-k", &address]),
        Endpoint::Tcp(_) => words(&["-b", "127.0.0.1", "-p", &address]),
    };
    let (cache, aio) = (format!("--cache={cache}"), format!("--aio={aio}"));
    let image = at.image.display().to_string();
    let rest = words(&["-t", "-f", "raw", "--shared=64", &cache, &aio, &image]);
    Ok([listen, rest].concat())
}

fn qemu_daemon(at: &Place) -> io::Result<Vec<String>> {
    let server = match &at.endpoint {
        Endpoint::Unix(path) => format!("addr.type=unix,addr.path={}", path.display()),
        Endpoint::Tcp(port) => format!("addr.type=inet,addr.host=127.0.0.1,addr.port={port}"),
    };
    let image = at.image.display();
    Ok(words(&[
        "--blockdev",
        &format!("driver=file,node-name=disk,filename={image},aio=io_uring"),
        "--nbd-server",
        &format!("{server},max-connections=64"),
        "--export",
        "type=nbd,id=disk,node-name=disk,name=disk,writable=on",
    ]))
}

fn nbd_server(at: &Place) -> io::Result<Vec<String>> {
    let listen = match &at.endpoint {
        // It would listen on its port of all addresses, too, if that were left out.
        Endpoint::Unix(path) => {
            let Endpoint::Tcp(port) = Endpoint::free_port()? else {
                return Err(io::Error::other("a port that is none"));
            };
            let path = path.display();
            format!("unixsock = {path}\nlistenaddr = 127.0.0.1\nport = {port}")
        }
        Endpoint::Tcp(port) => format!("listenaddr = 127.0.0.1\nport = {port}"),
    };
    let image = at.image.display();
    let settings = format!("[generic]\n{listen}\n[disk]\nexportname = {image}\n");
    fs::write(&at.settings, settings)?;
    let settings = at.settings.display().to_string();
    let number = at.process_file().display().to_string();
    Ok(words(&["-C", &settings, "-p", &number]))
}
