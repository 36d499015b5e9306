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
    /// For how long, in each slice.
    pub millis: u64,
    /// How many slices each device gets.
    pub slices: u32,
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

    /// Random requests past the page cache, to one of `devices` after the other in slices that go forth and back: what slows the
    /// machine down for a while hits all of them. Answers what each of them did.
    ///
    /// # Errors
    /// If fio cannot be run, or fails.
    pub fn run(&self, devices: &[&Path]) -> io::Result<Vec<Outcome>> {
        let mut fio = fio(if self.write { "randwrite" } else { "randread" });
        fio.arg(format!("--bs={}", self.block))
            .arg(format!("--iodepth={}", self.depth))
            .arg(format!("--size={}", self.span))
            .arg(format!("--runtime={}ms", self.millis))
            .args(["--time_based", "--norandommap"]);
        if let Some(cpu) = self.cpu {
            fio.arg(format!("--cpus_allowed={cpu}"));
        }
        for slice in 0..self.slices {
            let mut order: Vec<usize> = (0..devices.len()).collect();
            if slice % 2 == 1 {
                order.reverse();
            }
            for device in order {
                fio.arg(format!("--name={device}"))
                    .arg(format!("--filename={}", devices[device].display()))
                    .arg("--stonewall");
            }
        }
        let told = run(&mut fio)?;
        Ok((0..devices.len()).map(|n| self.outcome(&told, n)).collect())
    }

    /// What all slices of a device come to.
    fn outcome(&self, told: &Value, device: usize) -> Outcome {
        let direction = if self.write { "write" } else { "read" };
        let (mut count, mut millis, mut cpu) = (0.0, 0.0, 0.0);
        let name = device.to_string();
        let jobs = told["jobs"].as_array().into_iter().flatten();
        for job in jobs.filter(|job| job["jobname"] == name.as_str()) {
            let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
            count += number(&job[direction]["total_ios"]);
            millis += number(&job[direction]["runtime"]);
            let percent = number(&job["usr_cpu"]) + number(&job["sys_cpu"]);
            cpu += percent / 100.0 * number(&job["job_runtime"]) / 1e3;
        }
        Outcome {
            rate: count / millis * 1e3,
            count,
            cpu,
        }
    }
}

/// Writes each byte of `device` up to `span` once.
///
/// # Errors
/// If fio cannot be run, or fails.
pub fn fill(device: &Path, span: u64) -> io::Result<()> {
    let mut fio = fio("write");
    fio.args(["--name=fill", "--bs=1M", "--iodepth=16"])
        .arg(format!("--filename={}", device.display()))
        .arg(format!("--size={span}"));
    run(&mut fio).map(drop)
}

fn fio(kind: &str) -> Command {
    let mut fio = Command::new("fio");
    fio.args(["--ioengine=libaio", "--direct=1", "--thread"])
        .args(["--output-format=json", "--randrepeat=0"])
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
