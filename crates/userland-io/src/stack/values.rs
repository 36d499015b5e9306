//! One value of a key: its kind, how it is written, and what is wrong with it if it is not.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use super::error::nearest;

/// What a key takes.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Bytes: `512`, `4K`, `10GiB`. Every unit is a power of 1024.
    Size,
    /// A whole number: `42`.
    Number,
    /// A time: `5ms`, `2s`, `100us`, `0.5s`.
    Duration,
    /// Bytes from one to before another: `1M..2M`, `1M..` to the end, or `1M+4K` with a length.
    Range,
    /// A share of 1: `0.01`, `1%` or `1/100`.
    Fraction,
    /// True if it stands alone; else `yes` or `no`.
    Flag,
    /// Any text.
    Text,
    /// A file's path.
    Path,
    /// One of these.
    Choice(&'static [&'static str]),
    /// Any of these, joined by `+`.
    Set(&'static [&'static str]),
}

/// The kind in a word or two, as help shows it.
impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Size => f.write_str("size"),
            Kind::Number => f.write_str("number"),
            Kind::Duration => f.write_str("duration"),
            Kind::Range => f.write_str("range"),
            Kind::Fraction => f.write_str("fraction"),
            Kind::Flag => f.write_str("flag"),
            Kind::Text => f.write_str("text"),
            Kind::Path => f.write_str("path"),
            Kind::Choice(choices) => f.write_str(&choices.join("|")),
            Kind::Set(choices) => f.write_str(&choices.join("+")),
        }
    }
}

/// A value, read as its key's [`Kind`] says.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A [`Size`](Kind::Size) in bytes, or a [`Number`](Kind::Number).
    Number(u64),
    /// A time.
    Duration(Duration),
    /// From a byte to before another; to the end is `u64::MAX`.
    Range(Range<u64>),
    /// From 0 to 1.
    Fraction(f64),
    /// Yes or no.
    Flag(bool),
    /// A text, or the one of several choices.
    Text(String),
    /// A path.
    Path(PathBuf),
    /// Some of several choices.
    Set(Vec<String>),
}

/// A type that a [`Value`] turns into.
pub trait FromValue: Sized {
    /// `None` if it is another kind of value.
    fn from_value(value: &Value) -> Option<Self>;
}

macro_rules! from_value {
    ($($variant:ident => $type:ty),*) => {$(
        impl FromValue for $type {
            fn from_value(value: &Value) -> Option<Self> {
                match value {
                    Value::$variant(value) => Some(value.clone()),
                    _ => None,
                }
            }
        }
    )*};
}

from_value! {
    Number => u64, Duration => Duration, Range => Range<u64>, Fraction => f64,
    Flag => bool, Text => String, Path => PathBuf, Set => Vec<String>
}

impl FromValue for u32 {
    fn from_value(value: &Value) -> Option<Self> {
        u64::from_value(value).and_then(|value| value.try_into().ok())
    }
}

/// A value that does not read as what it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ValueError {
    message: String,
    /// The bytes of the value that are wrong.
    pub(super) at: Range<usize>,
}

impl ValueError {
    fn new(at: Range<usize>, message: impl Into<String>) -> Self {
        ValueError {
            message: message.into(),
            at,
        }
    }
}

impl Kind {
    /// Reads `text` as this kind.
    pub(super) fn read(self, text: &str) -> Result<Value, ValueError> {
        Ok(match self {
            Kind::Size => Value::Number(parse_size(text)?),
            Kind::Number => Value::Number(number(text)?),
            Kind::Duration => Value::Duration(parse_duration(text)?),
            Kind::Range => Value::Range(range(text)?),
            Kind::Fraction => Value::Fraction(fraction(text)?),
            Kind::Flag => Value::Flag(flag(text)?),
            Kind::Text => Value::Text(text.to_owned()),
            Kind::Path if text.is_empty() => {
                return Err(ValueError::new(0..0, "a path is not empty"));
            }
            Kind::Path if text.contains('\0') => {
                return Err(ValueError::new(0..text.len(), "a path has no zero byte"));
            }
            Kind::Path => Value::Path(PathBuf::from(text)),
            Kind::Choice(choices) => Value::Text(choice(text, 0..text.len(), choices)?),
            Kind::Set(choices) => {
                let mut set = Vec::new();
                let mut at = 0;
                for part in text.split('+') {
                    let one = choice(part, at..at + part.len(), choices)?;
                    if !set.contains(&one) {
                        set.push(one);
                    }
                    at += part.len() + 1;
                }
                Value::Set(set)
            }
        })
    }
}

/// Reads a length in bytes: `512`, `4K`, `10G`, `10GiB`, `10GB`. Every unit is a power of 1024, and case does not matter.
///
/// # Errors
/// If it is no whole number with a unit, or more than a disk's largest size.
pub fn parse_size(text: &str) -> Result<u64, ValueError> {
    let (digits, unit) = split_number(text);
    let all = 0..text.len();
    let unit_at = digits.len()..text.len();
    if digits.is_empty() {
        return Err(ValueError::new(
            all,
            format!("`{text}` is no size: write bytes, or a number with K, M, G or T, such as 10G"),
        ));
    }
    let lower = unit.to_ascii_lowercase();
    let shift = match lower.strip_suffix("ib").unwrap_or(&lower) {
        "" if lower.is_empty() => 0,
        "b" => 0,
        "k" | "kb" => 10,
        "m" | "mb" => 20,
        "g" | "gb" => 30,
        "t" | "tb" => 40,
        "p" | "pb" => 50,
        "e" | "eb" => 60,
        _ if unit.starts_with('.') => {
            return Err(ValueError::new(
                all,
                format!("`{text}` is no size: write a whole number of a smaller unit"),
            ));
        }
        _ => {
            return Err(ValueError::new(
                unit_at,
                format!("`{unit}` is no unit of size: use K, M, G or T"),
            ));
        }
    };
    let too_large = || {
        ValueError::new(
            all.clone(),
            format!("`{text}` is too large: no disk is longer than 2^63 - 1 bytes"),
        )
    };
    let number: u64 = digits.parse().map_err(|_| too_large())?;
    number
        .checked_mul(1 << shift)
        .filter(|&size| size <= crate::Geometry::MAX_SIZE)
        .ok_or_else(too_large)
}

