//! What a disk is and what it promises: its size, the limits of its requests,
//! and the claims from which every transport derives what it advertises.

use crate::Engine;

/// A disk's size, request limits and claims. All lengths are bytes.
///
/// There is no `new`: whoever makes a writable disk says what survives a crash.
/// Build one with [`read_only`](Self::read_only) or [`writable`](Self::writable)
/// and set the fields that differ:
///
/// ```
/// use userland_io::{CrashLevel, Discard, Features, Geometry};
///
/// let mut geometry = Geometry::writable(1 << 30, CrashLevel::Flush);
/// geometry.logical_block_size = 512;
/// geometry.discard = Discard::Zeroes;
/// geometry.features |= Features::FUA;
/// ```
///
/// Only `size` may change while a disk is open.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// The disk's length, at most [`MAX_SIZE`](Self::MAX_SIZE). Need not be a multiple of a block.
    pub size: u64,
    /// The unit of addressing: no smaller write reaches the engine, and none tears inside one.
    /// A power of two up to [`MAX_LOGICAL_BLOCK`](Self::MAX_LOGICAL_BLOCK); 1 (the default) for what is byte-addressed.
    pub logical_block_size: u32,
    /// The unit that the medium writes without reading first; at least the logical block.
    /// 0 (the default): the logical block.
    pub physical_block_size: u32,
    /// The smallest request that is efficient; 0 (the default): no preference.
    pub io_min: u32,
    /// The best request length; 0 (the default): no preference.
    pub io_opt: u32,
    /// The longest read or write; 0 (the default): no limit. The edge splits what is longer.
    pub max_transfer: u32,
    /// What the addresses of buffers are best aligned to, a power of two; 1 (the default) unless
    /// I/O is direct. A hint: an engine copes with any buffer.
    pub memory_alignment: u32,
    /// Discards act on whole, aligned granules of this length; 0 (the default): the logical block.
    pub discard_granularity: u32,
    /// The longest discard; 0 (the default): no limit.
    pub max_discard: u32,
    /// The longest `write_zeroes`; 0 (the default): no limit.
    pub max_write_zeroes: u32,
    /// An aligned unit of this length, of one request, is all there or not at all after a crash: a power of two, no longer than the
    /// longest transfer and `write_zeroes`. The edge splits no unit. 0 (the default): one logical block.
    pub atomic_write_unit: u32,
    /// What the engine can do and claims.
    pub features: Features,
    /// What a discarded range reads as.
    pub discard: Discard,
    /// What survives when the machine stops.
    pub crash: CrashLevel,
}

bitflags::bitflags! {
    /// What an engine can do and claims. None is set by default.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u32 {
        /// No mutation is accepted.
        const READ_ONLY = 1 << 0;
        /// Completed writes may sit in a cache that a crash empties. Implied by
        /// [`CrashLevel::Flush`] and [`CrashLevel::Prefix`]; see [`Geometry::needs_flush`].
        const VOLATILE_CACHE = 1 << 1;
        /// `write` and `write_zeroes` honour [`WriteFlags::FUA`]; else the edge flushes after them.
        const FUA = 1 << 2;
        /// `write_zeroes` is implemented; else the edge writes zeroes.
        const WRITE_ZEROES = 1 << 3;
        /// `extents` is implemented; else everything is data.
        const EXTENTS = 1 << 4;
        /// Seeking costs: a spinning disk.
        const ROTATIONAL = 1 << 5;
        /// A read beside a write in flight sees each block whole, old or new.
        const ATOMIC_READS = 1 << 6;
        /// After the process alone dies, every completed mutation is still there.
        const SURVIVES_KILL = 1 << 7;
    }
}

bitflags::bitflags! {
    /// How a `write` or `write_zeroes` is to be done.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct WriteFlags: u32 {
        /// Durable when it answers (force unit access).
        const FUA = 1 << 0;
        /// `write_zeroes`: keep the space allocated.
        const NO_UNMAP = 1 << 1;
        /// `write_zeroes`: answer `Unsupported` at once rather than write zeroes out.
        const FAST_ONLY = 1 << 2;
    }
}

