//! `ulio engines`: the catalogue.

mod common;
use common::Ulio;

use std::collections::BTreeSet;
use std::process::Stdio;

use userland_io::stack::Registry;

#[test]
fn every_name_and_key_of_the_registry_is_listed() {
    let ran = Ulio::new().run("engines");
    let out = ran.ok();
    for (_, entry) in Registry::builtin().entries() {
        assert!(out.contains(&entry.synopsis()), "{}\n{out}", entry.name);
        assert!(out.contains(entry.summary));
        for key in &entry.keys {
            assert!(out.contains(key.meaning), "{}: {}", entry.name, key.name);
        }
    }
    assert_eq!(ran.err, "");
}

#[test]
fn one_name_shows_that_alone() {
    let ran = Ulio::new().run("engines null");
    let out = ran.ok();
    assert!(out.starts_with("null:"), "{out}");
    assert!(out.contains("readonly") && !out.contains("memory"), "{out}");
}

#[test]
fn json_has_the_same_names_keys_and_defaults() {
    let ran = Ulio::new().run("engines --json");
    let list: serde_json::Value = serde_json::from_str(ran.ok()).unwrap();
    let list = list.as_array().unwrap();
    let names: BTreeSet<&str> = list.iter().filter_map(|e| e["name"].as_str()).collect();
    let registry = Registry::builtin();
    assert_eq!(names, registry.entries().map(|(_, e)| e.name).collect());
    let null = list.iter().find(|e| e["name"] == "null").unwrap();
    assert_eq!(null["role"], "engine");
    assert_eq!(null["keys"][0]["name"], "size");
    assert_eq!(null["keys"][0]["default"], "1G");
    assert_eq!(null["keys"][0]["positional"], true);
    assert_eq!(null["keys"][1]["kind"], "flag");
}

#[test]
fn an_unknown_name_is_answered_with_those_that_exist() {
    Ulio::new().run("engines nul").fails(
        2,
        &["no engine or layer is called `nul`; did you mean `null`?"],
    );
    Ulio::new()
        .run("engines fiel")
        .fails(2, &["did you mean `file`?"]);
    Ulio::new()
        .run("engines zfs")
        .fails(2, &["no engine or layer is called `zfs`", "memory", "null"]);
}

/// A reader that leaves early, as `head -1` does, is no fault: no panic, no message, no error.
#[test]
fn a_closed_pipe_ends_it_quietly() {
    let ulio = Ulio::new();
    for arguments in [
        "engines",
        "engines --json",
        "man",
        "completions bash",
        "info --map null:1G",
    ] {
        let mut child = ulio
            .command(arguments.split(' '))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{arguments}");
        assert_eq!(output.status.code(), Some(0), "{arguments}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_under_stdout_is_an_error() {
    let full = std::fs::File::options()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_ulio"))
        .arg("engines")
        .stdout(full)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(
        err.starts_with("error: writing to stdout: No space left"),
        "{err}"
    );
}
