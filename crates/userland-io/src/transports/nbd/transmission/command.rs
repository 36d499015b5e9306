//! Runs one request against the device, to its end.

use super::super::session::Session;
use super::input::Received;
use super::pool::Buffer;
use super::request::{Command, Request};
use super::status::{self, Status};
use super::{holes, request};
use crate::{Device, Engine, Error, ExtentKind, Extents, ReadBuf, WriteBuf};

/// The most chunks of a read that has holes.
const MOST_RUNS: usize = 64;

/// A request and what it needs to run.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) request: Request,
    /// What is to be written, the memory to read into, or the contexts selected.
    pub(super) buffer: Option<Buffer>,
    /// What is to be written, instead, if it stays where it was received.
    pub(super) received: Option<Received>,
    /// Ask for holes before reading.
    pub(super) ask: bool,
    /// What the request took from the connection's account beside its buffer.
    pub(super) charge: usize,
    /// The bytes of a long read that come after this piece of it.
    pub(super) rest: u64,
}

/// A request that has been run.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) job: Job,
    pub(super) outcome: Result<Outcome, Failure>,
}

/// What a request that was run has to tell.
#[derive(Debug)]
pub(super) enum Outcome {
    /// That it is done.
    Plain,
    /// What was read: all of the buffer.
    Data,
    /// As `Data`, and what a question for holes told: the first so many bytes are data.
    KnownData(u64),
    /// What was read, and where there was nothing to read.
    Sparse(Vec<Run>),
    /// The status of each context.
    Status(Vec<Status>),
}

/// Why it failed: refused after all, or by the device.
#[derive(Debug)]
pub(super) enum Failure {
    Refused(request::Refusal),
    Device(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Device(error)
    }
}

/// A part of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) len: usize,
    pub(super) is_hole: bool,
}

/// Runs `job`.
pub(super) async fn run<E: Engine>(device: &Device<E>, session: &Session, mut job: Job) -> Done {
    let request = job.request;
    let range = request.offset..request.offset + request.length;
    let outcome = match (request.command, &mut job.buffer) {
        (Command::Read { .. }, Some(buffer)) if job.ask => {
            read_sparse(device, session, buffer, request.offset).await
        }
        (Command::Read { .. }, Some(buffer)) => device
            .read(&mut ReadBuf::new(buffer), request.offset)
            .await
            .map(|()| Outcome::Data),
        (Command::Write(flags), buffer) => {
            match job.received.as_deref().or(buffer.as_deref()) {
                Some(bytes) => device
                    .write(&WriteBuf::new(bytes), request.offset, flags)
                    .await
                    .map(|()| Outcome::Plain),
                // Of no bytes: there is nothing to do.
                None => Ok(Outcome::Plain),
            }
        }
        (Command::Flush, _) => device.flush().await.map(|()| Outcome::Plain),
        (Command::Trim { fua }, _) => trim(device, range, fua).await.map(|()| Outcome::Plain),
        (Command::Cache, _) => device.prefetch(range).await.map(|()| Outcome::Plain),
        (Command::WriteZeroes(flags), _) => device
            .write_zeroes(range, flags)
            .await
            .map(|()| Outcome::Plain),
        (Command::Status { one, selected }, buffer) => {
            let mut request = request;
            let mut ids = Vec::new();
            if selected {
                let payload = buffer.as_deref().unwrap_or_default();
                if let Err(refusal) = request::select(&mut request, payload, session, &mut ids) {
                    let outcome = Err(Failure::Refused(refusal));
                    return Done { job, outcome };
                }
            }
            let range = request.offset..request.offset + request.length;
            let contexts = session
                .contexts
                .iter()
                .filter(|context| !selected || ids.contains(&context.id));
            status::ask(device, range, contexts, one)
                .await
                .map(Outcome::Status)
        }
        (Command::Read { .. }, None) => Ok(Outcome::Plain),
    };
    Done {
        job,
        outcome: outcome.map_err(Failure::Device),
    }
}

async fn trim<E: Engine>(
    device: &Device<E>,
    range: std::ops::Range<u64>,
    fua: bool,
) -> Result<(), Error> {
    if !range.is_empty() {
        device.discard(range).await?;
    }
    match fua {
        true => device.flush().await,
        false => Ok(()),
    }
}

/// Reads only what is not known to be zeroes.
async fn read_sparse<E: Engine>(
    device: &Device<E>,
    session: &Session,
    buffer: &mut Buffer,
    offset: u64,
) -> Result<Outcome, Error> {
    let len = buffer.len() as u64;
    let ahead = len.max(holes::AHEAD).min(session.size - offset);
    let mut extents = Extents::new(MOST_RUNS);
    // A failed question costs nothing but the zeroes, and so does what is not told in time: the read decides.
    for _ in 0..status::MOST_ASKED {
        let before = extents.covered();
        if before >= len || extents.is_full() {
            break;
        }
        let mut more = Extents::new(extents.room());
        let rest = offset + before..offset + ahead;
        if device.extents(rest, &mut more).await.is_err() {
            break;
        }
        for extent in &more {
            extents.push(extent.len, extent.kind);
        }
        if extents.covered() == before {
            break;
        }
    }
    let data = match extents.iter().next() {
        Some(first) if first.kind == ExtentKind::Data => first.len,
        _ => 0,
    };
    let runs = runs(&extents, buffer.len());
    if let [Run { is_hole: false, .. }] = runs[..] {
        device.read(&mut ReadBuf::new(buffer), offset).await?;
        return Ok(Outcome::KnownData(data));
    }
    let mut at = 0;
    for run in &runs {
        if !run.is_hole {
            let mut part = ReadBuf::new(&mut buffer[at..at + run.len]);
            device.read(&mut part, offset + at as u64).await?;
        }
        at += run.len;
    }
    Ok(Outcome::Sparse(runs))
}

/// Cuts `len` bytes into data and holes; a hole too short for a chunk of its own counts as data.
fn runs(extents: &Extents, len: usize) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut left = len;
    for extent in extents {
        let part = usize::try_from(extent.len).map_or(left, |part| part.min(left));
        if part == 0 {
            break;
        }
        // Beside another hole it needs no chunk of its own.
        let is_worth_it = |last: Option<&Run>| {
            part as u64 >= holes::SHORTEST_HOLE || last.is_some_and(|last| last.is_hole)
        };
        let is_hole = extent.kind != ExtentKind::Data && is_worth_it(runs.last());
        add(&mut runs, part, is_hole);
        left -= part;
    }
    if left > 0 {
        add(&mut runs, left, false);
    }
    runs
}

fn add(runs: &mut Vec<Run>, len: usize, is_hole: bool) {
    match runs.last_mut() {
        Some(last) if last.is_hole == is_hole => last.len += len,
        _ => runs.push(Run { len, is_hole }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ExtentKind::*;

    #[test]
    fn runs_cover_the_read_and_short_holes_are_data() {
        let mut extents = Extents::new(8);
        extents.push(10_000, Data);
        extents.push(4095, Hole);
        extents.push(5, Data);
        extents.push(4096, Zero);
        extents.push(4096, Hole);
        let run = |len, is_hole| Run { len, is_hole };
        assert_eq!(
            runs(&extents, 30_000),
            [run(14_100, false), run(8192, true), run(7708, false)]
        );
        assert_eq!(
            runs(&extents, 20_000),
            [run(14_100, false), run(5900, true)]
        );
        assert_eq!(runs(&extents, 100), [run(100, false)]);
        assert_eq!(runs(&Extents::new(1), 100), [run(100, false)]);
    }
}
