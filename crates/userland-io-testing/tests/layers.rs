//! The library's layers keep what the disk below them promises, alone and three deep.

#[path = "common/table.rs"]
mod table;

use table::table;
use userland_io::layers::{Fault, Offset, Operation, PartitionTable, Stats};
use userland_io::{AnyEngine, Checked, Engine, EngineExt, Layer, WriteBuf, WriteFlags};
use userland_io_testing::reference::{LogDisk, MapDisk};
use userland_io_testing::script::Mix;
use userland_io_testing::sim::DiskConfig;
use userland_io_testing::{Subject, Torture};

fn passes(subject: Subject) {
    for mix in [Mix::default(), Mix::default().hostile()] {
        if let Err(failure) = Torture::new(&subject).mix(mix).seeds(0..3_000).run() {
            panic!("{failure}");
        }
    }
}

#[test]
fn stats_change_nothing() {
    passes(Subject::new(
        "stats",
        DiskConfig::new(10 * 64, 64),
        async |disk| disk.layer(Stats::new()),
    ));
}

#[test]
fn a_fault_that_never_comes_changes_nothing() {
    passes(Subject::new(
        "fault",
        DiskConfig::new(10 * 64, 64),
        async |disk| disk.layer(Fault::new(5).on(Operation::Read).after(u64::MAX)),
    ));
}

#[test]
fn an_aligned_window_is_a_disk() {
    passes(Subject::new(
        "offset",
        DiskConfig::new(12 * 64, 64),
        async |disk| disk.layer(Offset::new(128).size(8 * 64 + 7)),
    ));
}

#[test]
fn a_window_that_starts_within_a_block_is_a_disk() {
    for start in [32, 96, 1, 77] {
        passes(Subject::new(
            "offset",
            DiskConfig::new(12 * 64, 64),
            move |disk| async move { disk.layer(Offset::new(start).size(8 * 64 + 7)) },
        ));
    }
}

#[test]
fn a_partition_is_a_disk() {
    passes(Subject::new(
        "partition",
        DiskConfig::new(13 * 512, 512),
        async |disk| {
            let disk = Checked::new(disk)?;
            let table = table(2, 10);
            let buf = WriteBuf::new(&table);
            disk.write(&buf, 0, WriteFlags::FUA).await?;
            let first = PartitionTable::read(&disk).await?.get(1)?;
            first.window().layer(disk)
        },
    ));
}

#[test]
fn a_window_of_a_window_of_a_map_is_a_disk() {
    passes(Subject::new(
        "stack",
        DiskConfig::new(30 * 64, 64),
        async |disk| {
            let map = MapDisk::open(disk).await?;
            map.layer(Offset::new(64))?
                .layer(Stats::new())?
                .layer(Offset::new(32))
        },
    ));
}

#[test]
fn a_log_on_a_window_of_a_map_is_a_log() {
    passes(Subject::new(
        "stack",
        DiskConfig::new(150 * 64, 64),
        async |disk| {
            let map = MapDisk::open(disk).await?;
            let window: AnyEngine = map.layer(Offset::new(64))?.erase();
            LogDisk::open(window).await
        },
    ));
}
