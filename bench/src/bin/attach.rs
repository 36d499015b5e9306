//! Measures FUSE with a loop device: ours against nbdfuse over nbdkit, both with direct I/O, by fio on the block device.
//!
//! A round starts each anew. Processor time is the whole machine's, since most of the work is the kernel's: run it on one
//! that does nothing else. Takes root, and fio, nbdkit, nbdfuse and losetup.
#![forbid(unsafe_code)]

use std::fs;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bench::figures::{Figure, Table, median};
use bench::{machine, table};
use clap::Parser;
use serde_json::Value;

/// Compare FUSE with a loop device: ours, and nbdfuse with losetup
#[derive(Parser)]
struct Arguments {
    /// How often everything is measured
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// How long each load runs, in seconds
    #[arg(long, default_value_t = 2)]
    seconds: u64,
    /// The size of the disks, in MiB
    #[arg(long, default_value_t = 1024)]
    size: u64,
}

const OURS: &str = "ulio attach --via fuse";
const THEIRS: &str = "nbdfuse, losetup";
const BLOCK: u64 = 4096;

fn main() -> io::Result<()> {
    let arguments = Arguments::parse();
    let mut about = machine::Machine::now();
    let mut figures = Table::new("4 KiB, direct", vec![OURS.into(), THEIRS.into()]);
    let mut ready = Vec::new();
    for _ in 0..arguments.rounds.max(1) {
        let ours = Device::ours(arguments.size)?;
        ready.push(ours.took.as_secs_f64() * 1e3);
        measure(&mut figures, OURS, &ours, &arguments)?;
        drop(ours);
        let theirs = Device::theirs(arguments.size)?;
        measure(&mut figures, THEIRS, &theirs, &arguments)?;
    }
    about.finish();
    println!("{}", table::markdown(&figures));
    for row in &figures.rows {
        let of = |each: fn(&Figure) -> f64| row.ratio(OURS, THEIRS, each).unwrap_or(f64::NAN);
        let (rate, cpu) = (of(|figure| figure.rate), of(|figure| figure.cpu));
        println!(
            "{}: {rate:.2} x the rate, {cpu:.2} x the processor time",
            row.work
        );
    }
    println!(
        "attached, program's start included: {:.1} ms",
        median(ready)
    );
    println!(
        "{}",
        serde_json::to_string(&about).map_err(io::Error::other)?
    );
    Ok(())
}

/// Runs each load on the device.
fn measure(
    figures: &mut Table,
    server: &str,
    device: &Device,
    arguments: &Arguments,
) -> io::Result<()> {
    // Both have all their memory, before anything is measured.
    fio(&device.path, "write", 16, 0)?;
    for depth in [1, 16] {
        for (kind, name) in [("randread", "read"), ("randwrite", "write")] {
            let before = busy()?;
            let (rate, count) = fio(&device.path, kind, depth, arguments.seconds)?;
            let cpu = (busy()? - before) * 1e6 / count;
            let work = format!("4 KiB {name}, depth {depth}");
            let cell = figures.cell_mut(&work, BLOCK, server);
            cell.rounds.push(Figure { rate, cpu });
        }
    }
    Ok(())
}

/// Requests a second, and how many. For 0 seconds, once over the device in long requests.
fn fio(device: &Path, kind: &str, depth: u32, seconds: u64) -> io::Result<(f64, f64)> {
    let mut fio = Command::new("fio");
    fio.args([
        "--name=load",
        "--ioengine=libaio",
        "--direct=1",
        "--output-format=json",
    ]);
    fio.arg(format!("--filename={}", device.display()));
    fio.arg(format!("--rw={kind}"))
        .arg(format!("--iodepth={depth}"));
    match seconds {
        0 => fio.arg("--bs=1M"),
        _ => fio
            .arg(format!("--bs={BLOCK}"))
            .arg("--time_based")
            .arg(format!("--runtime={seconds}")),
    };
    let output = fio.stdin(Stdio::null()).output()?;
    if !output.status.success() {
        return Err(io::Error::other(
            String::from_utf8_lossy(&output.stderr).into_owned(),
        ));
    }
    let told: Value = serde_json::from_slice(&output.stdout).map_err(io::Error::other)?;
    let side = if kind.ends_with("read") {
        "read"
    } else {
        "write"
    };
    let number = |name: &str| told["jobs"][0][side][name].as_f64().unwrap_or(f64::NAN);
    Ok((number("iops"), number("total_ios")))
}

