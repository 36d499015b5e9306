//! Measures block devices by fio: ours against those of others, in rounds that start each anew.
//!
//! `fuse` compares FUSE with a loop device with nbdfuse over nbdkit and losetup, both with direct I/O; `ublk-null` and `ublk-file`
//! compare ublk with `rublk add null` and `rublk add loop`, and want a kernel that has it (`cargo xtask vm`).
//! Processor time is the whole machine's for `fuse`, since there most of the work is the kernel's: run it on one that does nothing
//! else. For ublk it is that of the process that serves, and fio's. Takes root, fio, and the others' programs.
#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bench::attach::{Device, Load, Outcome, load, ready};
use bench::figures::{Figure, Table, median};
use bench::{machine, table};
use clap::{Parser, ValueEnum};
use userland_io::attach::Via;

/// Compare block devices of ours with those of other programs
#[derive(Parser)]
struct Arguments {
    /// What is compared
    #[arg(value_enum, default_value = "fuse")]
    what: What,
    /// How often everything is measured
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// How many slices of time each device has in a round, for each load
    #[arg(long, default_value_t = 4)]
    slices: u32,
    /// How long a slice is, in milliseconds
    #[arg(long, default_value_t = 150)]
    millis: u64,
    /// The size of the disks, in MiB
    #[arg(long, default_value_t = 256)]
    size: u64,
    /// How many requests are in flight
    #[arg(long, value_delimiter = ',', default_value = "1,16,64")]
    depths: Vec<u32>,
    /// How long requests are, in KiB
    #[arg(long, value_delimiter = ',', default_value = "4")]
    blocks: Vec<u64>,
    /// Hardware queues of ublk devices
    #[arg(long, default_value_t = 1)]
    queues: u16,
    /// How many requests a queue takes at once
    #[arg(long, default_value_t = 128)]
    tags: u16,
    /// How often a device is attached before that, only to be taken away again
    #[arg(long, default_value_t = 0)]
    cycles: usize,
    /// Where the images of `ublk-file` are
    #[arg(long, default_value = "/dev/shm")]
    dir: PathBuf,
    /// The processor that fio keeps to
    #[arg(long)]
    fio_cpu: Option<u32>,
    /// Files past the page cache
    #[arg(long)]
    direct: bool,
    /// The program rublk
    #[arg(long, default_value = "rublk")]
    rublk: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    Fuse,
    UblkNull,
    UblkFile,
}

fn main() -> io::Result<()> {
    let arguments = Arguments::parse();
    let mut about = machine::Machine::now();
    let pair = Pair::new(&arguments)?;
    let title = match (arguments.what, arguments.direct) {
        (What::UblkFile, true) => "direct".into(),
        (What::UblkFile, false) => "buffered".into(),
        _ => format!("{:?}", arguments.what),
    };
    let mut figures = Table::new(title, pair.names().map(String::from).into());
    let via = if arguments.what == What::Fuse {
        Via::Fuse
    } else {
        Via::Ublk
    };
    let calls = ready::times(arguments.cycles, via, arguments.queues, arguments.tags)?;
    let mut started = [Vec::new(), Vec::new()];
    for cycle in 0..arguments.cycles {
        for side in order(cycle) {
            let device = pair.start(side)?;
            started[side].push(device.took.as_secs_f64() * 1e3);
        }
    }
    for round in 0..arguments.rounds {
        let devices = pair.start_both(round)?;
        for side in order(round) {
            started[side].push(devices[side].took.as_secs_f64() * 1e3);
            // Both have all their memory, before anything is measured.
            load::fill(&devices[side].path, pair.size)?;
        }
        for load in loads(&arguments) {
            let measured = pair.measure(&devices, &load, round)?;
            for (side, figure) in measured.into_iter().enumerate() {
                let cell = figures.cell_mut(&load.name(), load.block, pair.names()[side]);
                cell.rounds.push(figure);
            }
        }
    }
    about.finish();
    if arguments.rounds > 0 {
        compare(&figures, pair.names());
    }
    for (side, ready) in started.into_iter().enumerate() {
        let (name, count) = (pair.names()[side], ready.len());
        println!(
            "{name}: attached after {:.1} ms, program's start included ({count} times)",
            median(ready)
        );
    }
    if !calls.is_empty() {
        let calls: Vec<f64> = calls.iter().map(|took| took.as_secs_f64() * 1e3).collect();
        let (first, count) = (calls[0], calls.len());
        println!(
            "attach() in a program: answers after {:.1} ms ({count} times; {first:.1} the first time)",
            median(calls)
        );
    }
    println!("{}", about.describe());
    Ok(())
}

/// Prints the table, and how ours did by theirs, round by round.
fn compare(figures: &Table, [ours, theirs]: [&str; 2]) {
    println!("{}", table::markdown(figures));
    let (mut rates, mut times) = (Vec::new(), Vec::new());
    for row in &figures.rows {
        let of = |each: fn(&Figure) -> f64| row.ratio(ours, theirs, each).unwrap_or(f64::NAN);
        let (rate, cpu) = (of(|figure| figure.rate), of(|figure| figure.cpu));
        let mut each = row.ratios(ours, theirs, |figure| figure.rate);
        each.sort_by(f64::total_cmp);
        let [low, high] = [each.first(), each.last()].map(|end| end.unwrap_or(&f64::NAN));
        println!(
            "{}: {rate:.2} x the rate ({low:.2} to {high:.2}), {cpu:.2} x the processor time",
            row.work
        );
        rates.push(rate);
        times.push(cpu);
    }
    let mean = |all: Vec<f64>| all.iter().sum::<f64>() / all.len() as f64;
    println!(
        "on average: {:.2} x the rate, {:.2} x the processor time",
        mean(rates),
        mean(times)
    );
}

