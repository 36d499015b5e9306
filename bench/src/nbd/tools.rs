//! What real clients see: fio's NBD engine, and nbdcopy.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::endpoint::Endpoint;
use super::kinds::Kind;
use super::server::Server;
use crate::figures::{Figure, Table};

/// A server for a client that is a program.
fn start(kind: &'static Kind, directory: &Path, size: u64) -> io::Result<Server> {
    let endpoint = Endpoint::Unix(directory.join("socket"));
    let server = Server::start(kind, endpoint, directory, size)?;
    server.connect()?.fill()?;
    Ok(server)
}

/// True if `program` is there.
pub fn is_installed(program: &str) -> bool {
    let mut command = Command::new(program);
    let quiet = command.arg("--version").stdout(Stdio::null());
    quiet.stderr(Stdio::null()).status().is_ok()
}

/// fio's works: its words, and the bytes of a request.
const FIO: &[(&str, &str, u64, &str)] = &[
    ("1 MiB sequential read", "read", 1 << 20, "8"),
    ("1 MiB sequential write", "write", 1 << 20, "8"),
    ("4 KiB read, depth 1", "randread", 4096, "1"),
    ("4 KiB write, depth 1", "randwrite", 4096, "1"),
];

/// Measures `kinds` with fio.
///
/// # Errors
/// If a server or fio fails.
pub fn fio(
    kinds: &[&'static Kind],
    directory: &Path,
    rounds: usize,
    time: Duration,
    size: u64,
) -> io::Result<Table> {
    let title = "fio, one connection, Unix";
    let names = kinds.iter().map(|kind| kind.name.to_owned());
    let mut table = Table::new(title, names.collect());
    for round in 0..rounds {
        eprintln!("{title}: round {} of {rounds}", round + 1);
        for turn in 0..kinds.len() {
            let server = start(kinds[(turn + round) % kinds.len()], directory, size)?;
            for &(work, pattern, block, depth) in FIO {
                let before = server.process.cpu()?;
                let done = run_fio(&server, pattern, block, depth, time, size)?;
                let cpu = server.process.cpu()?.saturating_sub(before);
                let cell = table.cell_mut(work, block, server.kind.name);
                cell.rounds.push(Figure {
                    rate: done.rate,
                    cpu: cpu.as_secs_f64() * 1e6 / done.count,
                });
            }
            table.peak(server.kind.name, server.process.peak_memory());
        }
    }
    Ok(table)
}

struct Done {
    rate: f64,
    count: f64,
}

fn run_fio(
    server: &Server,
    pattern: &str,
    block: u64,
    depth: &str,
    time: Duration,
    size: u64,
) -> io::Result<Done> {
    let output = Command::new("fio")
        .args(["--name=bench", "--ioengine=nbd", "--output-format=json"])
        .args(["--time_based", "--randrepeat=0", "--norandommap"])
        .arg(format!("--uri={}", server.endpoint.uri(server.kind.export)))
        .arg(format!("--rw={pattern}"))
        .arg(format!("--bs={block}"))
        .arg(format!("--iodepth={depth}"))
        .arg(format!("--size={size}"))
        .arg(format!("--runtime={}ms", time.as_millis()))
        .stdin(Stdio::null())
        .output()?;
    let failed = |why: &str| {
        let said = String::from_utf8_lossy(&output.stderr);
        io::Error::other(format!("{}: fio {why}: {}", server.kind.name, said.trim()))
    };
    if !output.status.success() {
        return Err(failed("failed"));
    }
    // It may say something before the JSON.
    let text = String::from_utf8_lossy(&output.stdout);
    let start = text.find('{').ok_or_else(|| failed("printed no JSON"))?;
    let json: Value = serde_json::from_str(&text[start..]).map_err(io::Error::other)?;
    let side = if pattern.contains("read") {
        "read"
    } else {
        "write"
    };
    let field = |name: &str| json["jobs"][0][side][name].as_f64();
    match (field("iops"), field("total_ios")) {
        (Some(rate), Some(count)) => Ok(Done { rate, count }),
        _ => Err(failed("told no rate")),
    }
}

/// What nbdcopy copies.
const COPIED: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// Measures `kinds` with nbdcopy: a disk of 1 GiB to and fro, over four connections.
///
/// # Errors
/// If a server or nbdcopy fails.
pub fn nbdcopy(kinds: &[&'static Kind], directory: &Path, rounds: usize) -> io::Result<Table> {
    let title = "nbdcopy of 1 GiB, four connections, Unix";
    let names = kinds.iter().map(|kind| kind.name.to_owned());
    let mut table = Table::new(title, names.collect());
    let source = directory.join("source");
    fill(&source)?;
    for round in 0..rounds {
        eprintln!("{title}: round {} of {rounds}", round + 1);
        for turn in 0..kinds.len() {
            let server = start(kinds[(turn + round) % kinds.len()], directory, COPIED)?;
            let uri = server.endpoint.uri(server.kind.export);
            let source = source.display().to_string();
            for (work, from, to) in [("read", &uri[..], "null:"), ("write", &source, &uri)] {
                let before = server.process.cpu()?;
                let start = Instant::now();
                let status = Command::new("nbdcopy")
                    .args(["--connections=4", "--allocated", from, to])
                    .stdin(Stdio::null())
                    .status()?;
                let took = start.elapsed();
                if !status.success() {
                    let why = format!("{}: nbdcopy: {status}", server.kind.name);
                    return Err(io::Error::other(why));
                }
                let cpu = server.process.cpu()?.saturating_sub(before);
                let mib = (COPIED / MIB) as f64;
                let cell = table.cell_mut(work, MIB, server.kind.name);
                cell.rounds.push(Figure {
                    rate: mib / took.as_secs_f64(),
                    cpu: cpu.as_secs_f64() * 1e6 / mib,
                });
            }
            table.peak(server.kind.name, server.process.peak_memory());
        }
    }
    fs::remove_file(&source)?;
    Ok(table)
}

/// Bytes that nobody takes for zeroes.
fn fill(path: &Path) -> io::Result<()> {
    let mut file = fs::File::create(path)?;
    let piece = vec![0x5a; MIB as usize];
    for _ in 0..COPIED / MIB {
        io::Write::write_all(&mut file, &piece)?;
    }
    Ok(())
}
