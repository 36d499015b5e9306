//! `ulio attach` killed with SIGKILL under load: what cannot go on fails and can be removed, and a recoverable device goes
//! on in another process, of another build too, as if nothing had been.
#![cfg(target_os = "linux")]

#[path = "common/attach.rs"]
mod attach;
mod common;
use attach::{Attached, Fio, Mounted, can_attach, has, listed, open, remains, run, until, via};
use common::{Ulio, noise};

use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

/// How long what is under way when the daemon dies may hang. Only the kernel's NBD client takes that time; by the others users hear
/// of it at once.
const TIMEOUT: Duration = Duration::from_secs(10);
/// What a busy machine may add: far less than the time-out, which is not to be waited for twice.
const BUSY: Duration = Duration::from_secs(7);

/// What a user of a recoverable device may wait for the next process. On a busy machine starting a program takes longer by itself, so
/// this goes for half of the pauses; the longest is told.
const PAUSE: Duration = Duration::from_secs(1);

/// These tests take turns: pauses are measured.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

const IMAGE: &str = "file:disk.img,size=64M";

#[test]
fn users_of_a_killed_daemon_fail_and_its_remains_go() {
    kill_under_load(5);
}

#[test]
#[ignore = "long: kills 50 daemons under load"]
fn users_of_50_killed_daemons_fail_and_their_remains_go() {
    kill_under_load(50);
}

/// How many daemons run, and are killed, at a time: the kernel's NBD client takes its time to give up.
const AT_ONCE: u32 = 10;

fn kill_under_load(times: u32) {
    if !has(&["fio"]) || !can_attach() {
        return;
    }
    let _turn = turn();
    let mut slowest = Duration::ZERO;
    let stack = format!("--timeout {}s file:disk.img,size=16M", TIMEOUT.as_secs());
    for from in (0..times).step_by(AT_ONCE as usize) {
        // Each has a directory, and so an image, of its own.
        let numbers = from..times.min(from + AT_ONCE);
        let dirs: Vec<Ulio> = numbers.map(|_| Ulio::new()).collect();
        let disks: Vec<_> = dirs
            .iter()
            .map(|ulio| Attached::new(ulio, &stack))
            .collect();
        let load = |(disk, ulio): (Attached, &Ulio)| {
            let options = ["--rw=randrw", "--bs=4k", "--iodepth=16"];
            let more = ["--time_based", "--runtime=3600"];
            let fio = Fio::start(ulio.dir(), &disk.path, &[&options[..], &more].concat());
            (disk, fio)
        };
        let loaded: Vec<_> = disks.into_iter().zip(&dirs).map(load).collect();
        let mut killed = Vec::new();
        for (disk, fio) in loaded {
            let (pid, path) = (disk.server.pid(), disk.path.clone());
            let at = Instant::now();
            disk.kill();
            killed.push((pid, path, at, fio));
        }
        let mut dead = Vec::new();
        for (pid, path, at, fio) in killed {
            let (error, told) = fio.wait();
            let took = at.elapsed();
            assert_ne!(error, 0, "fio saw no error: {told}");
            assert!(took < TIMEOUT + BUSY, "it took {took:?}");
            slowest = slowest.max(took);
            let left = listed(&dirs[0], &path).unwrap();
            assert_eq!(
                (&left["state"], &left["pid"]),
                (&"stale".into(), &pid.into())
            );
            dead.push((pid, path));
        }
        until("they can be removed", || {
            dirs[0].run("detach --stale").code == Some(0)
        });
        for (pid, path) in dead {
            assert_eq!(listed(&dirs[0], &path), None);
            assert_eq!(remains(pid, &path), Vec::<String>::new());
        }
        // Nobody holds the images, and the next ones work.
        for ulio in dirs {
            let disk = Attached::new(&ulio, &stack);
            let device = open(&disk.path, rustix::fs::OFlags::empty()).unwrap();
            device.sync_all().unwrap();
            drop(device);
            disk.stop();
        }
    }
    eprintln!(
        "{}: {times} killed; the slowest failed within {slowest:?}",
        via()
    );
}

