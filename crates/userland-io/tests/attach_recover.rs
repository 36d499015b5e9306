//! A process that serves a disk dies, and another carries on where it was: nobody who uses the disk notices.
#![cfg(all(feature = "attach", target_os = "linux"))]

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use userland_io::attach::{
    AttachError, Attached, Builder, DetachError, Holder, Listed, State, Via, list,
};
use userland_io::stack::Registry;
use userland_io::transports::ublk::{self, BlockDevice, Target};
use userland_io::{AnyEngine, Device};

#[path = "common/attach.rs"]
mod attach;
#[path = "common/children.rs"]
mod children;
#[path = "common/clients.rs"]
mod clients;
#[path = "common/need.rs"]
mod need;
use attach::{Aligned, attached_as, detach, direct, until, via};
use children::Child;
use clients::assert_same;

const SIZE: u64 = 4 << 20;
/// The file that a child serves.
const FILE: &str = "ULIO_TEST_FILE";
/// A layer over that file.
const LAYER: &str = "ULIO_TEST_LAYER";
/// The device that a child resumes.
const PATH: &str = "ULIO_TEST_PATH";

/// Tests take turns: which devices there are is looked at, and which index is free.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

async fn disk(file: &Path, size: u64) -> Device<AnyEngine> {
    let mut words = vec![format!("file:{},size={size}", file.display())];
    words.extend(std::env::var(LAYER));
    let engine = Registry::builtin().open_args(&words).await.unwrap();
    Device::open(engine).await.unwrap()
}

async fn resumed(file: &Path, size: u64, path: &Path) -> Result<Attached, AttachError> {
    let device = disk(file, size).await;
    Builder::new(device)
        .via(Via::Ublk)
        .resume(path)
        .attach()
        .await
}

