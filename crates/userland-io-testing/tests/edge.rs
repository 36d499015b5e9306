//! The edge keeps the contract over every kind of disk, byte by byte, and asks the disk for nothing it does not do.

use userland_io::{CrashLevel, Discard, Features};
use userland_io_testing::script::Mix;
use userland_io_testing::sim::DiskConfig;
use userland_io_testing::{Subject, Torture};

/// A disk whose every property is drawn from `seed`, and the length of the pieces in which it is used.
fn any_disk(seed: u64) -> (DiskConfig, usize) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let block = 1 << rng.u32(5..10);
    let blocks = rng.u64(2..10);
    let mut config = DiskConfig::new(blocks * u64::from(block), block);
    let geometry = &mut config.geometry;
    if rng.bool() {
        geometry.size += rng.u64(1..u64::from(block));
    }
    let units = |rng: &mut fastrand::Rng| match rng.bool() {
        true => 0,
        false => block * rng.u32(1..4),
    };
    geometry.max_transfer = units(&mut rng);
    geometry.max_write_zeroes = units(&mut rng);
    geometry.discard_granularity = units(&mut rng);
    if rng.bool() {
        geometry.max_discard = geometry.discard_granule() * rng.u32(1..4);
    }
    geometry.discard = rng
        .choice([
            Discard::None,
            Discard::Unspecified,
            Discard::OldOrZero,
            Discard::Zeroes,
        ])
        .unwrap();
    geometry.crash = rng
        .choice([
            CrashLevel::None,
            CrashLevel::Flush,
            CrashLevel::Prefix,
            CrashLevel::Sync,
        ])
        .unwrap();
    geometry.features = Features::empty();
    let volatile = matches!(geometry.crash, CrashLevel::Flush | CrashLevel::Prefix);
    geometry.features.set(Features::VOLATILE_CACHE, volatile);
    for feature in [
        Features::FUA,
        Features::WRITE_ZEROES,
        Features::EXTENTS,
        Features::ATOMIC_READS,
        Features::SURVIVES_KILL,
    ] {
        geometry.features.set(feature, rng.bool());
    }
    config.slow_zeroes = rng.bool();
    config.dirty = rng.bool();
    let cell = match rng.u8(..3) {
        0 => block as usize,
        1 => 32,
        _ => (block as usize / 2).max(32),
    };
    (config, cell)
}

fn torture(configs: u64, seeds: u64, mix: &Mix) {
    let mut crashes = 0;
    for number in 0..configs {
        let (config, cell) = any_disk(number);
        let geometry = config.geometry;
        let subject = Subject::new("edge", config, async |disk| Ok(disk)).cell(cell);
        let mut mix = mix.clone();
        mix.blocks = (geometry.size as usize).div_ceil(cell).min(40) as u16;
        let torture = Torture::new(&subject).mix(mix);
        match torture.seeds(number * seeds..(number + 1) * seeds).run() {
            Ok(report) => crashes += report.crashes,
            Err(failure) => panic!("disk {number}, in pieces of {cell}: {geometry:#?}\n{failure}"),
        }
    }
    println!("{configs} kinds of disk, {crashes} crashes");
}

#[test]
fn bytes_reach_any_disk_and_survive_as_it_claims() {
    torture(500, 25, &Mix::default());
}

#[test]
fn nothing_is_lost_by_errors_and_abandoned_futures() {
    torture(500, 25, &Mix::default().hostile());
}

#[test]
fn a_forgotten_future_harms_nobody_else() {
    let mix = Mix {
        forgets: true,
        abandons: 6,
        ..Mix::default()
    };
    torture(300, 25, &mix);
}
