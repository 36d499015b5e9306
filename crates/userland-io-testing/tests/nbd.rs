//! The reference engines through NBD: crashes of what serves the socket, judged at the clients' end.
//!
//! `SEEDS=1000000 cargo test --release -p userland-io-testing --features nbd --test nbd -- --nocapture` runs more.

#[path = "common/runtime.rs"]
mod runtime;

use std::ops::Range;

use runtime::{block_on, on_one_thread};
use userland_io::{AnyEngine, Engine, Result};
use userland_io_testing::Subject;
use userland_io_testing::live::{Live, Tokio};
use userland_io_testing::nbd::{Clients, through_nbd};
use userland_io_testing::reference::{LogDisk, MapDisk, SyncDisk};
use userland_io_testing::script::Mix;
use userland_io_testing::sim::{DiskConfig, SimDisk};

/// How many clients, how many connections each has, and how many of a hundred seeds go that way.
const WAYS: [(usize, usize, u64); 4] = [(1, 1, 91), (1, 4, 4), (4, 1, 4), (2, 8, 1)];

fn served<E: Engine, F: Future<Output = Result<E>> + 'static>(
    name: &str,
    blocks: u64,
    clients: Clients,
    open: impl Fn(SimDisk) -> F + Copy + Send + Sync + 'static,
) -> Subject {
    let disk = DiskConfig::new(blocks * 64, 64);
    let subject = Subject::over(name, vec![disk], move |mut disks| {
        let disk = disks.remove(0);
        async move { through_nbd(AnyEngine::new(open(disk).await?), clients).await }
    });
    match clients.count {
        1 => subject,
        _ => subject.ends_on_errors(),
    }
}

/// Runs `seeds`, divided among the ways.
fn no_false_alarm(seeds: Range<u64>, mix: &Mix, subject: impl Fn(Clients) -> Subject) {
    let mut start = seeds.start;
    for (count, connections, share) in WAYS {
        let end = start + (seeds.end - seeds.start) * share / 100;
        let subject = subject(Clients { count, connections });
        let live = Live::new(&subject, &Tokio).mix(mix.clone());
        let run = live.run(start..end, |_| true);
        // The tests are beside each other: most are cheaper on a thread of their own.
        let result = match (count, connections) {
            (1, 1) => on_one_thread(run),
            _ => block_on(run),
        };
        let way = format!("{}, {count} x {connections}", subject.name());
        match result {
            Ok(report) => println!("{way}: {report}"),
            Err(failure) => panic!("{way}: {failure}"),
        }
        start = end;
    }
}

/// Half of the seeds without trouble, half with errors of the disk and abandoned futures.
fn no_false_alarm_in_10_000(subject: impl Fn(Clients) -> Subject) {
    let seeds = std::env::var("SEEDS").ok();
    let seeds = seeds.map_or(10_000, |seeds| seeds.parse().expect("SEEDS is a number"));
    let mix = Mix {
        clients: 8,
        ops: 60,
        ..Mix::default()
    };
    no_false_alarm(0..seeds / 2, &mix, &subject);
    no_false_alarm(seeds / 2..seeds, &mix.hostile(), &subject);
}

#[test]
fn no_false_alarm_in_10_000_seeds_of_sync() {
    no_false_alarm_in_10_000(|clients| served("sync", 12, clients, SyncDisk::open));
}

#[test]
fn no_false_alarm_in_10_000_seeds_of_map() {
    no_false_alarm_in_10_000(|clients| served("map", 20, clients, MapDisk::open));
}

#[test]
fn no_false_alarm_in_10_000_seeds_of_log() {
    no_false_alarm_in_10_000(|clients| served("log", 400, clients, LogDisk::open));
}
