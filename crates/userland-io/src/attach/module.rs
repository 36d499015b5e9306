//! Loading a module of the kernel's, for a way that wants its driver.

use std::process::{Command, Stdio};

/// Loads the module `name`. What says that the driver is there already is for the caller to ask before.
///
/// # Errors
/// In words, what modprobe(8) says, or that there is none.
pub(super) fn load(name: &str) -> Result<(), String> {
    let mut command = Command::new("modprobe");
    // Not every caller's PATH has the directories of an administrator's programs.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    let output = command
        .args(["-q", name])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(_) => Err(format!(
            "this kernel has no driver {name}, built in or as a module"
        )),
        Err(error) => Err(format!(
            "this kernel has no driver {name} loaded, and modprobe cannot be run: {error}"
        )),
    }
}
