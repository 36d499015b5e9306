//! What a word gave for the keys of its name, read and typed.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::{Error, ErrorKind, InvalidGeometry};

use super::catalogue::Entry;
use super::values::{FromValue, Value};

/// The values of one word, by key. A default stands where a key has one and was not given.
#[derive(Clone, Debug)]
pub struct Options {
    pub(super) entry: Arc<Entry>,
    pub(super) given: BTreeMap<&'static str, (Value, Range<usize>)>,
}

impl Options {
    /// The value of `key`, given or by default.
    ///
    /// # Panics
    /// In debug builds, if the entry has no such key or its kind does not fit `T`: then the entry and the code
    /// that reads it disagree. In release builds that is `None`.
    pub fn get<T: FromValue>(&self, key: &str) -> Option<T> {
        let known = self.entry.keys.iter().find(|k| k.name == key);
        debug_assert!(
            known.is_some(),
            "the entry `{}` has no key `{key}`",
            self.entry.name
        );
        let value = match self.given.get(key) {
            Some((value, _)) => value.clone(),
            None => {
                let key = known?;
                key.kind.read(key.default?).ok()?
            }
        };
        T::from_value(&value)
    }

    /// The value of `key`, which is required or has a default.
    ///
    /// # Errors
    /// If it is neither, and was not given.
    pub fn need<T: FromValue>(&self, key: &'static str) -> Result<T, Refusal> {
        self.get(key)
            .ok_or_else(|| Refusal::missing(format!("`{}` needs `{key}`", self.entry.name)))
    }

    /// True if the flag `key` was given, alone or as `yes`.
    pub fn flag(&self, key: &str) -> bool {
        self.get(key).unwrap_or(false)
    }

    /// True if `key` was written down, rather than left to its default.
    pub fn is_given(&self, key: &str) -> bool {
        self.given.contains_key(key)
    }

    /// The entry that the word names.
    pub fn entry(&self) -> &Entry {
        &self.entry
    }
}

/// Why an engine or layer was not made of its options: shown with the words, at the key it is about.
#[derive(Debug)]
pub struct Refusal {
    pub(super) key: Option<&'static str>,
    pub(super) missing: bool,
    pub(super) error: Error,
}

impl Refusal {
    /// The value of `key` does not do.
    pub fn key(key: &'static str, message: impl Into<String>) -> Self {
        Refusal {
            key: Some(key),
            missing: false,
            error: Error::new(ErrorKind::Invalid, message.into()),
        }
    }

    /// The value of `key` does not do, for the reason `error`.
    pub fn key_error(key: &'static str, error: impl Into<Error>) -> Self {
        Refusal {
            key: Some(key),
            missing: false,
            error: error.into(),
        }
    }

    /// A key is missing.
    pub fn missing(message: impl Into<String>) -> Self {
        Refusal {
            key: None,
            missing: true,
            error: Error::new(ErrorKind::Invalid, message.into()),
        }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Refusal {
            key: None,
            missing: false,
            error,
        }
    }
}

impl From<ErrorKind> for Refusal {
    fn from(kind: ErrorKind) -> Self {
        Error::from(kind).into()
    }
}

impl From<std::io::Error> for Refusal {
    fn from(error: std::io::Error) -> Self {
        Error::from(error).into()
    }
}

impl From<InvalidGeometry> for Refusal {
    fn from(error: InvalidGeometry) -> Self {
        Error::from(error).into()
    }
}
