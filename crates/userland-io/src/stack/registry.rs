//! Names to engines and layers: reads words by the key tables, and opens what they say.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;

use crate::{AnyEngine, Checked};

use super::catalogue::{Entry, Role};
use super::error::{StackError, StackErrorKind as Kind, nearest};
use super::options::{Options, Refusal};
use super::values::{self, Value};
use super::words::{Item, Text, Word, Words};

type Opening = Pin<Box<dyn Future<Output = Result<AnyEngine, Refusal>> + Send>>;

#[derive(Clone)]
enum Opener {
    Engine(Arc<dyn Fn(Options) -> Opening + Send + Sync>),
    Layer(Arc<dyn Fn(Options, Checked<AnyEngine>) -> Opening + Send + Sync>),
}

#[derive(Clone)]
struct Known {
    entry: Arc<Entry>,
    opener: Opener,
}

impl Known {
    fn role(&self) -> Role {
        match self.opener {
            Opener::Engine(_) => Role::Engine,
            Opener::Layer(_) => Role::Layer,
        }
    }
}

/// The names that stacks are made of.
///
/// ```
/// use userland_io::stack::{Entry, Key, Kind, Refusal, Registry};
/// use userland_io::{EngineExt, engines::Null};
///
/// let entry = Entry::new("hole", "reads zeroes")
///     .positional(Key::new("size", Kind::Size, "the disk's length").default("1G"));
/// let registry = Registry::builtin().engine(entry, async |options| {
///     let size = options.need::<u64>("size")?;
///     if size > 1 << 40 {
///         return Err(Refusal::key("size", "a hole is at most 1T deep"));
///     }
///     Ok(Null::new(size).erase())
/// });
/// let plan = registry.parse("hole:5G").unwrap();
/// assert_eq!(plan.to_string(), "hole:5G");
/// ```
#[derive(Clone, Default)]
pub struct Registry {
    known: Vec<Known>,
}

impl Registry {
    /// No names at all.
    pub fn empty() -> Self {
        Registry::default()
    }

    /// The names of this library.
    pub fn builtin() -> Self {
        super::builtin::add(Registry::empty())
    }

    /// Adds an engine, or replaces the one with that name.
    pub fn engine<F, Fut>(self, entry: Entry, open: F) -> Self
    where
        F: Fn(Options) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<AnyEngine, Refusal>> + Send + 'static,
    {
        let open = move |options| Box::pin(open(options)) as Opening;
        self.add(entry, Opener::Engine(Arc::new(open)))
    }

    /// Adds a layer, or replaces the one with that name.
    pub fn layer<F, Fut>(self, entry: Entry, open: F) -> Self
    where
        F: Fn(Options, Checked<AnyEngine>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<AnyEngine, Refusal>> + Send + 'static,
    {
        let open = move |options, lower| Box::pin(open(options, lower)) as Opening;
        self.add(entry, Opener::Layer(Arc::new(open)))
    }

    /// Adds the name of an engine that this build lacks, for want of `feature`.
    #[cfg_attr(feature = "nbd", allow(dead_code))]
    pub(super) fn missing(self, mut entry: Entry, feature: &'static str) -> Self {
        entry.missing_feature = Some(feature);
        self.engine(entry, |_| async {
            Err(crate::ErrorKind::Unsupported.into())
        })
    }

    fn add(mut self, entry: Entry, opener: Opener) -> Self {
        let known = Known {
            entry: Arc::new(entry),
            opener,
        };
        self.known.retain(|k| k.entry.name != known.entry.name);
        self.known.push(known);
        self
    }

    /// Every name, in the order in which they were added.
    pub fn entries(&self) -> impl Iterator<Item = (Role, &Entry)> {
        self.known.iter().map(|k| (k.role(), &*k.entry))
    }

    /// Reads `words` and checks all names, keys and values. Nothing is opened yet.
    ///
    /// # Errors
    /// At the characters that are wrong.
    pub fn parse(&self, words: &str) -> Result<Plan, StackError> {
        self.plan(Words::parse(words)?)
    }

    /// As [`parse`](Self::parse), with each word an item of its own, such as the arguments of a command line.
    ///
    /// # Errors
    /// At the characters that are wrong.
    pub fn parse_args<S: AsRef<str>>(
        &self,
        words: impl IntoIterator<Item = S>,
    ) -> Result<Plan, StackError> {
        self.plan(Words::from_args(words)?)
    }

    /// Reads `words` and opens the stack.
    ///
    /// # Errors
    /// If the words are wrong, at the characters that are; if something cannot be opened, at its word.
    pub async fn open(&self, words: &str) -> Result<AnyEngine, StackError> {
        self.parse(words)?.open().await
    }

    /// As [`open`](Self::open), with each word an item of its own.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub async fn open_args<S: AsRef<str>>(
        &self,
        words: impl IntoIterator<Item = S>,
    ) -> Result<AnyEngine, StackError> {
        self.parse_args(words)?.open().await
    }