/// Reads a time: `5ms`, `2s`, `100us`, `0.5s`, `1m`, `1h`; 0 needs no unit.
///
/// # Errors
/// If it is no number with a unit, or longer than 292 years.
pub fn parse_duration(text: &str) -> Result<Duration, ValueError> {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let all = 0..text.len();
    let wrong = |why: &str| ValueError::new(all.clone(), format!("`{text}` is no duration: {why}"));
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || part.contains('.') || (part.is_empty() && number.contains('.')) {
        return Err(wrong("write a number with a unit, such as 5ms"));
    }
    let nanos: u128 = match unit {
        "ns" => 1,
        "us" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "m" => 60_000_000_000,
        "h" => 3_600_000_000_000,
        "" if number.bytes().all(|b| b == b'0' || b == b'.') => 1,
        "" => return Err(wrong("it needs a unit: ns, us, ms, s, m or h")),
        _ => {
            return Err(ValueError::new(
                end..text.len(),
                format!("`{unit}` is no unit of time: use ns, us, ms, s, m or h"),
            ));
        }
    };
    let too_long = || wrong("it is too long");
    let mut total = whole.parse::<u64>().map_err(|_| too_long())? as u128 * nanos;
    let mut place = nanos;
    for digit in part.bytes() {
        place /= 10;
        total += u128::from(digit - b'0') * place;
    }
    match u64::try_from(total) {
        Ok(total) if total <= i64::MAX as u64 => Ok(Duration::from_nanos(total)),
        _ => Err(too_long()),
    }
}

fn split_number(text: &str) -> (&str, &str) {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    text.split_at(end)
}

fn number(text: &str) -> Result<u64, ValueError> {
    let all = 0..text.len();
    match text.parse() {
        Ok(number) if !text.starts_with('+') => Ok(number),
        Err(e) if *e.kind() == std::num::IntErrorKind::PosOverflow => {
            Err(ValueError::new(all, format!("`{text}` is too large")))
        }
        _ => Err(ValueError::new(
            all,
            format!("`{text}` is no whole number, such as 42"),
        )),
    }
}

fn range(text: &str) -> Result<Range<u64>, ValueError> {
    let shifted = |offset: usize| {
        move |e: ValueError| ValueError::new(e.at.start + offset..e.at.end + offset, e.message)
    };
    let all = 0..text.len();
    let (start, end) = if let Some((start, end)) = text.split_once("..") {
        let from = parse_size(start)?;
        let to = match end {
            "" => u64::MAX,
            _ => parse_size(end).map_err(shifted(start.len() + 2))?,
        };
        (from, to)
    } else if let Some((start, len)) = text.split_once('+') {
        let from = parse_size(start)?;
        let len = parse_size(len).map_err(shifted(start.len() + 1))?;
        (from, from.saturating_add(len))
    } else {
        return Err(ValueError::new(
            all,
            format!("`{text}` is no range: write START..END, START.. or START+LENGTH"),
        ));
    };
    match start < end {
        true => Ok(start..end),
        false => Err(ValueError::new(all, format!("the range `{text}` is empty"))),
    }
}

fn fraction(text: &str) -> Result<f64, ValueError> {
    let plain = |text: &str| {
        let ok = text.bytes().all(|b| b.is_ascii_digit() || b == b'.');
        text.parse::<f64>().ok().filter(|_| ok)
    };
    let value = if let Some(percent) = text.strip_suffix('%') {
        plain(percent).map(|v| v / 100.0)
    } else if let Some((above, below)) = text.split_once('/') {
        plain(above).zip(plain(below)).map(|(a, b)| a / b)
    } else {
        plain(text)
    };
    match value {
        Some(value) if (0.0..=1.0).contains(&value) => Ok(value),
        _ => Err(ValueError::new(
            0..text.len(),
            format!("`{text}` is no share from 0 to 1, such as 0.01, 1% or 1/100"),
        )),
    }
}

fn flag(text: &str) -> Result<bool, ValueError> {
    match text {
        "yes" | "true" | "on" | "1" => Ok(true),
        "no" | "false" | "off" | "0" => Ok(false),
        _ => Err(ValueError::new(
            0..text.len(),
            format!("`{text}` is neither yes nor no"),
        )),
    }
}

fn choice(text: &str, at: Range<usize>, choices: &[&str]) -> Result<String, ValueError> {
    if let Some(found) = choices.iter().find(|c| c.eq_ignore_ascii_case(text)) {
        return Ok((*found).to_owned());
    }
    let meant = match nearest(text, choices.iter().copied()) {
        Some(meant) => format!("; did you mean `{meant}`?"),
        None => String::new(),
    };
    Err(ValueError::new(
        at,
        format!("`{text}` is none of {}{meant}", choices.join(", ")),
    ))
}
