//! Databases on a device that loses power: the device is attached over a simulated disk, which is cut at random points
//! while they commit, and each image that a cut leaves has every row that was committed by then.
//!
//! A cut takes nothing away from those who use the device. It is a copy of what the disk could have
//! after a crash at that moment, with requests in flight, and is mounted and looked at later.
#![cfg(target_os = "linux")]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use userland_io::{Checked, Engine, Filter, Result, WriteBuf, WriteFlags};
use userland_io_testing::sim::{DiskConfig, Keep, SimDisk, World};

#[path = "../../userland-io/tests/common/attach.rs"]
mod attach;
#[path = "../../userland-io/tests/common/clients.rs"]
mod clients;
#[path = "../../userland-io/tests/common/mounted.rs"]
mod mounted;
#[path = "../../userland-io/tests/common/need.rs"]
mod need;
use attach::{attached, detach, until};
use clients::{run, succeed};
use mounted::Mounted;

const SIZE: u64 = 128 << 20;
/// SQLite, with each of its ways to commit.
const SQLITE: &[Database] = &[
    Database("sqlite_rows.py", "delete"),
    Database("sqlite_rows.py", "persist"),
    Database("sqlite_rows.py", "wal"),
];
const POSTGRES: &[Database] = &[Database("postgres_rows.py", "cluster")];

/// A script that fills a database and looks at it, and the database's name.
struct Database(&'static str, &'static str);

impl Database {
    /// The script, to do what `what` says to the database in `directory`.
    fn command(&self, programs: &Programs, what: &str, directory: &Path) -> Command {
        let Database(script, name) = self;
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python");
        let mut command = Command::new(&programs.python);
        command.arg(scripts.join(script)).arg(what);
        command.arg(directory.join(name)).arg(name);
        command
    }
}

/// The programs that it takes.
struct Programs {
    databases: &'static [Database],
    python: PathBuf,
    mkfs: PathBuf,
    e2fsck: PathBuf,
}

impl Programs {
    fn find(databases: &'static [Database]) -> Option<Self> {
        Some(Programs {
            databases,
            python: need::python("sqlite3")?,
            mkfs: need::program("mkfs.ext4")?,
            e2fsck: need::program("e2fsck")?,
        })
    }
}

/// A process that commits rows, for as long as this is there.
struct Load {
    process: Child,
    /// The process said so, or it is `u64::MAX` when it has not said anything yet.
    committed: Arc<AtomicU64>,
    has_ended: Arc<AtomicBool>,
}

impl Load {
    fn start(programs: &Programs, directory: &Path, database: &Database) -> Self {
        let mut command = database.command(programs, "load", directory);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let committed = Arc::new(AtomicU64::new(u64::MAX));
        let has_ended = Arc::new(AtomicBool::new(false));
        let (says, ends) = (committed.clone(), has_ended.clone());
        thread::spawn(move || {
            for line in lines.map_while(std::io::Result::ok) {
                says.store(line.parse().unwrap(), Ordering::SeqCst);
            }
            ends.store(true, Ordering::SeqCst);
        });
        Load {
            process,
            committed,
            has_ended,
        }
    }

    fn committed(&self) -> u64 {
        self.committed.load(Ordering::SeqCst)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // The end of its input is what ends it.
        drop(self.process.stdin.take());
        let ended = self.process.wait().unwrap();
        assert!(ended.success() || thread::panicking(), "{ended}");
    }
}

/// What a cut left.
struct Cut {
    disk: SimDisk,
    keep: Keep,
    /// Rows that were committed before it, of each database.
    committed: Vec<u64>,
}

/// Cuts the power `count` times while databases commit on a device over `engine`, which is over `disk`. `None` once
/// the skip is told.
async fn cuts(
    programs: &Programs,
    disk: &SimDisk,
    engine: impl Engine,
    count: usize,
    keeps: &[Keep],
) -> Option<Vec<Cut>> {
    let device = attached(engine).await?;
    succeed(
        &programs.mkfs,
        &["-q", "-F", device.path().to_str().unwrap()],
    );
    let mounted = Mounted::new(device.path());
    let databases = programs.databases.iter();
    let loads: Vec<Load> = databases
        .map(|database| Load::start(programs, mounted.path(), database))
        .collect();
    let sum = || {
        loads
            .iter()
            .map(|load| load.committed().saturating_add(1))
            .sum::<u64>()
    };
    let all_go_on = || {
        assert!(
            !loads
                .iter()
                .any(|load| load.has_ended.load(Ordering::SeqCst))
        );
        loads.iter().all(|load| load.committed() != u64::MAX)
    };
    until("every database is there", all_go_on);
    let world = disk.world();
    let mut cuts = Vec::new();
    for index in 0..count {
        let target = sum() + world.draw(60);
        until("rows are committed", || all_go_on() && sum() >= target);
        // Somewhere within what comes next.
        let event = world.events() + world.draw(60);
        while world.events() < event && all_go_on() {
            thread::yield_now();
        }
        let keep = keeps[index % keeps.len()];
        cuts.push(Cut {
            // First, so that all of them are before the cut.
            committed: loads.iter().map(Load::committed).collect(),
            disk: disk.crash(keep),
            keep,
        });
    }
    drop(loads);
    drop(mounted);
    detach(device).await;
    Some(cuts)
}

