//! Measures NBD servers side by side: what clients see, and what it costs the server.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use bench::nbd::client::Load;
use bench::nbd::crowd;
use bench::nbd::kinds::{Disk, KINDS, Kind, Program, named};
use bench::nbd::report::Report;
use bench::nbd::requests::{self, Effort, Plan, loads};
use bench::nbd::tools;
use bench::{machine, page, syscalls};
use clap::{Parser, ValueEnum};

/// For how long at least many connections work: each has its turn but some times in a tenth of a second.
const CROWDED: Duration = Duration::from_secs(2);

/// Compare NBD servers: ours, those that are installed, and the limit of what a server can do
#[derive(Parser)]
struct Arguments {
    /// Fewer rounds and works, and nothing on a disk: three minutes, not twenty
    #[arg(long)]
    quick: bool,
    /// Only these parts
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Only servers whose name contains one of these; the limit always runs
    #[arg(long, value_delimiter = ',')]
    servers: Vec<String>,
    /// Only works of the raw client whose name contains one of these, such as "4 KiB read, depth 64"
    #[arg(long, value_delimiter = ';')]
    works: Vec<String>,
    /// How often everything is measured [default: 7, or 3 if quick]
    #[arg(long)]
    rounds: Option<usize>,
    /// How long each load runs, in milliseconds [default: 200, or 150 if quick]
    #[arg(long)]
    millis: Option<u64>,
    /// The size of the disks, in MiB
    #[arg(long, default_value_t = 256)]
    size: u64,
    /// A directory in memory, for images and sockets
    #[arg(long, default_value = "/dev/shm")]
    dir: PathBuf,
    /// A directory on a disk, for the images of the part `disk`
    #[arg(long, default_value = "target")]
    disk_dir: PathBuf,
    /// Put tables and picture into docs/benchmarks.md and docs/benchmarks.svg
    #[arg(long)]
    write: bool,
    /// Where the figures go as JSON
    #[arg(long, default_value = "target/bench-nbd.json")]
    json: PathBuf,
}

/// What can be measured by itself.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Servers of memory, raw client, Unix and TCP
    Memory,
    /// Servers of files in memory, raw client
    File,
    /// Servers of files on a disk, through the page cache and past it, raw client
    Disk,
    /// fio's NBD engine
    Fio,
    /// nbdcopy
    Nbdcopy,
    /// Layers, and an engine that takes its time
    Stacks,
    /// Many connections
    Crowd,
}

