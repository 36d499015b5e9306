//! Everything the library has goes through the checks: engines, layers and stacks of them, at the edge, through a
//! device, and through NBD with 1, 4 and 16 connections.

#[path = "common/runtime.rs"]
mod runtime;
#[path = "common/table.rs"]
mod table;

use std::path::{Path, PathBuf};

use runtime::block_on;
use table::table;
use userland_io::stack::Registry;
use userland_io::{AnyEngine, CrashLevel, Error, ErrorKind, Result};
use userland_io_testing::check::Clause;
use userland_io_testing::live::{Live, Tokio, through_device};
use userland_io_testing::nbd::{Clients, through_nbd};
use userland_io_testing::script::Script;
use userland_io_testing::stack::simulate;
use userland_io_testing::{Subject, Torture, conformance};

/// How a stack is reached.
#[derive(Clone, Copy, Debug)]
enum Way {
    Edge,
    Device,
    /// So many clients, so many connections each.
    Nbd(usize, usize),
}

const WAYS: [Way; 6] = [
    Way::Edge,
    Way::Device,
    Way::Nbd(1, 1),
    Way::Nbd(1, 4),
    Way::Nbd(4, 1),
    Way::Nbd(2, 8),
];

async fn open(words: &str) -> Result<AnyEngine> {
    let opened = Registry::builtin().open(words).await;
    opened.map_err(|error| Error::new(ErrorKind::Io, error))
}

async fn fronts(words: &str, way: Way) -> Result<Vec<AnyEngine>> {
    let engine = open(words).await?;
    match way {
        Way::Edge => Ok(vec![engine]),
        Way::Device => Ok(vec![through_device(engine).await?]),
        Way::Nbd(count, connections) => through_nbd(engine, Clients { count, connections }).await,
    }
}

fn real(words: &str, way: Way) -> Subject {
    let owned = words.to_owned();
    Subject::over(format!("{words} by {way:?}"), Vec::new(), move |_| {
        let words = owned.clone();
        async move { fronts(&words, way).await }
    })
}

/// The suite, then many clients, each way.
async fn check(words: &str, runs: u64) {
    for way in WAYS {
        let one = async || Ok(fronts(words, way).await?.remove(0));
        // Through NBD with many, the suite needs one of them only.
        if !matches!(way, Way::Nbd(4, _)) {
            let verdict = conformance::all(one).await;
            verdict.unwrap_or_else(|verdict| panic!("{words} by {way:?}: {verdict}"));
        }
        let subject = real(words, way);
        for live in [
            Live::new(&subject, &Tokio),
            Live::new(&subject, &Tokio).hostile(),
        ] {
            if let Err(failure) = live.run(0..runs, |_| true).await {
                panic!("{failure}");
            }
        }
    }
}

fn each(stacks: &[&str], runs: u64) {
    block_on(async {
        for words in stacks {
            check(words, runs).await;
        }
    });
}

#[test]
fn memory() {
    each(&["memory:100K", "memory:12345"], 60);
}

#[test]
fn disks_without_bytes() {
    each(&["null:100K,readonly", "pattern:100K"], 20);
}

#[test]
fn layers_one_at_a_time() {
    each(
        &[
            "memory:100K offset:4K",
            "memory:100K offset:513,size=50K",
            "memory:100K stats",
            "memory:100K readonly",
            "memory:100K delay:10us",
            "memory:100K fault:EIO,on=status",
        ],
        25,
    );
}

#[test]
fn stacks_three_deep() {
    each(
        &[
            "memory:100K offset:32K stats delay:flush=50us",
            "memory:100K stats offset:77 offset:4019",
        ],
        25,
    );
}

/// A write that was given up acts until a flush, here long after its script has ended: the next one is not blamed for it.
#[test]
fn what_one_script_gave_up_does_not_act_in_the_next() {
    block_on(async {
        let subject = real("memory:100K delay:write=10ms", Way::Nbd(1, 4));
        let script: Script = "seed=1 0:w0+4~1".parse().unwrap();
        if let Err(failure) = Live::new(&subject, &Tokio).replay(&script, 20).await {
            panic!("{failure}");
        }
    });
}

