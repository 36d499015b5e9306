//! The reference engines are legal, and the checker knows it: no false alarm.

use userland_io_testing::reference::{LogDisk, MapDisk, SyncDisk};
use userland_io_testing::sim::{AfterFailedFlush, DiskConfig};
use userland_io_testing::torture::{Scope, exhaustive};
use userland_io_testing::{Subject, Torture};

fn sync(config: DiskConfig) -> Subject {
    Subject::new("sync", config, SyncDisk::open)
}

fn map(config: DiskConfig) -> Subject {
    Subject::new("map", config, MapDisk::open)
}

fn log(config: DiskConfig) -> Subject {
    Subject::new("log", config, LogDisk::open)
}

fn subjects() -> [Subject; 3] {
    [
        sync(DiskConfig::new(12 * 64, 64)),
        map(DiskConfig::new(20 * 64, 64)),
        log(DiskConfig::new(100 * 64, 64)),
    ]
}

/// `SEEDS=100000 cargo test --release --test reference` runs more.
fn seeds(default: u64) -> std::ops::Range<u64> {
    let seeds = std::env::var("SEEDS").ok();
    0..seeds
        .map(|seeds| seeds.parse().expect("SEEDS is a number"))
        .unwrap_or(default)
}

#[test]
fn no_false_alarm_in_20_000_seeds() {
    for subject in subjects() {
        match Torture::new(&subject).seeds(seeds(20_000)).run() {
            Ok(report) => println!("{}: {report}", subject.name()),
            Err(failure) => panic!("{failure}"),
        }
    }
}

#[test]
fn no_false_alarm_with_errors_and_abandoned_futures() {
    for after in [AfterFailedFlush::Retry, AfterFailedFlush::Latch] {
        for mut subject in subjects() {
            subject.each_disk(|disk| disk.after_failed_flush = after);
            let torture = Torture::new(&subject).hostile();
            match torture.seeds(seeds(5_000)).run() {
                Ok(report) => println!("{}, {after:?}: {report}", subject.name()),
                Err(failure) => panic!("{failure}"),
            }
        }
    }
}

#[test]
fn no_false_alarm_on_slow_disks_that_fill_up() {
    for mut subject in subjects() {
        subject.each_disk(|disk| {
            disk.delay = std::time::Duration::from_millis(10);
            disk.capacity = Some(disk.geometry.size / 2);
        });
        let torture = Torture::new(&subject).hostile();
        match torture.seeds(seeds(3_000)).run() {
            Ok(report) => println!("{}, slow and full: {report}", subject.name()),
            Err(failure) => panic!("{failure}"),
        }
    }
}

#[test]
fn every_image_of_every_crash_point_is_legal() {
    for subject in subjects() {
        let scope = Scope {
            seeds: 0..std::env::var("SCOPES")
                .map_or(10, |n| n.parse().expect("SCOPES is a number")),
            ..Scope::default()
        };
        match exhaustive(&subject, &scope) {
            Ok(report) => println!("{}: {report}", subject.name()),
            Err(failure) => panic!("{failure}"),
        }
    }
}
