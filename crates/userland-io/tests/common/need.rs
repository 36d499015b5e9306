//! Programs that a test uses and a machine may lack.
//!
//! A test that lacks one says so in a line that `cargo xtask test` counts, and returns:
//!
//! ```ignore
//! #[path = "common/need.rs"]
//! mod need;
//!
//! #[test]
//! fn nbdinfo_sees_the_size() {
//!     let Some(nbdinfo) = need::program("nbdinfo") else { return };
//! ```
#![allow(dead_code)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where `name` is, or `None` once the skip is told.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Debian keeps mke2fs and its kin where an ordinary user's PATH does not look.
    let more = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    let found = std::env::split_paths(&path)
        .chain(more)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file());
    if found.is_none() {
        skip(&format!("needs the program {name}"));
    }
    found
}

/// The system's python3, if it can import `module`, or `None` once the skip is told.
pub(crate) fn python(module: &str) -> Option<PathBuf> {
    // Not the PATH's: Debian's modules belong to Debian's python.
    let python = Path::new("/usr/bin/python3");
    let mut import = Command::new(python);
    import.arg("-c").arg(format!("import {module}"));
    let status = import
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if status.is_ok_and(|status| status.success()) {
        return Some(python.to_owned());
    }
    skip(&format!(
        "needs {} with the module {module}",
        python.display()
    ));
    None
}

/// Tells that the calling test does not run because the kernel, the file system or the user lacks something that no
/// package brings. Return after it. Counted, and forgiven where skips are forbidden.
pub(crate) fn impossible(reason: &str) {
    skip(&format!("this machine cannot: {reason}"));
}

/// Tells that the calling test wants a kernel that has `what`, and runs in a guest that does. Return after it.
/// In a guest it is a skip like any other.
pub(crate) fn guest(what: &str) {
    match std::env::var_os("ULIO_GUEST") {
        Some(_) => skip(&format!("needs {what}")),
        None => skip(&format!("in a guest: needs {what}")),
    }
}

/// Tells that the calling test does not run, and why. Return after it.
pub(crate) fn skip(reason: &str) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("main");
    // Straight to stderr: libtest keeps what print! and eprintln! say of a test that passes.
    let line = format!("SKIP {test}: {reason}\n");
    std::io::stderr().write_all(line.as_bytes()).ok();
}
