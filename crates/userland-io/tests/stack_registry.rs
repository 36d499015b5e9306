//! Words to stacks: what each mistake is answered with, to the letter, and what each key does.

use userland_io::stack::{Entry, Key, Kind, Refusal, Registry, Role, StackError, StackErrorKind};
use userland_io::{EngineExt, ErrorKind, engines};

/// A registry with few names, so that lists in errors stay short.
fn few() -> Registry {
    let disk = Entry::new("disk", "a disk")
        .positional(
            Key::new("path", Kind::Path, "where it is")
                .required()
                .example("a.img"),
        )
        .key(
            Key::new("size", Kind::Size, "how long it is")
                .default("1G")
                .example("10G"),
        )
        .key(Key::new("readonly", Kind::Flag, "refuse writes"))
        .key(Key::new("mode", Kind::Choice(&["fast", "safe"]), "how it runs").default("safe"))
        .example("disk:a.img,size=10G")
        .schemes(&["dsk", "dsk+x"]);
    let slow = Entry::new("slow", "takes its time")
        .key(Key::new("read", Kind::Duration, "how long reads wait").example("5ms"));
    Registry::empty()
        .engine(disk, async |options| {
            let path: std::path::PathBuf = options.need("path")?;
            match path.to_str() {
                Some("absent") => Err(std::io::Error::from_raw_os_error(2).into()),
                Some("bad") => Err(Refusal::key("path", "`bad` is no good")),
                _ => Ok(engines::Null::new(options.need("size")?).erase()),
            }
        })
        .layer(slow, async |_, lower| Ok(lower.erase()))
}

async fn error(words: &str) -> StackError {
    few().open(words).await.unwrap_err()
}

