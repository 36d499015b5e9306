//! Feature combinations: none, each alone, all together. Features only add, so that is enough.

use std::process::Command;

use serde_json::Value;

use crate::report::Report;

/// Lints every workspace crate with features under each combination.
pub(crate) fn run(report: &mut Report, metadata: &Value) {
    for package in metadata["packages"].as_array().into_iter().flatten() {
        // Only a package of this repository has no source.
        let (Some(name), None) = (package["name"].as_str(), package["source"].as_str()) else {
            continue;
        };
        let features = package["features"].as_object();
        let features: Vec<&str> = features
            .into_iter()
            .flat_map(|map| map.keys())
            .map(String::as_str)
            .collect();
        if features.is_empty() {
            continue;
        }
        let alone = features.iter().filter(|name| **name != "default");
        let alone = alone.map(|feature| {
            (
                format!("only {feature}"),
                vec!["--no-default-features", "--features", feature],
            )
        });
        let none = ("no features".to_owned(), vec!["--no-default-features"]);
        let default = ("default features".to_owned(), vec![]);
        for (what, args) in [none, default].into_iter().chain(alone) {
            let mut cargo = Command::new("cargo");
            cargo
                .args(["clippy", "-q", "-p", name, "--lib", "--bins"])
                .args(args);
            cargo.args(["--", "-D", "warnings"]);
            report.step(&format!("{name}, {what}"), &mut cargo);
        }
    }
}
