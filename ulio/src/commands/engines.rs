//! `ulio engines`: the catalogue, straight from the registry that reads the words.

use serde::Serialize;
use userland_io::stack::{Entry, Key, Kind, Registry, Role};

use crate::cli::Engines;
use crate::errors::Failure;
use crate::output::Results;

/// Labels longer than this have a line of their own.
const WIDEST: usize = 24;

pub(crate) fn run(arguments: Engines, registry: &Registry) -> Result<(), Failure> {
    let mut entries: Vec<(Role, &Entry)> = registry.entries().collect();
    if let Some(name) = &arguments.name {
        entries.retain(|(_, entry)| entry.name == name);
        if entries.is_empty() {
            let advice = match registry.nearest(name) {
                Some(near) => format!("did you mean `{near}`?"),
                None => {
                    let names: Vec<_> = registry.entries().map(|(_, entry)| entry.name).collect();
                    format!("there are: {}", names.join(", "))
                }
            };
            return Err(Failure::Usage(format!(
                "no engine or layer is called `{name}`; {advice}"
            )));
        }
    }
    let mut results = Results::begin();
    if arguments.json {
        let list: Vec<_> = entries
            .iter()
            .map(|&(role, entry)| Described::new(role, entry))
            .collect();
        results.json(&list)?;
        return results.end();
    }
    for (role, title) in [
        (Role::Engine, "Engines, the first word of a stack"),
        (Role::Layer, "Layers, any further word"),
    ] {
        let part: Vec<_> = entries.iter().filter(|entry| entry.0 == role).collect();
        if part.is_empty() {
            continue;
        }
        if arguments.name.is_none() {
            results.line(format_args!("{title}:\n"))?;
        }
        for (_, entry) in part {
            describe(entry, &mut results)?;
        }
    }
    results.end()
}

fn describe(entry: &Entry, results: &mut Results) -> Result<(), Failure> {
    results.line(entry.synopsis())?;
    results.line(format_args!("    {}", entry.summary))?;
    if let Some(feature) = entry.missing_feature {
        results.line(format_args!(
            "    not in this build: needs the feature `{feature}`"
        ))?;
    }
    let rows: Vec<_> = entry
        .keys
        .iter()
        .map(|key| (label(key), meaning(entry, key)))
        .collect();
    let fitting = rows
        .iter()
        .map(|(label, _)| label.len())
        .filter(|&len| len <= WIDEST);
    let width = fitting.max().unwrap_or(0);
    for (label, meaning) in rows {
        match label.len() <= width {
            true => results.line(format_args!("      {label:width$}  {meaning}"))?,
            false => results.line(format_args!(
                "      {label}\n      {:width$}  {meaning}",
                ""
            ))?,
        }
    }
    for example in &entry.examples {
        results.line(format_args!("    example: {example}"))?;
    }
    results.line("")
}

fn label(key: &Key) -> String {
    match key.kind {
        Kind::Flag => key.name.to_owned(),
        kind => format!("{}={kind}", key.name),
    }
}

fn meaning(entry: &Entry, key: &Key) -> String {
    let mut text = key.meaning.to_owned();
    if entry
        .positional_key()
        .is_some_and(|first| first.name == key.name)
    {
        text.push_str("; may stand right after the colon");
    }
    match (key.required, key.default) {
        (true, _) => text.push_str(" (required)"),
        (false, Some(default)) => text.push_str(&format!(" (default {default})")),
        (false, None) => {}
    }
    text
}

#[derive(Serialize)]
struct Described<'a> {
    name: &'a str,
    role: &'a str,
    summary: &'a str,
    synopsis: String,
    uri_schemes: &'a [&'a str],
    missing_feature: Option<&'a str>,
    keys: Vec<DescribedKey<'a>>,
    examples: &'a [&'a str],
}

#[derive(Serialize)]
struct DescribedKey<'a> {
    name: &'a str,
    kind: String,
    choices: &'a [&'a str],
    meaning: &'a str,
    required: bool,
    positional: bool,
    default: Option<&'a str>,
    example: Option<&'a str>,
}

impl<'a> Described<'a> {
    fn new(role: Role, entry: &'a Entry) -> Self {
        let positional = entry.positional_key().map(|key| key.name);
        let keys = entry.keys.iter().map(|key| {
            let (kind, choices): (_, &[&str]) = match key.kind {
                Kind::Choice(choices) => ("choice".to_owned(), choices),
                Kind::Set(choices) => ("set".to_owned(), choices),
                kind => (kind.to_string(), &[]),
            };
            DescribedKey {
                name: key.name,
                kind,
                choices,
                meaning: key.meaning,
                required: key.required,
                positional: positional == Some(key.name),
                default: key.default,
                example: key.example,
            }
        });
        Described {
            name: entry.name,
            role: match role {
                Role::Engine => "engine",
                Role::Layer => "layer",
            },
            summary: entry.summary,
            synopsis: entry.synopsis(),
            uri_schemes: entry.schemes,
            missing_feature: entry.missing_feature,
            keys: keys.collect(),
            examples: &entry.examples,
        }
    }
}
