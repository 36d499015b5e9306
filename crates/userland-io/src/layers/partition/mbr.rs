//! The DOS partition table: four entries in the first sector, and a chain of
//! sectors with one logical partition each in an extended one.

use super::{PartitionTable, Source, TableKind, u32_at};
use crate::{Engine, Result};

/// The bytes of a table's sector, whatever the disk's blocks are.
pub(super) const SECTOR: usize = 512;

/// How many sectors a chain of logical partitions may have.
const MAX_CHAIN: usize = 256;

const ENTRIES: usize = 446;
const ENTRY: usize = 16;
const SIGNATURE: [u8; 2] = [0x55, 0xaa];
const PROTECTIVE: u8 = 0xee;
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// The table of one sector.
pub(super) struct Sector([Entry; 4]);

#[derive(Clone, Copy)]
struct Entry {
    kind: u8,
    first: u32,
    blocks: u32,
}

impl Entry {
    fn is_used(self) -> bool {
        self.kind != 0 && self.blocks != 0
    }

    fn is_extended(self) -> bool {
        self.is_used() && EXTENDED.contains(&self.kind)
    }
}

impl Sector {
    /// `None` if the sector holds no table: no signature, or entries that cannot be any (a boot sector of a file system).
    pub(super) fn parse(sector: &[u8]) -> Option<Self> {
        if sector.get(510..512)? != SIGNATURE {
            return None;
        }
        let entry = |n: usize| {
            let bytes = sector.get(ENTRIES + n * ENTRY..)?.get(..ENTRY)?;
            let is_boot_flag = matches!(bytes.first()?, 0 | 0x80);
            is_boot_flag.then_some(Entry {
                kind: *bytes.get(4)?,
                first: u32_at(bytes, 8)?,
                blocks: u32_at(bytes, 12)?,
            })
        };
        Some(Sector([entry(0)?, entry(1)?, entry(2)?, entry(3)?]))
    }

    /// True if it only says that the real table is a GPT.
    pub(super) fn is_protective(&self) -> bool {
        self.0.iter().any(|entry| entry.kind == PROTECTIVE)
    }
}

pub(super) async fn read<E: Engine>(
    source: &Source<'_, E>,
    sector: Sector,
) -> Result<PartitionTable> {
    // Nothing in the table says what it counts in: the disk's own blocks, as it was written on them.
    let block = source.block_sizes().next().unwrap_or(SECTOR as u64);
    let mut table = PartitionTable::new(TableKind::Mbr);
    for (number, entry) in (1..).zip(sector.0) {
        if entry.is_used() {
            table.add(
                number,
                entry.first.into(),
                entry.blocks.into(),
                block,
                source.size,
            );
        }
    }
    let mut number = 5;
    for extended in sector.0.into_iter().filter(|entry| entry.is_extended()) {
        let base = u64::from(extended.first);
        let mut at = base;
        for hop in 1.. {
            // Below 2^33 blocks of at most 4096 bytes: no overflow.
            let place = at * block;
            let found = source.bytes(place, SECTOR).await?;
            let Some(Sector([logical, next, ..])) = found.as_deref().and_then(Sector::parse) else {
                table.damage = Some(format!(
                    "the chain of logical partitions breaks off at byte {place}"
                ));
                break;
            };
            if logical.is_used() && !logical.is_extended() {
                let first = at + u64::from(logical.first);
                table.add(number, first, logical.blocks.into(), block, source.size);
                number += 1;
            }
            if !next.is_extended() {
                break;
            }
            let next = base + u64::from(next.first);
            // Every tool writes the chain upwards; one that turns back has no end.
            if next <= at || hop == MAX_CHAIN {
                table.damage = Some(format!(
                    "the chain of logical partitions turns back, or has no end, at byte {place}"
                ));
                break;
            }
            at = next;
        }
    }
    Ok(table)
}
