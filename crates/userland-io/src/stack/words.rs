//! Text to words: names, items and values with their places, and no meaning yet.
//!
//! ```text
//! stack = word *( space word )
//! word  = name [ ":" item *( "," item ) ]  |  URI *( "," item )  |  quoted URI *( "," item )
//! item  = value  |  key "=" value          (the first value is the positional, the others are flags)
//! value = characters without "," or space  |  '...'  |  "..."
//! ```
//!
//! Inside quotes every character stands for itself, and the quote for itself when
//! doubled. Quotes count only where a value starts: `file:it's.img` is a plain name.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::error::{StackError, StackErrorKind};

/// A piece of a word, and where it stands.
#[derive(Clone, Debug)]
pub struct Text {
    /// What it says, without quotes.
    pub text: String,
    /// Its place, quotes included, as a byte range of [`Words::source`].
    pub span: Range<usize>,
    /// True if it stood in quotes.
    pub quoted: bool,
}

/// One of the comma-separated parts of a word.
#[derive(Clone, Debug)]
pub enum Item {
    /// `value`: the positional, or a flag.
    Bare(Text),
    /// `key=value`.
    Pair(Text, Text),
}

/// A name with its items.
#[derive(Clone, Debug)]
pub struct Word {
    /// The name; of a URI, its scheme.
    pub name: Text,
    /// True if the word is a URI (`nbd://host/export`). Its first item is then the whole URI.
    pub is_uri: bool,
    /// What follows the name.
    pub items: Vec<Item>,
    /// The word's place.
    pub span: Range<usize>,
}

/// A stack's words, bottom first.
#[derive(Clone, Debug)]
pub struct Words {
    source: Arc<str>,
    words: Vec<Word>,
}

impl Words {
    /// Reads words separated by spaces.
    ///
    /// # Errors
    /// Of the kind [`StackErrorKind::Syntax`], at the characters that do not fit.
    pub fn parse(text: &str) -> Result<Self, StackError> {
        let source = Arc::from(text);
        let mut words = Vec::new();
        let mut at = 0;
        loop {
            at += text[at..].len() - text[at..].trim_start().len();
            if at == text.len() {
                return Ok(Words { source, words });
            }
            let mut parser = Parser {
                source: &source,
                at,
                end: text.len(),
                spaces_end: true,
            };
            let word = parser.word().map_err(|e| e.word(words.len()))?;
            words.push(word);
            at = parser.at;
        }
    }

    /// Reads a list of words, such as a command line's arguments. Spaces inside one belong to it.
    ///
    /// # Errors
    /// As [`parse`](Self::parse).
    pub fn from_args<S: AsRef<str>>(args: impl IntoIterator<Item = S>) -> Result<Self, StackError> {
        let args: Vec<S> = args.into_iter().collect();
        let joined: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
        let source = Arc::from(joined.join(" "));
        let mut words = Vec::new();
        let mut at = 0;
        for arg in joined {
            let mut parser = Parser {
                source: &source,
                at,
                end: at + arg.len(),
                spaces_end: false,
            };
            let word = parser.word().map_err(|e| e.word(words.len()))?;
            words.push(word);
            at += arg.len() + 1;
        }
        Ok(Words { source, words })
    }

    /// The text that the spans count in.
    pub fn source(&self) -> &str {
        &self.source
    }

    pub(super) fn shared_source(&self) -> &Arc<str> {
        &self.source
    }

    /// The words.
    pub fn iter(&self) -> std::slice::Iter<'_, Word> {
        self.words.iter()
    }

    /// How many words there are.
    pub fn len(&self) -> usize {
        self.words.len()
    }

    /// True if there is no word.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }
}

impl<'a> IntoIterator for &'a Words {
    type Item = &'a Word;
    type IntoIter = std::slice::Iter<'a, Word>;
    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// The words as [`parse`](Words::parse) reads them back, with quotes only where they are needed.
impl fmt::Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, word) in self.words.iter().enumerate() {
            if n > 0 {
                f.write_str(" ")?;
            }
            word.fmt(f)?;
        }
        Ok(())
    }
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.is_uri {
            f.write_str(&self.name.text)?;
        }
        for (n, item) in self.items.iter().enumerate() {
            match n {
                0 if self.is_uri => {}
                0 => f.write_str(":")?,
                _ => f.write_str(",")?,
            }
            match item {
                Item::Bare(value) => {
                    let text = &value.text;
                    let looks_like_a_pair = split_pair(text).is_some() && !self.is_uri;
                    let looks_like_a_uri = n == 0 && !self.is_uri && text.starts_with("//");
                    write_value(f, text, looks_like_a_pair || looks_like_a_uri)?;
                }
                Item::Pair(key, value) => {
                    write!(f, "{}=", key.text)?;
                    write_value(f, &value.text, false)?;
                }
            }
        }
        Ok(())
    }
}

