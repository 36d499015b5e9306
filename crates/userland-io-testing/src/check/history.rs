//! What happened to a window of a disk.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

use userland_io::{Discard, Error, ErrorKind, ExtentKind, Extents, Features, Geometry, WriteFlags};

use super::stamp::Stamp;

/// The number of an operation, unique in a run.
pub type OpId = u32;

/// The window of a disk that a history is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The cell's length in bytes.
    pub cell: usize,
    /// The window's length in bytes. The last cell may be shorter.
    pub len: usize,
    /// No cell holds more than one logical block, so none may tear.
    pub whole: bool,
    /// The engine claims `ATOMIC_READS`.
    pub atomic_reads: bool,
    /// Aligned groups of so many cells, written by one request, are all there or not at all after a crash.
    /// 0 or 1: no such claim.
    pub atomic_cells: usize,
}

impl Shape {
    /// The first `most` cells of a disk, or all there are. A cell is `cell` bytes long, or a logical block,
    /// but at least 32 bytes.
    pub fn of(geometry: &Geometry, cell: Option<usize>, most: usize) -> Self {
        let block = geometry.logical_block_size as usize;
        let cell = cell.unwrap_or(block.max(32)).max(1);
        Shape {
            cell,
            len: geometry.size.min((cell * most) as u64) as usize,
            whole: block.is_multiple_of(cell),
            atomic_reads: geometry.features.contains(Features::ATOMIC_READS),
            atomic_cells: geometry.atomic_write_unit as usize / cell,
        }
    }

    /// How many cells there are.
    pub fn cells(&self) -> usize {
        self.len.div_ceil(self.cell.max(1))
    }

    /// The bytes of `cells`, counted from the window's start.
    pub fn bytes(&self, cells: Range<usize>) -> Range<usize> {
        (cells.start * self.cell).min(self.len)..(cells.end * self.cell).min(self.len)
    }
}

/// An operation on whole cells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// A read of these cells.
    Read(Range<usize>),
    /// A write of these cells.
    Write(Range<usize>, WriteFlags),
    /// A `write_zeroes` of these cells.
    Zeroes(Range<usize>, WriteFlags),
    /// A discard of these cells, of which the second range, whole granules, must follow the claim. The
    /// others may keep their content or follow it.
    Discard(Range<usize>, Range<usize>, Discard),
    /// A flush.
    Flush,
    /// The extents of these cells.
    Extents(Range<usize>),
    /// A close.
    Close,
}

impl Request {
    /// The cells it touches.
    pub fn cells(&self) -> Range<usize> {
        match self {
            Request::Read(cells)
            | Request::Write(cells, _)
            | Request::Zeroes(cells, _)
            | Request::Discard(cells, ..)
            | Request::Extents(cells) => cells.clone(),
            Request::Flush | Request::Close => 0..0,
        }
    }

    fn is_mutation(&self) -> bool {
        matches!(
            self,
            Request::Write(..) | Request::Zeroes(..) | Request::Discard(..)
        )
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, flags) = match self {
            Request::Read(_) => ("read", WriteFlags::empty()),
            Request::Write(_, flags) => ("write", *flags),
            Request::Zeroes(_, flags) => ("write_zeroes", *flags),
            Request::Discard(..) => ("discard", WriteFlags::empty()),
            Request::Extents(_) => ("extents", WriteFlags::empty()),
            Request::Flush => return f.write_str("flush"),
            Request::Close => return f.write_str("close"),
        };
        let cells = self.cells();
        write!(f, "{name} {}..{}", cells.start, cells.end)?;
        for (name, _) in flags.iter_names() {
            write!(f, " {name}")?;
        }
        Ok(())
    }
}

/// A moment: the number of the event, counted from 1.
pub(super) type Time = u32;
pub(super) const NEVER: Time = Time::MAX;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Open,
    Ok,
    Failed(ErrorKind),
    /// The future was dropped or forgotten, then.
    Abandoned(Time),
    /// The process died first.
    Killed,
}

