//! Scripts as text. The grammar is told in the module above.

use std::fmt;
use std::str::FromStr;

use userland_io::{ErrorKind, WriteFlags};

use super::{Abandon, Action, End, Fault, Op, Round, Script};
use crate::sim::Keep;

/// A text that is not a script.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a script: {word:?}: {rule}")]
pub struct ParseScriptError {
    word: String,
    rule: &'static str,
}

const FLAGS: [(char, WriteFlags); 3] = [
    ('!', WriteFlags::FUA),
    ('n', WriteFlags::NO_UNMAP),
    ('q', WriteFlags::FAST_ONLY),
];

impl fmt::Display for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed={}", self.seed)?;
        for (index, round) in self.rounds.iter().enumerate() {
            f.write_str(if index == 0 { " " } else { " ; " })?;
            write!(f, "{round}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for action in &self.actions {
            write!(f, "{action} ")?;
        }
        if let Some(fault) = self.fault {
            let Fault {
                disk,
                flush,
                call,
                kind,
            } = fault;
            let kind = match kind {
                ErrorKind::NoSpace => "nospace",
                _ => "io",
            };
            let what = if flush { "failflush" } else { "fail" };
            write!(f, "{what}@{call}={kind}")?;
            if disk > 0 {
                write!(f, "/{disk}")?;
            }
            f.write_str(" ")?;
        }
        let moment = |at: u32| match at {
            u32::MAX => String::new(),
            at => format!("@{at}"),
        };
        match self.end {
            End::Done => f.write_str("done"),
            End::Close => f.write_str("close"),
            End::Kill { at } => write!(f, "kill{}", moment(at)),
            End::Crash { at, keep, again } => {
                write!(f, "crash{}/", moment(at))?;
                match keep {
                    Keep::Nothing => f.write_str("nothing")?,
                    Keep::Everything => f.write_str("everything")?,
                    Keep::Subset => f.write_str("subset")?,
                    Keep::Prefix => f.write_str("prefix")?,
                    Keep::Torn => f.write_str("torn")?,
                    Keep::Image(image) => write!(f, "{image}")?,
                }
                again.map_or(Ok(()), |again| write!(f, "/{again}"))
            }
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.client)?;
        let (letter, at, len, flags) = match self.op {
            Op::Read(at, len) => ('r', at, len, WriteFlags::empty()),
            Op::Write(at, len, flags) => ('w', at, len, flags),
            Op::Zeroes(at, len, flags) => ('z', at, len, flags),
            Op::Discard(at, len) => ('d', at, len, WriteFlags::empty()),
            Op::Extents(at, len) => ('x', at, len, WriteFlags::empty()),
            Op::Flush => ('f', 0, 0, WriteFlags::empty()),
        };
        write!(f, "{letter}")?;
        if self.op != Op::Flush {
            write!(f, "{at}+{len}")?;
        }
        for (letter, flag) in FLAGS {
            if flags.contains(flag) {
                write!(f, "{letter}")?;
            }
        }
        match self.abandon {
            Some(Abandon { polls, forget }) => {
                write!(f, "{}{polls}", if forget { '^' } else { '~' })
            }
            None => Ok(()),
        }
    }
}

impl FromStr for Script {
    type Err = ParseScriptError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut script = Script {
            seed: 0,
            rounds: Vec::new(),
        };
        for part in text.split(';') {
            let mut round = Round {
                actions: Vec::new(),
                fault: None,
                end: End::Done,
            };
            for word in part.split_whitespace() {
                let bad = |rule| ParseScriptError {
                    word: word.to_owned(),
                    rule,
                };
                if let Some(seed) = word.strip_prefix("seed=") {
                    script.seed = seed.parse().map_err(|_| bad("the seed is a number"))?;
                } else if word.starts_with("fail") {
                    let rule = "an error is fail@CALL=io or failflush@FLUSH=io (or nospace), and perhaps /DISK";
                    round.fault = Some(parse_fault(word).ok_or_else(|| bad(rule))?);
                } else if let Some((client, op)) = word.split_once(':') {
                    let rule = "an operation is CLIENT:w4+2, r, z, d, x (with ! n q) or f, and perhaps ~POLLS or ^POLLS";
                    let action = parse_action(client, op).ok_or_else(|| bad(rule))?;
                    round.actions.push(action);
                } else {
                    let rule = "a round ends in done, close, kill@EVENT or crash@EVENT/KEEP[/EVENT], where KEEP is \
                                nothing, everything, subset, prefix, torn or an image's number";
                    round.end = parse_end(word).ok_or_else(|| bad(rule))?;
                }
            }
            script.rounds.push(round);
        }
        Ok(script)
    }
}