/// What a discarded range reads as until it is written again. Ordered, weakest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Discard {
    /// There is no discard.
    None,
    /// Old content, zeroes or noise, but always the same; never another disk's bytes, nor those of a layer below.
    Unspecified,
    /// Each block its old content or zeroes.
    OldOrZero,
    /// Zeroes.
    Zeroes,
}

/// What is there after the machine stopped and the disk was opened again. Ordered, weakest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CrashLevel {
    /// Nothing survives.
    None,
    /// What a flush covered survives; each other block may be old or new on its own.
    Flush,
    /// As [`Flush`](Self::Flush), and what survives is a prefix of the history.
    Prefix,
    /// Every mutation that answered survives.
    Sync,
}

/// A [`Geometry`] that contradicts itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("geometry: {field} is {value}, but {rule}")]
pub struct InvalidGeometry {
    field: &'static str,
    value: u64,
    rule: &'static str,
}

impl From<InvalidGeometry> for crate::Error {
    fn from(error: InvalidGeometry) -> Self {
        crate::Error::new(crate::ErrorKind::Invalid, error)
    }
}

impl Geometry {
    /// The largest disk, in bytes: offsets fit an `off_t`.
    pub const MAX_SIZE: u64 = i64::MAX as u64;
    /// The largest logical block, in bytes: what NBD allows as minimum block size (proto.md, Block size constraints).
    pub const MAX_LOGICAL_BLOCK: u32 = 64 << 10;
    /// The largest physical block and memory alignment, in bytes.
    const MAX_ALIGNMENT: u32 = 1 << 20;
    /// The longest atomic unit that may be claimed, in bytes.
    pub(crate) const MAX_ATOMIC_WRITE: u32 = 256 << 10;

    /// A disk that accepts no mutation.
    pub const fn read_only(size: u64) -> Self {
        // What cannot change is as durable as it will ever be.
        let mut geometry = Geometry::writable(size, CrashLevel::Sync);
        geometry.features = Features::READ_ONLY;
        geometry
    }

    /// A disk that accepts mutations, of which `crash` says what survives.
    pub const fn writable(size: u64, crash: CrashLevel) -> Self {
        Geometry {
            size,
            logical_block_size: 1,
            physical_block_size: 0,
            io_min: 0,
            io_opt: 0,
            max_transfer: 0,
            memory_alignment: 1,
            discard_granularity: 0,
            max_discard: 0,
            max_write_zeroes: 0,
            atomic_write_unit: 0,
            features: match crash {
                CrashLevel::Flush | CrashLevel::Prefix => Features::VOLATILE_CACHE,
                CrashLevel::None | CrashLevel::Sync => Features::empty(),
            },
            discard: Discard::None,
            crash,
        }
    }

    /// True if no mutation is accepted.
    pub const fn is_read_only(&self) -> bool {
        self.features.contains(Features::READ_ONLY)
    }

    /// True if `flush` has something to do: completed writes may not be durable yet.
    /// Transports advertise a volatile write cache exactly then.
    pub const fn needs_flush(&self) -> bool {
        if self.is_read_only() {
            return false;
        }
        match self.crash {
            CrashLevel::Flush | CrashLevel::Prefix => true,
            CrashLevel::None | CrashLevel::Sync => self.features.contains(Features::VOLATILE_CACHE),
        }
    }

    /// The physical block size in bytes, with the default filled in.
    pub fn physical_block(&self) -> u32 {
        self.physical_block_size.max(self.logical_block_size)
    }

    /// The discard granule in bytes, with the default filled in.
    pub fn discard_granule(&self) -> u32 {
        self.discard_granularity.max(self.logical_block_size)
    }

    /// The same disk, accepting no mutation.
    pub const fn into_read_only(mut self) -> Self {
        self.features = self.features.union(Features::READ_ONLY);
        self.discard = Discard::None;
        self
    }