#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) client: usize,
    pub(super) request: Request,
    pub(super) start: Time,
    pub(super) end: Time,
    /// After this it has no effect any more.
    pub(super) acts_until: Time,
    pub(super) outcome: Outcome,
    /// What it saw of each cell.
    pub(super) seen: Vec<(usize, Seen)>,
}

/// Whose value a cell showed. Numbers are entries of the history, [`INITIAL`] what was there at first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    One(usize),
    Several(Vec<usize>),
    /// Bytes that nobody wrote as they are.
    Bytes(Vec<u8>),
    /// What one of several unspecified discards left: says nothing.
    Noise,
}

pub(super) const INITIAL: usize = 0;

/// The record of what was asked of a disk and what it answered.
#[derive(Debug)]
pub struct History {
    seed: u64,
    first: OpId,
    pub(super) shape: Shape,
    initial: Vec<u8>,
    pub(super) entries: Vec<Entry>,
    /// For each cell the entries that mutate it, the initial content first.
    pub(super) writers: Vec<Vec<usize>>,
    /// For each cell the entries that read it, each with the place in its `seen`.
    pub(super) readers: Vec<Vec<(usize, usize)>>,
    noise: HashMap<(usize, usize), Vec<u8>>,
    now: Time,
}

impl History {
    /// A history that begins with a disk whose window holds `initial`, durably. `first` is the number
    /// of its first operation, at least 1, and above those that wrote any of `initial`.
    ///
    /// # Panics
    /// If `initial` is not as long as the window.
    pub fn new(seed: u64, first: OpId, shape: Shape, initial: Vec<u8>) -> Self {
        assert_eq!(
            initial.len(),
            shape.len,
            "the initial content must fill the window"
        );
        let start = Entry {
            client: 0,
            request: Request::Write(0..shape.cells(), WriteFlags::FUA),
            start: 0,
            end: 0,
            acts_until: 0,
            outcome: Outcome::Ok,
            seen: Vec::new(),
        };
        History {
            seed,
            first,
            shape,
            initial,
            entries: vec![start],
            writers: vec![vec![INITIAL]; shape.cells()],
            readers: vec![Vec::new(); shape.cells()],
            noise: HashMap::new(),
            now: 0,
        }
    }

    /// The window.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The number that the next operation will have.
    pub fn next_op(&self) -> OpId {
        self.id(self.entries.len())
    }

    /// An operation begins.
    pub fn start(&mut self, client: usize, request: Request) -> OpId {
        let entry = self.entries.len();
        if request.is_mutation() {
            for cell in request.cells() {
                self.writers[cell].push(entry);
            }
        }
        let start = self.tick();
        self.entries.push(Entry {
            client,
            request,
            start,
            end: NEVER,
            acts_until: NEVER,
            outcome: Outcome::Open,
            seen: Vec::new(),
        });
        self.id(entry)
    }

    /// What the write `id` is to write.
    pub fn content(&self, id: OpId) -> Vec<u8> {
        let cells = self.entries[self.index(id)].request.cells();
        let mut content = vec![0; self.shape.bytes(cells.clone()).len()];
        for (cell, part) in cells.zip(content.chunks_mut(self.shape.cell)) {
            self.stamp(id, cell).fill(part);
        }
        content
    }

    /// A mutation or flush has answered.
    pub fn end(&mut self, id: OpId, result: &Result<(), Error>) {
        let now = self.tick();
        let index = self.index(id);
        let entry = &mut self.entries[index];
        entry.end = now;
        entry.acts_until = now;
        entry.outcome = match result {
            Ok(()) => Outcome::Ok,
            Err(error) => Outcome::Failed(error.kind()),
        };
        if matches!(entry.request, Request::Flush | Request::Close) && result.is_ok() {
            let began = entry.start;
            // A flush waits for what was abandoned before it.
            for entry in &mut self.entries {
                if matches!(entry.outcome, Outcome::Abandoned(at) if at < began) {
                    entry.acts_until = entry.acts_until.min(now);
                }
            }
        }
    }

