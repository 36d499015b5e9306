//! What waits for a file's disk: an io_uring ring, or threads where that is forbidden to the process.
#![cfg(target_os = "linux")]

use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;

use userland_io::engines::{Aio, File};
use userland_io::{Engine, ErrorKind, WriteBuf, WriteFlags};

#[path = "common/file.rs"]
mod file;
#[path = "common/need.rs"]
mod need;
use file::{read, write};

/// What this process has logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    /// Of all threads: an engine opens its file on one of its own.
    fn start() -> &'static Log {
        static LOG: OnceLock<Log> = OnceLock::new();
        LOG.get_or_init(|| {
            let log = Log::default();
            let writer = log.clone();
            let to = tracing_subscriber::fmt().with_ansi(false);
            to.with_writer(move || writer.clone()).init();
            log
        })
    }

    /// The lines that name `path`.
    fn about(&self, path: &Path) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let name = path.display().to_string();
        let lines = text.lines().filter(|line| line.contains(&name));
        lines.map(str::to_owned).collect()
    }
}

/// Runs `test` on a thread to which, as to all that it starts, the system answers `errno` when asked for a ring.
fn without_io_uring<F: Future<Output = ()>>(errno: i32, test: impl FnOnce() -> F + Send + 'static) {
    let thread = thread::spawn(move || {
        forbid(libc::SYS_io_uring_setup, errno);
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.unwrap().block_on(test());
    });
    thread.join().unwrap();
}

/// As containers do it.
fn forbid(call: libc::c_long, errno: i32) {
    let step = |code: u32, jt, k| libc::sock_filter {
        code: code as u16,
        jt,
        jf: 0,
        k,
    };
    let returns = libc::BPF_RET | libc::BPF_K;
    let mut steps = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, call as u32),
        step(returns, 0, libc::SECCOMP_RET_ALLOW),
        step(returns, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
    ];
    let filter = libc::sock_fprog {
        len: steps.len() as u16,
        filter: steps.as_mut_ptr(),
    };
    // SAFETY: the first takes numbers only; the second reads `filter` and `steps`, which live until it returns.
    let results = unsafe {
        [
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
            libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const filter,
            ),
        ]
    };
    assert_eq!(results, [0, 0], "{}", io::Error::last_os_error());
}

#[test]
fn where_io_uring_is_forbidden_threads_wait_for_the_disk_and_it_is_said() {
    let log = Log::start();
    // EPERM by a filter that knows the call, ENOSYS by one that does not.
    for errno in [libc::EPERM, libc::ENOSYS] {
        without_io_uring(errno, async move || {
            let place = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            let path = place.path().join("disk.img");
            for direct in [false, true] {
                let open = File::open(&path).size(4 << 20).direct(direct);
                let disk = open.clone().await.unwrap();
                let said = log.about(&path);
                let line = said.last().expect("nothing was said");
                let error = io::Error::from_raw_os_error(errno).to_string();
                assert!(line.contains("INFO") && line.contains(&error), "{line}");
                assert!(line.contains("threads wait for the disk"), "{line}");
                let bytes = vec![7; 64 << 10];
                write(&disk, &bytes, 1 << 20).await;
                let durable = WriteBuf::new(&bytes);
                let durable = disk.write(&durable, 2 << 20, WriteFlags::FUA);
                durable.await.unwrap();
                disk.flush().await.unwrap();
                for at in [1 << 20, 2 << 20] {
                    assert_eq!(read(&disk, at..at + (64 << 10)).await.unwrap(), bytes);
                }
                disk.close().await.unwrap();
                drop(disk);
                let error = open.aio(Aio::Uring).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Unsupported);
                assert!(error.to_string().contains("use threads"), "{error}");
            }
        });
    }
}

#[tokio::test]
async fn where_io_uring_is_allowed_it_waits_for_the_disk_and_it_is_said() {
    let log = Log::start();
    let place = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = place.path().join("disk.img");
    if let Err(error) = File::open(&path).size(1 << 20).aio(Aio::Uring).await {
        return need::impossible(&error.to_string());
    }
    let before = log.about(&path).len();
    let disk = File::open(&path).await.unwrap();
    let said = log.about(&path).split_off(before);
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].contains("INFO") && said[0].contains("io_uring waits for the disk"));
    disk.close().await.unwrap();
    drop(disk);
    // Who says how it is to be done need not be told.
    let threads = File::open(&path).aio(Aio::Threads).await.unwrap();
    assert_eq!(log.about(&path).len(), before + 1);
    threads.close().await.unwrap();
}