#[test]
fn only_ublk_and_only_what_survives_can_be_recoverable() {
    if !can_attach() {
        return;
    }
    let _turn = turn();
    let ulio = Ulio::new();
    let attach = format!("attach --via {}", via());
    if via() != "ublk" {
        ulio.run(&format!("{attach} --recoverable {IMAGE}"))
            .fails(1, &["cannot be attached here", "ublk"]);
        ulio.run(&format!("{attach} --resume /dev/ublkb0 {IMAGE}"))
            .fails(1, &["cannot be attached here", "ublk"]);
        return;
    }
    ulio.run(&format!("{attach} --recoverable memory:64M"))
        .fails(1, &["does not claim SURVIVES_KILL"]);
    let disk = Attached::new(&ulio, &format!("--recoverable {IMAGE}"));
    let resume = format!("attach --resume {}", disk.path.display());
    ulio.write("other.img", &[0; 1 << 20]);
    // Its process lives.
    ulio.run(&format!("{resume} file:other.img"))
        .fails(1, &[disk.path.to_str().unwrap()]);
    let path = disk.path.clone();
    disk.kill();
    // Another disk than it was.
    ulio.run(&format!("{resume} file:other.img"))
        .fails(1, &["67108864 bytes, and the disk 1048576"]);
    assert_eq!(listed(&ulio, &path).unwrap()["state"], "waiting");
    // It is not taken for rubbish, unless by name.
    let ran = ulio.run("detach --stale");
    assert_eq!(ran.code, Some(0), "{ran:#?}");
    assert!(ran.err.contains("waits to be resumed"), "{ran:#?}");
    assert_eq!(listed(&ulio, &path).unwrap()["state"], "waiting");
    // Nor are there two of it.
    let disk = Attached::new(&ulio, &format!("--recoverable {IMAGE}"));
    assert_eq!(disk.path, path);
    disk.server.wait_for("resuming /dev/ublkb");
    disk.kill();
    let ran = ulio.run(&format!("detach {}", path.display()));
    assert_eq!(ran.ok(), format!("{}\n", path.display()));
    until("the device is gone", || !path.exists());
    ulio.run(&format!("{resume} {IMAGE}"))
        .fails(1, &[path.to_str().unwrap()]);
}

#[test]
fn fio_sees_no_error_while_daemons_die_and_others_resume() {
    die_and_resume(5);
}

#[test]
#[ignore = "long: kills 50 daemons under load"]
fn fio_sees_no_error_while_50_daemons_die_and_others_resume() {
    die_and_resume(50);
}

/// Every second daemon is another program: the build that `ULIO_OTHER_BUILD` names (of another version, or profile), else a copy of the
/// same elsewhere. With the copy this proves that nothing of the old program's file or process is needed, but not that two versions
/// agree on what the kernel and `/run/ulio` keep; the tests of the record and of the parameters hold that.
struct Builds<'a> {
    ulio: &'a Ulio,
    other: PathBuf,
}

impl<'a> Builds<'a> {
    fn new(ulio: &'a Ulio) -> Self {
        let other = ulio.path("ulio-next");
        let own = ulio.command([""]).get_program().to_owned();
        let of = std::env::var_os("ULIO_OTHER_BUILD").unwrap_or(own);
        fs::copy(of, &other).unwrap();
        Builds { ulio, other }
    }

    fn command(&self, round: u32, arguments: &str) -> Command {
        let own = self.ulio.command(arguments.split(' '));
        if round.is_multiple_of(2) {
            return own;
        }
        let mut other = Command::new(&self.other);
        other.args(own.get_args()).current_dir(self.ulio.dir());
        other
    }
}

