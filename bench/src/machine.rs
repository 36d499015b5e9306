//! What figures depend on beside the programs: the machine, and what else it is doing.

use std::fs;
use std::io;
use std::process::Command;

use serde::Serialize;

/// Where and when something was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Year, month and day.
    pub date: String,
    /// The processor's name.
    pub processor: String,
    /// How many cores this process may use.
    pub cores: usize,
    /// The kernel's release.
    pub kernel: String,
    /// The load average of the last minute before anything was measured.
    pub load_before: f64,
    /// The same at the end: most of it is the measurement's own.
    pub load_after: f64,
}

impl Machine {
    /// This machine, now.
    pub fn now() -> Self {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let mut names = info
            .lines()
            .filter_map(|line| line.strip_prefix("model name"));
        let processor = names.next().unwrap_or("unknown");
        Machine {
            date: first_line(Command::new("date").arg("+%F")).unwrap_or_default(),
            processor: processor.trim_matches(['\t', ':', ' ']).to_owned(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")
                .unwrap_or_default()
                .trim()
                .to_owned(),
            load_before: load(),
            load_after: 0.0,
        }
    }

    /// Notes that all has been measured.
    pub fn finish(&mut self) {
        self.load_after = load();
    }

    /// One line about it.
    pub fn describe(&self) -> String {
        let Machine {
            date,
            processor,
            cores,
            kernel,
            load_before,
            load_after,
        } = self;
        format!(
            "{date}, {cores} cores of {processor}, Linux {kernel}, load {load_before:.1} before and {load_after:.1} after"
        )
    }
}

fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let first = text.split_whitespace().next();
    first.and_then(|load| load.parse().ok()).unwrap_or(f64::NAN)
}

/// The processor time that all of the machine has used since it started, in seconds (proc(5): /proc/stat).
///
/// # Errors
/// If the kernel does not say.
pub fn busy() -> io::Result<f64> {
    let text = fs::read_to_string("/proc/stat")?;
    let fields = text.lines().next().unwrap_or_default().split_whitespace();
    let ticks: Vec<f64> = fields
        .skip(1)
        .filter_map(|field| field.parse().ok())
        .collect();
    // All but idle and iowait, the fourth and fifth; guests' time is counted in the first two.
    let used: f64 = ticks
        .iter()
        .take(3)
        .chain(ticks.iter().skip(5).take(3))
        .sum();
    Ok(used / 100.0)
}

/// The first line that `command` prints, `None` if it cannot be run.
pub fn first_line(command: &mut Command) -> Option<String> {
    let output = command.output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    Some(text.lines().next().unwrap_or_default().to_owned())
}
