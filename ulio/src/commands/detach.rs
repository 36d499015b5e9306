//! `ulio detach`: takes devices away whose process lives, and what dead ones have left.

use std::path::Path;

use userland_io::attach::{Listed, State};

use super::attach::need_root;
use super::list;
use crate::cli::Detach;
use crate::errors::Failure;
use crate::output::{Results, note, one_line};

pub(crate) fn run(arguments: Detach) -> Result<(), Failure> {
    need_root("detaching a block device needs root: run it with sudo")?;
    let all = list::all()?;
    let mut errors = Vec::new();
    let chosen: Vec<&Listed> = match arguments.stale {
        true => stale(&all),
        false => {
            let mut chosen = Vec::new();
            for path in &arguments.devices {
                match named(&all, path) {
                    Some(listed) => chosen.push(listed),
                    None => errors.push(format!(
                        "{} was not attached by ulio: `ulio list` shows what was",
                        path.display()
                    )),
                }
            }
            chosen
        }
    };
    let mut results = Results::begin();
    for listed in chosen {
        match listed.detach() {
            Ok(()) => results.line(list::device(listed))?,
            Err(error) => errors.push(error.to_string()),
        }
    }
    results.end()?;
    let last = errors.pop();
    for error in errors {
        note(&format!("error: {}", one_line(&error)));
    }
    last.map_or(Ok(()), |error| Err(Failure::Failed(error)))
}

/// What can be removed of those whose process has died.
fn stale(all: &[Listed]) -> Vec<&Listed> {
    for listed in all.iter().filter(|listed| listed.state() == State::Waiting) {
        let device = list::device(listed);
        note(&format!(
            "{device} waits to be resumed, and is left alone: `ulio detach {device}` removes it"
        ));
    }
    let stale = all.iter().filter(|listed| listed.state() == State::Stale);
    stale.collect()
}

/// The device at `path`, or where that leads to. Of several on record, a living one.
fn named<'a>(all: &'a [Listed], path: &Path) -> Option<&'a Listed> {
    let leads_to = std::fs::canonicalize(path).ok();
    let is_it = |listed: &&Listed| {
        let known = listed.path();
        known.is_some() && (known == Some(path) || known == leads_to.as_deref())
    };
    let of_it = || all.iter().filter(is_it);
    of_it()
        .find(|listed| listed.state() == State::Running)
        .or_else(|| of_it().next())
}
