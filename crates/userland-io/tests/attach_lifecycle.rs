//! Attached devices come, are used, and go, also when somebody is in the way or their process dies.
#![cfg(all(feature = "attach", target_os = "linux"))]

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::{Semaphore, watch};

use userland_io::attach::{AttachError, Builder, DetachError, Holder, Listed, State, Via, list};
use userland_io::engines::Memory;
use userland_io::{Engine, Geometry, ReadBuf, WriteBuf, WriteFlags};

#[path = "common/attach.rs"]
mod attach;
#[path = "common/children.rs"]
mod children;
#[path = "common/clients.rs"]
mod clients;
#[path = "common/need.rs"]
mod need;
use attach::{
    Aligned, PATIENCE, attached, attached_as, detach, direct, is_gone, open, opened, resized,
    until, via,
};
use children::Child;

const SIZE: u64 = 8 << 20;

/// What is on record about the devices of process `pid`.
fn listed(pid: u32) -> Vec<Listed> {
    let all = list().unwrap().into_iter();
    all.filter(|listed| listed.pid() == pid).collect()
}

#[tokio::test]
async fn a_caller_on_one_thread_may_block_on_its_device() {
    let Some(disk) = attached(Memory::new(SIZE)).await else {
        return;
    };
    // This is the only thread of this runtime.
    let bytes: Vec<u8> = (0..SIZE).map(|at| (at / 1000) as u8).collect();
    fs::OpenOptions::new()
        .write(true)
        .open(disk.path())
        .and_then(|file| {
            file.write_all_at(&bytes, 0)?;
            file.sync_all()
        })
        .unwrap();
    assert!(fs::read(disk.path()).unwrap() == bytes);
    detach(disk).await;
}

/// A disk that is twice as long from its first read on.
#[derive(Clone)]
struct Growing(Arc<watch::Sender<u64>>);

impl Engine for Growing {
    fn geometry(&self) -> Geometry {
        Geometry::read_only(*self.0.borrow())
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, _: u64) -> userland_io::Result {
        self.0.send_replace(2 * SIZE);
        buf.fill(0);
        Ok(())
    }
    async fn changed(&self, seen: Geometry) -> Geometry {
        let mut sizes = self.0.subscribe();
        let _ = sizes.wait_for(|size| *size != seen.size).await;
        self.geometry()
    }
}

/// Linux 6.12 has ublk, and no way to resize one of its devices.
fn can_follow() -> bool {
    via() != Via::Ublk || std::env::var("ULIO_GUEST") != Ok("tcg".into())
}

#[tokio::test]
async fn a_disk_that_grows_while_its_device_is_made_is_followed() {
    let growing = Growing(Arc::new(watch::Sender::new(SIZE)));
    let Some(disk) = attached(growing.clone()).await else {
        return;
    };
    // The kernel's look for partitions is the first read. One that looks later than this, or not at all, is helped.
    let mut block = Aligned::new(512);
    direct(disk.path()).read_exact_at(&mut block, 0).unwrap();
    assert_eq!(growing.geometry().size, 2 * SIZE);
    // Asked once: it may follow at any moment.
    let size = disk.size();
    if can_follow() && size != 2 * SIZE {
        assert_eq!(resized(&disk, size).await, 2 * SIZE);
    }
    detach(disk).await;
}

#[tokio::test]
async fn a_device_in_use_is_not_detached_and_goes_on() {
    let Some(mut disk) = attached(Memory::new(SIZE)).await else {
        return;
    };
    let claim = open(disk.path(), libc::O_EXCL).unwrap();
    for _ in 0..2 {
        match disk.detach().await {
            Err(DetachError::InUse { path, holders }) => {
                assert_eq!(path, disk.path());
                // This process serves it, and so is not named.
                assert_eq!(holders, []);
            }
            other => panic!("{other:?}"),
        }
        claim.write_all_at(&[7; 512], 4096).unwrap();
        claim.sync_all().unwrap();
    }
    let own = listed(std::process::id()).into_iter();
    let [listed] = &own
        .filter(|listed| listed.path() == Some(disk.path()) && listed.state() != State::Ending)
        .collect::<Vec<_>>()[..]
    else {
        panic!("not listed once");
    };
    assert_eq!(
        (listed.via(), listed.state(), listed.size()),
        (via(), State::Running, SIZE)
    );
    assert!(matches!(listed.detach(), Err(DetachError::InUse { .. })));
    drop(claim);
    let mut block = Aligned::new(512);
    direct(disk.path()).read_exact_at(&mut block, 4096).unwrap();
    assert_eq!(block[..], [7; 512]);
    detach(disk).await;
}

