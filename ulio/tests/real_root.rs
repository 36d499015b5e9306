//! A real input: a Debian root file system, served, copied out by several clients,
//! written to through `nbdfuse` and through the kernel's ext4, its server killed, and
//! checked.
//!
//! It fetches packages from the machine's Debian mirror and moves gigabytes, so it is
//! left to `cargo xtask test --long`; docs/long-tests.md has its last result. Alone:
//! `cargo test -p ulio --test real_root -- --ignored --nocapture`
#![cfg(target_os = "linux")]

mod common;
use common::{Server, Ulio, need, noise};

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// What the root file system holds, at least.
const LEAST: u64 = 500 << 20;
const SERVE: &str = "serve file:disk.img --listen unix:s";

#[test]
#[ignore = "long: makes a Debian root file system, and moves gigabytes"]
fn a_debian_root_comes_out_whole_and_survives_a_killed_server() {
    let programs = [
        "mmdebstrap",
        "mke2fs",
        "e2fsck",
        "debugfs",
        "nbdcopy",
        "nbdfuse",
        "qemu-img",
        "diff",
    ];
    if !programs.iter().all(|name| need::program(name).is_some()) {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        return need::impossible("only root makes a root file system with all its owners");
    }
    let ulio = Ulio::new();
    let mut clock = Clock(Instant::now());
    make_root(&ulio);
    clock.told("root file system made by mmdebstrap");
    let size = make_image(&ulio);
    clock.told(&format!("ext4 image of {} MiB made of it", size >> 20));

    let server = Server::start(&ulio, SERVE, 1);
    let uri = server.uris[0].clone();
    run(&ulio, "nbdcopy", &["--connections=4", &uri, "nbdcopy.img"]);
    clock.told("copied out by nbdcopy, 4 connections");
    let convert = ["convert", "-f", "raw", "-O", "raw", &uri, "qemu.img"];
    run(&ulio, "qemu-img", &convert);
    clock.told("copied out by qemu-img");
    ulio.run_all(["copy", &uri, "file:ulio.img"]).ok();
    clock.told("copied out by ulio copy");
    for copy in ["nbdcopy.img", "qemu.img", "ulio.img"] {
        same(&ulio, "disk.img", copy);
        fs::remove_file(ulio.path(copy)).unwrap();
    }
    clock.told("all three compared, byte by byte");

    let files = [noise(64 << 20, 1), noise(123_457, 2), noise(0, 3)];
    let fuse = write_by_debugfs(&ulio, &uri, &files);
    server.signal("KILL");
    server.wait();
    drop(fuse);
    run(&ulio, "e2fsck", &["-fn", "disk.img"]);
    let server = Server::start(&ulio, SERVE, 1);
    run(&ulio, "nbdcopy", &["--connections=4", &uri, "after.img"]);
    run(&ulio, "e2fsck", &["-fn", "after.img"]);
    holds(&ulio, "after.img", "debugfs", &files);
    clock.told("written by debugfs through nbdfuse, synced, killed, restarted, checked");

    if let Some(server) = write_by_the_kernel(&ulio, server, &uri, &files) {
        run(&ulio, "nbdcopy", &["--connections=4", &uri, "after.img"]);
        replay(&ulio, "after.img");
        run(&ulio, "e2fsck", &["-fn", "after.img"]);
        for name in ["debugfs", "kernel"] {
            holds(&ulio, "after.img", name, &files);
        }
        clock.told("written by the kernel's ext4, synced, killed under load, restarted, checked");
        server.stop().ok();
    }
    holds_the_root(&ulio, "after.img");
    clock.told("every file of the root file system compared");
}

/// Tells how long each step took, for whoever runs this with `--nocapture`.
struct Clock(Instant);

impl Clock {
    fn told(&mut self, step: &str) {
        let took = self.0.elapsed().as_secs_f64();
        eprintln!("{took:8.1} s  {step}");
        self.0 = Instant::now();
    }
}

/// Runs a program in the test's directory. It has to succeed.
#[track_caller]
fn run(ulio: &Ulio, program: &str, arguments: &[&str]) -> String {
    let (code, text) = ran(ulio, program, arguments);
    assert_eq!(code, Some(0), "{program} {arguments:?}: {text}");
    text
}

