//! The documents name the tests that hold what they say. Each name is one of a test that exists.

use std::fs;
use std::path::Path;

/// Documents with names written as `file: test`.
const DOCUMENTS: [&str; 3] = ["docs/nbd.md", "docs/long-tests.md", "docs/semantics.md"];

#[test]
fn every_test_that_a_document_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut wrong = Vec::new();
    for document in DOCUMENTS {
        let text = fs::read_to_string(root.join(document)).unwrap();
        let named = names(&text);
        assert!(!named.is_empty(), "{document} names no test");
        for (file, test) in named {
            let path = match file {
                path if path.starts_with("src/") => format!("crates/userland-io/{path}"),
                path if path.contains('/') => path.to_owned(),
                stem => format!("crates/userland-io/tests/{stem}.rs"),
            };
            let source = fs::read_to_string(root.join(&path)).unwrap_or_default();
            if !has_test(&source, test) {
                wrong.push(format!("{document}: {path} has no test {test}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// What stands between two backticks and reads `file: test`.
fn names(text: &str) -> Vec<(&str, &str)> {
    let word = |text: &str| !text.is_empty() && !text.contains(char::is_whitespace);
    let quoted = text.split('`').skip(1).step_by(2);
    quoted
        .filter_map(|quoted| quoted.split_once(": "))
        .filter(|(file, test)| word(file) && word(test))
        .collect()
}

/// A function of that name, right behind its attributes, one of which makes it a test; or one of a `proptest!`.
fn has_test(source: &str, test: &str) -> bool {
    let declared = format!("fn {test}(");
    source.match_indices(&declared).any(|(at, _)| {
        let before = source[..at].trim_end().trim_end_matches("async").trim_end();
        let lines = before.lines().rev().map(str::trim);
        let mut attributes = lines.take_while(|line| line.starts_with("#["));
        attributes.any(|line| line == "#[test]" || line.starts_with("#[tokio::test"))
    })
}

#[test]
fn a_name_that_is_no_test_is_noticed() {
    let source = "#[test]\n#[ignore = \"x\"]\nfn one() {}\n    #[tokio::test(a)]\n    async fn two() {}\n\nfn helper() {}";
    let found = ["one", "two", "helper", "three", "on"].map(|name| has_test(source, name));
    assert_eq!(found, [true, true, false, false, false]);
    assert_eq!(
        names("`a.rs` `a: one` b `c: no test here` `d: two`"),
        [("a", "one"), ("d", "two")]
    );
}
