//! Measures NBD servers side by side: requests per second, and the CPU time that the
//! server spends on each.
//!
//! Each round starts every server anew and runs every load against it, so that a
//! slow minute of the machine hits all alike; the table shows medians over the rounds.
#![forbid(unsafe_code)]

mod client;
mod limit;
mod servers;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use client::{Client, Load};
use servers::{KINDS, Place};

/// Compare NBD servers over a Unix socket: 4 KiB at random, at depth 1, 16 and 64
#[derive(Parser)]
struct Arguments {
    /// How often everything is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How long each load runs, in milliseconds
    #[arg(long, default_value_t = 1000)]
    millis: u64,
    /// The size of the disk in bytes
    #[arg(long, default_value_t = 256 << 20)]
    size: u64,
    /// Where the file servers keep their image
    #[arg(long, default_value = "/dev/shm")]
    dir: PathBuf,
    /// Only servers whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// Serve SOCKET SIZE as the limit does
    #[arg(long, num_args = 2, value_names = ["SOCKET", "SIZE"], hide = true)]
    limit: Vec<String>,
}

const BLOCK: usize = 4096;

/// One measurement.
#[derive(Clone, Copy)]
struct Figure {
    iops: f64,
    /// The server's, in microseconds per request.
    cpu: f64,
}

fn main() -> io::Result<()> {
    let arguments = Arguments::parse();
    if let [socket, size] = &arguments.limit[..] {
        let size = size.parse().map_err(io::Error::other)?;
        return limit::serve(&PathBuf::from(socket), size);
    }
    let mut loads = Vec::new();
    for depth in [1, 16, 64] {
        for write in [false, true] {
            loads.push(Load {
                write,
                depth,
                block: BLOCK,
            });
        }
    }
    let directory = tempfile::tempdir_in(&arguments.dir)?;
    let place = Place {
        socket: directory.path().join("socket"),
        image: directory.path().join("image"),
        size: arguments.size,
    };
    let chosen = KINDS
        .iter()
        .filter(|kind| kind.name.contains(&arguments.only));
    let (present, absent): (Vec<_>, Vec<_>) = chosen.partition(|kind| kind.version().is_some());
    for kind in absent {
        eprintln!("{}: not installed, left out", kind.name);
    }
    let mut figures: BTreeMap<(usize, usize), Vec<Figure>> = BTreeMap::new();
    for round in 1..=arguments.rounds {
        for (column, kind) in present.iter().enumerate() {
            eprintln!("round {round} of {}: {}", arguments.rounds, kind.name);
            let server = kind.start(&place)?;
            let mut client = Client::connect(&place.socket)?;
            client.fill()?;
            for (row, load) in loads.iter().enumerate() {
                let before = server.cpu()?;
                let (done, took) = client.run(*load, Duration::from_millis(arguments.millis))?;
                let cpu = server.cpu()? - before;
                figures.entry((row, column)).or_default().push(Figure {
                    iops: done as f64 / took.as_secs_f64(),
                    cpu: cpu.as_secs_f64() * 1e6 / done as f64,
                });
            }
        }
    }
    for kind in &present {
        println!("{}: {}", kind.name, kind.version().unwrap_or_default());
    }
    println!(
        "\nk IOPS / server CPU us per request, medians of {} rounds\n",
        arguments.rounds
    );
    print!("| 4 KiB |");
    for kind in &present {
        print!(" {} |", kind.name);
    }
    println!("\n|---|{}", "---|".repeat(present.len()));
    for (row, load) in loads.iter().enumerate() {
        let what = if load.write { "write" } else { "read" };
        print!("| depth {} {what} |", load.depth);
        for column in 0..present.len() {
            let of = figures.remove(&(row, column)).unwrap_or_default();
            let iops = median(of.iter().map(|f| f.iops / 1e3).collect());
            let cpu = median(of.iter().map(|f| f.cpu).collect());
            print!(" {iops:.0} / {cpu:.1} |");
        }
        println!();
    }
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