/// Likewise, whatever comes of it: the exit code, and all that was said.
fn ran(ulio: &Ulio, program: &str, arguments: &[&str]) -> (Option<i32>, String) {
    let program = need::program(program).unwrap();
    let output = Command::new(program)
        .args(arguments)
        .current_dir(ulio.dir())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let told = [output.stdout, output.stderr].concat();
    (
        output.status.code(),
        String::from_utf8_lossy(&told).into_owned(),
    )
}

/// Makes the directory `root`.
fn make_root(ulio: &Ulio) {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let debian = release.lines().any(|line| line == "ID=debian");
    let suite = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .filter(|_| debian)
        .unwrap_or("stable");
    let mut arguments = vec![
        "--quiet",
        "--variant=important",
        "--include=build-essential,git,python3,vim",
        suite,
        "root",
    ];
    // The mirror that the machine itself is set to.
    let sources = "/etc/apt/sources.list.d/debian.sources";
    if debian && Path::new(sources).exists() {
        arguments.push(sources);
    }
    run(ulio, "mmdebstrap", &arguments);
    let held = run(ulio, "du", &["-s", "--block-size=1", "root"]);
    let held: u64 = held.split_whitespace().next().unwrap().parse().unwrap();
    assert!(held >= LEAST, "the root file system holds {held} bytes");
    eprintln!("            {suite}, {} MiB in files", held >> 20);
}

/// Makes `disk.img` of `root`, and gives its size.
fn make_image(ulio: &Ulio) -> u64 {
    let size = 2 << 30;
    let image = File::create(ulio.path("disk.img")).unwrap();
    image.set_len(size).unwrap();
    run(
        ulio,
        "mke2fs",
        &["-q", "-t", "ext4", "-d", "root", "disk.img"],
    );
    run(ulio, "e2fsck", &["-fn", "disk.img"]);
    size
}

/// Two files of the test's directory are equal.
#[track_caller]
fn same(ulio: &Ulio, one: &str, other: &str) {
    let [mut a, mut b] = [one, other].map(|name| File::open(ulio.path(name)).unwrap());
    let (mut x, mut y) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let (len, other_len) = (a.metadata().unwrap().len(), b.metadata().unwrap().len());
    assert_eq!(len, other_len, "the sizes of {one} and {other}");
    let mut at = 0;
    while at < len {
        let part = (len - at).min(1 << 20) as usize;
        a.read_exact(&mut x[..part]).unwrap();
        b.read_exact(&mut y[..part]).unwrap();
        assert!(x[..part] == y[..part], "{one} and {other} differ at {at}");
        at += part as u64;
    }
}

/// Writes `files` into `/debugfs` of the disk at `uri`, as a file of nbdfuse, and syncs that.
fn write_by_debugfs(ulio: &Ulio, uri: &str, files: &[Vec<u8>]) -> Fuse {
    let fuse = Fuse::mount(ulio, uri);
    let mut script = "mkdir /debugfs\n".to_owned();
    for (index, bytes) in files.iter().enumerate() {
        ulio.write(&format!("{index}"), bytes);
        script += &format!("write {index} /debugfs/{index}\n");
    }
    ulio.write("script", script.as_bytes());
    let told = run(ulio, "debugfs", &["-w", "-f", "script", "fuse/disk"]);
    assert!(!told.contains("error"), "{told}");
    File::options()
        .write(true)
        .open(fuse.file())
        .unwrap()
        .sync_all()
        .unwrap();
    fuse
}

