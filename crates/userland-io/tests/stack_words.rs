//! Words as text: any input is answered, what is printed reads back, and each mistake is pointed at.

use proptest::prelude::*;
use userland_io::stack::{Item, StackErrorKind, Word, Words};

/// A word without the places.
type Plain = (bool, String, Vec<(Option<String>, String)>);

fn plain(words: &Words) -> Vec<Plain> {
    let item = |item: &Item| match item {
        Item::Bare(value) => (None, value.text.clone()),
        Item::Pair(key, value) => (Some(key.text.clone()), value.text.clone()),
    };
    let word = |word: &Word| {
        let items = word.items.iter().map(item).collect();
        (word.is_uri, word.name.text.clone(), items)
    };
    words.iter().map(word).collect()
}

fn bare(text: &str) -> (Option<String>, String) {
    (None, text.to_owned())
}

fn pair(key: &str, value: &str) -> (Option<String>, String) {
    (Some(key.to_owned()), value.to_owned())
}

fn word(name: &str, items: &[(Option<String>, String)]) -> Plain {
    (false, name.to_owned(), items.to_vec())
}

fn uri(scheme: &str, items: &[(Option<String>, String)]) -> Plain {
    (true, scheme.to_owned(), items.to_vec())
}

#[test]
fn words_read_as_one_would_guess() {
    let table: &[(&str, &[Plain])] = &[
        ("", &[]),
        ("  null\t", &[word("null", &[])]),
        ("null:", &[word("null", &[])]),
        (
            "file:disk.img,size=10G,readonly delay:read=5ms",
            &[
                word(
                    "file",
                    &[bare("disk.img"), pair("size", "10G"), bare("readonly")],
                ),
                word("delay", &[pair("read", "5ms")]),
            ],
        ),
        (
            "file:'a b, c.img',size=1G",
            &[word("file", &[bare("a b, c.img"), pair("size", "1G")])],
        ),
        (
            "file:path=\"it's\"",
            &[word("file", &[pair("path", "it's")])],
        ),
        ("file:'it''s'", &[word("file", &[bare("it's")])]),
        ("file:it's.img", &[word("file", &[bare("it's.img")])]),
        ("file:path=a=b:c", &[word("file", &[pair("path", "a=b:c")])]),
        (
            "file:C:\\disk.img",
            &[word("file", &[bare("C:\\disk.img")])],
        ),
        ("file:/a=b", &[word("file", &[bare("/a=b")])]),
        (
            "nbd:nbd+unix:///?socket=/p",
            &[word("nbd", &[bare("nbd+unix:///?socket=/p")])],
        ),
        (
            "nbd://[::1]:10809/x",
            &[uri("nbd", &[bare("nbd://[::1]:10809/x")])],
        ),
        (
            "nbd+unix:///?socket=/p,connections=4 readonly",
            &[
                uri(
                    "nbd+unix",
                    &[bare("nbd+unix:///?socket=/p"), pair("connections", "4")],
                ),
                word("readonly", &[]),
            ],
        ),
        ("'nbd://h/a,b c'", &[uri("nbd", &[bare("nbd://h/a,b c")])]),
    ];
    for (text, expected) in table {
        let words = Words::parse(text).unwrap();
        assert_eq!(plain(&words), *expected, "{text}");
    }
}

#[test]
fn one_argument_is_one_word_whatever_its_spaces() {
    let words = Words::from_args(["file:a b.img,size=1G", "delay:read=5ms"]).unwrap();
    assert_eq!(
        plain(&words),
        [
            word("file", &[bare("a b.img"), pair("size", "1G")]),
            word("delay", &[pair("read", "5ms")])
        ]
    );
    assert_eq!(words.to_string(), "file:'a b.img',size=1G delay:read=5ms");
}

