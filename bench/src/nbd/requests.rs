//! The raw client's part: works by servers, in interleaved rounds.
//!
//! All servers of a table run at once, and each work goes round them in turn, beginning with another one each round. So a
//! ratio compares what was measured within seconds. A server that nobody asks takes no processor time.

use std::io;
use std::path::Path;
use std::time::Duration;

use super::client::Load;
use super::endpoint::Endpoint;
use super::kinds::Kind;
use super::server::Server;
use crate::figures::Table;
use crate::syscalls::Counting;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// How often.
    pub rounds: usize,
    /// How long each load runs.
    pub time: Duration,
    /// The size of the disks, in bytes.
    pub size: u64,
    /// Whether system calls can be counted.
    pub counts_syscalls: bool,
}

/// For how long system calls are counted.
const COUNTED: Duration = Duration::from_millis(100);

/// A table to be measured.
#[derive(Debug)]
pub struct Plan<'a> {
    /// What it is called.
    pub title: String,
    /// The servers.
    pub kinds: Vec<&'static Kind>,
    /// Over TCP, not a Unix socket.
    pub tcp: bool,
    /// Where images and sockets lie.
    pub directory: &'a Path,
    /// The works.
    pub loads: Vec<Load>,
}

impl Plan<'_> {
    /// Measures it.
    ///
    /// # Errors
    /// If a server cannot be started, or fails.
    pub fn measure(&self, effort: Effort) -> io::Result<Table> {
        let names = self.kinds.iter().map(|kind| kind.name.to_owned());
        let mut table = Table::new(&self.title, names.collect());
        for round in 0..effort.rounds {
            eprintln!("{}: round {} of {}", self.title, round + 1, effort.rounds);
            let servers = self.start(effort.size)?;
            for &load in &self.loads {
                for turn in 0..servers.len() {
                    let server = &servers[(turn + round) % servers.len()];
                    let (figure, _) = server.measure(load, effort.time)?;
                    let cell = table.cell_mut(&name(load), load.block as u64, server.kind.name);
                    cell.rounds.push(figure);
                }
            }
            for server in &servers {
                table.peak(server.kind.name, server.process.peak_memory());
            }
            // Once is enough: the counts hardly differ, but counting costs time, and would be measured, too.
            if round + 1 == effort.rounds && effort.counts_syscalls {
                let time = effort.time.min(COUNTED);
                if let Err(error) = self.count(&servers, &mut table, time) {
                    eprintln!("{}: system calls are not counted: {error}", self.title);
                }
            }
        }
        Ok(table)
    }

    fn start(&self, size: u64) -> io::Result<Vec<Server>> {
        let mut servers = Vec::new();
        for (index, kind) in self.kinds.iter().enumerate() {
            let endpoint = match self.tcp {
                true => Endpoint::free_port()?,
                false => Endpoint::Unix(self.directory.join(format!("socket-{index}"))),
            };
            let server = Server::start(kind, endpoint, self.directory, size)?;
            server.connect()?.fill()?;
            servers.push(server);
        }
        Ok(servers)
    }

    fn count(&self, servers: &[Server], table: &mut Table, time: Duration) -> io::Result<()> {
        for &load in &self.loads {
            for server in servers {
                let mut clients = server.clients(load)?;
                let counting = Counting::start(&server.process)?;
                let tally = super::client::run(&mut clients, load, time)?;
                let count = counting.stop()?;
                let cell = table.cell_mut(&name(load), load.block as u64, server.kind.name);
                cell.syscalls = Some(count as f64 / tally.total() as f64);
            }
        }
        Ok(())
    }
}

/// What a load is called in tables.
pub fn name(load: Load) -> String {
    let what = if load.write { "write" } else { "read" };
    let block = match load.block {
        block if block >= 1 << 20 => format!("{} MiB", block >> 20),
        block => format!("{} KiB", block >> 10),
    };
    let mut name = format!("{block} {what}, depth {}", load.depth);
    if load.connections > 1 {
        name += &format!(" x {}", load.connections);
    }
    if load.flush_every > 0 {
        name += &format!(", flush every {}", load.flush_every);
    }
    name
}

/// Loads of `block` bytes: reads and writes at each depth and number of connections.
pub fn loads(block: usize, shapes: &[(usize, usize)]) -> Vec<Load> {
    let of = |write| {
        move |&(depth, connections): &(usize, usize)| Load {
            write,
            depth,
            block,
            connections,
            flush_every: 0,
        }
    };
    let both = shapes
        .iter()
        .flat_map(|shape| [of(false)(shape), of(true)(shape)]);
    both.collect()
}
