//! What is wrong with a stack, and where in its words.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::Error;

/// What sort of mistake a [`StackError`] is about.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StackErrorKind {
    /// The text does not read as words.
    Syntax,
    /// No engine or layer has that name.
    UnknownName,
    /// There is such a name, but not in this build.
    Unavailable,
    /// The name has no such key.
    UnknownKey,
    /// A key that must be given is missing.
    MissingKey,
    /// A key is given twice, or what it is given makes no sense.
    Value,
    /// Engines and layers stand in the wrong order.
    Order,
    /// The words are right, but the engine or layer could not be opened.
    Open,
}

/// A mistake in a stack: the characters it is about, and what would be right.
///
/// `Display` is one line. [`render`](Self::render) shows the words with the
/// characters underlined, and lists what exists.
pub struct StackError(Box<Inner>);

struct Inner {
    kind: StackErrorKind,
    text: Arc<str>,
    word: Option<usize>,
    span: Range<usize>,
    message: String,
    help: Option<String>,
    list: Vec<String>,
    cause: Option<Error>,
}

impl StackError {
    pub(super) fn new(
        kind: StackErrorKind,
        text: &Arc<str>,
        span: Range<usize>,
        message: impl Into<String>,
    ) -> Self {
        StackError(Box::new(Inner {
            kind,
            text: text.clone(),
            word: None,
            span,
            message: message.into(),
            help: None,
            list: Vec::new(),
            cause: None,
        }))
    }

    pub(super) fn help(mut self, help: impl Into<String>) -> Self {
        self.0.help = Some(help.into());
        self
    }

    pub(super) fn maybe_help(mut self, help: Option<String>) -> Self {
        self.0.help = help.or(self.0.help);
        self
    }

    /// `title`, then `rows` in aligned columns.
    pub(super) fn list(mut self, title: impl Into<String>, rows: Vec<[String; 2]>) -> Self {
        let width = rows.iter().map(|[name, _]| name.chars().count()).max();
        self.0.list = vec![title.into()];
        for [name, meaning] in rows {
            let pad = width.unwrap_or(0) - name.chars().count();
            let line = format!("  {name}{:pad$}  {meaning}", "");
            self.0.list.push(line.trim_end().to_owned());
        }
        self
    }

    pub(super) fn word(mut self, index: usize) -> Self {
        self.0.word = Some(index);
        self
    }

    pub(super) fn cause(mut self, cause: Error) -> Self {
        self.0.cause = Some(cause);
        self
    }

    /// What sort of mistake it is.
    pub fn kind(&self) -> StackErrorKind {
        self.0.kind
    }

    /// True if the words themselves are wrong; false if they are right and what they name could not be opened.
    pub fn is_usage(&self) -> bool {
        self.0.kind != StackErrorKind::Open
    }

    /// All the words, as [`span`](Self::span) counts in them. A list of words is joined by spaces.
    pub fn text(&self) -> &str {
        &self.0.text
    }

    /// The characters it is about, as a byte range of [`text`](Self::text).
    pub fn span(&self) -> Range<usize> {
        self.0.span.clone()
    }

    /// Which word it is about, counted from 0, if it is about one.
    pub fn word_index(&self) -> Option<usize> {
        self.0.word
    }

    /// What is wrong, without where.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The words with the characters underlined, the way out, and what exists: several lines, without a last newline.
    pub fn render(&self) -> impl fmt::Display + '_ {
        Rendered(&self.0)
    }
}

impl fmt::Display for StackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &self.0;
        f.write_str(&inner.message)?;
        if let Some(help) = &inner.help {
            write!(f, " ({help})")?;
        }
        Ok(())
    }
}

impl fmt::Debug for StackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What `unwrap` prints: the rendered form helps most there.
        write!(f, "StackError({:?})\n{}", self.0.kind, self.render())
    }
}

impl std::error::Error for StackError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        // The message ends with the cause's own text, so the chain goes on below it.
        self.0
            .cause
            .as_ref()
            .and_then(|cause| std::error::Error::source(cause))
    }
}

impl From<StackError> for Error {
    fn from(error: StackError) -> Self {
        let kind = match &error.0.cause {
            Some(cause) => cause.kind(),
            None => crate::ErrorKind::Invalid,
        };
        Error::new(kind, error)
    }
}

struct Rendered<'a>(&'a Inner);

impl fmt::Display for Rendered<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { text, span, .. } = self.0;
        write!(f, "error: {}", self.0.message)?;
        if !text.trim().is_empty() {
            let shown: String = text.chars().map(printable).collect();
            let before = columns(text, 0..span.start);
            let marked = columns(text, span.clone()).max(1);
            write!(f, "\n  |\n  | {}", shown.trim_end())?;
            write!(f, "\n  | {:before$}{}", "", "^".repeat(marked))?;
        }
        if let Some(help) = &self.0.help {
            write!(f, "\n  = help: {help}")?;
        }
        for (n, line) in self.0.list.iter().enumerate() {
            let bullet = if n == 0 { "= " } else { "  " };
            write!(f, "\n  {bullet}{line}")?;
        }
        Ok(())
    }
}

/// One column a character, so that the carets stand under theirs.
fn printable(c: char) -> char {
    match c {
        c if c.is_whitespace() => ' ',
        c if c.is_control() => '?',
        c => c,
    }
}

fn columns(text: &str, range: Range<usize>) -> usize {
    text.char_indices()
        .filter(|(at, _)| range.contains(at))
        .count()
}

/// The one of `names` that `wrong` was most likely meant to be.
pub(super) fn nearest<'a>(
    wrong: &str,
    names: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let wrong: Vec<char> = wrong.to_lowercase().chars().take(64).collect();
    let most = (wrong.len() / 3).max(1);
    names
        .into_iter()
        .map(|name| (distance(&wrong, &name.chars().collect::<Vec<_>>()), name))
        .filter(|&(distance, name)| distance <= most && distance < name.len())
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, name)| name)
}

/// How many characters to insert, drop, change or swap to get from `a` to `b`.
fn distance(a: &[char], b: &[char]) -> usize {
    let mut rows = vec![(0..=b.len()).collect::<Vec<usize>>()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let changed = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = changed.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_carets_stand_under_the_characters() {
        let text: Arc<str> = Arc::from("ab \u{e9}\u{e9}:x\ty=1");
        let at = text.find("y=").unwrap();
        let error = StackError::new(StackErrorKind::Value, &text, at..at + 1, "no y")
            .help("try z")
            .list(
                "there are:",
                vec![["z".into(), "zed".into()], ["long".into(), String::new()]],
            );
        assert_eq!(
            error.render().to_string(),
            "error: no y\n  |\n  | ab \u{e9}\u{e9}:x y=1\n  |         ^\n  = help: try z\n  = there are:\n      z     zed\n      long"
        );
        assert_eq!(error.to_string(), "no y (try z)");
    }

    #[test]
    fn an_end_of_text_still_gets_a_caret() {
        let text: Arc<str> = Arc::from("null:");
        let error = StackError::new(StackErrorKind::Syntax, &text, 5..5, "more");
        assert!(error.render().to_string().ends_with("|      ^"));
    }

    #[test]
    fn near_misses_are_found_and_far_ones_are_not() {
        let names = ["read", "readonly", "write", "write_zeroes", "size"];
        assert_eq!(nearest("szie", names), Some("size"));
        assert_eq!(nearest("Read", names), Some("read"));
        assert_eq!(nearest("read-only", names), Some("readonly"));
        assert_eq!(nearest("cow", names), None);
        assert_eq!(nearest("", names), None);
    }
}