/// It claims nothing, and no process has the device open.
#[tokio::test]
async fn a_device_under_a_loop_device_is_in_use() {
    let Some(losetup) = need::program("losetup") else {
        return;
    };
    let Some(mut disk) = attached(Memory::new(SIZE)).await else {
        return;
    };
    let run = |arguments: &[&str]| {
        let ran = Command::new(&losetup).args(arguments).output().unwrap();
        assert!(ran.status.success(), "{ran:?}");
        String::from_utf8(ran.stdout).unwrap().trim_end().to_owned()
    };
    let above = run(&["--find", "--show", disk.path().to_str().unwrap()]);
    assert!(disk.in_use().unwrap());
    match disk.detach().await {
        Err(DetachError::InUse { holders, .. }) => {
            let name = above.strip_prefix("/dev/").unwrap().to_owned();
            assert!(holders.contains(&Holder::Device(name)), "{holders:?}");
        }
        other => panic!("{other:?}"),
    }
    run(&["-d", &above]);
    until("the loop device is gone", || !disk.in_use().unwrap());
    detach(disk).await;
}

/// A disk that is closed when it may be.
struct Lingering {
    disk: Memory,
    may_close: Arc<Semaphore>,
}

impl Engine for Lingering {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, at: u64) -> userland_io::Result {
        self.disk.read(buf, at).await
    }
    async fn write(&self, buf: &WriteBuf<'_>, at: u64, flags: WriteFlags) -> userland_io::Result {
        self.disk.write(buf, at, flags).await
    }
    async fn flush(&self) -> userland_io::Result {
        self.disk.flush().await
    }
    async fn close(&self) -> userland_io::Result {
        self.may_close.acquire().await.unwrap().forget();
        self.disk.close().await
    }
}

/// Where the process of a device, which this test calls by its own name, is to be asked.
fn socket_of(device: &Path) -> String {
    let name = std::thread::current().name().unwrap().to_owned();
    let lines = [
        format!("pid {}", std::process::id()),
        format!("label {name}"),
        format!("device {}", device.display()),
    ];
    let records = fs::read_dir("/run/ulio").unwrap();
    let mut paths = records.map(|entry| entry.unwrap().path());
    let is_of_it = |path: &PathBuf| {
        let text = fs::read_to_string(path).unwrap_or_default();
        lines.iter().all(|line| text.lines().any(|l| l == line))
    };
    let record = paths.find(is_of_it).expect("it is on record");
    record.with_extension("sock").display().to_string()
}

/// How many sockets there are of that name.
fn sockets(name: &str) -> usize {
    let all = fs::read_to_string("/proc/net/unix").unwrap();
    all.lines().filter(|line| line.ends_with(name)).count()
}