fn files(dir: &Path, direct: bool) {
    let path = dir.join("disk.img");
    let path = path.display();
    each(&[&format!("file:{path},size=150K")], 40);
    each(&[&format!("file:{path},aio=threads")], 25);
    if direct {
        each(
            &[
                &format!("file:{path},direct"),
                &format!("file:{path},direct,aio=threads"),
            ],
            25,
        );
    }
    each(&[&format!("file:{path} offset:50K stats delay:5us")], 15);
    let path = dir.join("parted.img");
    let image = [&table(3, 200)[..], &[0xa5; 120_000]].concat();
    std::fs::write(&path, image).unwrap();
    each(&[&format!("file:{} partition:1", path.display())], 15);
}

#[test]
fn files_on_a_disk() {
    // Where the build is: a file system that has direct I/O, usually.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    files(dir.path(), cfg!(target_os = "linux"));
}

#[cfg(target_os = "linux")]
#[test]
fn files_in_memory() {
    let shm = PathBuf::from("/dev/shm");
    if !shm.is_dir() {
        println!("SKIP: there is no /dev/shm");
        return;
    }
    files(tempfile::tempdir_in(shm).unwrap().path(), false);
}

/// What survives when the machine stops, for the layers over a simulated disk.
#[test]
fn crashes_below_each_layer() {
    let registry = Registry::builtin();
    let mut crashes = 0;
    for words in [
        "memory:64K",
        "file:x,size=64K stats",
        "memory:64K offset:8K",
        "memory:64K offset:4K,size=16K stats offset:512",
        "memory:64K offset:100",
    ] {
        let plan = registry.parse(words).unwrap();
        let simulation = simulate(&registry, &plan).unwrap();
        let subject = simulation.subject(None);
        match Torture::new(&subject).hostile().seeds(0..3000).run() {
            Ok(report) => crashes += report.crashes,
            Err(failure) => panic!("{failure}"),
        }
    }
    assert!(crashes > 10_000, "{crashes}");
}

#[test]
fn crashes_behind_a_socket() {
    let registry = Registry::builtin();
    let plan = registry.parse("memory:64K offset:8K stats").unwrap();
    let simulation = simulate(&registry, &plan).unwrap();
    block_on(async {
        for (count, connections) in [(1, 1), (1, 4), (4, 1), (2, 8)] {
            let clients = Clients { count, connections };
            let subject = simulation.subject_over(None, move |engine| through_nbd(engine, clients));
            let report = Live::new(&subject, &Tokio).run(0..60, |_| true).await;
            let report = report.unwrap_or_else(|failure| panic!("{failure}"));
            assert!(report.crashes > 20, "{report}");
        }
    });
}

/// The checks can fail: a disk that forgets what is written is no disk.
#[test]
fn a_disk_that_forgets_is_found_whatever_the_way() {
    block_on(async {
        for way in WAYS {
            let subject = real("null:200K", way);
            let failure = Live::new(&subject, &Tokio).run(0..50, |_| true).await;
            let failure = failure.unwrap_err();
            assert_eq!(failure.verdict.clause, Clause::Live, "{failure}");
            let left: usize = failure.script.rounds.iter().map(|r| r.actions.len()).sum();
            assert!(left <= 3, "{left} are no minimum: {failure}");
        }
    });
}

/// Likewise for crashes: a disk that needs a flush keeps less than one that needs none.
#[test]
fn a_claim_that_is_too_strong_is_found() {
    let registry = Registry::builtin();
    let plan = registry.parse("memory:64K offset:8K").unwrap();
    let simulation = simulate(&registry, &plan).unwrap();
    for (claim, clause) in [
        (CrashLevel::Sync, Clause::Sync),
        (CrashLevel::Prefix, Clause::Prefix),
    ] {
        let subject = simulation.subject(Some(claim));
        let failure = Torture::new(&subject).seeds(0..1000).run().unwrap_err();
        assert_eq!(failure.verdict.clause, clause, "{failure}");

        let clients = Clients {
            count: 2,
            connections: 2,
        };
        let subject =
            simulation.subject_over(Some(claim), move |engine| through_nbd(engine, clients));
        let failure = block_on(Live::new(&subject, &Tokio).run(0..1000, |_| true)).unwrap_err();
        assert_eq!(failure.verdict.clause, clause, "{failure}");
    }
}
