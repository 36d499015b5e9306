//! What is attached on this machine, by whichever process, and taking away what dead ones left.
//!
//! All of it blocks for moments: it is for command lines, not for a task among others.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::holders::{holders_besides, waiting};
use super::record::Record;
use super::{DetachError, Via, kernel_nbd, ublk, way};
use crate::Op;

/// How long a daemon may take to tell its counters.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a daemon answers that has detached its device and closed the disk.
const DONE: &str = "done\n";
/// What it answers while somebody uses the device.
pub(super) const IN_USE: &str = "in use\n";
/// Begins the answer that tells what went wrong.
const ERROR: &str = "error ";

/// How it went, for the process that asked: no end of a daemon looks like one of these.
pub(super) fn answer(result: &Result<(), DetachError>) -> String {
    match result {
        Ok(()) => DONE.to_owned(),
        Err(error) => format!("{ERROR}{error}\n"),
    }
}

/// What a daemon's answer says of how its device, at `path`, has ended.
fn ended_so(answer: &str, path: &Path) -> Result<(), DetachError> {
    match (answer, answer.strip_prefix(ERROR)) {
        (DONE, _) => Ok(()),
        (_, Some(text)) => Err(DetachError::Told(text.trim_end().to_owned())),
        _ => Err(DetachError::Lost {
            path: path.to_owned(),
        }),
    }
}

/// Every device on record, of the living and of the dead.
///
/// # Errors
/// If `/run/ulio` cannot be read. That it is not there is no error.
pub fn list() -> io::Result<Vec<Listed>> {
    let records = Record::all()?.into_iter();
    let listed = records.map(|record| Listed {
        state: match (record.is_alive(), &record.device) {
            (true, Some(_)) if way::is_there(&record) => State::Running,
            (true, Some(_)) => State::Ending,
            (true, None) => State::Starting,
            (false, Some(_)) if record.recoverable && ublk::is_there(&record) => State::Waiting,
            (false, _) => State::Stale,
        },
        record,
    });
    Ok(listed.collect())
}

/// A device on record.
#[derive(Clone, Debug)]
pub struct Listed {
    record: Record,
    state: State,
}

/// How a device on record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Its process lives, and is about to make it.
    Starting,
    /// Its process lives and serves it.
    Running,
    /// Its process lives, and the device is gone: the disk is being flushed and closed. Another device may have its path.
    Ending,
    /// Its process died, and it waits for another to resume it. Whoever uses it waits too.
    Waiting,
    /// Its process died. What it left can be removed.
    Stale,
}

impl State {
    /// Its name: `starting`, `running`, `ending`, `waiting` or `stale`.
    pub const fn name(self) -> &'static str {
        match self {
            State::Starting => "starting",
            State::Running => "running",
            State::Ending => "ending",
            State::Waiting => "waiting",
            State::Stale => "stale",
        }
    }
}

/// What a living device has done since it was attached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    operations: Vec<(Op, [u64; 3])>,
    data: Option<u64>,
}

impl Counters {
    /// How many requests for `op` were answered, how many bytes those that succeeded had, and how many failed.
    pub fn of(&self, op: Op) -> (u64, u64, u64) {
        let found = self.operations.iter().find(|(of, _)| *of == op);
        let [ops, bytes, errors] = found.map_or([0; 3], |(_, counts)| *counts);
        (ops, bytes, errors)
    }

    /// How many bytes of the disk are data, not holes; `None` if the disk cannot tell, or has too many to count.
    pub fn data(&self) -> Option<u64> {
        self.data
    }

    /// As [`parse`](Self::parse) reads it.
    pub(super) fn text(stats: &crate::Stats, data: Option<u64>) -> String {
        let line = |op: Op| {
            let of = stats.of(op);
            format!("{} {} {} {}\n", op.name(), of.ops, of.bytes, of.errors)
        };
        let mut text: String = Op::ALL.into_iter().map(line).collect();
        if let Some(data) = data {
            text += &format!("data {data}\n");
        }
        text
    }

    fn parse(text: &str) -> Self {
        let mut counters = Counters::default();
        for line in text.lines() {
            let mut words = line.split(' ');
            let name = words.next();
            let mut numbers = words.map_while(|word| word.parse().ok());
            let mut next = || numbers.next().unwrap_or(0);
            if name == Some("data") {
                counters.data = Some(next());
            } else if let Some(op) = Op::ALL.into_iter().find(|op| Some(op.name()) == name) {
                let counts = [next(), next(), next()];
                counters.operations.push((op, counts));
            }
        }
        counters
    }
}

impl Listed {
    /// The block device: `/dev/loop0`, say. `None` if its process has not made it, or died before.
    pub fn path(&self) -> Option<&Path> {
        self.record.device.as_deref()
    }

    /// The way by which it is attached.
    pub fn via(&self) -> Via {
        self.record.via
    }

