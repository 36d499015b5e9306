//! The checker checked: every bug that we can think of is found, and without it nothing is.
//!
//! Prints a table: how many seeds it took, how many of a thousand show it, and what a run costs.

mod bug;
mod cache;
mod journal;
mod log;
mod map;
mod pass;

use std::time::Instant;

use bug::Bug;
use userland_io_testing::check::Clause;
use userland_io_testing::script::Mix;
use userland_io_testing::sim::{AfterFailedFlush, DiskConfig};
use userland_io_testing::{Subject, Torture};

#[derive(Clone, Copy)]
enum Vehicle {
    Pass,
    Cache,
    Map,
    Overlay,
    Log,
    Journal,
}

const BUGS: [(Bug, Vehicle, &[Clause]); 29] = {
    use Bug::*;
    use Clause::*;
    [
        (FlushDoesNothing, Vehicle::Pass, &[Flush]),
        (FuaIgnored, Vehicle::Pass, &[Flush]),
        (FlushOfOwnQueueOnly, Vehicle::Cache, &[Flush]),
        (ZeroesShowWhatLiesBelow, Vehicle::Overlay, &[Live]),
        (TornBlock, Vehicle::Pass, &[Tearing]),
        (LateHolePunch, Vehicle::Overlay, LIVE),
        (StaleCachePerQueue, Vehicle::Cache, LIVE),
        (MetadataBeforeData, Vehicle::Map, &[Flush, Foreign]),
        (ReorderingUnderPrefix, Vehicle::Pass, &[Prefix]),
        (MapOnlyAtFlushUnderKill, Vehicle::Map, &[Live]),
        (ShortRead, Vehicle::Pass, &[Operation]),
        (LastBlockOffByOne, Vehicle::Pass, &[Live, Flush]),
        (StaleExtents, Vehicle::Pass, LIVE),
        (DiscardBelowGranularity, Vehicle::Pass, LIVE),
        (LostError, Vehicle::Pass, LIVE),
        (LateSecondLeg, Vehicle::Pass, LIVE),
        (DroppedFutureActsAfterFlush, Vehicle::Pass, &[Error, Flush]),
        (WrongFuaSplit, Vehicle::Pass, &[Flush]),
        (LatchedErrorForgotten, Vehicle::Pass, &[Flush]),
        (SlotReusedBeforeFlush, Vehicle::Map, &[Flush, Foreign]),
        (OldRecordsComeBack, Vehicle::Log, &[Prefix, Foreign]),
        (SyncWithoutFlush, Vehicle::Pass, &[Sync]),
        (TornUnit, Vehicle::Pass, &[Tearing]),
        (FlushErrorSwallowed, Vehicle::Pass, &[Flush]),
        (RecoveryWithoutFlush, Vehicle::Journal, &[Recovery, Sync]),
        (StaleLend, Vehicle::Pass, LIVE),
        (NowaitTailLate, Vehicle::Pass, LIVE),
        (LentTailLate, Vehicle::Pass, LIVE),
        (LentZeroes, Vehicle::Pass, LIVE),
    ]
};

fn subject(vehicle: Vehicle, bug: Bug) -> Subject {
    let disk = |blocks: u64| DiskConfig::new(blocks * 64, 64);
    let name = format!("{bug:?}");
    match vehicle {
        Vehicle::Pass => {
            let mut config = disk(10);
            if bug == Bug::TornBlock {
                config = DiskConfig::new(10 * 64, 32);
            }
            if bug == Bug::LatchedErrorForgotten {
                config.after_failed_flush = AfterFailedFlush::Forget;
            }
            Subject::new(name, config, move |disk| pass::Pass::open(disk, bug))
        }
        Vehicle::Cache => Subject::over(name, vec![disk(10)], move |mut disks| {
            cache::Cache::open(disks.remove(0), bug)
        }),
        Vehicle::Map => Subject::over(name, vec![disk(13)], move |disks| {
            map::Map::open(disks, bug)
        }),
        Vehicle::Overlay => {
            let mut base = disk(8);
            base.dirty = true;
            Subject::over(name, vec![disk(13), base], move |disks| {
                map::Map::open(disks, bug)
            })
        }
        Vehicle::Journal => {
            Subject::new(name, disk(8), move |disk| journal::Journal::open(disk, bug))
        }
        Vehicle::Log => Subject::new(name, disk(200), move |disk| log::Log::open(disk, bug)),
    }
}

fn mix(vehicle: Vehicle, bug: Bug) -> Mix {
    // What is in doubt after an error or a dropped future these do not care to know.
    let simple = matches!(
        vehicle,
        Vehicle::Map | Vehicle::Overlay | Vehicle::Log | Vehicle::Journal
    );
    let mut mix = match simple {
        true => Mix::default(),
        false => Mix::default().hostile(),
    };
    mix.blocks = 10;
    mix.rounds = 3;
    if let Vehicle::Log = vehicle {
        (mix.blocks, mix.ops) = (4, 8);
    }
    if bug == Bug::LatchedErrorForgotten {
        mix.kills = false;
    }
    mix
}

/// How it shows that an acknowledged value is not there: in a read, or after a crash.
const LIVE: &[Clause] = &[Clause::Live, Clause::Error, Clause::Foreign, Clause::Flush];

/// Every planted bug must be found among so many seeds.
const BOUND: u64 = 5_000;

#[test]
fn every_planted_bug_is_found() {
    println!(
        "{:<30} {:>10} {:>12} {:>10}  found as",
        "bug", "first seed", "of 1000 seeds", "us a run"
    );
    let mut missed = Vec::new();
    for (bug, vehicle, clauses) in BUGS {
        let subject = subject(vehicle, bug);
        let torture = Torture::new(&subject).mix(mix(vehicle, bug)).as_found();
        let Err(first) = torture.seeds(0..BOUND).run() else {
            missed.push(format!("{bug:?}: not found in {BOUND} seeds"));
            continue;
        };
        let clause = first.verdict.clause;
        if !clauses.contains(&clause) {
            missed.push(format!("{bug:?} is seen as another: {first}"));
        }
        let torture = Torture::new(&subject).mix(mix(vehicle, bug)).as_found();
        let start = Instant::now();
        let runs = (0..1000).map(|seed| torture.run_one(seed));
        let shown = runs.filter(Result::is_err).count();
        println!(
            "{:<30} {:>10} {:>12} {:>10.1}  {clause}",
            format!("{bug:?}"),
            first.found.seed,
            shown,
            start.elapsed().as_secs_f64() * 1e3
        );
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

#[test]
fn without_its_bug_no_vehicle_alarms() {
    for vehicle in [
        Vehicle::Pass,
        Vehicle::Cache,
        Vehicle::Map,
        Vehicle::Overlay,
        Vehicle::Log,
        Vehicle::Journal,
    ] {
        let subject = subject(vehicle, Bug::None);
        let torture = Torture::new(&subject).mix(mix(vehicle, Bug::None));
        if let Err(failure) = torture.seeds(0..5_000).run() {
            panic!("{failure}");
        }
    }
}
