//! Devices that the real binary attaches, by the way that `ULIO_VIA` names: `ublk`, `nbd` or `fuse`. If left out, `fuse`,
//! which works nearly everywhere; the others have their guests.
#![allow(dead_code)] // each test file uses a part of it

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::{Ran, Server, Ulio, need, send};

/// How long anything may take: far more than it needs on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// The way that is to be tested.
pub(crate) fn via() -> String {
    std::env::var("ULIO_VIA").unwrap_or_else(|_| "fuse".to_owned())
}

/// True if devices can be made here by that way; if not, the skip is told.
pub(crate) fn can_attach() -> bool {
    if !rustix::process::geteuid().is_root() {
        need::impossible("only root makes block devices");
        return false;
    }
    // The host's own kernel may lack all of it, a guest's must not.
    if std::env::var_os("ULIO_GUEST").is_some() {
        return true;
    }
    let ulio = Ulio::new();
    let ran = ulio.run(&format!("attach --background --via {} memory:1M", via()));
    if ran.err.contains("cannot be attached here") {
        match via().as_str() {
            "fuse" => need::impossible(ran.err.trim_end()),
            other => need::guest(other),
        }
        return false;
    }
    ulio.run(&format!("detach {}", ran.ok().trim_end())).ok();
    true
}

/// A device that a process of the binary serves.
pub(crate) struct Attached {
    pub(crate) server: Server,
    pub(crate) path: PathBuf,
}

impl Attached {
    /// Attaches what `arguments` say, by the way that is to be tested.
    #[track_caller]
    pub(crate) fn new(ulio: &Ulio, arguments: &str) -> Self {
        let line = format!("attach --via {} {arguments}", via());
        Self::spawn(ulio.command(line.split(' ')))
    }

    /// As the command says that runs the binary.
    #[track_caller]
    pub(crate) fn spawn(command: Command) -> Self {
        let server = Server::spawn(command, 1);
        let path = PathBuf::from(&server.uris[0]);
        assert!(path.starts_with("/dev"), "{path:?}");
        Attached { server, path }
    }

    /// Ends it in order, and sees that nothing is left.
    #[track_caller]
    pub(crate) fn stop(self) -> Ran {
        let (pid, path) = (self.server.pid(), self.path);
        let ran = self.server.stop();
        ran.ok();
        assert_eq!(remains(pid, &path), Vec::<String>::new(), "{ran:#?}");
        ran
    }

    /// Ends it with SIGKILL, and waits until it is dead.
    pub(crate) fn kill(self) {
        self.server.signal("KILL");
        assert_eq!(self.server.wait().code, None);
    }
}

/// What is left of the device at `path` that the process `pid` served.
pub(crate) fn remains(pid: u32, path: &Path) -> Vec<String> {
    let mut left = Vec::new();
    let of_it = |text: &str| text.starts_with(&format!("{pid}-"));
    let records = || fs::read_dir("/run/ulio").into_iter().flatten().flatten();
    for entry in records() {
        if of_it(&entry.file_name().to_string_lossy()) {
            left.push(entry.path().display().to_string());
        }
    }
    if path.to_string_lossy().starts_with("/dev/ublkb") {
        // A test beside this one may have taken its place, and say so a moment later.
        let line = format!("device {}", path.display());
        let is_of_another = || {
            let mut texts = records().map(|entry| fs::read_to_string(entry.path()));
            texts.any(|text| text.is_ok_and(|text| text.lines().any(|of| of == line)))
        };
        until("the device is gone, or another's", || {
            !path.exists() || is_of_another()
        });
    }
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let file = fs::read_to_string(entry.path().join("loop/backing_file"));
        if let Ok(file) = file
            && file.strip_prefix("/ulio-").is_some_and(of_it)
        {
            left.push(format!("{} over {file}", entry.path().display()));
        }
        let backend = fs::read_to_string(entry.path().join("backend"));
        if let Ok(backend) = backend
            && backend.strip_prefix("userland-io ").is_some_and(of_it)
        {
            left.push(format!("{} of {backend}", entry.path().display()));
        }
    }
    if Path::new(&format!("/proc/{pid}")).exists() {
        left.push(format!("process {pid}"));
    }
    left
}

/// What `ulio list --json` says of the device at `path`.
pub(crate) fn listed(ulio: &Ulio, path: &Path) -> Option<serde_json::Value> {
    let ran = ulio.run("list --json");
    let all: serde_json::Value = serde_json::from_str(ran.ok()).unwrap();
    let path = path.to_str().unwrap();
    let mut devices = all["devices"].as_array().unwrap().iter();
    // Another test's may have had the path before, and its process not have ended.
    let found = devices.find(|device| device["device"] == path && device["state"] != "ending");
    found.cloned()
}

