//! Words to stacks: what each mistake is answered with, to the letter, and what each key does.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use userland_io::stack::{
    Entry, Key, Kind, Refusal, Registry, Role, StackError, StackErrorKind, parse_duration,
    parse_size,
};
use userland_io::{
    Device, Engine, EngineExt, ErrorKind, ReadBuf, WriteBuf, WriteFlags, engines, errno,
};

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
fn sizes_count_in_powers_of_1024() {
    for (text, size) in [
        ("0", 0),
        ("512", 512),
        ("512B", 512),
        ("4k", 4096),
        ("4KiB", 4096),
        ("4KB", 4096),
        ("10M", 10 << 20),
        ("10G", 10 << 30),
        ("3t", 3 << 40),
        ("1P", 1 << 50),
        ("7E", 7 << 60),
        ("9223372036854775807", i64::MAX as u64),
    ] {
        assert_eq!(parse_size(text), Ok(size), "{text}");
    }
    for (text, message) in [
        (
            "",
            "`` is no size: write bytes, or a number with K, M, G or T, such as 10G",
        ),
        (
            "G",
            "`G` is no size: write bytes, or a number with K, M, G or T, such as 10G",
        ),
        (
            "-1",
            "`-1` is no size: write bytes, or a number with K, M, G or T, such as 10G",
        ),
        (
            "1.5G",
            "`1.5G` is no size: write a whole number of a smaller unit",
        ),
        ("1 G", "` G` is no unit of size: use K, M, G or T"),
        ("1ib", "`ib` is no unit of size: use K, M, G or T"),
        (
            "8E",
            "`8E` is too large: no disk is longer than 2^63 - 1 bytes",
        ),
        (
            "99999999999999999999",
            "`99999999999999999999` is too large: no disk is longer than 2^63 - 1 bytes",
        ),
    ] {
        assert_eq!(parse_size(text).unwrap_err().to_string(), message);
    }
}

#[test]
fn durations_have_units() {
    for (text, time) in [
        ("0", Duration::ZERO),
        ("5ms", Duration::from_millis(5)),
        ("2s", Duration::from_secs(2)),
        ("100us", Duration::from_micros(100)),
        ("7ns", Duration::from_nanos(7)),
        ("0.5s", Duration::from_millis(500)),
        ("1.25ms", Duration::from_micros(1250)),
        ("3m", Duration::from_secs(180)),
        ("1h", Duration::from_secs(3600)),
    ] {
        assert_eq!(parse_duration(text), Ok(time), "{text}");
    }
    for (text, message) in [
        (
            "",
            "`` is no duration: write a number with a unit, such as 5ms",
        ),
        (
            "5",
            "`5` is no duration: it needs a unit: ns, us, ms, s, m or h",
        ),
        ("5x", "`x` is no unit of time: use ns, us, ms, s, m or h"),
        (
            "ms",
            "`ms` is no duration: write a number with a unit, such as 5ms",
        ),
        (
            "1.2.3s",
            "`1.2.3s` is no duration: write a number with a unit, such as 5ms",
        ),
        (
            "1.s",
            "`1.s` is no duration: write a number with a unit, such as 5ms",
        ),
        (
            "9999999999h",
            "`9999999999h` is no duration: it is too long",
        ),
        (
            "99999999999999999999s",
            "`99999999999999999999s` is no duration: it is too long",
        ),
    ] {
        assert_eq!(parse_duration(text).unwrap_err().to_string(), message);
    }
}

