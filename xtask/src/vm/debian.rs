//! Debian packages, unpacked beside the system instead of installed: nothing of the machine changes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::cache;

/// Where packages are looked for.
#[derive(Debug)]
pub(super) struct Apt {
    options: Vec<String>,
}

impl Apt {
    /// Where this machine's packages are from.
    pub(super) fn of_machine() -> Self {
        // As root, apt would hand downloads to a user who cannot write here.
        let options = ["-o", "APT::Sandbox::User=root"];
        Apt {
            options: options.map(str::to_owned).to_vec(),
        }
    }

    /// Where the same archive has another release's. Only our own lists are touched.
    pub(super) fn of_release(release: &str) -> Result<Self, String> {
        let archive = archive()?;
        let dir = cache()?.join("apt").join(release);
        for sub in ["lists/partial", "cache/archives/partial"] {
            let dir = dir.join(sub);
            fs::create_dir_all(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        }
        let sources = dir.join("sources.list");
        let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
        let line = format!("deb [signed-by={keys}] {archive} {release} main\n");
        fs::write(&sources, line).map_err(|error| format!("{}: {error}", sources.display()))?;
        let mut apt = Apt::of_machine();
        for (key, value) in [
            ("Dir::Etc::sourcelist", sources.clone()),
            ("Dir::Etc::sourceparts", "/dev/null".into()),
            ("Dir::State::lists", dir.join("lists")),
            ("Dir::Cache", dir.join("cache")),
        ] {
            apt.options.push("-o".into());
            apt.options.push(format!("{key}={}", value.display()));
        }
        succeed(apt.command("apt-get").args(["update", "-q", "-q"]))?;
        Ok(apt)
    }

    /// The packages that `package` depends on whose names begin with `prefix`.
    pub(super) fn dependencies(&self, package: &str, prefix: &str) -> Result<Vec<String>, String> {
        let text = output(self.command("apt-cache").args(["depends", package]))?;
        let lines = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "));
        let names = lines.filter(|name| name.starts_with(prefix));
        Ok(names.map(str::to_owned).collect())
    }

    /// What would have to be installed so that `package` works.
    pub(super) fn missing(&self, package: &str) -> Result<Vec<String>, String> {
        let mut command = self.command("apt-get");
        command.args(["install", "--simulate", "--no-install-recommends", package]);
        let text = output(&mut command)?;
        let lines = text.lines().filter_map(|line| line.strip_prefix("Inst "));
        let names = lines.filter_map(|line| line.split_whitespace().next());
        Ok(names.map(str::to_owned).collect())
    }

    /// Fetches `packages` and unpacks them into `dir`, which is made anew.
    pub(super) fn unpack(&self, packages: &[String], dir: &Path) -> Result<(), String> {
        let fail = |error: std::io::Error| format!("{}: {error}", dir.display());
        if dir.exists() {
            fs::remove_dir_all(dir).map_err(fail)?;
        }
        let archives = dir.join("archives");
        fs::create_dir_all(&archives).map_err(fail)?;
        let mut download = self.command("apt-get");
        download.args(["download", "-q", "-q"]).args(packages);
        succeed(download.current_dir(&archives))?;
        for entry in fs::read_dir(&archives).map_err(fail)? {
            let archive = entry.map_err(fail)?.path();
            succeed(Command::new("dpkg").arg("-x").arg(archive).arg(dir))?;
        }
        fs::remove_dir_all(&archives).map_err(fail)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("LC_ALL", "C").args(&self.options);
        command
    }
}

/// The archive of Debian that this machine uses.
fn archive() -> Result<String, String> {
    let mut targets = Command::new("apt-get");
    targets.args(["indextargets", "--format", "$(LABEL) $(REPO_URI)"]);
    let text = output(&mut targets)?;
    let uris = text
        .lines()
        .filter_map(|line| line.strip_prefix("Packages "));
    let own = |uri: &&str| uri.trim_end_matches('/').ends_with("/debian");
    match uris.into_iter().find(own) {
        Some(uri) => Ok(uri.to_owned()),
        None => Err("this machine's apt knows no archive of Debian".into()),
    }
}

/// Runs a command that has to succeed.
pub(super) fn succeed(command: &mut Command) -> Result<(), String> {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{:?} failed: {status}", command.get_program())),
        Err(error) => Err(format!("cannot run {:?}: {error}", command.get_program())),
    }
}

/// What a command prints that has to succeed.
pub(super) fn output(command: &mut Command) -> Result<String, String> {
    let output = command.stdin(Stdio::null()).output();
    let output =
        output.map_err(|error| format!("cannot run {:?}: {error}", command.get_program()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{:?}: {}", command.get_program(), said.trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

pub(super) fn has_program(name: &str) -> bool {
    program(name).is_some()
}

/// Where a program is.
pub(super) fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).map(|dir| dir.join(name));
    places.find(|path| path.is_file())
}
