//! One operation after the other, against an array of bytes.

use std::ops::Range;

use userland_io::{Checked, Discard, Engine, ErrorKind, Geometry, Result, WriteBuf, WriteFlags};

use super::{broken, finish, must, opened, read};
use crate::check::Verdict;

/// How many operations a window gets.
const STEPS: u32 = 300;

/// Operations of every kind and length, at both ends of the disk and across every boundary, have exactly the effect that
/// they should on an array of bytes.
///
/// # Errors
/// The first byte that is not as it should be, and the operations before.
pub async fn every_operation_reaches_its_bytes<E: Engine>(
    open: impl AsyncFn() -> Result<E>,
) -> Result<(), Verdict> {
    let disk = opened(&open).await?;
    let geometry = disk.geometry();
    let block = u64::from(geometry.logical_block_size.max(geometry.discard_granule()));
    // Some blocks, and some more than a request may be long.
    let window = (block * 8).max(16 << 10).max(
        u64::from(geometry.max_transfer)
            .saturating_mul(2)
            .min(4 << 20),
    );
    let ends = [
        0..window.min(geometry.size),
        geometry.size - window.min(geometry.size)..geometry.size,
    ];
    for (seed, window) in ends.into_iter().enumerate() {
        if !window.is_empty() {
            walk(&disk, geometry, window, seed as u64).await?;
        }
    }
    finish(disk).await
}

struct Walk<'a, E> {
    disk: &'a Checked<E>,
    geometry: Geometry,
    window: Range<u64>,
    model: Vec<u8>,
    log: Vec<String>,
}

async fn walk<E: Engine>(
    disk: &Checked<E>,
    geometry: Geometry,
    window: Range<u64>,
    seed: u64,
) -> Result<(), Verdict> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let len = (window.end - window.start) as usize;
    let mut walk = Walk {
        model: read(disk, window.start, len).await?,
        disk,
        geometry,
        window,
        log: Vec::new(),
    };
    for _ in 0..STEPS {
        let range = walk.any_range(&mut rng);
        match rng.u8(..10) {
            0..5 if !geometry.is_read_only() => walk.write(range, &mut rng).await?,
            5..7 if !geometry.is_read_only() => walk.zeroes(range, &mut rng).await?,
            7 if geometry.discard != Discard::None => walk.discard(range).await?,
            8 => must("a flush", disk.flush().await)?,
            _ => walk.compare(range).await?,
        }
        if rng.u8(..10) == 0 {
            walk.compare(walk.window.clone()).await?;
        }
    }
    walk.compare(walk.window.clone()).await
}