#[test]
fn ranges_shares_and_sets_read_as_documented() {
    let entry = Entry::new("all", "every kind")
        .key(Key::new("range", Kind::Range, "r"))
        .key(Key::new("share", Kind::Fraction, "f"))
        .key(Key::new("set", Kind::Set(&["a", "b", "c"]), "s"))
        .key(Key::new("number", Kind::Number, "n"))
        .key(Key::new("path", Kind::Path, "p"));
    let registry = Registry::empty().engine(entry, async |_| Ok(engines::Null::new(0).erase()));
    let options = |words: &str| {
        let plan = registry.parse(words).unwrap();
        plan.options().next().unwrap().clone()
    };
    for (text, range) in [
        ("1K..2K", 1024..2048),
        ("5+3", 5..8),
        ("1M..", 1 << 20..u64::MAX),
    ] {
        assert_eq!(
            options(&format!("all:range={text}")).get("range"),
            Some(range)
        );
    }
    for (text, share) in [
        ("0.25", 0.25),
        ("1%", 0.01),
        ("1/4", 0.25),
        ("1", 1.0),
        ("0", 0.0),
    ] {
        assert_eq!(
            options(&format!("all:share={text}")).get("share"),
            Some(share)
        );
    }
    let set = options("all:set=c+a+c").get::<Vec<String>>("set");
    assert_eq!(set.unwrap(), ["c", "a"]);
    assert_eq!(options("all:number=42").get("number"), Some(42u64));
    assert_eq!(options("all").get::<u64>("number"), None);
    // The word, what is pointed at, what is said.
    for (words, at, message) in [
        (
            "all:range=5",
            "5",
            "`5` is no range: write START..END, START.. or START+LENGTH",
        ),
        ("all:range=5..5", "5..5", "the range `5..5` is empty"),
        (
            "all:range=5..6X",
            "X",
            "`X` is no unit of size: use K, M, G or T",
        ),
        (
            "all:range=5+x",
            "x",
            "`x` is no size: write bytes, or a number with K, M, G or T, such as 10G",
        ),
        (
            "all:share=1.5",
            "1.5",
            "`1.5` is no share from 0 to 1, such as 0.01, 1% or 1/100",
        ),
        (
            "all:share=0/0",
            "0/0",
            "`0/0` is no share from 0 to 1, such as 0.01, 1% or 1/100",
        ),
        (
            "all:share=inf",
            "inf",
            "`inf` is no share from 0 to 1, such as 0.01, 1% or 1/100",
        ),
        ("all:set=a+x+b", "x", "`x` is none of a, b, c"),
        ("all:number=+1", "+1", "`+1` is no whole number, such as 42"),
        (
            "all:number=99999999999999999999",
            "99999999999999999999",
            "`99999999999999999999` is too large",
        ),
        ("all:path=''", "''", "a path is not empty"),
        ("all:path='a\0b'", "'a\0b'", "a path has no zero byte"),
    ] {
        let error = registry.parse(words).unwrap_err();
        assert_eq!(error.message(), message, "{words}");
        assert_eq!(&words[error.span()], at, "{words}");
    }
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

// What each key of the library's own names does.

async fn open(words: &str) -> Device {
    Device::open(Registry::builtin().open(words).await.unwrap())
        .await
        .unwrap()
}

async fn read(disk: &Device, at: u64) -> userland_io::Result<[u8; 8]> {
    let mut bytes = [0xee; 8];
    disk.read(&mut ReadBuf::new(&mut bytes), at).await?;
    Ok(bytes)
}

async fn write(disk: &Device, at: u64) -> userland_io::Result {
    disk.write(&WriteBuf::new(b"12345678"), at, WriteFlags::empty())
        .await
}

#[tokio::test]
async fn engines_take_their_size() {
    for name in ["memory", "null", "pattern"] {
        for words in [format!("{name}:3M"), format!("{name}:size=3M")] {
            assert_eq!(open(&words).await.geometry().size, 3 << 20, "{words}");
        }
    }
    assert_eq!(open("null").await.geometry().size, 1 << 30);
    assert_eq!(open("pattern").await.geometry().size, 1 << 30);
    assert!(open("null:readonly").await.geometry().is_read_only());
    assert!(open("null:1G,readonly").await.geometry().is_read_only());
    assert!(!open("null:1G,readonly=no").await.geometry().is_read_only());
    assert_eq!(
        read(&open("pattern:1M").await, 4096).await.unwrap(),
        4096u64.to_be_bytes()
    );
}

#[tokio::test]
async fn file_takes_its_keys() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a disk, mine.img");
    let text = path.to_str().unwrap();
    let absent = Registry::builtin()
        .open(&format!("file:'{text}'"))
        .await
        .unwrap_err();
    assert_eq!(absent.kind(), StackErrorKind::Open);
    assert!(absent.to_string().contains(text), "{absent}");
    let disk = open(&format!("file:'{text}',size=1M,threads=2")).await;
    assert_eq!(disk.geometry().size, 1 << 20);
    write(&disk, 0).await.unwrap();
    disk.close().await.unwrap();
    let disk = open(&format!("file:path='{text}',readonly")).await;
    assert!(disk.geometry().is_read_only());
    assert_eq!(&read(&disk, 0).await.unwrap(), b"12345678");
    disk.close().await.unwrap();
    let other = format!("file:'{text}',size=2M");
    assert!(Registry::builtin().open(&other).await.is_err());
    let error = Registry::builtin()
        .open("file:x,threads=0")
        .await
        .unwrap_err();
    assert_eq!(error.to_string(), "0 threads: use 1 to 1024");
    assert_eq!(&error.text()[error.span()], "0");
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn direct_asks_for_blocks_where_the_file_system_has_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    let words = format!("file:{},size=1M,direct", path.display());
    // Some file systems (tmpfs of old) know no direct I/O, and say so.
    match Registry::builtin().open(&words).await {
        Ok(engine) => assert!(engine.geometry().logical_block_size >= 512),
        Err(error) => assert_eq!(error.kind(), StackErrorKind::Open),
    }
}

