//! The reference engines through NBD: crashes of what serves the socket, judged at the clients' end.

#[path = "common/runtime.rs"]
mod runtime;

use runtime::block_on;
use userland_io::{AnyEngine, Engine, Result};
use userland_io_testing::Subject;
use userland_io_testing::live::{Live, Tokio};
use userland_io_testing::nbd::through_nbd;
use userland_io_testing::reference::{LogDisk, MapDisk, SyncDisk};
use userland_io_testing::script::Mix;
use userland_io_testing::sim::{DiskConfig, SimDisk};

fn served<E: Engine, F: Future<Output = Result<E>> + 'static>(
    name: &str,
    blocks: u64,
    connections: usize,
    open: impl Fn(SimDisk) -> F + Copy + Send + Sync + 'static,
) -> Subject {
    let disk = DiskConfig::new(blocks * 64, 64);
    let name = format!("{name} through {connections}");
    Subject::over(name, vec![disk], move |mut disks| {
        let disk = disks.remove(0);
        async move { through_nbd(AnyEngine::new(open(disk).await?), connections).await }
    })
}

/// `SEEDS=10000 cargo test --release --features nbd --test nbd` runs more.
fn seeds(default: u64) -> std::ops::Range<u64> {
    let seeds = std::env::var("SEEDS").ok();
    0..seeds.map_or(default, |seeds| seeds.parse().expect("SEEDS is a number"))
}

fn no_false_alarm(abandons: bool) {
    block_on(async {
        for connections in [1, 4, 16] {
            for subject in [
                served("sync", 12, connections, SyncDisk::open),
                served("map", 20, connections, MapDisk::open),
                served("log", 400, connections, LogDisk::open),
            ] {
                let mut live = Live::new(&subject, &Tokio);
                if abandons {
                    let mix = Mix {
                        abandons: 8,
                        clients: 8,
                        ops: 60,
                        ..Mix::default()
                    };
                    live = live.mix(mix);
                }
                match live.run(seeds(100), |_| true).await {
                    Ok(report) => println!("{}: {report}", subject.name()),
                    Err(failure) => panic!("{failure}"),
                }
            }
        }
    });
}

#[test]
fn no_false_alarm_through_nbd() {
    no_false_alarm(false);
}

#[test]
fn no_false_alarm_through_nbd_with_abandoned_futures() {
    no_false_alarm(true);
}
