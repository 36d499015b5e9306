//! User-Mode Linux: where its kernel comes from, and how it is started.
//!
//! In this order: the file that `ULIO_UML` names; the one that `cargo xtask vm --build-uml` has built,
//! which takes minutes and so is never done unasked. Nothing else: Debian's own package has an old
//! kernel without ublk.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::launch::{Guest, warded};
use super::{cache, debian, guest};

/// Names a kernel to use.
pub(super) const VARIABLE: &str = "ULIO_UML";
/// The kernel that is built: the first with ublk's UPDATE_SIZE in Debian.
const VERSION: &str = "7.3";
/// The Debian release that has its source.
const RELEASE: &str = "trixie-backports";
/// What is switched on beside the default configuration.
const CONFIG: &str = include_str!("uml.config");
/// What building takes, and the package that has it.
const TOOLS: &[(&str, &str)] = &[
    ("bc", "bc"),
    ("bison", "bison"),
    ("flex", "flex"),
    ("gcc", "gcc"),
    ("make", "make"),
    ("xz", "xz-utils"),
];

/// A kernel that is there.
#[derive(Debug)]
pub(crate) struct Kernel {
    path: PathBuf,
    version: String,
    is_ours: bool,
}

impl Kernel {
    /// The kernel, if there is one.
    pub(super) fn find() -> Result<Option<Self>, String> {
        let (path, is_ours) = match env::var_os(VARIABLE) {
            Some(path) if !path.is_empty() => {
                let path = PathBuf::from(path);
                let path = path
                    .canonicalize()
                    .map_err(|error| format!("{VARIABLE}={}: {error}", path.display()))?;
                (path, false)
            }
            _ => match built()? {
                path if path.is_file() => (path, true),
                _ => return Ok(None),
            },
        };
        let output = Command::new(&path).arg("--version").output();
        let output = output.map_err(|error| format!("{}: {error}", path.display()))?;
        let said = String::from_utf8_lossy(&output.stdout);
        let version = said.lines().last().unwrap_or_default().trim().to_owned();
        if !output.status.success() || !version.starts_with(|c: char| c.is_ascii_digit()) {
            return Err(format!(
                "{}: not a User-Mode Linux kernel: --version says {version:?}",
                path.display()
            ));
        }
        Ok(Some(Kernel {
            path,
            version,
            is_ours,
        }))
    }

    pub(super) fn describe(&self) -> String {
        let from = match self.is_ours {
            true => "built here",
            false => VARIABLE,
        };
        format!(
            "User-Mode Linux {} ({from}: {})",
            self.version,
            self.path.display()
        )
    }

    pub(super) fn command(&self, guest: &Guest<'_>) -> Result<Command, String> {
        let program = env::current_exe().map_err(|error| format!("this program: {error}"))?;
        let mut command = warded(self.path.as_os_str());
        // Its memory is a file there.
        if Path::new("/dev/shm").is_dir() {
            command.env("TMPDIR", "/dev/shm");
        }
        let [out, err] = guest.outputs;
        command.arg(format!("mem={}M", guest.memory));
        command.arg(format!("ncpus={}", guest.cpus));
        command.arg(join("uml_dir=", guest.share));
        command.args(["umid=guest", "seccomp=on", "quiet", "panic=-1"]);
        command.args(["root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro"]);
        command.args(["con=null", "ssl=null"]);
        command.arg("con0=null,fd:2");
        command.arg(format!("con1=null,fd:{out}"));
        command.arg(format!("con2=null,fd:{err}"));
        command.arg(join("init=", &program));
        command.args(["--", guest::WORD, "uml"]).arg(guest.share);
        Ok(command)
    }
}

/// Builds the kernel, and gives its place.
pub(super) fn build() -> Result<PathBuf, String> {
    let missing: Vec<&str> = TOOLS
        .iter()
        .filter(|(program, _)| !debian::has_program(program))
        .map(|(_, package)| *package)
        .collect();
    if !missing.is_empty() {
        return Err(format!(
            "building needs more: apt-get install {}",
            missing.join(" ")
        ));
    }
    let place = built()?;
    let dir = cache()?.join("uml-build");
    fs::create_dir_all(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    let package = format!("linux-source-{VERSION}");
    let source = dir.join(&package);
    if !source.is_dir() {
        eprintln!("xtask: fetching {package} of {RELEASE}");
        let apt = debian::Apt::of_release(RELEASE)?;
        let unpacked = dir.join("package");
        apt.unpack(std::slice::from_ref(&package), &unpacked)?;
        let archive = unpacked.join(format!("usr/src/{package}.tar.xz"));
        let mut tar = Command::new("tar");
        tar.arg("-xf").arg(archive).arg("-C").arg(&dir);
        debian::succeed(&mut tar)?;
        fs::remove_dir_all(&unpacked).ok();
    }
    let out = dir.join("objects");
    fs::create_dir_all(&out).map_err(|error| format!("{}: {error}", out.display()))?;
    let make = |targets: &[&str]| {
        let mut make = Command::new("make");
        make.arg("-s").arg("-C").arg(&source);
        make.arg(join("O=", &out)).arg("ARCH=um").args(targets);
        debian::succeed(&mut make)
    };
    eprintln!("xtask: building Linux {VERSION}, which takes minutes");
    make(&["defconfig"])?;
    let config = out.join(".config");
    let edit = |text: String| text + "\n" + CONFIG;
    let edited = fs::read_to_string(&config).map(edit);
    edited
        .and_then(|text| fs::write(&config, text))
        .map_err(|error| format!("{}: {error}", config.display()))?;
    make(&["olddefconfig"])?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    make(&[&format!("-j{jobs}"), "linux"])?;
    let half = place.with_extension("half");
    let mut strip = Command::new("strip");
    strip.arg("-g").arg("-o").arg(&half).arg(out.join("linux"));
    debian::succeed(&mut strip)?;
    fs::rename(&half, &place).map_err(|error| format!("{}: {error}", place.display()))?;
    fs::remove_dir_all(&out).ok();
    Ok(place)
}

/// Where a kernel of ours is.
fn built() -> Result<PathBuf, String> {
    Ok(cache()?.join(format!("linux-uml-{VERSION}")))
}

fn join(word: &str, path: &Path) -> std::ffi::OsString {
    let mut word = std::ffi::OsString::from(word);
    word.push(path);
    word
}
