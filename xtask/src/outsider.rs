//! An engine of somebody else's, in a crate outside the workspace, goes through the suite; and with
//! a bug in it the suite says what is wrong.

use std::process::Command;

use crate::report::Report;

pub(crate) fn run(report: &mut Report) {
    report.step("an outsider's engine", &mut test());
    report.check("an outsider's bug", || {
        let output = test()
            .args(["--features", "bug"])
            .output()
            .map_err(|error| format!("cannot run cargo: {error}"))?;
        let said = String::from_utf8_lossy(&output.stdout);
        let verdict: Vec<&str> = said
            .lines()
            .skip_while(|line| !line.contains("broken: "))
            .take(2)
            .collect();
        match verdict[..] {
            [_, _] if !output.status.success() => Ok(verdict.join("\n")),
            _ => Err(format!("the suite did not report it:\n{said}")),
        }
    });
}

fn test() -> Command {
    let mut cargo = Command::new("cargo");
    // One directory for what both workspaces build.
    cargo.args(["test", "--manifest-path", "outsider/Cargo.toml"]);
    cargo.args(["--target-dir", "target"]);
    cargo
}
