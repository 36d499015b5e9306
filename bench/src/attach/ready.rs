//! How long `userland_io::attach` takes until a device can be used, without the start of a program around it.

use std::io;
use std::time::{Duration, Instant};

use tokio::runtime;
use userland_io::Device;
use userland_io::attach::{Builder, Via};
use userland_io::engines::Null;

/// Attaches a disk that holds nothing, and detaches it, `count` times: from the call to its answer each time.
///
/// # Errors
/// If it cannot be attached this way, or not detached.
pub fn times(count: usize, via: Via, queues: u16, depth: u16) -> io::Result<Vec<Duration>> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut times = Vec::new();
        for _ in 0..count {
            let disk = Device::open(Null::new(1 << 30)).await;
            let disk = disk.map_err(io::Error::other)?;
            let begun = Instant::now();
            let builder = Builder::new(disk).via(via).queues(queues).depth(depth);
            let attached = builder.attach().await;
            times.push(begun.elapsed());
            let detached = attached.map_err(io::Error::other)?.detach().await;
            detached.map_err(io::Error::other)?;
        }
        Ok(times)
    })
}
