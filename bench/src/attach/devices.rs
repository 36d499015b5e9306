//! Programs that make block devices: `ulio attach`, nbdfuse with losetup, rublk.

use std::fs;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::process;

/// A block device, and what serves it. It is taken away when dropped.
#[derive(Debug)]
pub struct Device {
    /// The device.
    pub path: PathBuf,
    /// From the start of the program to the device.
    pub took: Duration,
    /// The process that serves it.
    server: u32,
    end: Ended,
}

/// What takes a device away.
#[derive(Debug)]
pub enum Ended {
    /// Its process ends it when it is interrupted.
    Interrupt(Child),
    /// losetup and nbdfuse, with its mounted file.
    Unmount(Child, tempfile::TempDir),
    /// rublk, by the device's number.
    Rublk(PathBuf, String),
}

impl Device {
    /// `ulio attach`, with these further words, by the program beside this one.
    ///
    /// # Errors
    /// If it makes no device.
    pub fn ulio(words: &[&str]) -> io::Result<Self> {
        let begun = Instant::now();
        let mut ulio = Command::new(std::env::current_exe()?.with_file_name("ulio"));
        ulio.arg("attach").args(words);
        let mut child = ulio
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut line = String::new();
        if let Some(out) = child.stdout.take() {
            BufReader::new(out).read_line(&mut line)?;
        }
        let device = Device {
            path: line.trim_end().into(),
            took: begun.elapsed(),
            server: child.id(),
            end: Ended::Interrupt(child),
        };
        match line.is_empty() {
            false => Ok(device),
            true => Err(io::Error::other(format!(
                "ulio attach {words:?}: no device"
            ))),
        }
    }

    /// A disk of `size` bytes in memory by nbdfuse over nbdkit, and a loop device.
    ///
    /// # Errors
    /// If there is none in ten seconds.
    pub fn nbdfuse(size: u64) -> io::Result<Self> {
        let begun = Instant::now();
        let mounted = tempfile::tempdir()?;
        let file = mounted.path().join("disk");
        fs::write(&file, "")?;
        let mut nbdfuse = Command::new("nbdfuse");
        nbdfuse
            .arg(&file)
            .args(["[", "nbdkit", "--exit-with-parent", "memory"])
            .arg(size.to_string())
            .arg("]");
        let child = nbdfuse.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
        let mut device = Device {
            path: PathBuf::new(),
            took: Duration::ZERO,
            server: child.id(),
            end: Ended::Unmount(child, mounted),
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
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            return Err(io::Error::other(format!("losetup: {}", text.trim_end())));
        }
        device.path = String::from_utf8_lossy(&output.stdout).trim_end().into();
        device.took = begun.elapsed();
        Ok(device)
    }

    /// `rublk add`, with these further words. It goes into the background when the device is there, and says what it is.
    ///
    /// # Errors
    /// If it makes no device.
    pub fn rublk(program: &Path, words: &[&str]) -> io::Result<Self> {
        let begun = Instant::now();
        let mut rublk = Command::new(program);
        let output = rublk.arg("add").args(words).stdin(Stdio::null()).output()?;
        let took = begun.elapsed();
        let text = String::from_utf8_lossy(&output.stdout);
        let after = |what: &str| -> Option<&str> {
            let (_, rest) = text.split_once(what)?;
            rest.split([':', ' ', '\n']).find(|word| !word.is_empty())
        };
        let (Some(number), Some(server)) = (after("dev id"), after("daemon pid")) else {
            let told = String::from_utf8_lossy(&output.stderr);
            return Err(io::Error::other(format!(
                "rublk add {words:?}: {text}{told}"
            )));
        };
        Ok(Device {
            path: format!("/dev/ublkb{number}").into(),
            took,
            server: server.parse().map_err(io::Error::other)?,
            end: Ended::Rublk(program.to_owned(), number.to_owned()),
        })
    }

    /// The processor time that the process which serves it has used so far, in seconds.
    ///
    /// # Errors
    /// If it has ended.
    pub fn cpu(&self) -> io::Result<f64> {
        Ok(process::cpu(self.server)?.as_secs_f64())
    }

    /// What the kernel's files say about it in `/sys/block`.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn attribute(&self, name: &str) -> io::Result<String> {
        let device = self.path.file_name().unwrap_or_default();
        let path = Path::new("/sys/block").join(device).join(name);
        Ok(fs::read_to_string(path)?.trim().to_owned())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let quietly = |command: &mut Command| {
            let _ = command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
        };
        match &mut self.end {
            Ended::Interrupt(child) => {
                quietly(Command::new("kill").args(["-INT", &child.id().to_string()]));
                let _ = child.wait();
            }
            Ended::Unmount(child, mounted) => {
                quietly(Command::new("losetup").arg("-d").arg(&self.path));
                quietly(
                    Command::new("fusermount3")
                        .arg("-u")
                        .arg(mounted.path().join("disk")),
                );
                let _ = child.wait();
            }
            Ended::Rublk(program, number) => {
                quietly(Command::new(program).args(["del", "-n", number]));
            }
        }
    }
}