    /// A read has answered: with the bytes of its cells, or not.
    pub fn end_read(&mut self, id: OpId, result: &Result<Vec<u8>, Error>) {
        let bytes = match result {
            Ok(bytes) => bytes,
            Err(error) => return self.end(id, &Err(error.kind().into())),
        };
        let cells = self.entries[self.index(id)].request.cells();
        let mut seen = Vec::with_capacity(cells.len());
        for (cell, part) in cells.zip(bytes.chunks(self.shape.cell)) {
            let found = self.identify(cell, part);
            seen.push((cell, self.bind_noise(id, cell, part, found)));
        }
        self.saw(id, seen);
        self.end(id, &Ok(()));
    }

    /// The extents of a range have been told. What is said to be zeroes counts as read.
    pub fn end_extents(&mut self, id: OpId, result: &Result<Extents, Error>) {
        let extents = match result {
            Ok(extents) => extents,
            Err(error) => return self.end(id, &Err(error.kind().into())),
        };
        let cells = self.entries[self.index(id)].request.cells();
        let mut zero = Vec::new();
        let mut at = cells.start * self.shape.cell;
        for run in extents {
            let end = at.saturating_add(run.len as usize);
            if run.kind != ExtentKind::Data {
                zero.push(at..end);
            }
            at = end;
        }
        let mut seen = Vec::new();
        for cell in cells {
            let mut bytes = self.shape.bytes(cell..cell + 1);
            let len = bytes.len();
            if bytes.all(|byte| zero.iter().any(|run| run.contains(&byte))) {
                seen.push((cell, self.identify(cell, &vec![0; len])));
            }
        }
        self.saw(id, seen);
        self.end(id, &Ok(()));
    }

    /// The future of an operation was dropped or forgotten. A mutation may act until the next flush has answered.
    pub fn abandon(&mut self, id: OpId) {
        let now = self.tick();
        let index = self.index(id);
        self.entries[index].outcome = Outcome::Abandoned(now);
    }

    /// The process died, and another has opened the disk: what had not answered never acts again.
    pub fn killed(&mut self) {
        let now = self.tick();
        for entry in &mut self.entries {
            if matches!(entry.outcome, Outcome::Open | Outcome::Abandoned(_)) {
                entry.acts_until = entry.acts_until.min(now);
                entry.outcome = Outcome::Killed;
            }
        }
    }

    /// The operations from `first` on that have not answered, as a list to read.
    pub(crate) fn unanswered(&self, first: OpId) -> String {
        let entries = self.entries.iter().enumerate().skip(self.index(first));
        let open = entries.filter(|(_, entry)| entry.outcome == Outcome::Open);
        let names: Vec<String> = open.map(|(index, _)| self.name(index)).collect();
        names.join(", ")
    }

    fn saw(&mut self, id: OpId, seen: Vec<(usize, Seen)>) {
        let entry = self.index(id);
        for (place, (cell, _)) in seen.iter().enumerate() {
            self.readers[*cell].push((entry, place));
        }
        self.entries[entry].seen = seen;
    }

    /// Whose bytes these are.
    pub(super) fn identify(&self, cell: usize, bytes: &[u8]) -> Seen {
        if let Some(stamp) = Stamp::decode(bytes) {
            let here = stamp.seed == self.seed && stamp.cell as usize == cell;
            if here && stamp.op >= self.first {
                let entry = self.index(stamp.op);
                if self.writers[cell].binary_search(&entry).is_ok() {
                    return Seen::One(entry);
                }
            }
        }
        let writers = self.writers[cell].iter().copied();
        let found: Vec<usize> = writers.filter(|&w| self.wrote(w, cell, bytes)).collect();
        match found[..] {
            [one] => Seen::One(one),
            [] if self.noisy(cell).next().is_some() => Seen::Noise,
            [] => Seen::Bytes(bytes.to_vec()),
            _ => Seen::Several(found),
        }
    }