fn die_and_resume(times: u32) {
    if !can_recover() || !has(&["fio"]) {
        return;
    }
    let _turn = turn();
    let ulio = Ulio::new();
    let builds = Builds::new(&ulio);
    let mut disk = Some(Attached::new(&ulio, &format!("--recoverable {IMAGE}")));
    let path = disk.as_ref().unwrap().path.clone();
    // The second half is for this test's own writes.
    let mut fio = Fio::start(
        ulio.dir(),
        &path,
        &[
            "--rw=randrw",
            "--bs=4k",
            "--size=32M",
            "--iodepth=16",
            "--verify=crc32c",
            "--verify_backlog=256",
            "--verify_fatal=1",
            "--time_based",
            "--runtime=3600",
        ],
    );
    let probe = Probe::default();
    std::thread::scope(|scope| {
        let prober = scope.spawn(|| probe.work(&path));
        let done = probe.done_when_dropped();
        let (mut deaths, mut starts, mut pauses) = (Vec::new(), Vec::new(), Vec::new());
        for round in 1..=times {
            probe.wait_for_more(100);
            probe.longest.store(0, Relaxed);
            let began = Instant::now();
            disk.take().unwrap().kill();
            let dead = began.elapsed();
            assert!(fio.is_running(), "fio ended before round {round}");
            let resume = format!("attach --resume {} {IMAGE}", path.display());
            disk = Some(Attached::spawn(builds.command(round, &resume)));
            let ready = began.elapsed();
            probe.wait_for_more(100);
            let pause = Duration::from_micros(probe.longest.load(Relaxed));
            eprintln!("{round}: dead after {dead:?}, resumed after {ready:?}, paused {pause:?}");
            deaths.push(dead);
            starts.push(ready - dead);
            pauses.push(pause);
        }
        assert!(fio.is_running(), "fio ended before the last round");
        let (error, told) = fio.stop();
        assert_eq!(error, 0, "{told}");
        assert_eq!(told, "");
        drop(done);
        prober.join().unwrap();
        let told = |what: &str, times: &mut Vec<Duration>| {
            times.sort_unstable();
            let (median, longest) = (times[times.len() / 2], times[times.len() - 1]);
            eprintln!("{what}: median {median:?}, longest {longest:?}");
            median
        };
        eprintln!("{times} killed and resumed");
        told("a process's death", &mut deaths);
        told("the next one's start", &mut starts);
        assert!(told("pauses", &mut pauses) <= PAUSE, "{pauses:?}");
    });
    // As the image has it, too.
    disk.take().unwrap().stop();
    probe.check(|block, offset| {
        let image = fs::File::open(ulio.path("disk.img")).unwrap();
        image.read_exact_at(block, offset).unwrap();
    });
}

fn can_recover() -> bool {
    if via() != "ublk" {
        // Told by that way's own run.
        return false;
    }
    can_attach()
}

const BLOCK: usize = 4096;
const FIRST: u64 = 32 << 20;
const BLOCKS: u64 = 1024;

/// One who writes and reads back, block by block, and takes the time.
#[derive(Default)]
struct Probe {
    done: AtomicBool,
    /// How many blocks it has written and read back.
    turns: AtomicU64,
    /// The longest time that a block took, in microseconds.
    longest: AtomicU64,
}

impl Probe {
    /// Works until it is done.
    fn work(&self, path: &Path) {
        let device = open(path, rustix::fs::OFlags::empty()).unwrap();
        let mut memory = vec![0; 2 * BLOCK];
        let at = memory.as_ptr().align_offset(BLOCK);
        let block = &mut memory[at..at + BLOCK];
        while !self.done.load(Relaxed) {
            let turn = self.turns.load(Relaxed);
            let begun = Instant::now();
            block.copy_from_slice(&noise(BLOCK, turn));
            device.write_all_at(block, offset(turn)).unwrap();
            // What was written some time ago, perhaps in the time of another process.
            let earlier = turn.saturating_sub(BLOCKS / 2);
            device.read_exact_at(block, offset(earlier)).unwrap();
            assert!(block == noise(BLOCK, earlier), "turn {turn}");
            let took = begun.elapsed().as_micros().try_into().unwrap();
            self.longest.fetch_max(took, Relaxed);
            self.turns.store(turn + 1, Relaxed);
        }
    }

    /// Also if this test fails.
    fn done_when_dropped(&self) -> impl Drop {
        struct Done<'a>(&'a AtomicBool);
        impl Drop for Done<'_> {
            fn drop(&mut self) {
                self.0.store(true, Relaxed);
            }
        }
        Done(&self.done)
    }

    #[track_caller]
    fn wait_for_more(&self, more: u64) {
        let enough = self.turns.load(Relaxed) + more;
        until("more is written", || self.turns.load(Relaxed) >= enough);
    }

    /// The last that was written everywhere is there.
    fn check(&self, read: impl Fn(&mut [u8], u64)) {
        let turns = self.turns.load(Relaxed);
        let mut block = vec![0; BLOCK];
        for turn in turns.saturating_sub(BLOCKS)..turns {
            read(&mut block, offset(turn));
            assert!(block == noise(BLOCK, turn), "turn {turn} of {turns}");
        }
    }
}

