//! The Debian packages that tests use, and putting them on the machine.

use std::io::{self, BufRead, IsTerminal, Write};
use std::process::{Command, Stdio};

/// Every package that a test uses, and what for. The only such list.
const PACKAGES: &[(&str, &str)] = &[
    (
        "busybox-static",
        "brings a guest up that tests other kernels",
    ),
    (
        "e2fsprogs",
        "mke2fs, e2fsck and debugfs: a real file system through the server",
    ),
    ("fio", "its NBD engine writes and verifies"),
    ("g++", "compiles the fuzzer's run time"),
    ("gcc-mingw-w64-x86-64", "links the build for Windows"),
    ("libnbd-bin", "nbdinfo and nbdcopy: clients"),
    ("nbdkit", "a server that our client talks to"),
    (
        "python3-libnbd",
        "a client that can send each command, and bad ones",
    ),
    (
        "qemu-utils",
        "qemu-img, qemu-io and qemu-nbd: clients, and a server that our client talks to",
    ),
    (
        "systemd",
        "systemd-analyze: the unit of a service is understood",
    ),
    ("valgrind", "counts instructions per request"),
    ("xz-utils", "unpacks the modules of a guest's kernel"),
    ("zstd", "unpacks a guest's kernel"),
];

/// Packages that only the long tests use.
const LONG: &[(&str, &str)] = &[
    ("mmdebstrap", "makes a Debian root file system"),
    (
        "postgresql",
        "a database that commits while the power is cut",
    ),
];

/// Installs what is missing, where that is allowed. Says what it does; whatever stays missing is
/// named by the tests that skip themselves for it.
pub(crate) fn install(yes: bool, long: bool) {
    println!("\n==> packages");
    if !runs(Command::new("dpkg-query").arg("--version")) {
        println!("not a Debian or Ubuntu system: install these by hand, or see tests skipped:");
        PACKAGES
            .iter()
            .for_each(|(name, why)| println!("    {name:<22} {why}"));
        return;
    }
    let wanted = PACKAGES.iter().chain(if long { LONG } else { &[] });
    let missing: Vec<_> = wanted.filter(|(name, _)| !installed(name)).collect();
    if missing.is_empty() {
        println!("all there");
        return;
    }
    println!("missing:");
    missing
        .iter()
        .for_each(|(name, why)| println!("    {name:<22} {why}"));
    let names: Vec<&str> = missing.iter().map(|(name, _)| *name).collect();
    let by_hand = format!("apt-get install {}", names.join(" "));
    let Some(prefix) = privilege() else {
        println!("neither root nor sudo without a password: as root run `{by_hand}`");
        return;
    };
    if !yes && !confirmed() {
        println!("not installed: run `{by_hand}`, or pass --yes");
        return;
    }
    // --no-remove: never trade a package that the machine has for one that a test wants.
    let update = apt(prefix, &["update", "-q"]);
    let install = [
        "install",
        "-q",
        "-y",
        "--no-install-recommends",
        "--no-remove",
    ];
    if !(update && apt(prefix, &[&install[..], &names].concat())) {
        println!("apt-get failed: going on without");
    }
}

fn installed(package: &str) -> bool {
    let mut query = Command::new("dpkg-query");
    query.args(["-W", "-f=${db:Status-Status}", package]);
    let output = query.stderr(Stdio::null()).output();
    output.is_ok_and(|output| output.status.success() && output.stdout == b"installed")
}

/// What to put before a command so that it runs as root; `None` if nothing does.
fn privilege() -> Option<&'static [&'static str]> {
    let id = Command::new("id").arg("-u").output();
    if id.is_ok_and(|output| output.stdout.trim_ascii() == b"0") {
        return Some(&["env"]);
    }
    runs(Command::new("sudo").args(["-n", "true"])).then_some(&["sudo", "-n", "env"])
}

fn confirmed() -> bool {
    if !io::stdin().is_terminal() {
        return false;
    }
    print!("install them now? [y/N] ");
    let mut answer = String::new();
    io::stdout().flush().is_ok()
        && io::stdin().lock().read_line(&mut answer).is_ok()
        && matches!(answer.trim(), "y" | "Y" | "yes")
}

fn apt(prefix: &[&str], args: &[&str]) -> bool {
    let mut command = Command::new(prefix[0]);
    command.args(&prefix[1..]);
    command
        .args(["DEBIAN_FRONTEND=noninteractive", "apt-get"])
        .args(args);
    command
        .stdin(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn runs(command: &mut Command) -> bool {
    let command = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}
