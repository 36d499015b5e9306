//! A server in this process, for clients that are programs of their own.
#![allow(dead_code)]

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use userland_io::engines::Memory;
use userland_io::transports::nbd::{Server, ServerHandle, Uri};
use userland_io::{Device, Engine, WriteBuf, WriteFlags};

/// How long any one client may take: far more than it needs on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A server on a Unix socket and on TCP.
pub(crate) struct Served {
    runtime: Runtime,
    server: Option<ServerHandle>,
    /// For files; gone at the end of the test.
    pub(crate) dir: TempDir,
}

impl Served {
    /// Serves what `exports` adds to a server.
    pub(crate) fn new(exports: impl AsyncFnOnce(Server) -> Server) -> Self {
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let dir = tempfile::tempdir().unwrap();
        let socket = format!("unix:{}", dir.path().join("sock").display());
        let server = runtime.block_on(async {
            let server = exports(Server::new()).await;
            server.bind([&socket[..], "127.0.0.1:0"]).await.unwrap()
        });
        Served {
            runtime,
            server: Some(server),
            dir,
        }
    }

    /// Serves `engine` as the only export, `disk`.
    pub(crate) fn disk(engine: impl Engine) -> Self {
        Served::new(async |server| server.export("disk", Device::open(engine).await.unwrap()))
    }

    /// Serves `disk`, 16 MiB of which the fifth holds data.
    pub(crate) fn sparse() -> Self {
        Served::new(async |server| {
            let disk = Device::open(Memory::new(16 << 20)).await.unwrap();
            let data = vec![7; 1 << 20];
            disk.write(&WriteBuf::new(&data), 4 << 20, WriteFlags::empty())
                .await
                .unwrap();
            server.export("disk", disk)
        })
    }

    /// Serves a memory disk of `size` bytes as `disk`, and the same without writes as `read-only`.
    pub(crate) fn also_read_only(size: u64) -> Self {
        Served::new(async |server| {
            let disk = Device::open(Memory::new(size)).await.unwrap();
            server
                .export("read-only", disk.read_only())
                .export("disk", disk)
        })
    }

    /// The URIs of the export `name`: over Unix, then over TCP.
    pub(crate) fn uris(&self, name: &str) -> Vec<String> {
        let addresses = self.server.iter().flat_map(ServerHandle::addresses);
        addresses
            .map(|address| Uri::new(address.clone(), name).to_string())
            .collect()
    }

    /// Runs `work` on the server's runtime.
    pub(crate) fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// A path in the test's directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let Some(server) = self.server.take() else {
            return;
        };
        let result = self.runtime.block_on(server.shutdown());
        if !std::thread::panicking() {
            result.unwrap();
        }
    }
}

/// What a program answered.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) ok: bool,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs `program` to its end.
pub(crate) fn run(program: &Path, args: &[&str]) -> Ran {
    let mut command = Command::new(program);
    command
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let (out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let read = |mut from: Box<dyn Read + Send>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            from.read_to_end(&mut bytes).unwrap();
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let (stdout, stderr) = (read(Box::new(out)), read(Box::new(err)));
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("{} {args:?} hangs", program.display());
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    Ran {
        ok: status.success(),
        stdout: stdout.join().unwrap(),
        stderr: stderr.join().unwrap(),
    }
}

/// Runs `program`, which must succeed, and answers what it printed.
pub(crate) fn succeed(program: &Path, args: &[&str]) -> String {
    let ran = run(program, args);
    assert!(
        ran.ok,
        "{} {args:?} failed:\n{}{}",
        program.display(),
        ran.stdout,
        ran.stderr
    );
    ran.stdout
}

/// Bytes that look like a disk's: pieces of noise, text and zeroes. The same for the same seed.
pub(crate) fn image(len: usize, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let piece = random.usize(1..200_000).min(len - bytes.len());
        match random.u8(0..3) {
            0 => bytes.resize(bytes.len() + piece, 0),
            1 => bytes.extend((0..piece).map(|at| b"userland disks "[at % 15])),
            _ => bytes.extend(std::iter::repeat_with(|| random.u8(..)).take(piece)),
        }
    }
    bytes
}

/// Fails where two images differ, and says where.
pub(crate) fn assert_same(expected: &[u8], found: &[u8], what: &str) {
    assert_eq!(expected.len(), found.len(), "{what}: wrong length");
    // At once, which matters where millions of bytes are compared without optimization.
    if expected == found {
        return;
    }
    let differs = expected.iter().zip(found).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{what}: bytes differ from there on");
}
