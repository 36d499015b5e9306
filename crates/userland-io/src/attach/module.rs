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
        .arg(name)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(refused(name, &String::from_utf8_lossy(&output.stderr))),
        Err(error) => Err(format!(
            "this kernel has no driver {name} loaded, and modprobe cannot be run: {error}"
        )),
    }
}

/// What modprobe complained of, in one line.
fn refused(name: &str, said: &str) -> String {
    let mut said = said.lines().map(str::trim);
    match said.rfind(|line| !line.is_empty()) {
        // Its own words for that name a directory, and no way out. Busybox's differ.
        Some(line) if !line.contains("not found") => {
            format!("the driver {name} cannot be loaded: {line}")
        }
        _ => format!("this kernel has no driver {name}, built in or as a module"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_modprobe_says_is_told_unless_there_is_no_such_module() {
        let none = "this kernel has no driver nbd, built in or as a module";
        for said in [
            "",
            "modprobe: FATAL: Module nbd not found in directory /lib/modules/6.1\n",
            "modprobe: module nbd not found in modules.dep\n",
        ] {
            assert_eq!(refused("nbd", said), none);
        }
        let said =
            "warning\nmodprobe: ERROR: could not insert 'nbd': Key was rejected by service\n\n";
        assert_eq!(
            refused("nbd", said),
            "the driver nbd cannot be loaded: modprobe: ERROR: could not insert 'nbd': Key was rejected by service"
        );
    }
}