fn main() -> io::Result<ExitCode> {
    let arguments = Arguments::parse();
    let (rounds, millis) = if arguments.quick { (3, 150) } else { (7, 200) };
    let effort = Effort {
        rounds: arguments.rounds.unwrap_or(rounds).max(1),
        time: Duration::from_millis(arguments.millis.unwrap_or(millis)),
        size: arguments.size.max(1) << 20,
        counts_syscalls: syscalls::can_count(),
    };
    if !effort.counts_syscalls {
        eprintln!("system calls are not counted: that needs perf (Debian: linux-perf), and root");
    }
    let run = Run {
        kinds: present(&arguments.servers),
        effort,
        arguments: &arguments,
    };
    // As a shell takes them.
    let words: Vec<String> = std::env::args()
        .skip(1)
        .map(|word| match word.contains(' ') {
            true => format!("'{word}'"),
            false => word,
        })
        .collect();
    let mut report = Report {
        machine: machine::Machine::now(),
        command: ["cargo xtask bench nbd", &words.join(" ")]
            .join(" ")
            .trim()
            .to_owned(),
        versions: run.versions(),
        tables: Vec::new(),
        crowds: Vec::new(),
        targets: Vec::new(),
    };
    let all = run.measure(&mut report)?;
    report.machine.finish();
    report.judge();
    let json = serde_json::to_string_pretty(&report).map_err(io::Error::other)?;
    fs::write(&arguments.json, json + "\n")?;
    println!("{}", report.markdown());
    if arguments.write {
        let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
        page::replace(&docs.join("benchmarks.md"), "bench nbd", &report.markdown())?;
        fs::write(docs.join("benchmarks.svg"), report.plot())?;
    }
    Ok(match all {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// The servers that are asked for and installed.
fn present(wanted: &[String]) -> Vec<&'static Kind> {
    let is_wanted = |kind: &&Kind| {
        let named = wanted.iter().any(|part| kind.name.contains(part));
        wanted.is_empty() || named || kind.program == Program::Limit
    };
    let (present, absent): (Vec<_>, Vec<_>) = KINDS
        .iter()
        .filter(is_wanted)
        .partition(|kind| kind.version().is_some());
    for kind in absent {
        if let Program::Installed(program, package) = kind.program {
            eprintln!("{}: no {program} (Debian: {package}), left out", kind.name);
        }
    }
    present
}

struct Run<'a> {
    kinds: Vec<&'static Kind>,
    effort: Effort,
    arguments: &'a Arguments,
}

impl Run<'_> {
    fn wants(&self, part: Part) -> bool {
        let only = &self.arguments.only;
        match only.is_empty() {
            true => !(self.arguments.quick && part == Part::Disk),
            false => only.contains(&part),
        }
    }

    fn kinds(&self, disk: Disk) -> Vec<&'static Kind> {
        self.kinds
            .iter()
            .copied()
            .filter(|kind| kind.disk == disk)
            .collect()
    }

    fn wanted(&self, mut loads: Vec<Load>) -> Vec<Load> {
        let works = &self.arguments.works;
        let is_wanted = |name: String| works.iter().any(|part| name.contains(part));
        loads.retain(|load| works.is_empty() || is_wanted(requests::name(*load)));
        loads
    }

    fn versions(&self) -> BTreeMap<String, String> {
        let mut all = BTreeMap::new();
        for kind in &self.kinds {
            let name = match kind.program {
                Program::Limit => continue,
                Program::Ulio => "ulio",
                Program::Installed(name, _) => name,
            };
            all.insert(name.to_owned(), kind.version().unwrap_or_default());
        }
        for name in ["fio", "nbdcopy"] {
            let version = machine::first_line(Command::new(name).arg("--version"));
            all.extend(version.map(|version| (name.to_owned(), version)));
        }
        all
    }

    /// Measures all that is wanted. A part that fails is left out, so that the others are not lost with it; false if one
    /// did.
    fn measure(&self, report: &mut Report) -> io::Result<bool> {
        let memory = tempfile::tempdir_in(&self.arguments.dir)?;
        let memory = memory.path();
        let mut tables = Vec::new();
        if self.wants(Part::Memory) {
            tables.extend([false, true].map(|tcp| self.memory(memory, tcp)));
        }
        if self.wants(Part::File) {
            let plan = self.files(memory, Disk::Buffered, "tmpfs");
            tables.push(plan.measure(self.effort));
        }
        if self.wants(Part::Disk) {
            let disk = tempfile::tempdir_in(&self.arguments.disk_dir)?;
            let kind = file_system(disk.path());
            for way in [Disk::Buffered, Disk::Direct] {
                let plan = self.files(disk.path(), way, &kind);
                tables.push(plan.measure(self.effort));
            }
        }
        tables.extend(self.tools(memory));
        if self.wants(Part::Stacks) {
            tables.extend([self.stacks(memory), self.late(memory)]);
        }
        let mut all = true;
        let mut complain = |error: io::Error| {
            eprintln!("left out: {error}");
            all = false;
        };
        for table in tables {
            match table {
                Ok(table) => report.tables.push(table),
                Err(error) => complain(error),
            }
        }
        if self.wants(Part::Crowd) {
            let time = self.effort.time.max(CROWDED);
            for kind in self.kinds(Disk::Memory) {
                match crowd::measure(kind, memory, time) {
                    Ok(crowd) => report.crowds.push(crowd),
                    Err(error) => complain(error),
                }
            }
        }
        Ok(all)
    }

    fn memory(&self, directory: &Path, tcp: bool) -> io::Result<bench::figures::Table> {
        let small = [(1, 1), (16, 1), (64, 1), (1, 4), (16, 4), (64, 4), (1, 16)];
        let middle = [(1, 1), (16, 1), (64, 1), (1, 4), (16, 4), (64, 4)];
        let large = [(1, 1), (16, 1), (64, 1), (1, 4), (16, 4)];
        let mut all = match self.arguments.quick {
            true => loads(4 << 10, &[(1, 1), (16, 1), (64, 1), (16, 4), (1, 16)]),
            false => loads(4 << 10, &small),
        };
        if self.arguments.quick {
            all.extend(loads(64 << 10, &[(16, 1)]));
            all.extend(loads(1 << 20, &[(16, 1)]));
        } else {
            all.extend(loads(64 << 10, &middle));
            all.extend(loads(1 << 20, &large));
        }
        let plan = Plan {
            title: format!("memory, {}", if tcp { "TCP" } else { "Unix" }),
            kinds: self.kinds(Disk::Memory),
            tcp,
            directory,
            loads: self.wanted(all),
        };
        plan.measure(self.effort)
    }

    fn files<'p>(&self, directory: &'p Path, disk: Disk, file_system: &str) -> Plan<'p> {
        let way = match disk {
            Disk::Direct => "direct",
            _ => "buffered",
        };
        let mut all = loads(4 << 10, &[(1, 1), (16, 1), (64, 1)]);
        for depth in [1, 16] {
            all.push(Load {
                write: true,
                depth,
                block: 4 << 10,
                connections: 1,
                flush_every: 8,
            });
        }
        Plan {
            title: format!("file, {way}, {file_system}, Unix"),
            kinds: self.kinds(disk),
            tcp: false,
            directory,
            loads: self.wanted(all),
        }
    }

    fn tools(&self, directory: &Path) -> Vec<io::Result<bench::figures::Table>> {
        let Effort {
            rounds, time, size, ..
        } = self.effort;
        let mut kinds = self.kinds(Disk::Memory);
        if !self.arguments.quick {
            kinds.extend(self.kinds(Disk::Buffered));
        }
        let mut tables = Vec::new();
        if self.wants(Part::Fio) {
            match tools::is_installed("fio") {
                // Twice the time: fio takes some to begin.
                true => tables.push(tools::fio(&kinds, directory, rounds, 2 * time, size)),
                false => eprintln!("fio is not installed, left out"),
            }
        }
        if self.wants(Part::Nbdcopy) {
            match tools::is_installed("nbdcopy") {
                true => tables.push(tools::nbdcopy(&kinds, directory, rounds)),
                false => eprintln!("nbdcopy (Debian: libnbd-bin) is not installed, left out"),
            }
        }
        tables
    }

    /// What layers cost.
    fn stacks(&self, directory: &Path) -> io::Result<bench::figures::Table> {
        let plan = Plan {
            title: "stacks, Unix".into(),
            kinds: vec![named("ulio memory")?, named("ulio memory, five layers")?],
            tcp: false,
            directory,
            loads: loads(4 << 10, &[(16, 1), (64, 1)]),
        };
        plan.measure(self.effort)
    }

    /// Whether requests wait side by side.
    fn late(&self, directory: &Path) -> io::Result<bench::figures::Table> {
        let plan = Plan {
            title: "stacks, 5 ms late, Unix".into(),
            kinds: vec![named("ulio memory, 5 ms late")?],
            tcp: false,
            directory,
            loads: loads(4 << 10, &[(1, 1), (64, 1)]),
        };
        let small = Effort {
            size: 4 << 20,
            ..self.effort
        };
        plan.measure(small)
    }
}

/// The name of the file system that `path` lies on.
fn file_system(path: &Path) -> String {
    let name = machine::first_line(Command::new("stat").args(["-f", "-c", "%T"]).arg(path));
    match name.as_deref() {
        Some("ext2/ext3") => "ext4".into(),
        Some(name) => name.to_owned(),
        None => "disk".into(),
    }
}