fn parse_fault(text: &str) -> Option<Fault> {
    let (what, call) = text.split_once('@')?;
    let flush = match what {
        "fail" => false,
        "failflush" => true,
        _ => return None,
    };
    let (call, kind) = call.split_once('=')?;
    let (kind, disk) = kind.split_once('/').unwrap_or((kind, "0"));
    Some(Fault {
        disk: disk.parse().ok()?,
        flush,
        call: call.parse().ok()?,
        kind: match kind {
            "io" => ErrorKind::Io,
            "nospace" => ErrorKind::NoSpace,
            _ => return None,
        },
    })
}

fn parse_action(client: &str, text: &str) -> Option<Action> {
    let forget = text.contains('^');
    let (text, abandon) = match text.split_once(['~', '^']) {
        Some((text, polls)) => {
            let polls = polls.parse().ok()?;
            (text, Some(Abandon { polls, forget }))
        }
        None => (text, None),
    };
    let client = client.parse().ok()?;
    let action = |op| {
        Some(Action {
            client,
            op,
            abandon,
        })
    };
    if text == "f" {
        return action(Op::Flush);
    }
    let mut letters = text.chars();
    let letter = letters.next()?;
    let mut rest = letters.as_str();
    let mut flags = WriteFlags::empty();
    while let Some((flag, flagless)) = FLAGS
        .iter()
        .find_map(|&(letter, flag)| Some((flag, rest.strip_suffix(letter)?)))
    {
        flags |= flag;
        rest = flagless;
    }
    let (at, len) = rest.split_once('+')?;
    let (at, len) = (at.parse().ok()?, len.parse().ok()?);
    match letter {
        'w' => action(Op::Write(at, len, flags)),
        'z' => action(Op::Zeroes(at, len, flags)),
        _ if !flags.is_empty() => None,
        'r' => action(Op::Read(at, len)),
        'd' => action(Op::Discard(at, len)),
        'x' => action(Op::Extents(at, len)),
        _ => None,
    }
}

fn parse_end(word: &str) -> Option<End> {
    let mut parts = word.split('/');
    let head = parts.next()?;
    let (name, at) = match head.split_once('@') {
        Some((name, at)) => (name, at.parse().ok()?),
        None => (head, u32::MAX),
    };
    let end = match name {
        "done" => End::Done,
        "close" => End::Close,
        "kill" => End::Kill { at },
        "crash" => End::Crash {
            at,
            keep: match parts.next()? {
                "nothing" => Keep::Nothing,
                "everything" => Keep::Everything,
                "subset" => Keep::Subset,
                "prefix" => Keep::Prefix,
                "torn" => Keep::Torn,
                image => Keep::Image(image.parse().ok()?),
            },
            again: parts.next().map(str::parse).transpose().ok()?,
        },
        _ => return None,
    };
    parts.next().is_none().then_some(end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::script::Mix;

    #[test]
    fn every_script_reads_as_it_prints() {
        let mix = Mix {
            forgets: true,
            disks: 2,
            ..Mix::default().hostile()
        };
        for seed in 0..500 {
            let script = Script::random(seed, &mix);
            assert_eq!(script.to_string().parse(), Ok(script));
        }
    }

    #[test]
    fn a_word_that_means_nothing_is_named() {
        for (text, named) in [
            ("0:w4", "\"0:w4\": an operation is"),
            ("0:r1+1!", "\"0:r1+1!\": an operation is"),
            ("crash", "\"crash\": a round ends in"),
            ("fail@x=io", "\"fail@x=io\": an error is"),
        ] {
            let error = text.parse::<Script>().unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