#[tokio::test]
async fn a_device_that_is_gone_is_ending_until_its_disk_is_closed() {
    let may_close = Arc::new(Semaphore::new(0));
    let disk = Lingering {
        disk: Memory::new(SIZE),
        may_close: may_close.clone(),
    };
    let Some(mut disk) = attached(disk).await else {
        return;
    };
    let path = disk.path().to_owned();
    let found = |state| {
        let mut all = listed(std::process::id()).into_iter();
        // A test beside this one may have been given its path by now, and have its own name for it.
        let own = std::thread::current().name().map(ToOwned::to_owned);
        all.find(|listed| {
            listed.path() == Some(&path)
                && Some(listed.label()) == own.as_deref()
                && listed.state() == state
        })
    };
    assert!(found(State::Running).is_some());
    let ending = async {
        loop {
            if let Some(ending) = found(State::Ending) {
                return ending;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let look = async {
        let seen = tokio::time::timeout(PATIENCE, ending).await;
        // Who asks for the end now is told how it went, too.
        let socket = socket_of(&path);
        let late = seen.map(|ending| std::thread::spawn(move || ending.detach()));
        // The one that listens, and the one that has come.
        until("it is asked to end", || sockets(&socket) >= 2);
        may_close.add_permits(1);
        late
    };
    let (detached, late) = tokio::join!(disk.detach(), look);
    let late = late.expect("it is never ending");
    detached.unwrap();
    late.join().unwrap().unwrap();
    assert!(found(State::Ending).is_none());
}

/// A process that is about to be started has copies of all descriptors, also of those that look who uses a device.
#[tokio::test]
async fn a_program_that_starts_others_detaches_all_the_same() {
    let is_done = Arc::new(AtomicBool::new(false));
    let starts = std::thread::spawn({
        let is_done = is_done.clone();
        move || {
            while !is_done.load(Ordering::Relaxed) {
                let status = std::process::Command::new("true").status();
                assert!(status.unwrap().success());
            }
        }
    });
    for _ in 0..10 {
        let Some(mut disk) = attached(Memory::new(SIZE)).await else {
            break;
        };
        disk.detach().await.unwrap();
    }
    is_done.store(true, Ordering::Relaxed);
    starts.join().unwrap();
}

#[tokio::test]
async fn a_device_that_cannot_be_claimed_for_want_of_files_is_not_detached() {
    let Some(mut child) = Child::start("child_without_files") else {
        return;
    };
    child.said("done");
}

#[tokio::test]
#[ignore = "another test's child process"]
async fn child_without_files() {
    let Some(mut disk) = attached(Memory::new(SIZE)).await else {
        return children::say("skipped", "");
    };
    let claim = open(disk.path(), libc::O_EXCL).unwrap();
    let before = getrlimit(Resource::Nofile);
    // The lowest that is free. What is open stays so.
    let free = File::open("/dev/null").unwrap().as_raw_fd();
    let none = Rlimit {
        current: Some(free.try_into().unwrap()),
        ..before
    };
    setrlimit(Resource::Nofile, none).unwrap();
    let refused = disk.detach().await;
    setrlimit(Resource::Nofile, before).unwrap();
    let error = refused.unwrap_err();
    assert!(matches!(error, DetachError::Refused { .. }), "{error}");
    assert!(error.to_string().contains("Too many open files"), "{error}");
    claim.write_all_at(&[7; 512], 4096).unwrap();
    claim.sync_all().unwrap();
    drop(claim);
    detach(disk).await;
    children::say("done", "");
}

#[tokio::test]
async fn a_device_whose_handle_is_dropped_goes_when_nobody_uses_it() {
    let Some(disk) = attached(Memory::new(SIZE)).await else {
        return;
    };
    let path = disk.path().to_owned();
    let claim = open(&path, libc::O_EXCL).unwrap();
    drop(disk);
    // For longer than the manager takes to look again.
    for round in 0..4 {
        claim.write_all_at(&[round; 512], 0).unwrap();
        claim.sync_all().unwrap();
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(claim);
    let is_ours = |listed: &Listed| listed.path() == Some(&path);
    until("the record is gone", || {
        !listed(std::process::id()).iter().any(is_ours)
    });
    is_gone(&path);
}

#[tokio::test]
async fn a_disk_whose_end_is_no_whole_block_is_rounded_down() {
    let Some(disk) = attached(Memory::new(SIZE + 700)).await else {
        return;
    };
    assert_eq!(disk.size(), SIZE + 512);
    assert_eq!(
        attach::told(disk.path(), "size"),
        ((SIZE + 512) / 512).to_string()
    );
    let mut last = Aligned::new(512);
    direct(disk.path()).read_exact_at(&mut last, SIZE).unwrap();
    detach(disk).await;
    let short = opened(Memory::new(511)).await;
    let error = Builder::new(short).attach().await.unwrap_err();
    assert!(error.to_string().contains("511 bytes"), "{error}");
}

/// What the library logs in this process.
static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct Logged;

impl Write for Logged {
    fn write(&mut self, text: &[u8]) -> std::io::Result<usize> {
        LOG.lock().unwrap().write(text)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_device_follows_its_disks_size_or_the_log_says_why_not() {
    let log = tracing_subscriber::fmt().with_ansi(false);
    log.with_writer(|| Logged).init();
    let device = opened(Memory::new(SIZE)).await;
    let Some(disk) = attached_as(&device, |builder| builder).await else {
        return;
    };
    let file = direct(disk.path());
    file.write_all_at(&Aligned::filled(4096, 1), SIZE - 4096)
        .unwrap();
    let mut block = Aligned::new(4096);
    device.get_ref().resize(2 * SIZE);
    if can_follow() {
        assert_eq!(resized(&disk, SIZE).await, 2 * SIZE);
        file.write_all_at(&Aligned::filled(4096, 2), 2 * SIZE - 4096)
            .unwrap();
        device.get_ref().resize(SIZE / 2 + 100);
        assert_eq!(resized(&disk, 2 * SIZE).await, SIZE / 2);
        assert_eq!(file.read_at(&mut block, SIZE).unwrap(), 0);
    } else {
        until("the log says so", || {
            let log = String::from_utf8_lossy(&LOG.lock().unwrap()).into_owned();
            log.lines().any(|line| {
                line.contains("cannot follow the disk's size")
                    && line.contains("cannot resize a device")
            })
        });
        assert_eq!(disk.size(), SIZE);
        file.read_exact_at(&mut block, SIZE - 4096).unwrap();
        assert_eq!(block[..], [1; 4096]);
    }
    drop(file);
    detach(disk).await;
}

/// The device's node in a directory where nobody but us makes nodes.
#[tokio::test]
async fn a_device_is_there_where_neither_udev_nor_the_kernel_makes_nodes() {
    let Some(unshare) = need::program("unshare") else {
        return;
    };
    if via() == Via::Fuse && std::env::var_os("ULIO_GUEST").is_none() {
        return need::guest("a place for a /dev of its own");
    }
    let test = std::env::current_exe().unwrap();
    let script = "set -e; cd /dev; mkdir -p /run/dev; mount -t tmpfs dev /run/dev
        cp -a null zero urandom fuse loop-control ublk-control /run/dev/ 2>/run/none || :
        mount --move /run/dev /dev; cd /; exec \"$0\" --exact --ignored --nocapture child_without_nodes";
    let args = [
        "--mount",
        "--propagation=private",
        "sh",
        "-c",
        script,
        test.to_str().unwrap(),
    ];
    let said = clients::succeed(&unshare, &args);
    assert!(said.contains("1 passed"), "{said}");
}

#[tokio::test]
#[ignore = "another test's child process"]
async fn child_without_nodes() {
    let disk = attached(Memory::new(SIZE)).await.unwrap();
    let mut block = Aligned::filled(4096, 3);
    let file = direct(disk.path());
    file.write_all_at(&block, 0).unwrap();
    block.fill(0);
    file.read_exact_at(&mut block, 0).unwrap();
    assert_eq!(block[..], [3; 4096]);
    drop(file);
    detach(disk).await;
}

#[tokio::test]
async fn only_a_disk_that_outlives_its_process_is_recoverable() {
    let device = opened(Memory::new(SIZE)).await;
    let builder = Builder::new(device.clone()).via(via()).recoverable(true);
    match builder.attach().await {
        Err(AttachError::Refused(why)) => assert!(why.contains("SURVIVES_KILL"), "{why}"),
        Err(AttachError::NotRoot) => need::impossible("only root makes block devices"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn what_a_killed_process_leaves_is_stale_and_taken_away_when_unused() {
    let Some(mut child) = Child::start("child_that_is_killed") else {
        return;
    };
    let path = PathBuf::from(child.said("attached"));
    let pid = child.id();
    assert_eq!(listed(pid)[0].state(), State::Running);
    // Whoever has claimed the device keeps it, dead or not.
    let claim = open(&path, libc::O_EXCL).unwrap();
    child.kill();
    let [stale] = &listed(pid)[..] else {
        panic!("not on record");
    };
    assert_eq!((stale.state(), stale.path()), (State::Stale, Some(&*path)));
    // The driver of ublk takes a device away itself, and those who have it open have nothing.
    if via() != Via::Ublk {
        match stale.detach() {
            Err(DetachError::InUse { .. }) => {}
            other => panic!("{other:?}"),
        }
        assert_eq!(listed(pid).len(), 1);
    }
    drop(claim);
    until("the device can be taken away", || stale.detach().is_ok());
    assert!(listed(pid).is_empty());
    is_gone(&path);
    // Another finds the place free.
    detach(attached(Memory::new(SIZE)).await.unwrap()).await;
}

#[tokio::test]
#[ignore = "another test's child process"]
async fn child_that_is_killed() {
    if let Some(disk) = attached(Memory::new(SIZE)).await {
        children::say("attached", disk.path().display());
        std::future::pending::<()>().await;
    }
    children::say("skipped", "");
}