/// What is wrong with what a cut left.
async fn look(programs: &Programs, cut: &Cut) -> std::result::Result<(), String> {
    let device = attached(cut.disk.clone()).await.unwrap();
    let result = Mounted::attempt(device.path()).and_then(|mounted| {
        for (database, committed) in programs.databases.iter().zip(&cut.committed) {
            let name = database.1;
            let mut check = database.command(programs, "check", mounted.path());
            let ran = check.stdin(Stdio::null()).output().unwrap();
            if !ran.status.success() {
                let said = String::from_utf8_lossy(&ran.stderr);
                return Err(format!("{name}: {said}"));
            }
            let said = String::from_utf8_lossy(&ran.stdout);
            let found: u64 = said.trim().parse().unwrap();
            if found < *committed {
                return Err(format!(
                    "{name}: {committed} rows, of which {found} are left"
                ));
            }
        }
        Ok(())
    });
    let result = result.and_then(|()| {
        let ran = run(
            &programs.e2fsck,
            &["-f", "-n", device.path().to_str().unwrap()],
        );
        if ran.ok { Ok(()) } else { Err(ran.stdout) }
    });
    detach(device).await;
    result.map_err(|error| format!("{:?}, {:?}: {error}", cut.keep, cut.committed))
}

async fn every_row_survives(databases: &'static [Database], seed: u64, count: usize) {
    let Some(programs) = Programs::find(databases) else {
        return;
    };
    let world = World::new(seed);
    let disk = SimDisk::new(&world, DiskConfig::new(SIZE, 4096));
    let keeps = [Keep::Subset, Keep::Nothing, Keep::Torn, Keep::Prefix];
    let Some(cuts) = cuts(&programs, &disk, disk.clone(), count, &keeps).await else {
        return;
    };
    for cut in &cuts {
        look(&programs, cut).await.unwrap();
    }
    let breaches = world.take_breaches();
    assert!(breaches.is_empty(), "{breaches:#?}");
    let rows: u64 = cuts.last().map_or(0, |cut| cut.committed.iter().sum());
    assert!(rows > count as u64 * 10, "{rows} rows are no load");
}

#[tokio::test]
async fn every_committed_row_survives_twenty_cuts() {
    every_row_survives(SQLITE, 1, 20).await;
}

#[tokio::test]
#[ignore = "takes minutes"]
async fn every_committed_row_survives_two_hundred_cuts() {
    for seed in 0..4 {
        every_row_survives(SQLITE, 100 + seed, 50).await;
    }
}

#[tokio::test]
#[ignore = "takes minutes, and a server that few machines have"]
async fn every_committed_row_of_postgresql_survives_twenty_cuts() {
    if !Path::new("/usr/lib/postgresql").exists() {
        return need::skip("needs the server of PostgreSQL");
    }
    every_row_survives(POSTGRES, 1, 20).await;
}

/// A layer that promises what it does not keep.
struct Forgetful(Checked<SimDisk>);

impl Filter for Forgetful {
    type Lower = SimDisk;
    fn lower(&self) -> &Checked<SimDisk> {
        &self.0
    }
    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, _: WriteFlags) -> Result {
        self.0.write(buf, offset, WriteFlags::empty()).await
    }
    async fn flush(&self) -> Result {
        Ok(())
    }
}

#[tokio::test]
async fn a_disk_that_does_not_flush_is_found_out() {
    let Some(programs) = Programs::find(SQLITE) else {
        return;
    };
    let disk = SimDisk::new(&World::new(3), DiskConfig::new(SIZE, 4096));
    let forgetful = Forgetful(Checked::new(disk.clone()).unwrap());
    let Some(cuts) = cuts(&programs, &disk, forgetful, 2, &[Keep::Subset]).await else {
        return;
    };
    for cut in &cuts {
        assert!(look(&programs, cut).await.is_err());
    }
}
