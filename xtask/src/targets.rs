//! Builds for systems that this is not: the portable parts for Windows and macOS.

use std::process::{Command, Stdio};

use crate::report::Report;

/// What is portable; the rest of the workspace is Linux's.
const PORTABLE: &[&str] = &[
    "-p",
    "userland-io",
    "-p",
    "userland-io-testing",
    "-p",
    "ulio",
];

/// Links everything for Windows, and type-checks it for macOS, whose linker is not to be had here.
pub(crate) fn run(report: &mut Report) {
    let name = "build for Windows (x86_64-pc-windows-gnu)";
    if !has_program("x86_64-w64-mingw32-gcc") {
        report.skip(
            name,
            "needs x86_64-w64-mingw32-gcc, from the package gcc-mingw-w64-x86-64",
        );
    } else {
        target_step(
            report,
            name,
            "x86_64-pc-windows-gnu",
            &["build", "--lib", "--bins", "--examples"],
        );
    }
    let name = "check for macOS (aarch64-apple-darwin)";
    target_step(
        report,
        name,
        "aarch64-apple-darwin",
        &["check", "--lib", "--bins", "--examples"],
    );
}

fn target_step(report: &mut Report, name: &str, target: &str, args: &[&str]) {
    if let Err(reason) = add(target) {
        return report.excuse(name, &reason);
    }
    let mut cargo = Command::new("cargo");
    cargo
        .args(args)
        .args(PORTABLE)
        .args(["--all-features", "--target", target]);
    report.step(name, &mut cargo);
}

/// Makes the standard library for `target` available.
fn add(target: &str) -> Result<(), String> {
    let sysroot = Command::new("rustc")
        .args(["--print", "target-libdir", "--target", target])
        .output();
    let there = sysroot.is_ok_and(|output| {
        let dir = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        output.status.success() && std::path::Path::new(&dir).is_dir()
    });
    if there {
        return Ok(());
    }
    let added = Command::new("rustup")
        .args(["target", "add", target])
        .stdin(Stdio::null())
        .output();
    match added {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr);
            let last = text.trim().lines().last().unwrap_or("no reason given");
            Err(format!("rustup cannot add the target: {last}"))
        }
        Err(error) => Err(format!(
            "the target is not installed, and rustup cannot be run: {error}"
        )),
    }
}

fn has_program(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(name).is_file())
}