/// The processor time that all of the machine has used since it started, in seconds (proc(5): /proc/stat).
fn busy() -> io::Result<f64> {
    let text = fs::read_to_string("/proc/stat")?;
    let fields = text
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1);
    let ticks: Vec<f64> = fields.filter_map(|field| field.parse().ok()).collect();
    // All but idle and iowait, the fourth and fifth; guests' time is counted in the first two.
    let used: f64 = ticks
        .iter()
        .take(3)
        .chain(ticks.iter().skip(5).take(3))
        .sum();
    Ok(used / 100.0)
}

/// A block device, and what serves it.
struct Device {
    path: PathBuf,
    took: Duration,
    server: Child,
    /// Where nbdfuse has its file.
    mounted: Option<tempfile::TempDir>,
}

impl Device {
    fn ours(size: u64) -> io::Result<Self> {
        let begun = Instant::now();
        let mut ulio = Command::new(std::env::current_exe()?.with_file_name("ulio"));
        ulio.args(["attach", "--via", "fuse"])
            .arg(format!("memory:{size}M"));
        let mut server = ulio
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut line = String::new();
        if let Some(out) = server.stdout.take() {
            BufReader::new(out).read_line(&mut line)?;
        }
        let device = Device {
            path: line.trim_end().into(),
            took: begun.elapsed(),
            server,
            mounted: None,
        };
        device.checked(size)
    }

    fn theirs(size: u64) -> io::Result<Self> {
        let begun = Instant::now();
        let mounted = tempfile::tempdir()?;
        let file = mounted.path().join("disk");
        fs::write(&file, "")?;
        let mut nbdfuse = Command::new("nbdfuse");
        nbdfuse
            .arg(&file)
            .args(["[", "nbdkit", "--exit-with-parent", "memory"]);
        nbdfuse.arg(format!("{size}M")).arg("]");
        let server = nbdfuse.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
        let mut device = Device {
            path: PathBuf::new(),
            took: Duration::ZERO,
            server,
            mounted: Some(mounted),
        };
        while fs::metadata(&file)?.len() == 0 {
            if begun.elapsed() > Duration::from_secs(10) {
                return Err(io::Error::other("nbdfuse mounts nothing"));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let mut losetup = Command::new("losetup");
        losetup
            .args(["--direct-io=on", "--find", "--show"])
            .arg(&file);
        let output = losetup.output()?;
        device.path = String::from_utf8_lossy(&output.stdout).trim_end().into();
        device.took = begun.elapsed();
        device.checked(size)
    }

    fn checked(self, size: u64) -> io::Result<Self> {
        let name = self.path.file_name().unwrap_or_default().display();
        let sectors = fs::read_to_string(format!("/sys/block/{name}/size"))?;
        let direct = fs::read_to_string(format!("/sys/block/{name}/loop/dio"))?;
        match (sectors.trim() == (size << 11).to_string(), direct.trim()) {
            (true, "1") => Ok(self),
            _ => Err(io::Error::other(format!("{name} is not as it was to be"))),
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let quietly = |command: &mut Command| {
            let _ = command.stderr(Stdio::null()).status();
        };
        if let Some(mounted) = &self.mounted {
            quietly(Command::new("losetup").arg("-d").arg(&self.path));
            quietly(
                Command::new("fusermount3")
                    .arg("-u")
                    .arg(mounted.path().join("disk")),
            );
        } else {
            let id = self.server.id().to_string();
            quietly(Command::new("kill").args(["-INT", &id]));
        }
        let _ = self.server.wait();
    }
}
