//! The bytes of a simulated disk: what is durable, and every version since.
//!
//! The disk is cut into units (logical blocks, but at least 16 bytes), which never
//! tear. A mutation is taken apart into pieces, one a unit. Each piece lands on its own and
//! becomes the newest version of its unit; a flush, or FUA, makes a version the durable one and drops what
//! is older; a crash picks among what is left.

use std::ops::Range;
use std::sync::Arc;

use userland_io::CrashLevel;

use super::World;

/// What a machine crash leaves of the versions that no flush has made durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// None of them.
    Nothing,
    /// All of them, and what was in flight.
    Everything,
    /// For each unit, any of its versions.
    Subset,
    /// Those that landed before a random moment.
    Prefix,
    /// Those that landed before a random moment, but the last request is torn: any of its units.
    Torn,
    /// The image with this number, of [`SimDisk::images`](super::SimDisk::images).
    Image(u64),
}

/// How many versions of a unit of a simulated disk a crash may choose from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tail {
    /// The unit's number.
    pub unit: usize,
    /// Versions, with the durable one and what is in flight.
    pub versions: usize,
}

#[derive(Clone, Debug)]
pub(super) enum Bytes {
    Hole,
    Zero,
    Data(Arc<[u8]>),
}

#[derive(Clone, Debug)]
struct Unit {
    durable: Bytes,
    versions: Vec<Version>,
}

#[derive(Clone, Debug)]
struct Version {
    call: usize,
    seq: u64,
    /// A flush failed and the disk dropped the page: it reads back, but no later flush makes it durable.
    lost: bool,
    /// When a read first returned it; `u64::MAX` until then.
    seen: u64,
    bytes: Bytes,
}

/// A part of a mutation: new bytes for some of one unit.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    unit: usize,
    at: usize,
    len: usize,
    bytes: Bytes,
    /// Bytes of it that a read has shown before it landed, from the unit's start.
    shown: Option<(usize, usize)>,
}

/// A torn read shows so many bytes of what is in flight: never a whole block, whatever a block is to the caller.
const SPLINTER: usize = 8;

#[derive(Debug)]
struct Pending {
    call: usize,
    pieces: Vec<Piece>,
    orphan: bool,
    /// How many futures had been forgotten when it began.
    forgotten: u64,
}

#[derive(Debug)]
pub(super) struct Store {
    size: u64,
    unit: usize,
    level: CrashLevel,
    units: Vec<Unit>,
    pending: Vec<Pending>,
    /// When each mutation completed with success; `u64::MAX` until then.
    completed: Vec<u64>,
    seq: u64,
}

impl Bytes {
    fn copy_to(&self, at: usize, to: &mut [u8]) {
        match self {
            Bytes::Data(data) => to.copy_from_slice(&data[at..at + to.len()]),
            Bytes::Hole | Bytes::Zero => to.fill(0),
        }
    }
}

impl Store {
    pub(super) fn new(size: u64, block: u32, level: CrashLevel) -> Self {
        let unit = block.max(16) as usize;
        let blank = Unit {
            durable: Bytes::Hole,
            versions: Vec::new(),
        };
        Store {
            size,
            unit,
            level,
            units: vec![blank; size.div_ceil(unit as u64) as usize],
            pending: Vec::new(),
            completed: Vec::new(),
            seq: 0,
        }
    }

    pub(super) fn unit_len(&self) -> usize {
        self.unit
    }

    pub(super) fn resize(&mut self, size: u64) {
        let blank = Unit {
            durable: Bytes::Hole,
            versions: Vec::new(),
        };
        self.size = size;
        self.units
            .resize(size.div_ceil(self.unit as u64) as usize, blank);
        let units = self.units.len();
        for pending in &mut self.pending {
            pending.pieces.retain(|piece| piece.unit < units);
        }
    }

    /// Fills the disk with durable noise.
    pub(super) fn scribble(&mut self, world: &World) {
        let len = self.unit;
        for unit in &mut self.units {
            let mut noise = vec![0; len];
            for chunk in noise.chunks_mut(8) {
                let word = world.draw(u64::MAX).to_le_bytes();
                chunk.copy_from_slice(&word[..chunk.len()]);
            }
            unit.durable = Bytes::Data(noise.into());
        }
    }