/// Who comes first: another one each time.
fn order(turn: usize) -> [usize; 2] {
    [turn % 2, 1 - turn % 2]
}

fn loads(arguments: &Arguments) -> Vec<Load> {
    let mut loads = Vec::new();
    for &block in &arguments.blocks {
        for &depth in &arguments.depths {
            loads.extend([false, true].map(|write| Load {
                write,
                block: block << 10,
                depth,
                millis: arguments.millis,
                slices: arguments.slices,
                span: arguments.size << 20,
                cpu: arguments.fio_cpu,
            }));
        }
    }
    loads
}

/// The two that are compared: ours is 0, theirs 1.
struct Pair<'a> {
    arguments: &'a Arguments,
    size: u64,
    /// An image for each.
    images: Option<tempfile::TempDir>,
}

impl<'a> Pair<'a> {
    fn new(arguments: &'a Arguments) -> io::Result<Self> {
        let size = arguments.size << 20;
        let images = match arguments.what {
            What::UblkFile => {
                let dir = tempfile::tempdir_in(&arguments.dir)?;
                for name in IMAGES {
                    fs::File::create(dir.path().join(name))?.set_len(size)?;
                }
                Some(dir)
            }
            _ => None,
        };
        Ok(Pair {
            arguments,
            size,
            images,
        })
    }

    fn names(&self) -> [&'static str; 2] {
        match self.arguments.what {
            What::Fuse => ["ulio attach --via fuse", "nbdfuse, losetup"],
            What::UblkNull => ["ulio attach null", "rublk null"],
            What::UblkFile => ["ulio attach file", "rublk loop"],
        }
    }

    /// Starts both, beginning with another one each round: who comes first may be better or worse off for it.
    fn start_both(&self, round: usize) -> io::Result<[Device; 2]> {
        let [first, second] = order(round);
        let mut devices = [self.start(first)?, self.start(second)?];
        if first == 1 {
            devices.reverse();
        }
        Ok(devices)
    }

    fn start(&self, side: usize) -> io::Result<Device> {
        let (size, queues) = (self.size, self.arguments.queues.to_string());
        let image = self
            .images
            .as_ref()
            .map(|dir| dir.path().join(IMAGES[side]));
        let image = image
            .as_deref()
            .unwrap_or(Path::new(""))
            .display()
            .to_string();
        let cache = if self.arguments.direct { ",direct" } else { "" };
        let tags = self.arguments.tags.to_string();
        let ours = ["--via", "ublk", "--depth", &tags, "--queues", &queues];
        let theirs = ["--depth", &tags, "--queue", &queues];
        let rublk = &self.arguments.rublk;
        let device = match (self.arguments.what, side) {
            (What::Fuse, 0) => Device::ulio(&["--via", "fuse", &format!("memory:{size}")]),
            (What::Fuse, _) => Device::nbdfuse(size),
            (What::UblkNull, 0) => Device::ulio(&[&ours[..], &[&format!("null:{NULL}")]].concat()),
            (What::UblkNull, _) => Device::rublk(rublk, &[&["null"], &theirs[..]].concat()),
            (What::UblkFile, 0) => {
                Device::ulio(&[&ours[..], &[&format!("file:{image}{cache}")]].concat())
            }
            (What::UblkFile, _) => {
                let mut words = [&["loop", "--file", &image], &theirs[..]].concat();
                if !self.arguments.direct {
                    words.push("--buffered-io");
                }
                Device::rublk(rublk, &words)
            }
        }?;
        let bytes = if self.arguments.what == What::UblkNull {
            NULL
        } else {
            size
        };
        let as_asked = device.attribute("size")? == (bytes >> 9).to_string()
            && match self.arguments.what {
                What::Fuse => device.attribute("loop/dio")? == "1",
                _ => {
                    fs::read_dir(format!(
                        "/sys/block/{}/mq",
                        device.path.file_name().unwrap_or_default().display()
                    ))?
                    .count()
                        == usize::from(self.arguments.queues)
                }
            };
        match as_asked {
            true => Ok(device),
            false => Err(io::Error::other(format!(
                "{} is not as it was to be",
                device.path.display()
            ))),
        }
    }

    /// Loads both, beginning with another one each round.
    fn measure(&self, devices: &[Device; 2], load: &Load, round: usize) -> io::Result<[Figure; 2]> {
        let figure = |outcome: &Outcome, cpu: f64| Figure {
            rate: outcome.rate,
            cpu: cpu * 1e6 / outcome.count,
        };
        let mut figures = [Figure {
            rate: f64::NAN,
            cpu: f64::NAN,
        }; 2];
        let order = order(round);
        if self.arguments.what == What::Fuse {
            // What the kernel's threads do is nobody's: one after the other, and all that the machine does.
            for side in order {
                let before = machine::busy()?;
                let outcomes = load.run(&[&devices[side].path])?;
                let cpu = machine::busy()? - before;
                figures[side] = figure(&outcomes[0], cpu);
            }
            return Ok(figures);
        }
        // Only one is busy at a time, so the processor time of a process that serves is all its own.
        let of_servers = || Ok::<_, io::Error>([devices[0].cpu()?, devices[1].cpu()?]);
        let before = of_servers()?;
        let outcomes = load.run(&order.map(|side| &*devices[side].path))?;
        let after = of_servers()?;
        for (side, outcome) in order.into_iter().zip(&outcomes) {
            figures[side] = figure(outcome, after[side] - before[side] + outcome.cpu);
        }
        Ok(figures)
    }
}

/// What the images are called.
const IMAGES: [&str; 2] = ["ours", "theirs"];
/// The size of rublk's null device, in bytes.
const NULL: u64 = 250 << 30;