/// Waits until `is` is true.
#[track_caller]
pub(crate) fn until(what: &str, mut is: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < PATIENCE, "{what}: not in {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs `ulio` to detach what nobody uses any more, but for a process that a test beside this one is just starting: until it
/// is another program, it has a copy of every descriptor, and so of a claim that was let go of.
pub(crate) fn detached(ulio: &Ulio, line: &str) -> Ran {
    let begun = Instant::now();
    loop {
        let ran = ulio.run(line);
        if !ran.err.contains("is in use") || begun.elapsed() > PATIENCE {
            return ran;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs a program, which has to succeed, and gives what it said.
#[track_caller]
pub(crate) fn run<S: AsRef<str>>(program: &str, arguments: impl IntoIterator<Item = S>) -> String {
    let mut command = Command::new(need::program(program).unwrap());
    for argument in arguments {
        command.arg(argument.as_ref());
    }
    let output = command.stdin(Stdio::null()).output().unwrap();
    let told = [output.stdout, output.stderr].concat();
    let told = String::from_utf8_lossy(&told).into_owned();
    assert!(output.status.success(), "{command:?}: {told}");
    told
}

/// True if all of these programs are here; if not, the skip is told.
pub(crate) fn has(programs: &[&str]) -> bool {
    let mut programs = programs.iter();
    programs.all(|name| need::program(name).is_some())
}

/// Opens a device, past the page cache, with `flags` as well.
pub(crate) fn open(path: &Path, flags: rustix::fs::OFlags) -> io::Result<File> {
    let flags = rustix::fs::OFlags::DIRECT | flags;
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
}

/// Claims a device, as a mount does.
#[track_caller]
pub(crate) fn claim(path: &Path) -> File {
    open(path, rustix::fs::OFlags::EXCL).unwrap()
}

/// A mounted file system. It is unmounted when a test fails, too.
pub(crate) struct Mounted(PathBuf);

impl Mounted {
    #[track_caller]
    pub(crate) fn new(device: &Path, at: PathBuf) -> Self {
        Self::with(&[device.to_str().unwrap()], at)
    }

    /// What mount(8) makes of `what`.
    #[track_caller]
    pub(crate) fn with(what: &[&str], at: PathBuf) -> Self {
        fs::create_dir_all(&at).unwrap();
        run("mount", what.iter().copied().chain([at.to_str().unwrap()]));
        Mounted(at)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Unmounts it, in order.
    #[track_caller]
    pub(crate) fn unmount(self) {
        run("umount", [self.0.to_str().unwrap()]);
        std::mem::forget(self);
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let mut unmount = Command::new("umount");
        let _ = unmount.arg("--lazy").arg(&self.0).status();
    }
}

/// fio on a device, which is killed if a test ends before it does.
pub(crate) struct Fio(Child);

impl Fio {
    /// Starts it with `options`, and waits until it works.
    #[track_caller]
    pub(crate) fn start(dir: &Path, path: &Path, options: &[&str]) -> Self {
        let before = requests(path);
        let child = Command::new(need::program("fio").unwrap())
            .args(["--name=load", "--direct=1", "--ioengine=libaio", "--thread"])
            .args(["--output-format=terse"])
            .arg(format!("--filename={}", path.display()))
            .args(options)
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut fio = Fio(child);
        until("fio works", || {
            assert!(fio.is_running(), "fio ended");
            requests(path) >= before + 100
        });
        fio
    }

    /// True if it still works.
    pub(crate) fn is_running(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }

    /// Waits for its end: how many errors it counted, and what it said on stderr.
    pub(crate) fn wait(mut self) -> (u64, String) {
        let err = self.0.stderr.take().unwrap();
        let told = std::thread::spawn(move || io::read_to_string(err).unwrap_or_default());
        let out = io::read_to_string(self.0.stdout.take().unwrap()).unwrap();
        self.0.wait().unwrap();
        let told = told.join().unwrap();
        let last = out.lines().rfind(|line| line.contains(";load;"));
        // The terse format's fifth field: the error number of the job.
        let error = last.and_then(|line| line.split(';').nth(4)?.parse().ok());
        (error.unwrap_or_else(|| panic!("{out}{told}")), told)
    }

    /// Ends it, as Ctrl-C does.
    pub(crate) fn stop(self) -> (u64, String) {
        send(&self.0, "INT");
        self.wait()
    }
}

impl Drop for Fio {
    fn drop(&mut self) {
        if self.is_running() {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

/// How many reads and writes of the device the kernel has counted.
fn requests(path: &Path) -> u64 {
    let name = path.file_name().unwrap();
    let stat = fs::read_to_string(Path::new("/sys/block").join(name).join("stat")).unwrap();
    let number = |n| stat.split_whitespace().nth(n)?.parse::<u64>().ok();
    number(0).unwrap() + number(4).unwrap()
}