impl<E: Engine> Walk<'_, E> {
    /// Often along the blocks, often to the window's end, often a few bytes.
    fn any_range(&self, rng: &mut fastrand::Rng) -> Range<u64> {
        let Range { start, end } = self.window;
        let block = u64::from(self.geometry.logical_block_size);
        let mut at = rng.u64(start..end);
        let mut to = match rng.u8(..4) {
            0 => end,
            1 => rng.u64(at..=end),
            2 => at + rng.u64(1..20),
            _ => at + block * rng.u64(1..4),
        };
        if rng.bool() {
            at = (at / block * block).max(start);
            to = to.next_multiple_of(block);
        }
        at..to.clamp(at, end)
    }

    fn inside(&self, range: &Range<u64>) -> Range<usize> {
        (range.start - self.window.start) as usize..(range.end - self.window.start) as usize
    }

    async fn write(&mut self, range: Range<u64>, rng: &mut fastrand::Rng) -> Result<(), Verdict> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        rng.fill(&mut bytes);
        let flags = match rng.bool() {
            true => WriteFlags::FUA,
            false => WriteFlags::empty(),
        };
        self.log.push(format!("write {range:?}{}", names(flags)));
        let buf = WriteBuf::new(&bytes);
        let result = self.disk.write(&buf, range.start, flags).await;
        must(&format!("a write of {range:?}"), result)?;
        let inside = self.inside(&range);
        self.model[inside].copy_from_slice(&bytes);
        self.compare(self.around(&range)).await
    }

    async fn zeroes(&mut self, range: Range<u64>, rng: &mut fastrand::Rng) -> Result<(), Verdict> {
        let mut flags = WriteFlags::empty();
        for flag in [WriteFlags::FUA, WriteFlags::NO_UNMAP, WriteFlags::FAST_ONLY] {
            flags.set(flag, rng.u8(..3) == 0);
        }
        let request = format!("write_zeroes {range:?}{}", names(flags));
        self.log.push(request.clone());
        let result = self.disk.write_zeroes(range.clone(), flags).await;
        let fast_only = flags.contains(WriteFlags::FAST_ONLY);
        match result {
            Err(error) if fast_only && error.kind() == ErrorKind::Unsupported => {}
            result => {
                must(&request, result)?;
                let inside = self.inside(&range);
                self.model[inside].fill(0);
            }
        }
        self.compare(self.around(&range)).await
    }

    async fn discard(&mut self, range: Range<u64>) -> Result<(), Verdict> {
        self.log.push(format!("discard {range:?}"));
        let result = self.disk.discard(range.clone()).await;
        must(&format!("a discard of {range:?}"), result)?;
        let granule = u64::from(self.geometry.discard_granule());
        let start = range.start.next_multiple_of(granule);
        let end = match range.end == self.geometry.size {
            true => range.end,
            false => range.end - range.end % granule,
        };
        let block = u64::from(self.geometry.logical_block_size);
        let len = end.saturating_sub(start) as usize;
        // All at once: a block may be a byte.
        let all = match len {
            0 => Vec::new(),
            _ => read(self.disk, start, len).await?,
        };
        let mut at = start;
        while at < end {
            let part = at..(at + block).min(end);
            let inside = self.inside(&part);
            let now = &all[(part.start - start) as usize..][..inside.len()];
            let zero = now.iter().all(|&byte| byte == 0);
            let legal = match self.geometry.discard {
                Discard::Zeroes => zero,
                Discard::OldOrZero => zero || *now == self.model[inside.clone()],
                _ => true,
            };
            if !legal {
                return Err(self.broken(format!(
                    "the claim is Discard::{:?}, but after discard {range:?} the bytes {part:?} are {}",
                    self.geometry.discard,
                    head(now)
                )));
            }
            // Whatever it is, it stays.
            self.model[inside].copy_from_slice(now);
            at = part.end;
        }
        self.compare(self.around(&range)).await
    }

    /// The range with a block on either side.
    fn around(&self, range: &Range<u64>) -> Range<u64> {
        let block = u64::from(self.geometry.logical_block_size);
        let start = range.start.saturating_sub(block).max(self.window.start);
        start..(range.end + block).min(self.window.end)
    }

    async fn compare(&self, range: Range<u64>) -> Result<(), Verdict> {
        let inside = self.inside(&range);
        let now = read(self.disk, range.start, inside.len()).await?;
        let should = &self.model[inside];
        match (0..now.len()).find(|&at| now[at] != should[at]) {
            None => Ok(()),
            Some(at) => Err(self.broken(format!(
                "a read of {range:?} has {} at {}, where {} should be",
                head(&now[at..]),
                range.start + at as u64,
                head(&should[at..])
            ))),
        }
    }

    fn broken(&self, what: String) -> Verdict {
        let last = self.log.len().saturating_sub(8);
        let mut verdict = broken(what);
        verdict.timeline = format!("  the last mutations: {}\n", self.log[last..].join(", "));
        verdict
    }
}

/// The flags as words, each after a space.
pub(super) fn names(flags: WriteFlags) -> String {
    let names = flags.iter_names();
    names.map(|(name, _)| format!(" {name}")).collect()
}

fn head(bytes: &[u8]) -> String {
    let head: Vec<String> = bytes.iter().take(8).map(|b| format!("{b:02x}")).collect();
    head.join(" ")
}