    /// The name that `wrong`, which is none, was most likely meant to be.
    pub fn nearest(&self, wrong: &str) -> Option<&'static str> {
        nearest(wrong, self.known.iter().map(|known| known.entry.name))
    }

    /// Checks all names, keys and values of `words`.
    ///
    /// # Errors
    /// At the characters that are wrong.
    pub fn plan(&self, words: Words) -> Result<Plan, StackError> {
        let reader = Reader {
            registry: self,
            source: words.shared_source(),
        };
        if words.is_empty() {
            let message = "a stack has at least one word: an engine, such as memory:1G";
            return Err(reader
                .wrong(Kind::Order, 0..0, message)
                .list("engines:", reader.names(Role::Engine)));
        }
        let mut steps: Vec<Step> = Vec::new();
        let mut before = None;
        for (n, word) in words.iter().enumerate() {
            let entry = steps.last().map(|step| &*step.known.entry);
            let before = entry.zip(before.replace(word));
            let step = reader
                .step(n, word, before)
                .map_err(|error| error.word(n))?;
            steps.push(step);
        }
        Ok(Plan { words, steps })
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.known.iter().map(|k| k.entry.name))
            .finish()
    }
}

/// A stack whose words are right, ready to be opened. `Display` writes the words.
#[derive(Clone, Debug)]
pub struct Plan {
    words: Words,
    steps: Vec<Step>,
}

#[derive(Clone)]
struct Step {
    known: Known,
    options: Options,
}

impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.options.fmt(f)
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.words.fmt(f)
    }
}

impl Plan {
    /// The words that it was made of.
    pub fn words(&self) -> &Words {
        &self.words
    }

    /// The options of each word, bottom first.
    pub fn options(&self) -> impl Iterator<Item = &Options> {
        self.steps.iter().map(|step| &step.options)
    }

    /// Opens the engine, then each layer over it.
    ///
    /// # Errors
    /// At the word that could not be opened. What was opened below it is dropped again.
    pub async fn open(&self) -> Result<AnyEngine, StackError> {
        let mut below: Option<AnyEngine> = None;
        for (n, (step, word)) in self.steps.iter().zip(self.words.iter()).enumerate() {
            let options = step.options.clone();
            let opened = match (&step.known.opener, below.take()) {
                (Opener::Layer(open), Some(lower)) => match Checked::new(lower) {
                    Ok(lower) => open(options, lower).await,
                    Err(error) => Err(error.into()),
                },
                (Opener::Engine(open), _) => open(options).await,
                // `plan` puts an engine at the bottom.
                (Opener::Layer(_), None) => Err(crate::ErrorKind::Invalid.into()),
            };
            match opened {
                Ok(engine) => below = Some(engine),
                Err(refusal) => return Err(self.refused(n, word, step, refusal)),
            }
        }
        below.ok_or_else(|| {
            let source = self.words.shared_source();
            StackError::new(Kind::Order, source, 0..0, "a stack has at least one word")
        })
    }

    fn refused(&self, n: usize, word: &Word, step: &Step, refusal: Refusal) -> StackError {
        let source = self.words.shared_source();
        let at_key = refusal.key.and_then(|key| step.options.given.get(key));
        let (kind, span) = match at_key {
            Some((_, span)) => (Kind::Value, span.clone()),
            None if refusal.missing => (Kind::MissingKey, word.name.span.clone()),
            None => (Kind::Open, word.span.clone()),
        };
        let message = match kind {
            Kind::Open => format!("`{word}`: {}", refusal.error),
            _ => refusal.error.to_string(),
        };
        StackError::new(kind, source, span, message)
            .word(n)
            .cause(refusal.error)
    }
}