#[tokio::test]
async fn readonly_and_offset_do_as_they_say() {
    let disk = open("memory:1M readonly").await;
    assert_eq!(write(&disk, 0).await.unwrap_err().errno(), errno::EROFS);
    let disk = open("pattern:1M offset:64K,size=8K").await;
    assert_eq!(disk.geometry().size, 8192);
    assert_eq!(read(&disk, 0).await.unwrap(), 65536u64.to_be_bytes());
    assert_eq!(
        open("pattern:1M offset:start=64K").await.geometry().size,
        (1 << 20) - 65536
    );
    let error = Registry::builtin()
        .open("null:1M offset:2M")
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "`offset:2M`: the window starts at byte 2097152, but the disk below has only 1048576"
    );
    assert_eq!(error.word_index(), Some(1));
}

#[tokio::test]
async fn a_partition_that_is_not_there_is_pointed_at() {
    let error = Registry::builtin()
        .open("null:1M partition:1")
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "`partition:1`: there is no partition table on this disk (its first sector is no MBR)"
    );
}

#[tokio::test(start_paused = true)]
async fn delay_waits_by_its_keys() {
    for (words, reads, writes) in [
        ("memory:1M delay:5ms", 5, 5),
        ("memory:1M delay:read=7ms", 7, 0),
        ("memory:1M delay:5ms,write=9ms", 5, 9),
        ("memory:1M delay:5ms,write=0", 5, 0),
    ] {
        let disk = open(words).await;
        let start = tokio::time::Instant::now();
        read(&disk, 0).await.unwrap();
        let read_took = start.elapsed();
        write(&disk, 0).await.unwrap();
        let write_took = start.elapsed() - read_took;
        let near = |took: Duration, wanted: u64| {
            let wanted = Duration::from_millis(wanted);
            took >= wanted && took <= wanted + Duration::from_millis(2)
        };
        assert!(
            near(read_took, reads) && near(write_took, writes),
            "{words}: {read_took:?} {write_took:?}"
        );
    }
}

#[tokio::test]
async fn fault_fails_by_its_keys() {
    // The word, and which of six writes of 8 bytes each at 0, 1K, 2K, ... fail, with what.
    let table = [
        ("fault", "111111", errno::EIO),
        ("fault:ENOSPC", "111111", errno::ENOSPC),
        ("fault:error=erofs", "111111", errno::EROFS),
        ("fault:on=read+flush", "000000", 0),
        ("fault:on=write", "111111", errno::EIO),
        ("fault:range=1K..3K", "011000", errno::EIO),
        ("fault:after=4", "000011", errno::EIO),
        ("fault:times=2", "110000", errno::EIO),
        ("fault:once", "100000", errno::EIO),
        ("fault:probability=0", "000000", 0),
        ("fault:late", "111111", errno::EIO),
    ];
    for (word, expected, number) in table {
        let disk = open(&format!("memory:1M {word}")).await;
        let mut failed = String::new();
        for n in 0..6 {
            match write(&disk, n * 1024).await {
                Ok(()) => failed.push('0'),
                Err(error) => {
                    assert_eq!(error.errno(), number, "{word}");
                    failed.push('1');
                }
            }
        }
        assert_eq!(failed, expected, "{word}");
    }
    let draws = async |word: &str| {
        let disk = open(&format!("memory:1M {word}")).await;
        let mut draws = Vec::new();
        for _ in 0..200 {
            draws.push(write(&disk, 0).await.is_err());
        }
        draws
    };
    let first = draws("fault:probability=50%,seed=1").await;
    assert_eq!(first, draws("fault:probability=1/2,seed=1").await);
    assert_ne!(first, draws("fault:probability=0.5,seed=2").await);
    let both = Registry::builtin()
        .open("null fault:once,times=2")
        .await
        .unwrap_err();
    assert_eq!(both.to_string(), "`once` is `times=1`: give one of them");
    assert_eq!(&both.text()[both.span()], "once");
}

#[tokio::test]
async fn stats_log_what_went_through_when_the_disk_closes() {
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);
    impl std::io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    let guard = tracing::subscriber::set_default(subscriber);
    let disk = open("memory:1M stats:top").await;
    write(&disk, 8).await.unwrap();
    assert_eq!(&read(&disk, 8).await.unwrap(), b"12345678");
    disk.close().await.unwrap();
    drop(guard);
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert!(
        text.contains("top: read 1 (8 bytes), write 1 (8 bytes)"),
        "{text}"
    );
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
