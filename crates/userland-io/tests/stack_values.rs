//! Values in words: sizes, times, ranges, shares and sets, and what is wrong with others.

use std::time::Duration;
use userland_io::stack::{Entry, Key, Kind, Registry, parse_duration, parse_size};
use userland_io::{EngineExt, engines};

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
