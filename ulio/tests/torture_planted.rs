//! `ulio torture --uri` finds bugs that were put into a server: those of the proof kit's planted ones that show without
//! a crash.
#![cfg(unix)]

mod common;

#[allow(dead_code, reason = "some bugs show only after a crash")]
#[path = "../../crates/userland-io-testing/tests/planted/bug.rs"]
mod bug;
#[path = "../../crates/userland-io-testing/tests/planted/map.rs"]
mod map;
#[path = "../../crates/userland-io-testing/tests/planted/pass.rs"]
mod pass;

use bug::Bug;
use common::Ulio;
use userland_io::transports::nbd::Server;
use userland_io::{AnyEngine, Device, Extents, Result};
use userland_io_testing::sim::{DiskConfig, SimDisk, World};

async fn engine(bug: Bug) -> Result<AnyEngine> {
    let world = World::new(1);
    let disk = |blocks: u64| DiskConfig::new(blocks * 512, 512);
    if !matches!(bug, Bug::ZeroesShowWhatLiesBelow | Bug::LateHolePunch) {
        let disk = SimDisk::new(&world, disk(16));
        return Ok(AnyEngine::new(pass::Pass::open(disk, bug).await?));
    }
    let mut base = disk(8);
    base.dirty = true;
    let disks = [disk(13), base].map(|config| SimDisk::new(&world, config));
    Ok(map::Map::open(disks.into(), bug).await?.remove(0))
}

/// Serves an engine with this bug, and tortures that.
fn tortured(bug: Bug) -> common::Ran {
    let ulio = Ulio::new();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let address = format!("unix:{}", ulio.path("s").display());
    let server = runtime.block_on(async {
        let device = Device::open(engine(bug).await.unwrap()).await.unwrap();
        // Somebody has looked at the map before, when it was blank.
        let all = 0..device.geometry().size;
        device.extents(all, &mut Extents::new(9)).await.unwrap();
        let server = Server::new().export("", device).bind([&address]).await;
        server.unwrap()
    });
    let ran = ulio.run("torture --uri nbd+unix:///?socket=s --overwrite --clients 2 --seeds 300");
    let _ = runtime.block_on(server.shutdown());
    ran
}

#[test]
fn bugs_that_show_without_a_crash_are_found_through_a_socket() {
    for bug in [
        Bug::ZeroesShowWhatLiesBelow,
        Bug::LateHolePunch,
        Bug::ShortRead,
        Bug::LastBlockOffByOne,
        Bug::StaleExtents,
        Bug::DiscardBelowGranularity,
        Bug::LateSecondLeg,
    ] {
        let ran = tortured(bug);
        assert_eq!(ran.code, Some(1), "{bug:?}: {ran:?}");
        assert!(ran.out.contains("broken: "), "{bug:?}: {ran:?}");
    }
}

#[test]
fn the_same_engines_without_a_bug_pass_through_a_socket() {
    tortured(Bug::None).ok();
}