/// Mounts the disk at `uri`, writes `files` into `/kernel`, syncs them, and kills the server while more is being
/// written. Gives the next server, or nothing if this machine cannot mount.
fn write_by_the_kernel(
    ulio: &Ulio,
    server: Server,
    uri: &str,
    files: &[Vec<u8>],
) -> Option<Server> {
    let fuse = Fuse::mount(ulio, uri);
    fs::create_dir(ulio.path("mnt")).unwrap();
    let (code, told) = ran(ulio, "mount", &["-o", "loop", "fuse/disk", "mnt"]);
    if code != Some(0) {
        need::impossible(&format!("mount a file system: {}", told.trim()));
        return None;
    }
    let mount = Mount(ulio.path("mnt"));
    let dir = mount.0.join("kernel");
    fs::create_dir(&dir).unwrap();
    for (index, bytes) in files.iter().enumerate() {
        fs::write(dir.join(index.to_string()), bytes).unwrap();
    }
    // The whole file system: files, directories, journal.
    run(ulio, "sync", &["-f", "mnt/kernel"]);
    let (done, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let part = noise(1 << 20, 4);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for index in 0.. {
                // Errors are what the dead server gives.
                let path = mount.0.join(format!("unsynced{}", index % 200));
                let wrote = fs::write(&path, &part);
                if index % 50 == 49 {
                    let _ = File::open(&path).and_then(|file| file.sync_all());
                }
                if wrote.is_err() || done.load(Relaxed) {
                    return;
                }
                written.fetch_add(1, Relaxed);
            }
        });
        let began = Instant::now();
        while written.load(Relaxed) < 120 && began.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(1));
        }
        server.signal("KILL");
        server.wait();
        done.store(true, Relaxed);
    });
    assert!(written.load(Relaxed) >= 120, "it was killed under load");
    drop(mount);
    drop(fuse);
    Some(Server::start(ulio, SERVE, 1))
}

/// What a mount does first after a crash: e2fsck replays the journal, and finds no other work.
fn replay(ulio: &Ulio, image: &str) {
    let (code, told) = ran(ulio, "e2fsck", &["-p", image]);
    assert!(matches!(code, Some(0 | 1)), "e2fsck -p: {code:?} {told}");
    assert!(told.contains("recovering journal"), "{told}");
}

/// The ext4 `image` has `files` in the directory `dir`.
#[track_caller]
fn holds(ulio: &Ulio, image: &str, dir: &str, files: &[Vec<u8>]) {
    for (index, bytes) in files.iter().enumerate() {
        let command = format!("dump /{dir}/{index} dumped");
        let _ = fs::remove_file(ulio.path("dumped"));
        run(ulio, "debugfs", &["-R", &command, image]);
        assert!(&ulio.read("dumped") == bytes, "/{dir}/{index} of {image}");
    }
}

/// The ext4 `image` has every file of `root`.
fn holds_the_root(ulio: &Ulio, image: &str) {
    fs::create_dir(ulio.path("back")).unwrap();
    run(ulio, "debugfs", &["-R", "rdump /usr back", image]);
    run(
        ulio,
        "diff",
        &["-r", "--no-dereference", "root/usr", "back/usr"],
    );
}

/// A disk as the file `fuse/disk`, by nbdfuse.
struct Fuse {
    child: Child,
    dir: PathBuf,
}

impl Fuse {
    fn mount(ulio: &Ulio, uri: &str) -> Self {
        let dir = ulio.path("fuse");
        fs::create_dir_all(&dir).unwrap();
        let child = Command::new("nbdfuse")
            .args(["fuse/disk", uri])
            .current_dir(ulio.dir())
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut fuse = Fuse { child, dir };
        let began = Instant::now();
        while !fuse.file().exists() {
            let ended = fuse.child.try_wait().unwrap();
            assert_eq!(ended, None, "nbdfuse ended");
            assert!(began.elapsed() < Duration::from_secs(60), "nbdfuse hangs");
            std::thread::sleep(Duration::from_millis(5));
        }
        fuse
    }

    fn file(&self) -> PathBuf {
        self.dir.join("disk")
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        let mut unmount = Command::new("umount");
        let unmounted = unmount.arg("--lazy").arg(&self.dir).status();
        if !unmounted.is_ok_and(|status| status.success()) {
            let _ = self.child.kill();
        }
        // It ends once it is unmounted. What goes wrong then is the dead server's, and no news.
        let _ = self.child.wait();
    }
}

/// A mounted file system.
struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let mut unmount = Command::new("umount");
        let _ = unmount.arg(&self.0).stderr(Stdio::null()).status();
    }
}
