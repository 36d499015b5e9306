//! Which test programs run in guests, and running them: built on the host, then all of a kernel's in one guest.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::{Engine, Kernel, tcg, uml};
use crate::report::Report;
use crate::root;

/// A test program that runs in guests.
struct Suite {
    package: &'static str,
    /// The name of the integration test: its file in `tests/` without `.rs`.
    test: &'static str,
    /// The tests that run, by a part of their names; empty: all.
    only: &'static str,
    kernel: Engine,
    /// What its environment has beside the run's.
    env: &'static [(&'static str, &'static str)],
    /// Only in long runs.
    long: bool,
}

/// The table. A line more is all that another suite takes.
const SUITES: &[Suite] = &[
    uml("kernel_nbd", &[]),
    uml("kernel_nbd_export", &[]),
    of_ulio(uml("attach", UBLK)),
    of_ulio(uml("attach", NBD)),
    of_ulio(uml("attach", FUSE)),
    of_ulio(uml("attach_ways", UBLK)),
    of_ulio(uml("attach_ways", NBD)),
    of_ulio(uml("attach_recovery", UBLK)),
    of_ulio(uml("attach_recovery", NBD)),
    uml("attach_requests", UBLK),
    uml("attach_requests", NBD),
    uml("attach_requests", FUSE),
    uml("attach_data", UBLK),
    uml("attach_data", NBD),
    uml("attach_data", FUSE),
    uml("attach_fs", UBLK),
    uml("attach_fs", NBD),
    uml("attach_fs", FUSE),
    uml("attach_lifecycle", UBLK),
    uml("attach_lifecycle", NBD),
    uml("attach_lifecycle", FUSE),
    uml("attach_race", UBLK),
    uml("attach_race", NBD),
    uml("attach_race", FUSE),
    uml("attach_recover", UBLK),
    uml("attach_timers", UBLK),
    uml("attach_timers", NBD),
    uml("attach_leaks", UBLK),
    uml("attach_leaks", NBD),
    databases(UBLK),
    databases(NBD),
    databases(FUSE),
    tcg("attach_requests", UBLK),
    tcg("attach_lifecycle", UBLK),
    tcg("attach_recover", UBLK),
];

const UBLK: &[(&str, &str)] = &[("ULIO_VIA", "ublk")];
const NBD: &[(&str, &str)] = &[("ULIO_VIA", "nbd")];
const FUSE: &[(&str, &str)] = &[("ULIO_VIA", "fuse")];

/// All tests of a program of the library's, in User-Mode Linux.
const fn uml(test: &'static str, env: &'static [(&'static str, &'static str)]) -> Suite {
    Suite {
        package: "userland-io",
        test,
        only: "",
        kernel: Engine::Uml,
        env,
        long: false,
    }
}

/// The databases of the proof kit, in User-Mode Linux: what they take is too long for every day.
const fn databases(env: &'static [(&'static str, &'static str)]) -> Suite {
    Suite {
        package: "userland-io-testing",
        long: true,
        ..uml("attach_databases", env)
    }
}

/// Of the command line's rather than the library's.
const fn of_ulio(mut suite: Suite) -> Suite {
    suite.package = "ulio";
    suite
}

/// The same in an emulated machine, where everything takes its time.
const fn tcg(test: &'static str, env: &'static [(&'static str, &'static str)]) -> Suite {
    Suite {
        kernel: Engine::Tcg,
        ..uml(test, env)
    }
}

/// The longest time that one guest may take, in seconds: every day, and in long runs.
const TIMEOUTS: [u32; 2] = [900, 3 * 3600];