fn offset(turn: u64) -> u64 {
    FIRST + turn % BLOCKS * BLOCK as u64
}

#[test]
fn a_mounted_ext4_sees_no_error_when_a_new_build_takes_over() {
    if !can_recover() || !has(&["mkfs.ext4", "e2fsck", "mount"]) {
        return;
    }
    let _turn = turn();
    let ulio = Ulio::new();
    let builds = Builds::new(&ulio);
    let mut disk = Some(Attached::new(&ulio, &format!("--recoverable {IMAGE}")));
    let path = disk.as_ref().unwrap().path.clone();
    let device = path.to_str().unwrap();
    // Any error is to be seen, rather than lived with.
    run("mkfs.ext4", ["-q", "-e", "remount-ro", device]);
    let mounted = Mounted::new(&path, ulio.path("mnt"));
    let files = 40;
    let part = |n: u64| noise(256 << 10, n);
    for round in 0..4 {
        std::thread::scope(|scope| {
            // Synced ones and others.
            let writer = scope.spawn(|| {
                for n in 0..files {
                    let name = mounted.path(&format!("{round}-{n}"));
                    fs::write(&name, part(round * files + n)).unwrap();
                    if n % 4 == 0 {
                        fs::File::open(&name).unwrap().sync_all().unwrap();
                    }
                }
            });
            until("files are written", || {
                mounted.path(&format!("{round}-{}", files / 4)).exists()
            });
            disk.take().unwrap().kill();
            let again = format!("attach --recoverable {IMAGE}");
            let taken_over = Attached::spawn(builds.command(round as u32 + 1, &again));
            assert_eq!(taken_over.path, path, "it is not made anew");
            disk = Some(taken_over);
            writer.join().unwrap();
        });
        // Room for the next round; the last one stays.
        for n in (0..files).filter(|_| round < 3) {
            let name = mounted.path(&format!("{round}-{n}"));
            assert!(
                fs::read(&name).unwrap() == part(round * files + n),
                "{round}-{n}"
            );
            fs::remove_file(name).unwrap();
        }
    }
    // A first signal waits for the users, a second one hands over as a kill does.
    let server = disk.take().unwrap().server;
    server.signal("TERM");
    server.wait_for("in use: mounted on");
    server.signal("TERM");
    let ran = server.wait();
    let waits = format!("{device} waits: `ulio attach --resume {device} {IMAGE}`");
    assert!(ran.err.contains(&waits), "{ran:#?}");
    let disk = Attached::spawn(builds.command(0, &format!("attach --recoverable {IMAGE}")));
    fs::write(mounted.path("last"), part(1000)).unwrap();
    mounted.unmount();
    run("e2fsck", ["-f", "-n", device]);
    let mounted = Mounted::new(&path, ulio.path("mnt"));
    for n in 0..files {
        let name = mounted.path(&format!("3-{n}"));
        assert!(fs::read(&name).unwrap() == part(3 * files + n), "3-{n}");
    }
    assert!(fs::read(mounted.path("last")).unwrap() == part(1000));
    mounted.unmount();
    disk.stop();
}

/// What a service manager makes of the unit: `NAME=VALUE` lines, the last of each name.
fn of_the_unit(name: &str) -> Option<&'static str> {
    let unit = include_str!("../systemd/ulio-attach@.service");
    let mut lines = unit.lines().rev();
    lines.find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
}

/// A service manager that does with the unit what systemd does, as far as a restart goes: `ExecStartPre=`, `ExecStart=` with
/// the variables of `/etc/ulio/NAME.conf`, `Restart=on-failure` and what limits it.
struct Manager<'a> {
    ulio: &'a Ulio,
    variables: [(&'static str, &'static str); 2],
    notify: UnixDatagram,
}