    /// What a disk that rests on both `self` and `lower` can promise. The size is `self`'s.
    ///
    /// Block sizes and alignments: the larger. Limits: the smaller that is one.
    /// `io_opt`, `discard_granularity`: the least common multiple. `READ_ONLY`,
    /// `VOLATILE_CACHE`, `ROTATIONAL`, and `EXTENTS`, `WRITE_ZEROES` (which the edge
    /// emulates): if either. `FUA`, `SURVIVES_KILL`, `ATOMIC_READS`: if both.
    /// Crash level and discard: the weaker. Atomic unit: the smaller.
    pub fn stack(self, lower: &Geometry) -> Geometry {
        let either = Features::READ_ONLY
            | Features::VOLATILE_CACHE
            | Features::ROTATIONAL
            | Features::EXTENTS
            | Features::WRITE_ZEROES;
        let any = (self.features | lower.features) & either;
        let both = (self.features & lower.features) - either;
        let granularity = lcm(self.discard_granularity, lower.discard_granularity);
        let max_transfer = smaller_limit(self.max_transfer, lower.max_transfer);
        let max_write_zeroes = smaller_limit(self.max_write_zeroes, lower.max_write_zeroes);
        // Of two powers of two the smaller divides the other. One that a limit would split is given up.
        let unit = self.atomic_write_unit.min(lower.atomic_write_unit);
        let fits = |limit: u32| limit == 0 || unit <= limit;
        let atomic_write_unit = match fits(max_transfer) && fits(max_write_zeroes) {
            true => unit,
            false => 0,
        };
        Geometry {
            size: self.size,
            logical_block_size: self.logical_block_size.max(lower.logical_block_size),
            physical_block_size: self.physical_block_size.max(lower.physical_block_size),
            io_min: self.io_min.max(lower.io_min),
            io_opt: lcm(self.io_opt, lower.io_opt).unwrap_or(0),
            max_transfer,
            memory_alignment: self.memory_alignment.max(lower.memory_alignment),
            discard_granularity: granularity.unwrap_or(0),
            max_discard: smaller_limit(self.max_discard, lower.max_discard),
            max_write_zeroes,
            atomic_write_unit,
            features: any | both,
            // Granules without a common multiple below 4 GiB: nothing can be discarded whole.
            discard: match granularity {
                Some(_) => self.discard.min(lower.discard),
                None => Discard::None,
            },
            crash: self.crash.min(lower.crash),
        }
    }

    /// Refuses a geometry that contradicts itself, naming the field and the rule.
    pub fn validate(&self) -> Result<(), InvalidGeometry> {
        let block = u64::from(self.logical_block_size);
        let power = |v: u64| v.is_power_of_two();
        let blocks = |v: u64| block != 0 && v.is_multiple_of(block);
        let max = u64::from(Self::MAX_ALIGNMENT);
        let check = |field, value: u64, ok: bool, rule| match ok {
            true => Ok(()),
            false => Err(InvalidGeometry { field, value, rule }),
        };
        check(
            "size",
            self.size,
            self.size <= Self::MAX_SIZE,
            "no disk is longer than 2^63 - 1 bytes",
        )?;
        check(
            "logical_block_size",
            block,
            power(block) && block <= u64::from(Self::MAX_LOGICAL_BLOCK),
            "it must be a power of two up to 64 KiB",
        )?;
        let physical = u64::from(self.physical_block_size);
        check(
            "physical_block_size",
            physical,
            physical == 0 || (power(physical) && physical >= block && physical <= max),
            "it must be 0, or a power of two from the logical block size up to 1 MiB",
        )?;
        let alignment = u64::from(self.memory_alignment);
        check(
            "memory_alignment",
            alignment,
            power(alignment) && alignment <= max,
            "it must be a power of two up to 1 MiB",
        )?;
        for (field, value) in [
            ("io_min", self.io_min),
            ("io_opt", self.io_opt),
            ("max_transfer", self.max_transfer),
            ("discard_granularity", self.discard_granularity),
            ("max_write_zeroes", self.max_write_zeroes),
        ] {
            let value = u64::from(value);
            check(
                field,
                value,
                blocks(value),
                "it must be 0 or a multiple of the logical block size",
            )?;
        }
        let unit = u64::from(self.atomic_write_unit);
        check(
            "atomic_write_unit",
            unit,
            unit == 0
                || (power(unit) && unit >= block && unit <= u64::from(Self::MAX_ATOMIC_WRITE)),
            "it must be 0, or a power of two from the logical block size up to 256 KiB",
        )?;
        for (field, value) in [
            ("max_transfer", self.max_transfer),
            ("max_write_zeroes", self.max_write_zeroes),
        ] {
            let value = u64::from(value);
            check(
                field,
                value,
                value == 0 || value >= unit,
                "it must be 0, or no shorter than atomic_write_unit",
            )?;
        }
        let max_discard = u64::from(self.max_discard);
        check(
            "max_discard",
            max_discard,
            max_discard.is_multiple_of(u64::from(self.discard_granule())),
            "it must be 0 or a multiple of the discard granularity",
        )?;
        check(
            "crash",
            self.crash as u64,
            !(self.crash == CrashLevel::Sync && self.features.contains(Features::VOLATILE_CACHE)),
            "a disk that keeps every answered write (Sync) has no VOLATILE_CACHE",
        )?;
        check(
            "discard",
            self.discard as u64,
            !self.is_read_only() || self.discard == Discard::None,
            "a read-only disk has no discard",
        )
    }
}