    /// What its process called it.
    pub fn label(&self) -> &str {
        &self.record.label
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.record.size
    }

    /// True if it takes no writes.
    pub fn is_read_only(&self) -> bool {
        self.record.read_only
    }

    /// True if it outlives its process.
    pub fn is_recoverable(&self) -> bool {
        self.record.recoverable
    }

    /// The process that serves it, or served it.
    pub fn pid(&self) -> u32 {
        self.record.pid
    }

    /// How it was when it was listed.
    pub fn state(&self) -> State {
        self.state
    }

    /// The URI of the NBD server that the kernel talks to itself, if that is how it is attached: then its process sees no
    /// request, and counts none.
    pub fn server(&self) -> Option<&str> {
        self.record.remains(kernel_nbd::SERVER)
    }

    /// What it has done. `None` if its process does not answer within two seconds, or has nothing to
    /// [count](Self::server).
    pub fn counters(&self) -> Option<Counters> {
        match self.state {
            State::Running if self.server().is_none() => {
                let text = self.ask("counters\n", Some(PATIENCE)).ok()?;
                Some(Counters::parse(&text))
            }
            _ => None,
        }
    }

    /// Everyone who uses it, its own process apart.
    ///
    /// # Errors
    /// If the device is not there.
    pub fn holders(&self) -> io::Result<Vec<super::Holder>> {
        match self.path() {
            Some(path) => holders_besides(path, Some(self.pid())),
            None => Ok(Vec::new()),
        }
    }

    /// Detaches it: by its process if that lives, which may take as long as a flush; else takes away what was left.
    ///
    /// # Errors
    /// [`DetachError::InUse`] if somebody uses it: then nothing has changed, and it stays on record. The same goes for what a
    /// dead process has left if it cannot be told whether it is used.
    pub fn detach(&self) -> Result<(), DetachError> {
        let device = self.path().unwrap_or(Path::new("the device")).to_owned();
        let failed = |error| DetachError::Kernel {
            path: device.clone(),
            error,
        };
        let in_use = || {
            let mut holders = self.holders().unwrap_or_default();
            if holders.is_empty() && self.state == State::Waiting {
                holders = waiting();
            }
            DetachError::InUse {
                path: device.clone(),
                holders,
            }
        };
        if self.record.is_alive() {
            // Asked here, for the error to name the users. The process claims it before it takes it away.
            let is_in_use = |path| super::in_use(path).is_ok_and(|is| is);
            if way::is_there(&self.record) && self.path().is_some_and(is_in_use) {
                return Err(in_use());
            }
            let answer = match self.ask("detach\n", None) {
                Ok(answer) => answer,
                // It is ending already, or does just now.
                Err(error) if is_unheard(&error) => String::new(),
                Err(error) => return Err(failed(error)),
            };
            return match answer.as_str() {
                IN_USE => Err(in_use()),
                answer => ended_so(answer, &device),
            };
        }
        way::remove_stale(&self.record).map_err(|error| match error.kind() {
            io::ErrorKind::ResourceBusy => in_use(),
            _ => failed(error),
        })?;
        self.record.remove().map_err(failed)
    }

    fn ask(&self, order: &str, patience: Option<Duration>) -> io::Result<String> {
        let mut socket = UnixStream::connect(self.record.socket())?;
        socket.set_read_timeout(patience)?;
        socket.write_all(order.as_bytes())?;
        let mut text = String::new();
        socket.take(64 << 10).read_to_string(&mut text)?;
        Ok(text)
    }
}

/// True if nobody listens, or has stopped to.
fn is_unheard(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound};
    matches!(
        error.kind(),
        BrokenPipe | ConnectionRefused | ConnectionReset | NotFound
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_answer_says_that_all_went_well() {
        let path = Path::new("/dev/loop0");
        let said = |text: &str| ended_so(text, path).map_err(|error| error.to_string());
        assert_eq!(said(&answer(&Ok(()))), Ok(()));
        let error = DetachError::Told("no space".to_owned());
        assert_eq!(said(&answer(&Err(error))), Err("no space".to_owned()));
        for text in ["", "do", "done", "in use"] {
            let lost = said(text).unwrap_err();
            assert!(lost.contains("before the disk was flushed"), "{text:?}");
        }
    }

    #[test]
    fn counters_are_read_as_they_were_written() {
        let text = Counters::text(&crate::Stats::default(), Some(17));
        assert_eq!(Counters::parse(&text).data(), Some(17));
        let counters = Counters::parse("read 3 4096 1\nnew 1 2\nwrite 7\n");
        assert_eq!(counters.of(Op::Read), (3, 4096, 1));
        assert_eq!(counters.of(Op::Write), (7, 0, 0));
        assert_eq!(counters.of(Op::Flush), (0, 0, 0));
        assert_eq!(counters.data(), None);
    }
}
