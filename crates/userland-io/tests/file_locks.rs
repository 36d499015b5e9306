//! The lock on an image: among disks of this library, and with QEMU's tools, both ways.
#![cfg(target_os = "linux")]

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tokio::sync::Mutex;
use userland_io::engines::{File, OpenFile};
use userland_io::{Engine, ErrorKind, WriteBuf, WriteFlags};

#[path = "common/need.rs"]
mod need;

/// These tests start processes, which hold copies of all handles until they run their program: what one has
/// just closed, another may still be keeping open.
static ALONE: Mutex<()> = Mutex::const_new(());

async fn refusal(open: OpenFile) -> String {
    let error = open.await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    let text = error.to_string();
    assert!(!text.contains('\n'), "{text:?} is more than one line");
    text
}

fn has(tool: &str) -> bool {
    need::program(tool).is_some()
}

#[tokio::test]
async fn a_writer_is_alone_and_readers_share() {
    let _alone = ALONE.lock().await;
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("disk.img");
    let writer = File::open(&path).size(1 << 20).await.unwrap();
    let text = refusal(File::open(&path)).await;
    let me = format!("is in use by this process (pid {})", std::process::id());
    assert!(
        text.contains(&me) && text.contains("stop that first"),
        "{text}"
    );
    refusal(File::open(&path).read_only(true)).await;
    refusal(File::open(&path).size(1 << 20).direct(true)).await;
    writer.close().await.unwrap();
    drop(writer);
    let reader = File::open(&path).read_only(true).await.unwrap();
    let another = File::open(&path).read_only(true).await.unwrap();
    let text = refusal(File::open(&path)).await;
    assert!(text.contains("open both read-only"), "{text}");
    drop(reader);
    refusal(File::open(&path)).await;
    drop(another);
    File::open(&path).await.unwrap();
}

/// POSIX locks go when any handle of the process to the file is closed; these must not.
#[tokio::test]
async fn closing_another_handle_of_the_process_leaves_the_lock() {
    let _alone = ALONE.lock().await;
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("disk.img");
    let _writer = File::open(&path).size(1 << 20).await.unwrap();
    drop(std::fs::File::open(&path).unwrap());
    refusal(File::open(&path)).await;
}

/// A program that locks the whole file, as virtual machine monitors other than QEMU do.
#[tokio::test]
async fn a_lock_on_the_whole_file_is_respected() {
    let _alone = ALONE.lock().await;
    for exclusive in [false, true] {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("disk.img");
        drop(File::open(&path).size(1 << 20).await.unwrap());
        let kind = ["F_RDLCK", "F_WRLCK"][usize::from(exclusive)];
        let program = format!(
            "import fcntl, struct, sys\n\
             file = open(sys.argv[1], 'r+b')\n\
             fcntl.fcntl(file, 37, struct.pack('hhqqi4x', fcntl.{kind}, 0, 0, 0, 0))\n\
             print('locked', flush=True)\n\
             sys.stdin.read()\n"
        );
        let child = Command::new("python3")
            .args(["-c", &program])
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut child) = child else {
            need::skip("needs the program python3");
            return;
        };
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        assert_eq!(line, "locked\n");
        let text = refusal(File::open(&path)).await;
        assert!(text.contains(&format!("(pid {})", child.id())), "{text}");
        // A shared lock on everything is a reader's and a writer's in QEMU's convention: it stops all.
        refusal(File::open(&path).read_only(true)).await;
        drop(child.stdin.take());
        child.wait().unwrap();
    }
}

#[tokio::test]
async fn who_locks_the_whole_file_is_stopped_by_ours() {
    let _alone = ALONE.lock().await;
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("disk.img");
    drop(File::open(&path).size(1 << 20).await.unwrap());
    let program = "import fcntl, struct, sys\n\
                   file = open(sys.argv[1], 'r+b')\n\
                   for kind in fcntl.F_RDLCK, fcntl.F_WRLCK:\n    \
                   lock = struct.pack('hhqqi4x', kind, 0, 0, 0, 0)\n    \
                   try: fcntl.fcntl(file, 37, lock); print('yes')\n    \
                   except BlockingIOError: print('no')\n";
    for (read_only, answer) in [(false, "no\nno\n"), (true, "yes\nno\n")] {
        let _disk = File::open(&path).read_only(read_only).await.unwrap();
        let mut python = Command::new("python3");
        let Ok(output) = python.args(["-c", program]).arg(&path).output() else {
            need::skip("needs the program python3");
            return;
        };
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            answer,
            "{output:?}"
        );
    }
}

