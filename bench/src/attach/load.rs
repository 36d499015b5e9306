//! What fio does to a block device, and what that cost.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

/// Requests of one kind, for a while.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Reads, or writes.
    pub write: bool,
    /// Bytes of each.
    pub block: u64,
    /// How many are in flight.
    pub depth: u32,
    /// For how long.
    pub millis: u64,
    /// Offsets are below this, in bytes.
    pub span: u64,
    /// The processor that fio keeps to.
    pub cpu: Option<u32>,
}

/// What came of a load.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Requests a second.
    pub rate: f64,
    /// How many there were.
    pub count: f64,
    /// The processor time of fio itself for all of them, its system calls included, in seconds.
    pub cpu: f64,
}

impl Load {
    /// Its row in a table.
    pub fn name(&self) -> String {
        let kind = if self.write { "write" } else { "read" };
        match self.block >> 20 {
            0 => format!("{} KiB {kind}, depth {}", self.block >> 10, self.depth),
            mib => format!("{mib} MiB {kind}, depth {}", self.depth),
        }
    }

    /// Random requests to `device`, past the page cache.
    ///
    /// # Errors
    /// If fio cannot be run, or fails.
    pub fn run(&self, device: &Path) -> io::Result<Outcome> {
        let kind = if self.write { "randwrite" } else { "randread" };
        let mut fio = fio(device, kind);
        fio.arg(format!("--bs={}", self.block))
            .arg(format!("--iodepth={}", self.depth))
            .arg(format!("--size={}", self.span))
            .arg(format!("--runtime={}ms", self.millis))
            .args(["--time_based", "--norandommap"]);
        if let Some(cpu) = self.cpu {
            fio.arg(format!("--cpus_allowed={cpu}"));
        }
        let told = run(&mut fio)?;
        let job = &told["jobs"][0];
        let side = if self.write { "write" } else { "read" };
        let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
        let percent = number(&job["usr_cpu"]) + number(&job["sys_cpu"]);
        Ok(Outcome {
            rate: number(&job[side]["iops"]),
            count: number(&job[side]["total_ios"]),
            cpu: percent / 100.0 * number(&job["job_runtime"]) / 1e3,
        })
    }
}

/// Writes each byte of `device` up to `span` once.
///
/// # Errors
/// If fio cannot be run, or fails.
pub fn fill(device: &Path, span: u64) -> io::Result<()> {
    let mut fio = fio(device, "write");
    fio.args(["--bs=1M", "--iodepth=16"])
        .arg(format!("--size={span}"));
    run(&mut fio).map(drop)
}

fn fio(device: &Path, kind: &str) -> Command {
    let mut fio = Command::new("fio");
    fio.args(["--name=load", "--ioengine=libaio", "--direct=1"])
        .args(["--output-format=json", "--randrepeat=0", "--thread"])
        .arg(format!("--filename={}", device.display()))
        .arg(format!("--rw={kind}"))
        .stdin(Stdio::null());
    fio
}

fn run(fio: &mut Command) -> io::Result<Value> {
    let output = fio.output()?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(format!("fio: {text}")));
    }
    serde_json::from_slice(&output.stdout).map_err(io::Error::other)
}