/// Runs the suites of each kernel that can be had, in one guest each.
pub(crate) fn run(report: &mut Report, long: bool) {
    if SUITES.is_empty() {
        return;
    }
    let programs = match build() {
        Ok(programs) => programs,
        Err(error) => return report.check("test programs for guests", || Err(error)),
    };
    for (engine, name) in [(Engine::Uml, "uml"), (Engine::Tcg, "tcg")] {
        let suites: Vec<&Suite> = SUITES
            .iter()
            .filter(|suite| suite.kernel == engine && (long || !suite.long))
            .collect();
        if suites.is_empty() {
            continue;
        }
        let step = format!("tests in a guest ({name})");
        let kernel = match engine {
            Engine::Uml => uml::Kernel::find().map(|kernel| kernel.map(Kernel::Uml)),
            Engine::Tcg => tcg::Kernel::prepare().map(|kernel| Some(Kernel::Tcg(kernel))),
        };
        match kernel {
            Ok(Some(kernel)) => println!("\n{}", kernel.describe()),
            Ok(None) => {
                let why = format!(
                    "no kernel: set {}, or `cargo xtask vm --build-uml`",
                    uml::VARIABLE
                );
                report.excuse(&step, &why);
                continue;
            }
            Err(error) => {
                report.excuse(&step, &error);
                continue;
            }
        }
        match script(name, &suites, &programs, long) {
            Ok(script) => {
                let mut cargo = Command::new("cargo");
                cargo.args(["xtask", "vm", "-v", "--engine", name]);
                let timeout = TIMEOUTS[usize::from(long)].to_string();
                cargo.args(["--timeout", &timeout, "--", "sh"]);
                report.step(&step, cargo.arg(script));
            }
            Err(error) => report.check(&step, || Err(error)),
        }
    }
}

/// A test program that was built.
struct Program {
    package: String,
    test: String,
    /// The directory of its package, in which cargo would run it.
    dir: PathBuf,
    path: PathBuf,
}

/// Builds all tests, with what `cargo xtask test` has built them with already.
fn build() -> Result<Vec<Program>, String> {
    let mut cargo = Command::new("cargo");
    cargo.args(["test", "--workspace", "--all-features", "--no-run"]);
    cargo.args(["--message-format", "json"]);
    let output = cargo
        .output()
        .map_err(|error| format!("cannot run cargo: {error}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().filter_map(program).collect())
}

/// The integration test that a line of cargo's tells of.
fn program(line: &str) -> Option<Program> {
    let message: Value = serde_json::from_str(line).ok()?;
    let kinds = message["target"]["kind"].as_array()?;
    if !kinds.iter().any(|kind| kind == "test") {
        return None;
    }
    let manifest = Path::new(message["manifest_path"].as_str()?);
    let dir = manifest.parent()?;
    Some(Program {
        // Packages have their directories' names here.
        package: dir.file_name()?.to_str()?.to_owned(),
        test: message["target"]["name"].as_str()?.to_owned(),
        dir: dir.to_owned(),
        path: message["executable"].as_str()?.into(),
    })
}

/// Writes the script that a guest runs, and gives its place.
fn script(
    kernel: &str,
    suites: &[&Suite],
    programs: &[Program],
    long: bool,
) -> Result<PathBuf, String> {
    let mut text = String::from("status=0\n");
    for suite in suites {
        let is_it =
            |program: &&Program| program.package == suite.package && program.test == suite.test;
        let Some(program) = programs.iter().find(is_it) else {
            return Err(format!(
                "{} has no test named {}",
                suite.package, suite.test
            ));
        };
        let env = suite
            .env
            .iter()
            .map(|(key, value)| format!("{key}={value} "));
        let env: String = env.collect();
        let rest = if long {
            " --include-ignored --skip child_"
        } else {
            ""
        };
        text += &format!(
            "echo; echo '{env}{} {}'\ncd '{}' && {env}'{}' {}{rest} || status=1\n",
            suite.test,
            suite.only,
            program.dir.display(),
            program.path.display(),
            suite.only
        );
    }
    text += "exit $status\n";
    let path = root().join(format!("target/guest-{kernel}.sh"));
    fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(path)
}
