//! What stands in a registry: each name with its keys, as help and parsing both read them.

use super::values::Kind;

/// A key that a name takes.
///
/// ```
/// use userland_io::stack::{Key, Kind};
///
/// let size = Key::new("size", Kind::Size, "creates the file with this length").example("10G");
/// ```
#[non_exhaustive]
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// What stands before the `=`.
    pub name: &'static str,
    /// What it takes.
    pub kind: Kind,
    /// The value if it is not given, as it would be written. `None`: then there is none.
    pub default: Option<&'static str>,
    /// True if it must be given.
    pub required: bool,
    /// What it does, in one line.
    pub meaning: &'static str,
    /// A value as one would write it.
    pub example: Option<&'static str>,
}

impl Key {
    /// A key that may be left out.
    pub const fn new(name: &'static str, kind: Kind, meaning: &'static str) -> Self {
        Key {
            name,
            kind,
            default: None,
            required: false,
            meaning,
            example: None,
        }
    }

    /// It must be given.
    pub const fn required(mut self) -> Self {
        self.required = true;
        self
    }

    /// The value if it is not given. Read as a given one is.
    pub const fn default(mut self, default: &'static str) -> Self {
        self.default = Some(default);
        self
    }

    /// A value as one would write it.
    pub const fn example(mut self, example: &'static str) -> Self {
        self.example = Some(example);
        self
    }
}

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The first word of a stack.
    Engine,
    /// Any further word.
    Layer,
}

/// A name, what it stands for, and its keys.
///
/// ```
/// use userland_io::stack::{Entry, Key, Kind};
///
/// let entry = Entry::new("tape", "a disk on a tape: slow")
///     .positional(Key::new("path", Kind::Path, "the tape drive").required().example("/dev/st0"))
///     .key(Key::new("rewind", Kind::Flag, "go back to the start first"))
///     .example("tape:/dev/st0,rewind");
/// ```
#[non_exhaustive]
#[derive(Clone, Debug)]
pub struct Entry {
    /// The name.
    pub name: &'static str,
    /// What it is, in one line.
    pub summary: &'static str,
    /// Whether the first of [`keys`](Self::keys) is also the value right after the colon.
    pub has_positional: bool,
    /// Its keys.
    pub keys: Vec<Key>,
    /// Words as one would write them.
    pub examples: Vec<&'static str>,
    /// The URI schemes that mean this name: a bare `nbd://host/x` is `nbd:nbd://host/x`.
    pub schemes: &'static [&'static str],
    /// The feature of this library that it needs, if this build lacks it.
    pub missing_feature: Option<&'static str>,
}

impl Entry {
    /// A name that takes no keys.
    pub fn new(name: &'static str, summary: &'static str) -> Self {
        Entry {
            name,
            summary,
            has_positional: false,
            keys: Vec::new(),
            examples: Vec::new(),
            schemes: &[],
            missing_feature: None,
        }
    }

    /// A key that is also the value right after the colon: `file:disk.img` is `file:path=disk.img`.
    pub fn positional(mut self, key: Key) -> Self {
        self.keys.insert(0, key);
        self.has_positional = true;
        self
    }

    /// A further key.
    pub fn key(mut self, key: Key) -> Self {
        self.keys.push(key);
        self
    }

    /// A word as one would write it.
    pub fn example(mut self, example: &'static str) -> Self {
        self.examples.push(example);
        self
    }

    /// URI schemes that mean this name.
    pub fn schemes(mut self, schemes: &'static [&'static str]) -> Self {
        self.schemes = schemes;
        self
    }

    /// The key that stands right after the colon.
    pub fn positional_key(&self) -> Option<&Key> {
        self.keys.first().filter(|_| self.has_positional)
    }

    /// How the word is written, keys that may be left out in brackets: `null:[SIZE][,logical_block_size=SIZE]`.
    pub fn synopsis(&self) -> String {
        let mut text = self.name.to_owned();
        for (n, key) in self.keys.iter().enumerate() {
            let upper = match key.kind {
                Kind::Choice(choices) => choices.join("|"),
                Kind::Set(choices) => choices.join("+"),
                kind => kind.to_string().to_uppercase(),
            };
            let before = if n == 0 { ":" } else { "," };
            let part = match key.kind {
                _ if n == 0 && self.has_positional => upper,
                Kind::Flag => key.name.to_owned(),
                _ => format!("{}={upper}", key.name),
            };
            match (key.required, n) {
                (true, _) => text.push_str(&format!("{before}{part}")),
                (false, 0) => text.push_str(&format!(":[{part}]")),
                (false, _) => text.push_str(&format!("[,{part}]")),
            }
        }
        text
    }

    /// The keys with what they mean, in the columns of an error or of help.
    pub(super) fn key_rows(&self) -> Vec<[String; 2]> {
        let mut rows = Vec::new();
        for (n, key) in self.keys.iter().enumerate() {
            let mut meaning = key.meaning.to_owned();
            if n == 0 && self.has_positional {
                meaning.push_str(&format!(" (also as {}:{})", self.name, "..."));
            }
            match (key.required, key.default) {
                (true, _) => meaning.push_str(" (required)"),
                (_, Some(default)) => meaning.push_str(&format!(" (default {default})")),
                _ => {}
            }
            let name = match key.kind {
                Kind::Flag => key.name.to_owned(),
                kind => format!("{}={kind}", key.name),
            };
            rows.push([name, meaning]);
        }
        rows
    }
}