#[tokio::test]
async fn each_mistake_is_rendered_in_full() {
    let table = [
        (
            "disk:a.img,szie=10G slow",
            StackErrorKind::UnknownKey,
            "\
error: `disk` has no key `szie`
  |
  | disk:a.img,szie=10G slow
  |            ^^^^
  = help: did you mean `size`?
  = keys of `disk`:
      path=path       where it is (also as disk:...) (required)
      size=size       how long it is (default 1G)
      readonly        refuse writes
      mode=fast|safe  how it runs (default safe)",
        ),
        (
            "dsik:a.img",
            StackErrorKind::UnknownName,
            "\
error: no engine is called `dsik`
  |
  | dsik:a.img
  | ^^^^
  = help: did you mean `disk`?
  = engines:
      disk  a disk",
        ),
        (
            "disk:a.img qcow",
            StackErrorKind::UnknownName,
            "\
error: no layer is called `qcow`
  |
  | disk:a.img qcow
  |            ^^^^
  = layers:
      slow  takes its time",
        ),
        (
            "disk:a b.img",
            StackErrorKind::UnknownName,
            "\
error: no layer is called `b.img`
  |
  | disk:a b.img
  |        ^^^^^
  = help: a path with a space in it stands in quotes: disk:'a b.img'
  = layers:
      slow  takes its time",
        ),
        (
            "disk.img",
            StackErrorKind::UnknownName,
            "\
error: no engine is called `disk.img`
  |
  | disk.img
  | ^^^^^^^^
  = help: if it is a file: file:disk.img
  = engines:
      disk  a disk",
        ),
        (
            "http://host/x",
            StackErrorKind::UnknownName,
            "\
error: no engine takes `http://` addresses
  |
  | http://host/x
  | ^^^^
  = engines:
      disk  a disk",
        ),
        (
            "slow:read=5ms",
            StackErrorKind::Order,
            "\
error: `slow` is a layer, and the first word is the engine
  |
  | slow:read=5ms
  | ^^^^
  = help: put an engine before it, such as memory:1G slow:read=5ms
  = engines:
      disk  a disk",
        ),
        (
            "disk:a disk:b",
            StackErrorKind::Order,
            "\
error: `disk` is an engine, and a stack has only one, its first word
  |
  | disk:a disk:b
  |        ^^^^
  = layers that can follow:
      slow  takes its time",
        ),
        (
            "  ",
            StackErrorKind::Order,
            "\
error: a stack has at least one word: an engine, such as memory:1G
  = engines:
      disk  a disk",
        ),
        (
            "disk:size=1G",
            StackErrorKind::MissingKey,
            "\
error: `disk` needs `path`: where it is
  |
  | disk:size=1G
  | ^^^^
  = help: for example disk:a.img,size=10G
  = keys of `disk`:
      path=path       where it is (also as disk:...) (required)
      size=size       how long it is (default 1G)
      readonly        refuse writes
      mode=fast|safe  how it runs (default safe)",
        ),
        (
            "disk:a,size=10X",
            StackErrorKind::Value,
            "\
error: `X` is no unit of size: use K, M, G or T
  |
  | disk:a,size=10X
  |               ^
  = help: for example size=10G",
        ),
        (
            "disk:a,size='10X'",
            StackErrorKind::Value,
            "\
error: `X` is no unit of size: use K, M, G or T
  |
  | disk:a,size='10X'
  |             ^^^^^
  = help: for example size=10G",
        ),
        (
            "disk:a,size",
            StackErrorKind::Value,
            "\
error: `size` needs a value (size)
  |
  | disk:a,size
  |        ^^^^
  = help: write size=10G",
        ),
        (
            "disk:a,path=b",
            StackErrorKind::Value,
            "\
error: `path` is given twice
  |
  | disk:a,path=b
  |        ^^^^",
        ),
        (
            "disk:a,readonly=maybe",
            StackErrorKind::Value,
            "\
error: `maybe` is neither yes nor no
  |
  | disk:a,readonly=maybe
  |                 ^^^^^",
        ),
        (
            "disk:a,mode=sfae",
            StackErrorKind::Value,
            "\
error: `sfae` is none of fast, safe; did you mean `safe`?
  |
  | disk:a,mode=sfae
  |             ^^^^",
        ),
        (
            "disk:bad slow",
            StackErrorKind::Value,
            "\
error: `bad` is no good
  |
  | disk:bad slow
  |      ^^^",
        ),
        (
            "disk:absent slow",
            StackErrorKind::Open,
            "\
error: `disk:absent`: No such file or directory (os error 2)
  |
  | disk:absent slow
  | ^^^^^^^^^^^",
        ),
    ];
    for (words, kind, expected) in table {
        let error = error(words).await;
        assert_eq!(error.render().to_string(), expected, "{words}");
        assert_eq!(error.kind(), kind, "{words}");
        assert_eq!(error.is_usage(), kind != StackErrorKind::Open);
        assert!(!error.to_string().contains('\n'), "{error}");
        assert_eq!(error.text(), words);
    }
}

#[tokio::test]
async fn a_comma_in_a_value_is_told_of_quotes() {
    let error = error("disk:my,disk.img").await;
    assert_eq!(
        error.to_string(),
        "`disk` has no key `disk.img` (a value with a comma in it stands in quotes)"
    );
}

#[tokio::test]
async fn the_cause_decides_the_kind_of_an_error_that_goes_on() {
    let error: userland_io::Error = error("disk:absent").await.into();
    assert!(error.to_string().contains("No such file"), "{error}");
    assert_eq!(
        userland_io::Error::from(self::error("nothing").await).kind(),
        ErrorKind::Invalid
    );
}

#[test]
fn uris_are_a_name_in_short() {
    let registry = few();
    for (words, path) in [
        ("dsk://host/x", "dsk://host/x"),
        ("dsk+x:///?socket=/p,size=2G", "dsk+x:///?socket=/p"),
        ("disk:dsk://host/x", "dsk://host/x"),
        ("'dsk://a,b c'", "dsk://a,b c"),
        ("disk:///a/b", "///a/b"),
    ] {
        let plan = registry.parse(words).unwrap();
        let options = plan.options().next().unwrap();
        let got: std::path::PathBuf = options.need("path").unwrap();
        assert_eq!(got.to_str(), Some(path), "{words}");
        assert_eq!(plan.to_string(), words);
    }
    let error = registry.parse("disk:///a,size=x").unwrap_err();
    assert_eq!(&error.text()[error.span()], "x");
}