#[test]
fn each_mistake_is_pointed_at() {
    // The text, the characters pointed at, what is said.
    let table = [
        ("null file:a,,b", ",", "nothing stands beside this comma"),
        ("file:a,", ",", "nothing stands beside this comma"),
        ("file:a,size=", "size=", "`size=` has no value"),
        ("file:'a b", "'a", "this ' is never closed by another"),
        (
            "file:'a'b",
            "b",
            "after the closing quote comes a comma, a space or the end",
        ),
        (":x", ":", "a word starts with a name: name:value,key=value"),
        (
            "/dev/sda,readonly",
            "/dev/sda",
            "`/dev/sda` is no name of an engine or layer",
        ),
        (
            "disk.img,size=1G",
            ",",
            "after the name `disk.img` comes `:`, not `,`",
        ),
        (
            "delay=5ms",
            "=",
            "after the name `delay` comes `:`, not `=`",
        ),
        (
            "'file':x",
            ":",
            "after the closing quote comes a comma, a space or the end",
        ),
        (
            "'a b'",
            "'a b'",
            "a word starts with a name, not with a quote",
        ),
    ];
    for (text, at, message) in table {
        let error = Words::parse(text).unwrap_err();
        assert_eq!(error.kind(), StackErrorKind::Syntax, "{text}");
        assert_eq!(error.message(), message, "{text}");
        assert_eq!(&text[error.span()], at, "{text}");
        assert!(error.is_usage());
    }
    assert_eq!(
        Words::parse("null file:a,,b").unwrap_err().word_index(),
        Some(1)
    );
    assert_eq!(
        Words::from_args(["null", ""]).unwrap_err().message(),
        "an empty word"
    );
}

#[test]
fn a_bare_path_is_told_how_to_be_a_file() {
    for (text, help) in [
        ("/dev/sda", "if it is a file: file:/dev/sda"),
        ("/a,b", "if it is a file: file:'/a,b'"),
        ("disk.img,size=1G", "if it is a file: file:disk.img"),
    ] {
        let error = Words::parse(text).unwrap_err();
        assert!(error.to_string().contains(help), "{error}");
    }
}

/// Text that is likely to touch the grammar.
fn grammar_soup() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        Just("nbd://".to_owned()),
        Just("file:".to_owned()),
        Just("size=".to_owned()),
        "[a-z:=,'\" /.+\u{e9}\t-]{1,4}",
        any::<char>().prop_map(String::from),
    ];
    proptest::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_text_is_words_or_an_error_that_points_into_it(text in prop_oneof![grammar_soup(), any::<String>()]) {
        match Words::parse(&text) {
            Ok(words) => {
                for word in &words {
                    prop_assert!(text.get(word.span.clone()).is_some_and(|t| !t.is_empty()));
                    prop_assert!(text.get(word.name.span.clone()).is_some());
                }
            }
            Err(error) => {
                prop_assert!(text.get(error.span()).is_some());
                prop_assert!(error.render().to_string().contains('^'));
            }
        }
    }

    #[test]
    fn what_is_printed_reads_back(args in proptest::collection::vec(grammar_soup(), 0..4)) {
        for words in [Words::from_args(&args), Words::parse(&args.join(" "))].into_iter().flatten() {
            let printed = words.to_string();
            let again = Words::parse(&printed);
            prop_assert!(again.is_ok(), "{printed:?}: {again:?}");
            let again = again.unwrap();
            prop_assert_eq!(plain(&words), plain(&again), "{}", printed);
            prop_assert_eq!(again.to_string(), printed);
        }
    }

    #[test]
    fn any_value_survives_quoting(value in any::<String>(), key in "[a-z][a-z0-9_-]{0,6}") {
        let doubled = value.replace('\'', "''");
        let text = format!("file:'{doubled}',{key}=\"{}\"", value.replace('"', "\"\""));
        let words = Words::parse(&text).unwrap();
        let expected = word("file", &[bare(&value), pair(&key, &value)]);
        prop_assert_eq!(plain(&words), vec![expected.clone()]);
        prop_assert_eq!(plain(&Words::parse(&words.to_string()).unwrap()), vec![expected]);
    }
}