/// The larger of two limits that are both kept: 0 means none.
fn smaller_limit(a: u32, b: u32) -> u32 {
    match (a, b) {
        (0, limit) | (limit, 0) => limit,
        (a, b) => a.min(b),
    }
}

/// The least common multiple, where 0 stands for no wish; `None` above `u32::MAX`.
fn lcm(a: u32, b: u32) -> Option<u32> {
    if a == 0 || b == 0 {
        return Some(a.max(b));
    }
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    (a / x).checked_mul(b)
}

/// Resolves once `engine`'s own geometry differs from `seen`, for a layer over `lower`.
///
/// A layer must not hand its own `seen` down: the engine below compares it with
/// *its* geometry, and would answer at once, or never. This waits for each change
/// below until it shows above.
pub async fn changed_through<E: Engine, L: Engine>(
    engine: &E,
    lower: &L,
    seen: Geometry,
) -> Geometry {
    loop {
        // The lower geometry first: a change between the two look-ups is then seen by one of them.
        let below = lower.geometry();
        let own = engine.geometry();
        if own != seen {
            return own;
        }
        lower.changed(below).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flush() -> Geometry {
        Geometry::writable(1000, CrashLevel::Flush)
    }

    #[test]
    fn stacking_follows_the_table() {
        type Set = fn(&mut Geometry, u32);
        type Get = fn(&Geometry) -> u32;
        macro_rules! field {
            ($name:ident) => {
                (|g, v| g.$name = v, |g| g.$name)
            };
        }
        type Rows<'a> = &'a [(u32, u32, u32)];
        // upper, lower, together
        let larger = [(1, 4096, 4096), (4096, 512, 4096)];
        let lower_limit = [(0, 8, 8), (8, 0, 8), (8, 4, 4), (0, 0, 0)];
        let multiple = [(0, 8, 8), (8, 12, 24), (0, 0, 0)];
        let least = [(0, 8, 0), (16, 8, 8)];
        let table: [((Set, Get), Rows<'_>); 10] = [
            (field!(logical_block_size), &larger),
            (field!(physical_block_size), &larger),
            (field!(io_min), &larger),
            (field!(memory_alignment), &larger),
            (field!(max_transfer), &lower_limit),
            (field!(max_discard), &lower_limit),
            (field!(max_write_zeroes), &lower_limit),
            (field!(io_opt), &multiple),
            (field!(discard_granularity), &multiple),
            (field!(atomic_write_unit), &least),
        ];
        for ((set, get), rows) in table {
            for &(upper, lower, together) in rows {
                let (mut a, mut b) = (flush(), flush());
                set(&mut a, upper);
                set(&mut b, lower);
                assert_eq!(get(&a.stack(&b)), together, "{upper} over {lower}");
            }
        }
    }

    #[test]
    fn stacking_combines_claims() {
        let either = Features::READ_ONLY
            | Features::VOLATILE_CACHE
            | Features::ROTATIONAL
            | Features::EXTENTS
            | Features::WRITE_ZEROES;
        for flag in Features::all().iter() {
            let (mut with, mut without) = (flush(), flush());
            with.features = flag;
            without.features = Features::empty();
            let expected = match either.contains(flag) {
                true => flag,
                false => Features::empty(),
            };
            assert_eq!(with.stack(&without).features, expected, "{flag:?}");
            assert_eq!(without.stack(&with).features, expected, "{flag:?}");
            assert_eq!(with.stack(&with).features, flag, "{flag:?}");
        }
        let (mut a, mut b) = (flush(), Geometry::writable(7, CrashLevel::None));
        a.discard = Discard::Zeroes;
        b.discard = Discard::OldOrZero;
        let stacked = a.stack(&b);
        assert_eq!(
            (stacked.crash, stacked.discard, stacked.size),
            (CrashLevel::None, Discard::OldOrZero, 1000)
        );
    }

    #[test]
    fn an_atomic_unit_that_a_limit_would_split_is_given_up() {
        let (mut a, mut b) = (flush(), flush());
        (a.atomic_write_unit, b.atomic_write_unit) = (16 << 10, 8192);
        assert_eq!(a.stack(&b).atomic_write_unit, 8192);
        a.max_transfer = 8192;
        b.max_write_zeroes = 8192;
        assert_eq!(a.stack(&b).atomic_write_unit, 8192);
        b.max_write_zeroes = 4096;
        assert_eq!(a.stack(&b).atomic_write_unit, 0);
        (a.max_transfer, b.max_write_zeroes) = (4096, 0);
        assert_eq!(b.stack(&a).atomic_write_unit, 0);
    }

    #[test]
    fn granules_without_a_common_multiple_discard_nothing() {
        let (mut a, mut b) = (flush(), flush());
        (a.discard, b.discard) = (Discard::Zeroes, Discard::Zeroes);
        (a.discard_granularity, b.discard_granularity) = (u32::MAX, u32::MAX - 1);
        let stacked = a.stack(&b);
        assert_eq!(
            (stacked.discard, stacked.discard_granularity),
            (Discard::None, 0)
        );
    }

    #[test]
    fn what_a_flush_is_for_follows_from_the_claims() {
        let mut cached = Geometry::writable(1, CrashLevel::None);
        cached.features |= Features::VOLATILE_CACHE;
        for (geometry, needs) in [
            (flush(), true),
            (Geometry::writable(1, CrashLevel::Prefix), true),
            (Geometry::writable(1, CrashLevel::Sync), false),
            (Geometry::writable(1, CrashLevel::None), false),
            (cached, true),
            (flush().into_read_only(), false),
        ] {
            assert_eq!(geometry.needs_flush(), needs, "{geometry:?}");
        }
        // Forgetting the flag does not hide the cache.
        let mut forgot = flush();
        forgot.features = Features::empty();
        assert!(forgot.needs_flush());
    }

    #[test]
    fn contradictions_are_named() {
        type Spoil = fn(&mut Geometry);
        let cases: [(&str, Spoil); 13] = [
            ("size", |g| g.size = 1 << 63),
            ("logical_block_size", |g| g.logical_block_size = 0),
            ("logical_block_size", |g| g.logical_block_size = 3),
            ("physical_block_size", |g| {
                (g.logical_block_size, g.physical_block_size) = (4096, 512)
            }),
            ("memory_alignment", |g| g.memory_alignment = 0),
            ("max_transfer", |g| {
                (g.logical_block_size, g.max_transfer) = (512, 1000)
            }),
            ("atomic_write_unit", |g| g.atomic_write_unit = 12 << 10),
            ("atomic_write_unit", |g| g.atomic_write_unit = 512 << 10),
            ("max_transfer", |g| {
                (g.atomic_write_unit, g.max_transfer) = (8192, 4096)
            }),
            ("max_write_zeroes", |g| {
                (g.atomic_write_unit, g.max_write_zeroes) = (8192, 4096)
            }),
            ("max_discard", |g| {
                (g.discard_granularity, g.max_discard) = (4096, 512)
            }),
            ("crash", |g| {
                g.crash = CrashLevel::Sync;
                g.features = Features::VOLATILE_CACHE
            }),
            ("discard", |g| {
                g.features |= Features::READ_ONLY;
                g.discard = Discard::Zeroes
            }),
        ];
        for (field, spoil) in cases {
            let mut geometry = flush();
            spoil(&mut geometry);
            let error = geometry.validate().unwrap_err();
            assert_eq!(error.field, field);
        }
        assert_eq!(flush().validate(), Ok(()));
        assert_eq!(Geometry::read_only(0).validate(), Ok(()));
    }
}
