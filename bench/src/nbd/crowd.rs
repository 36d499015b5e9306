//! Many connections at once: what they take at rest, and whether they share.

use std::io;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::client::{self, Load};
use super::endpoint::Endpoint;
use super::kinds::Kind;
use super::server::Server;
use crate::figures::median;

/// How many connections rest.
pub const IDLE: usize = 1000;
/// How many work.
pub const ACTIVE: usize = 200;
/// How long a connection is left alone before it counts as resting.
const REST: Duration = Duration::from_secs(2);

/// What many connections make of a server.
#[derive(Clone, Debug, Serialize)]
pub struct Crowd {
    /// The server.
    pub server: String,
    /// Its resident memory with nobody connected, in bytes.
    pub alone: u64,
    /// The same with [`IDLE`] connections at rest, each of which has read 4 KiB.
    pub idle: u64,
    /// The same after each of them has had 64 such reads in flight, and rests again.
    pub after_burst: u64,
    /// Of [`ACTIVE`] connections that work at depth 1: the slowest one's rate by the median.
    pub slowest: f64,
    /// The fastest one's by the median.
    pub fastest: f64,
}

/// Measures `kind`.
///
/// # Errors
/// If the server fails.
pub fn measure(kind: &'static Kind, directory: &Path, time: Duration) -> io::Result<Crowd> {
    eprintln!("{IDLE} connections: {}", kind.name);
    let size = 16 << 20;
    let endpoint = Endpoint::Unix(directory.join("socket"));
    let server = Server::start(kind, endpoint, directory, size)?;
    server.connect()?.fill()?;
    let alone = rest(&server);
    let mut clients = Vec::new();
    for _ in 0..IDLE {
        let mut client = server.connect()?;
        client.read_once(0, 4096)?;
        clients.push(client);
    }
    let idle = rest(&server);
    let deep = Load {
        write: false,
        depth: 64,
        block: 4096,
        connections: 1,
        flush_every: 0,
    };
    for client in &mut clients {
        client.run(deep, Duration::ZERO)?;
    }
    let after_burst = rest(&server);
    drop(clients);
    let load = Load {
        depth: 1,
        connections: ACTIVE,
        ..deep
    };
    let tally = client::run(&mut server.clients(load)?, load, time)?;
    let rates: Vec<f64> = tally.done.iter().map(|&done| done as f64).collect();
    let middle = median(rates.clone());
    let slowest = rates.iter().copied().fold(f64::INFINITY, f64::min);
    let fastest = rates.iter().copied().fold(0.0, f64::max);
    Ok(Crowd {
        server: kind.name.to_owned(),
        alone,
        idle,
        after_burst,
        slowest: slowest / middle,
        fastest: fastest / middle,
    })
}

/// Waits until the server has had time to give memory back, and says what it still has.
fn rest(server: &Server) -> u64 {
    std::thread::sleep(REST);
    server.process.resident_memory()
}