impl Manager<'_> {
    fn command(&self, name: &str) -> Command {
        let line = of_the_unit(name).unwrap().trim_start_matches('-');
        let mut words = Vec::new();
        for word in line.split(' ') {
            match word.strip_prefix('$') {
                Some(variable) => {
                    let (_, value) = self
                        .variables
                        .iter()
                        .find(|(of, _)| *of == variable)
                        .unwrap();
                    words.extend(value.split(' '));
                }
                None => words.push(word),
            }
        }
        assert_eq!(words[0], "/usr/bin/ulio");
        let mut command = self.ulio.command(&words[1..]);
        command.env("NOTIFY_SOCKET", self.ulio.path("notify"));
        command
    }

    /// Runs the service until it ends well, or for good. `pids` hears of each of its processes, once that is ready.
    fn run(&self, pids: &mpsc::Sender<u32>) -> ExitStatus {
        loop {
            // Its failure is none: the line begins with a dash.
            self.command("ExecStartPre").output().unwrap();
            let mut service = self
                .command("ExecStart")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let mut text = [0; 4096];
            let len = self.notify.recv(&mut text).unwrap();
            assert!(text[..len].starts_with(b"READY=1\n"));
            pids.send(service.id()).unwrap();
            let status = service.wait().unwrap();
            // What else it told of its end.
            self.notify.set_nonblocking(true).unwrap();
            while self.notify.recv(&mut text).is_ok() {}
            self.notify.set_nonblocking(false).unwrap();
            let never: i32 = of_the_unit("RestartPreventExitStatus")
                .unwrap()
                .parse()
                .unwrap();
            if status.success() || status.code() == Some(never) {
                return status;
            }
            let pause = of_the_unit("RestartSec")
                .unwrap()
                .strip_suffix("ms")
                .unwrap();
            std::thread::sleep(Duration::from_millis(pause.parse().unwrap()));
        }
    }
}

#[test]
fn a_service_manager_brings_it_back_under_a_mounted_file_system() {
    if !can_recover() || !has(&["mkfs.ext4", "e2fsck", "mount"]) {
        return;
    }
    let _turn = turn();
    assert_eq!(of_the_unit("Restart"), Some("on-failure"));
    // However often, and at once.
    assert_eq!(of_the_unit("StartLimitIntervalSec"), Some("0"));
    let ulio = Ulio::new();
    let notify = UnixDatagram::bind(ulio.path("notify")).unwrap();
    notify.set_read_timeout(Some(attach::PATIENCE)).unwrap();
    let manager = Manager {
        ulio: &ulio,
        variables: [("OPTIONS", "--recoverable --via ublk"), ("STACK", IMAGE)],
        notify,
    };
    let (send, pids) = mpsc::channel();
    std::thread::scope(|scope| {
        let service = scope.spawn(move || manager.run(&send));
        let ready = || pids.recv_timeout(attach::PATIENCE).unwrap();
        let kill = |pid: u32, name| {
            let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
            rustix::process::kill_process(pid, name).unwrap();
        };
        let of = |pid: u32| {
            let ran = ulio.run("list --json");
            let all: serde_json::Value = serde_json::from_str(ran.ok()).unwrap();
            let mut devices = all["devices"].as_array().unwrap().iter();
            let device = devices.find(|device| device["pid"] == pid).unwrap();
            PathBuf::from(device["device"].as_str().unwrap())
        };
        let mut pid = ready();
        let path = of(pid);
        run(
            "mkfs.ext4",
            ["-q", "-e", "remount-ro", path.to_str().unwrap()],
        );
        let mounted = Mounted::new(&path, ulio.path("mnt"));
        let part = |n: u64| noise(1 << 20, n);
        for round in 0..3 {
            fs::write(mounted.path(&format!("{round}")), part(round)).unwrap();
            kill(pid, rustix::process::Signal::KILL);
            pid = ready();
            assert_eq!(of(pid), path);
            // What was not written yet is, now.
            let written = fs::File::open(mounted.path(&format!("{round}"))).unwrap();
            written.sync_all().unwrap();
        }
        for round in 0..3 {
            let file = fs::read(mounted.path(&format!("{round}"))).unwrap();
            assert!(file == part(round), "{round}");
        }
        mounted.unmount();
        run("e2fsck", ["-f", "-n", path.to_str().unwrap()]);
        kill(pid, rustix::process::Signal::TERM);
        assert_eq!(service.join().unwrap().code(), Some(0));
        assert_eq!(remains(pid, &path), Vec::<String>::new());
    });
}