fn write_value(f: &mut fmt::Formatter<'_>, text: &str, quote: bool) -> fmt::Result {
    let plain = !text.is_empty()
        && !text.starts_with(QUOTES)
        && !text.contains(|c: char| c == ',' || c.is_whitespace());
    match plain && !quote {
        true => f.write_str(text),
        false if text.contains('\'') && !text.contains('"') => write!(f, "\"{text}\""),
        false => write!(f, "'{}'", text.replace('\'', "''")),
    }
}

const QUOTES: [char; 2] = ['\'', '"'];

struct Parser<'a> {
    source: &'a Arc<str>,
    at: usize,
    end: usize,
    /// False for one word of a list, where spaces are characters like any other.
    spaces_end: bool,
}

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        &self.source[self.at..self.end]
    }

    fn peek(&self) -> Option<char> {
        self.rest()
            .chars()
            .next()
            .filter(|&c| !self.spaces_end || !c.is_whitespace())
    }

    fn wrong(&self, span: Range<usize>, message: impl Into<String>) -> StackError {
        StackError::new(StackErrorKind::Syntax, self.source, span, message)
    }

    /// What is left of this word, for an error that is about all of it.
    fn rest_of_word(&self) -> Range<usize> {
        let rest = self.rest();
        let len = match self.spaces_end {
            true => rest.find(char::is_whitespace).unwrap_or(rest.len()),
            false => rest.len(),
        };
        self.at..self.at + len
    }

    /// The characters up to one of `stops`, or the word's end.
    fn until(&mut self, stops: &[char]) -> Text {
        let spaces_end = self.spaces_end;
        let rest = self.rest();
        let len = rest
            .find(|c: char| stops.contains(&c) || (spaces_end && c.is_whitespace()))
            .unwrap_or(rest.len());
        let span = self.at..self.at + len;
        self.at = span.end;
        Text {
            text: rest[..len].to_owned(),
            span,
            quoted: false,
        }
    }

    fn word(&mut self) -> Result<Word, StackError> {
        let start = self.at;
        let mut items = Vec::new();
        let name;
        let mut is_uri = false;
        if self.peek().is_some_and(|c| QUOTES.contains(&c)) {
            let text = self.quoted()?;
            let Some(scheme) = uri_scheme(&text.text) else {
                return Err(self
                    .wrong(text.span, "a word starts with a name, not with a quote")
                    .help("quote the value instead: file:'a b.img'"));
            };
            name = Text {
                text: scheme.to_owned(),
                ..text.clone()
            };
            is_uri = true;
            items.push(Item::Bare(text));
        } else if let Some(scheme) = uri_scheme(self.rest()) {
            name = Text {
                text: scheme.to_owned(),
                span: start..start + scheme.len(),
                quoted: false,
            };
            is_uri = true;
            items.push(Item::Bare(self.until(&[','])));
        } else {
            name = self.name()?;
        }
        match self.peek() {
            Some(',') if is_uri => {
                self.at += 1;
                self.items(&mut items)?;
            }
            Some(':') if !is_uri => {
                self.at += 1;
                if self.peek().is_some() {
                    self.items(&mut items)?;
                }
            }
            _ => {}
        }
        Ok(Word {
            name,
            is_uri,
            items,
            span: start..self.at,
        })
    }

    fn name(&mut self) -> Result<Text, StackError> {
        let whole = self.rest_of_word();
        let name = self.until(&[':', ',', '=']);
        let path_help = |parser: &Parser<'_>| {
            let mut quoted = String::new();
            let _ = fmt::Write::write_fmt(
                &mut quoted,
                format_args!("{}", Quoted(&parser.source[whole.clone()])),
            );
            format!("if it is a file: file:{quoted}")
        };
        if name.text.is_empty() {
            let span = whole.start..(whole.start + 1).min(whole.end);
            let message = match whole.is_empty() {
                true => "an empty word",
                false => "a word starts with a name: name:value,key=value",
            };
            return Err(self.wrong(span, message));
        }
        if !is_name(&name.text) {
            let message = format!("`{}` is no name of an engine or layer", name.text);
            return Err(self.wrong(name.span, message).help(path_help(self)));
        }
        if let Some(c @ (',' | '=')) = self.peek() {
            let message = format!("after the name `{}` comes `:`, not `{c}`", name.text);
            let error = self.wrong(self.at..self.at + 1, message);
            return Err(match name.text.contains(['.', '/']) {
                true => error.help(format!("if it is a file: file:{}", name.text)),
                false => error,
            });
        }
        Ok(name)
    }

    fn items(&mut self, items: &mut Vec<Item>) -> Result<(), StackError> {
        loop {
            items.push(self.item()?);
            match self.peek() {
                Some(',') => self.at += 1,
                _ => return Ok(()),
            }
        }
    }

    fn item(&mut self) -> Result<Item, StackError> {
        if self.peek().is_some_and(|c| QUOTES.contains(&c)) {
            return Ok(Item::Bare(self.quoted()?));
        }
        if let Some((key, _)) = split_pair(self.rest()) {
            let span = self.at..self.at + key.len();
            let key = Text {
                text: key.to_owned(),
                span,
                quoted: false,
            };
            self.at = key.span.end + 1;
            let value = match self.peek() {
                Some(c) if QUOTES.contains(&c) => self.quoted()?,
                _ => self.until(&[',']),
            };
            if value.text.is_empty() && !value.quoted {
                let message = format!("`{}=` has no value", key.text);
                return Err(self
                    .wrong(key.span.start..value.span.end, message)
                    .help(format!("an empty value is {}=''", key.text)));
            }
            return Ok(Item::Pair(key, value));
        }
        let value = self.until(&[',']);
        if value.text.is_empty() {
            // Point at the comma that promised something, or the one that came too early.
            let at = self.at;
            let span = match self.peek() {
                Some(_) => at..at + 1,
                None => at.saturating_sub(1)..at,
            };
            return Err(self
                .wrong(span, "nothing stands beside this comma")
                .help("an empty value is ''"));
        }
        Ok(Item::Bare(value))
    }

    /// A quoted value, from its first quote on.
    fn quoted(&mut self) -> Result<Text, StackError> {
        let start = self.at;
        let mut text = String::new();
        let mut chars = self.rest().char_indices().peekable();
        let quote = chars.next().map_or('\'', |(_, quote)| quote);
        while let Some((at, c)) = chars.next() {
            if c != quote {
                text.push(c);
            } else if chars.next_if(|&(_, next)| next == quote).is_some() {
                text.push(quote);
            } else {
                self.at = start + at + 1;
                if let Some(c) = self.peek().filter(|&c| c != ',') {
                    let span = self.at..self.at + c.len_utf8();
                    return Err(self
                        .wrong(
                            span,
                            "after the closing quote comes a comma, a space or the end",
                        )
                        .help(format!("a {quote} inside the quotes is written twice")));
                }
                let span = start..self.at;
                return Ok(Text {
                    text,
                    span,
                    quoted: true,
                });
            }
        }
        Err(self.wrong(
            self.rest_of_word(),
            format!("this {quote} is never closed by another"),
        ))
    }
}

struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_value(f, self.0, split_pair(self.0).is_some())
    }
}

/// `key=` at the start of `text`: the key, and what follows.
fn split_pair(text: &str) -> Option<(&str, &str)> {
    let (key, value) = text.split_once('=')?;
    let mut chars = key.chars();
    let ok = chars.next().is_some_and(|c| c.is_ascii_alphabetic())
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    ok.then_some((key, value))
}

/// The scheme, if `text` starts with `scheme://`.
fn uri_scheme(text: &str) -> Option<&str> {
    let (scheme, rest) = text.split_once(':')?;
    (rest.starts_with("//") && is_name(scheme)).then_some(scheme)
}

/// Letters, digits, `+`, `.`, `-` and `_`, a letter first (RFC 3986 section 3.1 for schemes, with `_`).
pub(super) fn is_name(text: &str) -> bool {
    let mut chars = text.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic())
        && chars.all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '.' | '-' | '_'))
}