#[tokio::test]
async fn qemu_tools_are_stopped_by_ours() {
    let _alone = ALONE.lock().await;
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("disk.img");
    let copy = place.path().join("copy.img");
    let (image, copy) = (path.to_str().unwrap(), copy.to_str().unwrap());
    let run = |tool: &str, args: &[&str]| {
        let output = Command::new(tool).args(args).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned()
            + &String::from_utf8_lossy(&output.stdout);
        (output.status.success(), text)
    };
    // (`qemu-img info` of a raw image reads nothing of it, and asks for no lock.)
    let convert = ["convert", "-f", "raw", "-O", "raw", image, copy];
    let resize = ["resize", "-f", "raw", image, "1M"];
    let read = ["-f", "raw", "-r", "-c", "read 0 512", image];
    let write = ["-f", "raw", "-c", "write 0 512", image];
    let readers = [("qemu-img", &convert[..]), ("qemu-io", &read)];
    let writers = [("qemu-img", &resize[..]), ("qemu-io", &write)];

    let disk = File::open(&path).size(1 << 20).await.unwrap();
    for (tool, args) in readers.into_iter().chain(writers) {
        let (success, text) = run(tool, args);
        assert!(!success && text.contains("lock"), "{tool} {args:?}: {text}");
    }
    drop(disk);
    for (tool, args) in readers.into_iter().chain(writers) {
        let (success, text) = run(tool, args);
        assert!(success, "{tool} {args:?}: {text}");
    }
    // A read-only disk stops writers only.
    let _disk = File::open(&path).read_only(true).await.unwrap();
    for (tool, args) in readers {
        let (success, text) = run(tool, args);
        assert!(success, "{tool} {args:?}: {text}");
    }
    for (tool, args) in writers {
        let (success, text) = run(tool, args);
        assert!(!success && text.contains("lock"), "{tool} {args:?}: {text}");
    }
}

/// `qemu-io` that has the image open until it is told to quit.
struct QemuIo(Child);

impl QemuIo {
    fn open(path: &Path, read_only: bool) -> Self {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw"]);
        if read_only {
            command.arg("-r");
        }
        let mut child = command
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Its answer to a command says that it has opened the image.
        let mut input = child.stdin.take().unwrap();
        input.write_all(b"length\n").unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("MiB") {
            line.clear();
            assert!(output.read_line(&mut line).unwrap() > 0, "qemu-io ended");
        }
        child.stdin = Some(input);
        child.stdout = Some(output.into_inner());
        QemuIo(child)
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn ours_is_stopped_by_qemu_tools() {
    let _alone = ALONE.lock().await;
    if !has("qemu-io") {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("disk.img");
    drop(File::open(&path).size(1 << 20).await.unwrap());
    {
        let qemu = QemuIo::open(&path, false);
        let text = refusal(File::open(&path)).await;
        assert!(
            text.contains(&format!("qemu-io (pid {})", qemu.0.id())),
            "{text}"
        );
        refusal(File::open(&path).read_only(true)).await;
    }
    {
        let _qemu = QemuIo::open(&path, true);
        refusal(File::open(&path)).await;
        File::open(&path).read_only(true).await.unwrap();
    }
    File::open(&path).await.unwrap();
}

const HOLD: &str = "ULIO_TEST_HOLDS_THE_IMAGE";

/// Not a test of its own: the process that the one below kills.
#[tokio::test]
async fn holder() {
    let Ok(path) = std::env::var(HOLD) else {
        return;
    };
    let disk = File::open(&path).await.unwrap();
    let buf = WriteBuf::new(b"completed, not flushed");
    disk.write(&buf, 0, WriteFlags::empty()).await.unwrap();
    println!("holding");
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

#[tokio::test]
async fn a_killed_process_leaves_its_writes_and_no_lock() {
    let _alone = ALONE.lock().await;
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("disk.img");
    drop(File::open(&path).size(1 << 20).await.unwrap());
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "holder", "--nocapture"])
        .env(HOLD, &path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("holding") {
        line.clear();
        assert!(output.read_line(&mut line).unwrap() > 0, "the holder ended");
    }
    let text = refusal(File::open(&path)).await;
    assert!(text.contains(&format!("(pid {})", child.id())), "{text}");
    child.kill().unwrap();
    child.wait().unwrap();
    let patience = Instant::now();
    while let Err(error) = File::open(&path).await {
        assert!(patience.elapsed() < Duration::from_secs(30), "{error}");
    }
    let bytes = std::fs::read(&path).unwrap();
    assert!(bytes.starts_with(b"completed, not flushed"));
}