    /// Takes `range` apart; `fill` makes the bytes of each piece from its place in the range.
    pub(super) fn pieces(
        &self,
        range: Range<u64>,
        mut fill: impl FnMut(Range<usize>) -> Option<Bytes>,
    ) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let unit = (at / self.unit as u64) as usize;
            let inside = (at % self.unit as u64) as usize;
            let len = ((self.unit - inside) as u64).min(range.end - at) as usize;
            let from = (at - range.start) as usize;
            if let Some(bytes) = fill(from..from + len) {
                pieces.push(Piece {
                    unit,
                    at: inside,
                    len,
                    bytes,
                    shown: None,
                });
            }
            at += len as u64;
        }
        pieces
    }

    /// Takes in a mutation, of which nothing has landed yet.
    pub(super) fn submit(&mut self, pieces: Vec<Piece>, world: &World) -> usize {
        let call = self.completed.len();
        self.completed.push(u64::MAX);
        self.pending.push(Pending {
            call,
            pieces,
            orphan: false,
            forgotten: world.forgotten(),
        });
        call
    }

    /// Lands up to `pieces` pieces of `call`, any of them. True once none is left.
    pub(super) fn land(&mut self, call: usize, pieces: usize, world: &World) -> bool {
        for _ in 0..pieces {
            let Some(pending) = self.pending.iter_mut().find(|p| p.call == call) else {
                return true;
            };
            if pending.pieces.is_empty() {
                break;
            }
            let any = world.draw(pending.pieces.len() as u64) as usize;
            let piece = pending.pieces.swap_remove(any);
            self.apply(call, piece);
        }
        self.pending
            .iter()
            .all(|p| p.call != call || p.pieces.is_empty())
    }

    /// The mutation `call` is over: what has not landed never will.
    pub(super) fn finish(&mut self, call: usize, success: bool, durable: bool) {
        self.pending.retain(|pending| pending.call != call);
        if success {
            self.seq += 1;
            self.completed[call] = self.seq;
        }
        if durable || (success && self.level == CrashLevel::Sync) {
            self.commit(|version| version.call == call);
        }
    }

    /// The future of `call` was dropped: it may still act, until the next flush.
    pub(super) fn abandon(&mut self, call: usize) {
        if let Some(pending) = self.pending.iter_mut().find(|p| p.call == call) {
            pending.orphan = true;
        }
    }

    /// An abandoned mutation may act at any moment, this one for example.
    pub(super) fn stir(&mut self, world: &World) {
        if self.pending.iter().any(|p| p.orphan) && world.one_in(4) {
            let orphans: Vec<usize> = self.orphans(world).map(|p| p.call).collect();
            let any = orphans[world.draw(orphans.len() as u64) as usize];
            self.land(any, 1, world);
        }
    }

    fn orphans<'a>(&'a self, world: &World) -> impl Iterator<Item = &'a Pending> + use<'a> {
        let forgotten = world.forgotten();
        self.pending
            .iter()
            .filter(move |p| p.orphan || p.forgotten < forgotten)
    }

    /// Settles every abandoned mutation: its pieces land now, or never.
    pub(super) fn settle(&mut self, world: &World) {
        let orphans: Vec<(usize, bool)> = self.orphans(world).map(|p| (p.call, p.orphan)).collect();
        for (call, orphan) in orphans {
            // One that may have been forgotten may also still be alive: it must have its whole effect.
            let pieces = match orphan && world.one_in(2) {
                true => world.draw(3) as usize,
                false => usize::MAX,
            };
            self.land(call, pieces, world);
            if orphan {
                self.pending.retain(|p| p.call != call);
            }
        }
    }

    pub(super) fn now(&self) -> u64 {
        self.seq
    }

    /// Makes durable what had completed, or had been read, when a flush began at `since`.
    pub(super) fn flush(&mut self, since: u64) {
        let completed = std::mem::take(&mut self.completed);
        self.commit(|version| completed[version.call].min(version.seen) <= since);
        self.completed = completed;
    }

    /// A flush failed, and the disk drops what it should have written: it reads back, but is never durable.
    pub(super) fn lose(&mut self, since: u64) {
        for unit in &mut self.units {
            for version in &mut unit.versions {
                version.lost |= self.completed[version.call] <= since;
            }
        }
    }

    fn commit(&mut self, covered: impl Fn(&Version) -> bool) {
        let covered = |version: &Version| !version.lost && covered(version);
        let mut upto = 0;
        if self.level == CrashLevel::Prefix {
            let all = self.units.iter().flat_map(|unit| &unit.versions);
            upto = all.filter(|v| covered(v)).map(|v| v.seq).max().unwrap_or(0);
        }
        for unit in &mut self.units {
            let last = unit
                .versions
                .iter()
                .rposition(|v| covered(v) || v.seq <= upto);
            if let Some(last) = last {
                unit.durable = unit.versions[last].bytes.clone();
                unit.versions.drain(..=last);
            }
        }
    }

    fn apply(&mut self, call: usize, piece: Piece) {
        let bytes = self.merged(&piece);
        self.seq += 1;
        self.units[piece.unit].versions.push(Version {
            call,
            seq: self.seq,
            lost: false,
            seen: u64::MAX,
            bytes,
        });
    }

    /// The unit's bytes with the piece over them.
    fn merged(&self, piece: &Piece) -> Bytes {
        let start = piece.unit as u64 * self.unit as u64;
        let whole = (self.size - start).min(self.unit as u64) as usize;
        match &piece.bytes {
            Bytes::Data(data) if data.len() == self.unit => Bytes::Data(data.clone()),
            bytes if piece.at == 0 && piece.len >= whole && !matches!(bytes, Bytes::Data(_)) => {
                bytes.clone()
            }
            bytes => {
                let mut all = vec![0; self.unit];
                self.current(piece.unit).copy_to(0, &mut all);
                bytes.copy_to(0, &mut all[piece.at..piece.at + piece.len]);
                Bytes::Data(all.into())
            }
        }
    }

    fn current(&self, unit: usize) -> &Bytes {
        let unit = &self.units[unit];
        unit.versions.last().map_or(&unit.durable, |v| &v.bytes)
    }

    /// Copies the current bytes from `offset`, which lie in one unit, to `to`. With `torn`, a mutation in flight
    /// may show in part.
    pub(super) fn read(&mut self, offset: u64, to: &mut [u8], torn: Option<&World>) {
        let unit = (offset / self.unit as u64) as usize;
        let at = (offset % self.unit as u64) as usize;
        self.look(unit).copy_to(at, to);
        let Some(world) = torn else { return };
        let mut whole = vec![0; self.unit];
        self.current(unit).copy_to(0, &mut whole);
        let mut torn = false;
        let flying = self.pending.iter_mut().flat_map(|p| &mut p.pieces);
        for piece in flying.filter(|piece| piece.unit == unit) {
            if piece.shown.is_none() && piece.len > 2 * SPLINTER && world.one_in(4) {
                let start = world.draw((piece.len - SPLINTER) as u64) as usize;
                piece.shown = Some((start, start + SPLINTER));
            }
            // Once a byte was seen it is there.
            if let Some((start, end)) = piece.shown {
                let bytes = &mut whole[piece.at + start..piece.at + end];
                match &piece.bytes {
                    Bytes::Data(data) => bytes.copy_from_slice(&data[start..end]),
                    Bytes::Hole | Bytes::Zero => bytes.fill(0),
                }
                torn = true;
            }
        }
        if torn {
            to.copy_from_slice(&whole[at..at + to.len()]);
        }
    }

    /// What is there, for nobody to see.
    pub(super) fn peek(&self, offset: u64, mut to: &mut [u8]) {
        let mut at = (offset % self.unit as u64) as usize;
        for unit in (offset / self.unit as u64) as usize.. {
            let len = to.len().min(self.unit - at);
            if len == 0 {
                break;
            }
            let (piece, rest) = to.split_at_mut(len);
            self.current(unit).copy_to(at, piece);
            (to, at) = (rest, 0);
        }
    }

    /// The unit's current bytes, which someone now has seen.
    pub(super) fn look(&mut self, unit: usize) -> &Bytes {
        self.seq += 1;
        let now = self.seq;
        if let Some(version) = self.units[unit].versions.last_mut() {
            version.seen = version.seen.min(now);
        }
        self.current(unit)
    }

    /// How many bytes have space allocated.
    pub(super) fn allocated(&self) -> u64 {
        let units = 0..self.units.len();
        let held = units.filter(|&unit| !matches!(self.current(unit), Bytes::Hole));
        held.count() as u64 * self.unit as u64
    }

    /// For each unit with more than one, how many versions a crash may choose from.
    pub(super) fn tails(&self) -> Vec<Tail> {
        let mut tails = Vec::new();
        for (unit, state) in self.units.iter().enumerate() {
            let versions = 1 + state.versions.len() + self.flying(unit).count();
            if versions > 1 {
                tails.push(Tail { unit, versions });
            }
        }
        tails
    }

    fn flying(&self, unit: usize) -> impl Iterator<Item = &Piece> {
        let pieces = self.pending.iter().flat_map(|p| &p.pieces);
        pieces.filter(move |piece| piece.unit == unit)
    }

    /// What a machine crash leaves.
    pub(super) fn crash(&self, keep: Keep, world: &World) -> Self {
        let keep = match (self.level, keep) {
            (CrashLevel::None, _) => return self.like(|_| Bytes::Hole),
            (CrashLevel::Prefix, Keep::Subset | Keep::Torn) => Keep::Prefix,
            (CrashLevel::Prefix, Keep::Image(n)) => {
                return self.prefix(n.min(self.seq), false, world);
            }
            (_, keep) => keep,
        };
        match keep {
            Keep::Nothing => self.like(|unit| self.units[unit].durable.clone()),
            Keep::Everything => self.like(|unit| match self.flying(unit).last() {
                Some(piece) => self.merged(piece),
                None => self.current(unit).clone(),
            }),
            Keep::Subset => self.like(|unit| {
                let options = 1 + self.units[unit].versions.len() + self.flying(unit).count();
                self.option(unit, world.draw(options as u64) as usize)
            }),
            Keep::Prefix => self.prefix(self.any_moment(world), false, world),
            Keep::Torn => self.prefix(self.any_moment(world), true, world),
            Keep::Image(mut number) => {
                let mut choice = vec![0; self.units.len()];
                for tail in self.tails() {
                    choice[tail.unit] = (number % tail.versions as u64) as usize;
                    number /= tail.versions as u64;
                }
                self.like(|unit| self.option(unit, choice[unit]))
            }
        }
    }

    fn any_moment(&self, world: &World) -> u64 {
        let versions = self.units.iter().flat_map(|unit| &unit.versions);
        let first = versions.map(|v| v.seq).min().unwrap_or(self.seq);
        first.saturating_sub(1) + world.draw(self.seq - first.min(self.seq) + 2)
    }

    fn prefix(&self, upto: u64, torn: bool, world: &World) -> Self {
        let versions = self.units.iter().flat_map(|unit| &unit.versions);
        let last = versions.filter(|v| v.seq <= upto).max_by_key(|v| v.seq);
        let torn = last.filter(|_| torn).map(|v| v.call);
        self.like(|unit| {
            let state = &self.units[unit];
            let keep = |v: &&Version| v.seq <= upto && (Some(v.call) != torn || world.one_in(2));
            match state.versions.iter().rev().find(keep) {
                Some(version) => version.bytes.clone(),
                None => state.durable.clone(),
            }
        })
    }

    fn option(&self, unit: usize, option: usize) -> Bytes {
        let state = &self.units[unit];
        match option.checked_sub(1) {
            None => state.durable.clone(),
            Some(n) if n < state.versions.len() => state.versions[n].bytes.clone(),
            Some(n) => match self.flying(unit).nth(n - state.versions.len()) {
                Some(piece) => self.merged(piece),
                None => self.current(unit).clone(),
            },
        }
    }

    fn like(&self, mut durable: impl FnMut(usize) -> Bytes) -> Self {
        let units = 0..self.units.len();
        let unit = |unit| Unit {
            durable: durable(unit),
            versions: Vec::new(),
        };
        Store {
            units: units.map(unit).collect(),
            pending: Vec::new(),
            completed: Vec::new(),
            ..*self
        }
    }

    /// What a process that was killed leaves: all that landed, any part of what was in flight, and still not durable.
    pub(super) fn kill(&self, world: &World) -> Self {
        let mut next = Store {
            units: self.units.clone(),
            completed: self.completed.clone(),
            pending: Vec::new(),
            ..*self
        };
        for pending in &self.pending {
            for piece in &pending.pieces {
                if world.one_in(2) {
                    next.apply(pending.call, piece.clone());
                }
            }
        }
        next
    }
}
