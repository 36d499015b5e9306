//! Licences of everything we link: each dependency's SPDX expression against the list in `deny.toml`.
//!
//! `cargo metadata` has all that this needs, in a fraction of a second. cargo-deny reads
//! the same list and says the same, but takes minutes to build on a fresh machine, so
//! only a long run asks it for a second opinion.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use crate::root;

/// `Ok` says what was checked, `Err` lists each offender.
pub(crate) fn check(metadata: &Value) -> Result<String, String> {
    let path = root().join("deny.toml");
    let text =
        std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let allowed = allowed(&text)?;
    let fuzz = fuzz_metadata()?;
    let mut seen = BTreeSet::new();
    let mut wrong = Vec::new();
    let workspaces = [metadata, &fuzz].into_iter();
    for package in workspaces
        .flat_map(|metadata| metadata["packages"].as_array())
        .flatten()
    {
        let name = format!(
            "{} {}",
            text_of(package, "name"),
            text_of(package, "version")
        );
        // No source: a package of this repository.
        let Some(source) = package["source"].as_str() else {
            continue;
        };
        if !seen.insert(name.clone()) {
            continue;
        }
        if !source.starts_with("registry+") && !source.starts_with("sparse+") {
            wrong.push(format!("{name} comes from {source}, not from a registry"));
        }
        let licence = text_of(package, "license");
        match permits(licence, &allowed) {
            Ok(true) => {}
            Ok(false) => wrong.push(format!(
                "{name} is licensed {licence:?}, which deny.toml does not allow"
            )),
            Err(error) => wrong.push(format!("{name} has licence {licence:?}: {error}")),
        }
    }
    match wrong.is_empty() {
        true => Ok(format!(
            "{} dependencies, all under licences that deny.toml allows",
            seen.len()
        )),
        false => Err(wrong.join("\n")),
    }
}

/// Builds cargo-deny into the build directory; does nothing once it is there.
pub(crate) fn install_cargo_deny() -> Command {
    let mut cargo = Command::new("cargo");
    cargo
        .args(["install", "-q", "cargo-deny", "--locked", "--root"])
        .arg(tools());
    cargo
}

/// cargo-deny's own look at `deny.toml`.
pub(crate) fn cargo_deny() -> Command {
    let mut deny = Command::new(tools().join("bin/cargo-deny"));
    deny.args(["check", "licenses", "bans", "sources"]);
    deny
}

fn tools() -> PathBuf {
    root().join("target/tools")
}

fn fuzz_metadata() -> Result<Value, String> {
    let mut cargo = Command::new("cargo");
    cargo
        .args(["metadata", "--format-version", "1", "--manifest-path"])
        .arg(root().join("fuzz/Cargo.toml"));
    let output = cargo
        .output()
        .map_err(|error| format!("cannot run cargo: {error}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())
}

fn text_of<'a>(package: &'a Value, key: &str) -> &'a str {
    package[key].as_str().unwrap_or_default()
}

/// The strings of `allow = [...]` under `[licenses]`.
fn allowed(text: &str) -> Result<BTreeSet<String>, String> {
    let section = text
        .split("[licenses]")
        .nth(1)
        .ok_or("deny.toml has no [licenses]")?;
    let list = section
        .split_once("allow = [")
        .and_then(|(_, rest)| rest.split_once(']'));
    let (list, _) = list.ok_or("deny.toml has no list `allow = [...]` under [licenses]")?;
    let lines = list
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default());
    let names = lines
        .flat_map(|line| line.split(','))
        .map(|name| name.trim().trim_matches('"'));
    Ok(names
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect())
}

/// Whether `allowed` suffices to use something under `expression`: one side of an OR, both of an AND.
fn permits(expression: &str, allowed: &BTreeSet<String>) -> Result<bool, String> {
    // "MIT/Apache-2.0" is how OR was once written.
    let spaced = expression
        .replace('/', " OR ")
        .replace('(', " ( ")
        .replace(')', " ) ");
    let mut words = spaced.split_whitespace().peekable();
    let permitted = any_of(&mut words, allowed)?;
    match words.next() {
        None => Ok(permitted),
        Some(word) => Err(format!("{word:?} is out of place")),
    }
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn any_of(words: &mut Words<'_>, allowed: &BTreeSet<String>) -> Result<bool, String> {
    let mut permitted = all_of(words, allowed)?;
    while words.next_if_eq(&"OR").is_some() {
        permitted |= all_of(words, allowed)?;
    }
    Ok(permitted)
}

fn all_of(words: &mut Words<'_>, allowed: &BTreeSet<String>) -> Result<bool, String> {
    let mut permitted = one(words, allowed)?;
    while words.next_if_eq(&"AND").is_some() {
        permitted &= one(words, allowed)?;
    }
    Ok(permitted)
}

fn one(words: &mut Words<'_>, allowed: &BTreeSet<String>) -> Result<bool, String> {
    match words.next() {
        Some("(") => {
            let permitted = any_of(words, allowed)?;
            words
                .next_if_eq(&")")
                .ok_or("a parenthesis is not closed")?;
            Ok(permitted)
        }
        None | Some("AND" | "OR" | "WITH" | ")") => Err("a licence's name is missing".to_owned()),
        Some(name) => {
            let exception = words.next_if_eq(&"WITH").and_then(|_| words.next());
            let whole = exception.map_or(name.to_owned(), |exception| {
                format!("{name} WITH {exception}")
            });
            // An exception only ever grants more than the licence alone.
            Ok(allowed.contains(&whole) || allowed.contains(name))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn permitted(expression: &str) -> Result<bool, String> {
        let allowed = ["MIT", "Apache-2.0", "Unicode-3.0"]
            .map(str::to_owned)
            .into();
        permits(expression, &allowed)
    }

    #[test]
    fn one_side_of_an_or_is_enough_and_both_of_an_and_are_needed() {
        assert_eq!(permitted("GPL-3.0 OR MIT"), Ok(true));
        assert_eq!(permitted("GPL-3.0/MIT"), Ok(true));
        assert_eq!(permitted("GPL-3.0 AND MIT"), Ok(false));
        assert_eq!(permitted("(MIT OR GPL-3.0) AND Unicode-3.0"), Ok(true));
        assert_eq!(permitted("MIT OR GPL-3.0 AND GPL-2.0"), Ok(true));
        assert_eq!(permitted("Apache-2.0 WITH LLVM-exception"), Ok(true));
        assert_eq!(permitted("GPL-2.0"), Ok(false));
    }

    #[test]
    fn a_malformed_expression_is_an_error() {
        for expression in ["", "MIT OR", "(MIT", "MIT)", "MIT GPL-3.0"] {
            assert!(permitted(expression).is_err(), "{expression:?}");
        }
    }

    #[test]
    fn the_list_is_read_from_the_right_section() {
        let text =
            "[bans]\nallow = [\"x\"]\n[licenses]\nallow = [\n  \"MIT\", # ours\n  \"ISC\",\n]\n";
        assert_eq!(allowed(text), Ok(["ISC", "MIT"].map(str::to_owned).into()));
        assert!(allowed("[bans]").is_err());
    }
}