#[test]
fn a_flag_may_stand_first_unless_any_text_could_be_meant() {
    let path = |words: &str| {
        let plan = few().parse(words).unwrap();
        let options = plan.options().next().unwrap().clone();
        options.need::<std::path::PathBuf>("path").unwrap()
    };
    assert_eq!(path("disk:readonly").to_str(), Some("readonly"));
    let plan = Registry::builtin().parse("null:readonly").unwrap();
    assert!(plan.options().next().unwrap().flag("readonly"));
    assert!(Registry::builtin().parse("null:'readonly'").is_err());
}

#[test]
fn a_catalogue_entry_holds_to_its_own_rules() {
    let registry = Registry::builtin();
    let mut names = std::collections::BTreeSet::new();
    for (role, entry) in registry.entries() {
        assert!(names.insert(entry.name), "{} twice", entry.name);
        assert!(!entry.summary.is_empty());
        assert!(!entry.examples.is_empty(), "{} has no example", entry.name);
        for key in &entry.keys {
            assert!(!(key.required && key.default.is_some()), "{}", key.name);
            let flag = key.kind == Kind::Flag;
            assert!(
                flag || key.example.is_some(),
                "{}: {}",
                entry.name,
                key.name
            );
        }
        if entry.missing_feature.is_some() {
            continue;
        }
        // Examples and defaults are read as what a user writes is.
        for example in &entry.examples {
            let words = match role {
                Role::Engine => (*example).to_owned(),
                Role::Layer => format!("null {example}"),
            };
            registry.parse(&words).unwrap();
        }
        let required: Vec<String> = entry
            .keys
            .iter()
            .filter(|key| key.required)
            .map(|key| format!("{}={}", key.name, key.example.unwrap()))
            .collect();
        for key in &entry.keys {
            for value in [key.default, key.example].into_iter().flatten() {
                let mut items = required.clone();
                items.retain(|item| !item.starts_with(&format!("{}=", key.name)));
                items.push(format!("{}='{value}'", key.name));
                let word = format!("{}:{}", entry.name, items.join(","));
                let words = match role {
                    Role::Engine => word,
                    Role::Layer => format!("null {word}"),
                };
                registry.parse(&words).unwrap();
            }
        }
    }
}

#[test]
fn a_synopsis_shows_what_may_be_left_out() {
    let registry = few();
    let all: Vec<String> = registry.entries().map(|(_, e)| e.synopsis()).collect();
    assert_eq!(
        all,
        [
            "disk:PATH[,size=SIZE][,readonly][,mode=fast|safe]",
            "slow:[read=DURATION]"
        ]
    );
}

#[test]
fn a_name_added_again_replaces_the_old() {
    let again = Entry::new("slow", "new");
    let registry = few().layer(again, async |_, lower| Ok(lower.erase()));
    let slow: Vec<_> = registry
        .entries()
        .filter(|(_, e)| e.name == "slow")
        .collect();
    assert_eq!(slow.len(), 1);
    assert_eq!(slow[0].1.summary, "new");
}

#[test]
fn a_name_that_this_build_lacks_says_which_feature_it_needs() {
    let mut entry = Entry::new("tape", "a tape");
    entry.missing_feature = Some("tape");
    let registry = few().engine(entry, async |_| Err(ErrorKind::Unsupported.into()));
    let error = registry.parse("tape slow").unwrap_err();
    assert_eq!(error.kind(), StackErrorKind::Unavailable);
    assert_eq!(
        error.to_string(),
        "`tape` is not in this build (build it with the feature `tape`)"
    );
    let listed = registry.parse("tap").unwrap_err().render().to_string();
    assert!(
        listed.contains("tape  a tape (not in this build: needs the feature `tape`)"),
        "{listed}"
    );
}

#[cfg(not(feature = "nbd"))]
#[test]
fn without_its_feature_nbd_is_known_but_not_there() {
    let error = Registry::builtin().parse("nbd://host/x").unwrap_err();
    assert_eq!(error.kind(), StackErrorKind::Unavailable);
}