/// Reads words by the key tables.
struct Reader<'a> {
    registry: &'a Registry,
    source: &'a Arc<str>,
}

impl Reader<'_> {
    fn wrong(&self, kind: Kind, span: Range<usize>, message: impl Into<String>) -> StackError {
        StackError::new(kind, self.source, span, message)
    }

    fn names(&self, role: Role) -> Vec<[String; 2]> {
        let mut rows = Vec::new();
        for known in self.registry.known.iter().filter(|k| k.role() == role) {
            let entry = &known.entry;
            let mut summary = entry.summary.to_owned();
            if let Some(feature) = entry.missing_feature {
                summary.push_str(&format!(
                    " (not in this build: needs the feature `{feature}`)"
                ));
            }
            rows.push([entry.name.to_owned(), summary]);
        }
        rows
    }

    fn step(
        &self,
        n: usize,
        word: &Word,
        before: Option<(&Entry, &Word)>,
    ) -> Result<Step, StackError> {
        let (known, items) = self.find(n, word, before)?;
        let name = known.entry.name;
        let span = word.name.span.clone();
        match (n, known.role()) {
            (0, Role::Layer) => {
                return Err(self
                    .wrong(
                        Kind::Order,
                        span,
                        format!("`{name}` is a layer, and the first word is the engine"),
                    )
                    .help(format!("put an engine before it, such as memory:1G {word}"))
                    .list("engines:", self.names(Role::Engine)));
            }
            (1.., Role::Engine) => {
                return Err(self
                    .wrong(
                        Kind::Order,
                        span,
                        format!("`{name}` is an engine, and a stack has only one, its first word"),
                    )
                    .list("layers that can follow:", self.names(Role::Layer)));
            }
            _ => {}
        }
        if let Some(feature) = known.entry.missing_feature {
            return Err(self
                .wrong(
                    Kind::Unavailable,
                    span,
                    format!("`{name}` is not in this build"),
                )
                .help(format!("build it with the feature `{feature}`")));
        }
        let options = self.options(&known.entry, word, items)?;
        Ok(Step {
            known: known.clone(),
            options,
        })
    }

    /// The entry that a word names, and its items with the positional in place.
    fn find(
        &self,
        n: usize,
        word: &Word,
        before: Option<(&Entry, &Word)>,
    ) -> Result<(&Known, Vec<Item>), StackError> {
        let name = &word.name.text;
        let mut items = word.items.clone();
        let mut found = None;
        if word.is_uri {
            let is_scheme = |k: &&Known| k.entry.schemes.contains(&name.as_str());
            found = self.registry.known.iter().find(is_scheme);
        }
        if found.is_none() {
            found = self.registry.known.iter().find(|k| k.entry.name == name);
            // `file:///a/b` is the name `file`, after all.
            if let (true, Some(Item::Bare(value))) = (word.is_uri, items.first_mut()) {
                let cut = (name.len() + 1).min(value.text.len());
                value.text.drain(..cut);
                if !value.quoted {
                    value.span.start += cut;
                }
            }
        }
        if let Some(known) = found {
            return Ok((known, items));
        }
        let (role, what) = match n {
            0 => (Role::Engine, "engine"),
            _ => (Role::Layer, "layer"),
        };
        let message = match word.is_uri {
            true => format!("no engine takes `{name}://` addresses"),
            false => format!("no {what} is called `{name}`"),
        };
        let near = self.registry.nearest(name);
        let mut help = near.map(|near| format!("did you mean `{near}`?"));
        if help.is_none() && name.contains('.') {
            help = match before {
                None => Some(format!("if it is a file: file:{word}")),
                Some((entry, before)) => ends_in_path(entry, before).then(|| {
                    let name = entry.name;
                    format!("a path with a space in it stands in quotes: {name}:'a b.img'")
                }),
            };
        }
        Err(self
            .wrong(Kind::UnknownName, word.name.span.clone(), message)
            .maybe_help(help)
            .list(format!("{what}s:"), self.names(role)))
    }

    fn options(
        &self,
        entry: &Arc<Entry>,
        word: &Word,
        items: Vec<Item>,
    ) -> Result<Options, StackError> {
        let name = entry.name;
        let mut given: BTreeMap<&'static str, (Value, Range<usize>)> = BTreeMap::new();
        for (n, item) in items.into_iter().enumerate() {
            let (key_text, key, value) = match item {
                Item::Pair(key, value) => (key.clone(), self.key(entry, &key, false)?, Some(value)),
                Item::Bare(value) => match entry.positional_key() {
                    Some(key) if n == 0 && !means_flag(entry, key, &value) => {
                        (value.clone(), key, Some(value))
                    }
                    _ => (value.clone(), self.key(entry, &value, true)?, None),
                },
            };
            if given.contains_key(key.name) {
                return Err(self.wrong(
                    Kind::Value,
                    key_text.span,
                    format!("`{}` is given twice", key.name),
                ));
            }
            let read = match (&value, key.kind) {
                (Some(value), kind) => kind.read(&value.text),
                (None, values::Kind::Flag) => Ok(Value::Flag(true)),
                (None, kind) => {
                    let example = key.example.unwrap_or("...");
                    return Err(self
                        .wrong(
                            Kind::Value,
                            key_text.span,
                            format!("`{}` needs a value ({kind})", key.name),
                        )
                        .help(format!("write {}={example}", key.name)));
                }
            };
            let text = value.unwrap_or(key_text);
            let read = read.map_err(|error| {
                let mut span = text.span.clone();
                // In quotes, doubled ones may have moved what follows: point at the whole then.
                if !text.quoted && !error.at.is_empty() {
                    span = span.start + error.at.start..span.start + error.at.end;
                }
                let example = key.example.map(|e| format!("for example {}={e}", key.name));
                self.wrong(Kind::Value, span, error.to_string())
                    .maybe_help(example)
            })?;
            given.insert(key.name, (read, text.span));
        }
        for key in &entry.keys {
            if key.required && !given.contains_key(key.name) {
                let help = entry.examples.first().map(|e| format!("for example {e}"));
                return Err(self
                    .wrong(
                        Kind::MissingKey,
                        word.name.span.clone(),
                        format!("`{name}` needs `{}`: {}", key.name, key.meaning),
                    )
                    .maybe_help(help)
                    .list(format!("keys of `{name}`:"), entry.key_rows()));
            }
        }
        Ok(Options {
            entry: entry.clone(),
            given,
        })
    }

    fn key<'e>(
        &self,
        entry: &'e Entry,
        key: &Text,
        bare: bool,
    ) -> Result<&'e super::Key, StackError> {
        if let Some(known) = entry.keys.iter().find(|k| k.name == key.text) {
            return Ok(known);
        }
        let name = entry.name;
        let near = nearest(&key.text, entry.keys.iter().map(|k| k.name));
        let mut help = near.map(|near| format!("did you mean `{near}`?"));
        if help.is_none() && bare && entry.has_positional {
            help = Some("a value with a comma in it stands in quotes".to_owned());
        }
        let error = self
            .wrong(
                Kind::UnknownKey,
                key.span.clone(),
                format!("`{name}` has no key `{}`", key.text),
            )
            .maybe_help(help);
        Err(match entry.keys.is_empty() {
            true => error.list(format!("`{name}` takes no keys"), Vec::new()),
            false => error.list(format!("keys of `{name}`:"), entry.key_rows()),
        })
    }
}

/// True if the last of `word` is a path without quotes, which a space has ended.
fn ends_in_path(entry: &Entry, word: &Word) -> bool {
    let (key, value) = match word.items.as_slice() {
        [Item::Bare(value)] => (entry.positional_key(), value),
        [.., Item::Pair(key, value)] => {
            let key = entry.keys.iter().find(|known| known.name == key.text);
            (key, value)
        }
        _ => return false,
    };
    key.is_some_and(|key| key.kind == values::Kind::Path) && !value.quoted
}

/// True if what stands where the positional would is a flag: `null:readonly`. Where any text could be meant, as in
/// `file:readonly`, it is not.
fn means_flag(entry: &Entry, positional: &super::Key, value: &Text) -> bool {
    let takes_any = matches!(positional.kind, values::Kind::Text | values::Kind::Path);
    let is_flag = |key: &super::Key| key.kind == values::Kind::Flag && key.name == value.text;
    !takes_any && !value.quoted && entry.keys.iter().any(is_flag)
}