    /// The unspecified discards of which no noise has been seen yet.
    fn noisy(&self, cell: usize) -> impl Iterator<Item = usize> {
        self.writers[cell].iter().copied().filter(move |&writer| {
            let request = &self.entries[writer].request;
            matches!(request, Request::Discard(_, _, Discard::Unspecified))
                && !self.noise.contains_key(&(writer, cell))
        })
    }

    /// Noise that only one discard can have left, and no mutation in flight, is its value from now on.
    fn bind_noise(&mut self, read: OpId, cell: usize, bytes: &[u8], found: Seen) -> Seen {
        let start = self.entries[self.index(read)].start;
        let mut writers = self.writers[cell].iter();
        if found == Seen::Noise && writers.any(|&w| self.entries[w].acts_until > start) {
            return found;
        }
        let only = {
            let mut noisy = self.noisy(cell);
            noisy.next().filter(|_| noisy.next().is_none())
        };
        match (found, only) {
            (Seen::Noise, Some(discard)) if self.shape.whole => {
                self.noise.insert((discard, cell), bytes.to_vec());
                Seen::One(discard)
            }
            (found, _) => found,
        }
    }

    /// True if `writer` put exactly these bytes into the cell.
    fn wrote(&self, writer: usize, cell: usize, bytes: &[u8]) -> bool {
        if writer == INITIAL {
            return self.initial[self.shape.bytes(cell..cell + 1)] == *bytes;
        }
        if let Request::Write(..) = self.entries[writer].request {
            return self.stamp(self.id(writer), cell).matches(bytes);
        }
        match self.noise.get(&(writer, cell)) {
            Some(noise) => noise == bytes,
            None => bytes.iter().all(|&byte| byte == 0),
        }
    }

    /// What `writer` put into the cell.
    pub(super) fn bytes_of(&self, writer: usize, cell: usize) -> Vec<u8> {
        let range = self.shape.bytes(cell..cell + 1);
        if writer == INITIAL {
            return self.initial[range].to_vec();
        }
        let mut bytes = vec![0; range.len()];
        if let Request::Write(..) = self.entries[writer].request {
            self.stamp(self.id(writer), cell).fill(&mut bytes);
        }
        bytes
    }

    /// True if each byte is that of one of `writers`.
    pub(super) fn is_mix_of(&self, writers: &[usize], cell: usize, bytes: &[u8]) -> bool {
        let values: Vec<Vec<u8>> = writers.iter().map(|&w| self.bytes_of(w, cell)).collect();
        let mut places = bytes.iter().enumerate();
        places.all(|(at, byte)| values.iter().any(|value| value[at] == *byte))
    }

    fn stamp(&self, id: OpId, cell: usize) -> Stamp {
        Stamp {
            seed: self.seed,
            op: id,
            cell: cell as u32,
        }
    }

    fn tick(&mut self) -> Time {
        self.now += 1;
        self.now
    }

    pub(super) fn id(&self, entry: usize) -> OpId {
        self.first + entry as OpId - 1
    }

    fn index(&self, id: OpId) -> usize {
        (id - self.first) as usize + 1
    }
}

impl Entry {
    /// It completed with success, and its effect on the cell is not left open.
    pub(super) fn took_effect(&self, cell: usize) -> bool {
        let sure = match &self.request {
            Request::Discard(_, sure, Discard::Zeroes) => sure.contains(&cell),
            Request::Discard(..) => false,
            _ => true,
        };
        sure && self.outcome == Outcome::Ok
    }

    pub(super) fn is_flush(&self) -> bool {
        matches!(self.request, Request::Flush | Request::Close) && self.outcome == Outcome::Ok
    }

    pub(super) fn has_fua(&self) -> bool {
        match &self.request {
            Request::Write(_, flags) | Request::Zeroes(_, flags) => flags.contains(WriteFlags::FUA),
            _ => false,
        }
    }
}