#[tokio::test]
async fn ways_that_cannot_recover_say_so() {
    if via() == Via::Ublk {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let device = disk(&directory.path().join("disk"), SIZE).await;
    let builder = Builder::new(device).via(via()).recoverable(true);
    match builder.attach().await {
        Err(AttachError::NoWay(passed)) => {
            let [reason] = &passed[..] else {
                panic!("{passed:?}");
            };
            assert!(reason.to_string().contains("only ublk"), "{reason}");
        }
        Err(AttachError::NotRoot) => need::impossible("only root makes block devices"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn requests_under_way_are_done_by_the_next_process() {
    if via() != Via::Ublk {
        return;
    }
    let _turn = TURN.lock().await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("disk");
    let Some(mut child) = Child::with("child_that_serves_a_file", |command| {
        command.env(FILE, &file)
    }) else {
        return;
    };
    let path = PathBuf::from(child.said("attached"));
    let load = Load::start(&path);
    load.wait_for(50);
    child.kill();
    let waiting = list()
        .unwrap()
        .into_iter()
        .find(|listed| listed.pid() == child.id());
    assert_eq!(waiting.unwrap().state(), State::Waiting);

    // Another disk is refused, and the device waits on.
    let longer = directory.path().join("longer");
    let refused = resumed(&longer, 2 * SIZE, &path).await.unwrap_err();
    assert!(
        refused.to_string().contains("was made for another disk"),
        "{refused}"
    );

    let second = resumed(&file, SIZE, &path).await.unwrap();
    assert_eq!((second.path(), second.size()), (&*path, SIZE));
    load.wait_for(50);
    // While its process lives, nobody takes it.
    let like_it = directory.path().join("like it");
    let third = resumed(&like_it, SIZE, &path).await.unwrap_err();
    assert!(
        third.to_string().contains("is being served by process"),
        "{third}"
    );
    let model = load.end();
    assert_same(&model, &std::fs::read(&file).unwrap(), "the file");
    detach(second).await;
    assert!(
        list()
            .unwrap()
            .iter()
            .all(|listed| listed.path() != Some(&path))
    );
}

#[tokio::test]
async fn another_device_in_its_place_is_left_alone() {
    if via() != Via::Ublk {
        return;
    }
    let _turn = TURN.lock().await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("disk");
    let Some((child, path)) = killed(&file) else {
        return;
    };
    let index = index_of(&path);
    ublk::remove(index).await.unwrap();
    let others = directory.path().join("another");
    let mut another = Child::with("child_that_is_another_program", |command| {
        command.env(FILE, &others).env(PATH, &path)
    })
    .unwrap();
    assert_eq!(another.said("serves"), path.to_str().unwrap());
    another.kill();

    let all = list().unwrap();
    let gone = all.iter().find(|listed| listed.pid() == child.id());
    let gone = gone.unwrap();
    assert_eq!(gone.state(), State::Stale);
    let refused = resumed(&file, SIZE, &path).await.unwrap_err();
    assert!(
        refused
            .to_string()
            .contains("is not the device that is on record"),
        "{refused}"
    );
    gone.detach().unwrap();
    waits(index).await;
    // Whoever asks for that one has it.
    let taken = resumed(&others, SIZE, &path).await.unwrap();
    detach(taken).await;
}

/// Serves a file by a device that is nowhere on record.
#[tokio::test]
#[ignore = "another test's child process"]
async fn child_that_is_another_program() {
    let device = disk(Path::new(&std::env::var_os(FILE).unwrap()), SIZE).await;
    let index = index_of(Path::new(&std::env::var_os(PATH).unwrap()));
    let target = Target::new(device).recoverable(true).index(index);
    let block = target.add().await.unwrap();
    children::say("serves", block.path().display());
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn one_that_was_not_noted_yet_is_found() {
    if via() != Via::Ublk {
        return;
    }
    let _turn = TURN.lock().await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("disk");
    let Some((child, path)) = killed(&file) else {
        return;
    };
    // As if it had died as soon as the driver had the device.
    let record = format!("/run/ulio/{}-0.device", child.id());
    let text = std::fs::read_to_string(&record).unwrap();
    let early = |line: &&str| !line.starts_with("way-") && !line.starts_with("device ");
    let text: Vec<&str> = text.lines().filter(early).collect();
    let text = text
        .join("\n")
        .replace("recoverable true", "recoverable false");
    std::fs::write(&record, text).unwrap();
    let all = list().unwrap();
    let left = all.iter().find(|listed| listed.pid() == child.id());
    let left = left.unwrap();
    assert_eq!((left.state(), left.path()), (State::Stale, None));
    left.detach().unwrap();
    let index = index_of(&path);
    until("the device is gone", || {
        !Path::new(&format!("/sys/class/ublk-char/ublkc{index}")).exists()
    });
    assert!(!Path::new(&record).exists());
}

/// A process that has died as soon as its device was told of, while the kernel looked for partitions, with the device's
/// lock in hand: its path. `None` once the skip is told.
async fn killed_in_the_scan(file: &Path) -> Option<(Child, PathBuf)> {
    let serve = |command: &mut Command| {
        command.env(FILE, file).env(LAYER, "delay:read=1h");
    };
    let mut child = Child::with("child_that_serves_a_file", |command| {
        serve(command);
        command
    })?;
    let path = PathBuf::from(child.said("attached"));
    let index = index_of(&path);
    until("the kernel reads", || {
        let inflight = attach::told(&path, "inflight");
        !inflight.trim_start().starts_with('0')
    });
    child.kill();
    waits(index).await;
    Some((child, path))
}

/// What is on record of a dead process, once it is detached, which may not take long.
async fn detached(listed: Listed) -> Result<(), DetachError> {
    let detach = tokio::task::spawn_blocking(move || listed.detach());
    let detached = tokio::time::timeout(attach::PATIENCE, detach).await;
    detached.expect("detach hangs").unwrap()
}

/// A process that has served `file` by a device at that path, and was killed. `None` where there can be none.
fn killed(file: &Path) -> Option<(Child, PathBuf)> {
    let mut child = Child::with("child_that_serves_a_file", |command| {
        command.env(FILE, file)
    })?;
    let path = PathBuf::from(child.said("attached"));
    child.kill();
    Some((child, path))
}

fn left_by(child: &Child) -> Listed {
    let mut all = list().unwrap().into_iter();
    all.find(|listed| listed.pid() == child.id()).unwrap()
}

#[tokio::test]
async fn one_killed_while_the_kernel_looks_for_partitions_can_be_detached() {
    if via() != Via::Ublk || looks_before_it_is_ready() {
        return;
    }
    let _turn = TURN.lock().await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("disk");
    let Some((child, path)) = killed_in_the_scan(&file).await else {
        return;
    };
    let left = left_by(&child);
    assert_eq!(left.state(), State::Waiting);
    detached(left).await.unwrap();
    until("the device is gone", || !path.exists());
    assert!(
        list()
            .unwrap()
            .iter()
            .all(|listed| listed.pid() != child.id())
    );
}

#[tokio::test]
async fn one_that_somebody_waits_to_open_is_in_use() {
    if via() != Via::Ublk || looks_before_it_is_ready() {
        return;
    }
    let _turn = TURN.lock().await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("disk");
    let Some((child, path)) = killed_in_the_scan(&file).await else {
        return;
    };
    let opener = thread::spawn({
        let path = path.clone();
        move || direct(&path)
    });
    let refused = |result: Result<(), DetachError>| {
        let Err(DetachError::InUse { holders, .. }) = result else {
            panic!("{result:?}");
        };
        let own = std::process::id();
        assert!(
            matches!(&holders[..], [Holder::Waiting { pid, .. }] if *pid == own),
            "{holders:?}"
        );
    };
    let opens = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        let mut stacks = tasks.map(|task| std::fs::read_to_string(task.path().join("stack")));
        stacks.any(|stack| stack.unwrap_or_default().contains("bdev_open"))
    };
    until("somebody waits to open it", opens);
    refused(detached(left_by(&child)).await);
    // Nothing has come of it: the next process serves whoever waited.
    let second = resumed(&file, SIZE, &path).await.unwrap();
    let opened = opener.join().unwrap();
    let mut block = Aligned::new(4096);
    opened.read_exact_at(&mut block, 0).unwrap();
    drop(opened);
    detach(second).await;
}

/// True where the driver looks for partitions before the device is ready, so that nobody is told of one where it has not: before
/// Linux 7.0.
fn looks_before_it_is_ready() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let major = release
        .split('.')
        .next()
        .and_then(|major| major.parse().ok());
    major.is_some_and(|major: u32| major < 7)
}

/// Until the driver has seen that the device's process is dead.
async fn waits(index: u32) {
    tokio::time::timeout(attach::PATIENCE, async {
        loop {
            let all = ublk::devices().await.unwrap();
            let of_it = all.iter().find(|info| info.index == index);
            match of_it.expect("the device is gone").state {
                ublk::State::Waiting => return,
                _ => tokio::task::yield_now().await,
            }
        }
    })
    .await
    .expect("it does not wait for a process");
}

/// N of `/dev/ublkbN`.
fn index_of(path: &Path) -> u32 {
    let name = path.to_str().unwrap().strip_prefix("/dev/ublkb");
    name.unwrap().parse().unwrap()
}

#[tokio::test]
async fn one_that_runs_out_of_descriptors_leaves_none_and_harms_none() {
    if via() != Via::Ublk {
        return;
    }
    let _turn = TURN.lock().await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("disk");
    let short = "child_that_is_short_of_descriptors";
    let Some(mut adds) = Child::with(short, |command| command.env(FILE, &file)) else {
        return;
    };
    adds.said("done");
    let mut served = Child::with("child_that_serves_a_file", |command| {
        command.env(FILE, &file)
    })
    .unwrap();
    let path = served.said("attached");
    served.kill();
    waits(index_of(Path::new(&path))).await;
    let resumes = Child::with(short, |command| command.env(FILE, &file).env(PATH, &path));
    resumes.unwrap().said("done");
    // What is left is a record.
    for listed in list().unwrap() {
        if listed.path() == Some(Path::new(&path)) {
            listed.detach().unwrap();
        }
    }
}

/// Makes a device, or resumes one, with ever more descriptors until it works: each failure is told, and none changes anything.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "another test's child process"]
async fn child_that_is_short_of_descriptors() {
    let resumed = std::env::var_os(PATH).map(PathBuf::from);
    let device = disk(Path::new(&std::env::var_os(FILE).unwrap()), SIZE).await;
    if let Err(error) = ublk::devices().await {
        need::guest(&error.to_string());
        return children::say("skipped", "");
    }
    let before = ublk::devices().await.unwrap();
    let limits = getrlimit(Resource::Nofile);
    // Descriptors that are free but not the last would be taken first.
    let open = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64;
    let mut refusals = Vec::new();
    let made: BlockDevice = loop {
        let few = Rlimit {
            current: Some(open + refusals.len() as u64),
            ..limits
        };
        setrlimit(Resource::Nofile, few).unwrap();
        let target = Target::new(device.clone())
            .runtime(tokio::runtime::Handle::current())
            .recoverable(true)
            .queues(2);
        let made = tokio::time::timeout(attach::PATIENCE, async {
            match &resumed {
                Some(path) => target.resume(path).await,
                None => target.add().await,
            }
        });
        let made = made.await.expect("it neither works nor fails");
        setrlimit(Resource::Nofile, limits).unwrap();
        match made {
            Ok(block) => break block,
            Err(error) => refusals.push(error.to_string()),
        }
        assert_eq!(ublk::devices().await.unwrap(), before, "{refusals:#?}");
    };
    let of_queues = |text: &&String| text.contains("a queue of the block device");
    // Each queue takes two.
    let of_queues = refusals.iter().filter(of_queues).count();
    assert!(of_queues >= 2, "{refusals:#?}");
    made.shutdown().await.unwrap();
    children::say("done", "");
}

/// Threads that write and read back, and do not take an error.
struct Load {
    stop: &'static AtomicBool,
    done: &'static AtomicU64,
    threads: Vec<thread::JoinHandle<Vec<u8>>>,
}

impl Load {
    const THREADS: u64 = 8;

    fn start(path: &Path) -> Self {
        let stop: &AtomicBool = Box::leak(Box::default());
        let done: &AtomicU64 = Box::leak(Box::default());
        let part = SIZE / Self::THREADS;
        let threads = (0..Self::THREADS).map(|index| {
            let path = path.to_owned();
            thread::spawn(move || {
                let file = direct(&path);
                let mut random = fastrand::Rng::with_seed(index);
                let mut model = vec![0; part as usize];
                while !stop.load(Ordering::Relaxed) {
                    let len = 4096 * random.usize(1..8);
                    let at = 4096 * random.usize(0..(model.len() - len) / 4096);
                    let mut memory = Aligned::filled(len, random.u8(..));
                    file.write_all_at(&memory, index * part + at as u64)
                        .unwrap();
                    model[at..at + len].copy_from_slice(&memory);
                    memory.fill(0);
                    file.read_exact_at(&mut memory, index * part + at as u64)
                        .unwrap();
                    assert_same(&model[at..at + len], &memory, "read back");
                    done.fetch_add(1, Ordering::Relaxed);
                }
                file.sync_all().unwrap();
                model
            })
        });
        Load {
            stop,
            done,
            threads: threads.collect(),
        }
    }

    /// Waits for so many more of them.
    fn wait_for(&self, more: u64) {
        let target = self.done.load(Ordering::Relaxed) + more;
        until("the load goes on", || {
            assert!(!self.threads.iter().any(thread::JoinHandle::is_finished));
            self.done.load(Ordering::Relaxed) >= target
        });
    }

    /// Ends it, and gives what the device has to hold.
    fn end(self) -> Vec<u8> {
        self.stop.store(true, Ordering::Relaxed);
        let models = self
            .threads
            .into_iter()
            .map(|thread| thread.join().unwrap());
        models.collect::<Vec<_>>().concat()
    }
}

#[tokio::test]
#[ignore = "another test's child process"]
async fn child_that_serves_a_file() {
    let device = disk(Path::new(&std::env::var_os(FILE).unwrap()), SIZE).await;
    if let Some(disk) = attached_as(&device, |builder| builder.recoverable(true)).await {
        children::say("attached", disk.path().display());
        std::future::pending::<()>().await;
    }
    children::say("skipped", "");
}
