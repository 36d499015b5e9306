//! Partition tables, MBR and GPT: read from a disk to find the window of one partition.
//!
//! Nothing in a table is believed: every place is checked against the disk's size,
//! chains of logical partitions end, and a damaged GPT header gives way to its
//! backup. `mbr` and `gpt` read one kind each.

mod gpt;
mod mbr;

use super::Offset;
use crate::{Checked, Engine, Error, ErrorKind, ReadBuf, Result};

/// Which kind of table it is.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TableKind {
    /// The DOS table in the first sector, with a chain of logical partitions.
    Mbr,
    /// The GUID partition table (UEFI specification, section 5.3).
    Gpt,
}

/// One partition. Where it lies is bytes, and is known to be inside the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Partition {
    /// Its number, from 1. Logical partitions of an MBR start at 5.
    pub number: u32,
    /// Its first byte.
    pub start: u64,
    /// Its length.
    pub size: u64,
}

impl Partition {
    /// The layer that shows this partition.
    pub const fn window(&self) -> Offset {
        Offset::new(self.start).size(self.size)
    }
}

/// The partitions of a disk.
///
/// ```no_run
/// use userland_io::{Checked, Layer, engines::Memory, layers::PartitionTable};
///
/// # async fn open() -> userland_io::Result {
/// let disk = Checked::new(Memory::new(1 << 30))?;
/// let first = PartitionTable::read(&disk).await?.get(1)?;
/// let partition = first.window().layer(disk)?;
/// # let _ = partition;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionTable {
    kind: TableKind,
    /// By number. An error is a partition that does not lie inside the disk.
    partitions: Vec<(u32, Result<Partition, String>)>,
    /// What was found wrong with the table, and did not keep it from being read.
    damage: Option<String>,
}

impl PartitionTable {
    /// Reads the table of `disk`.
    ///
    /// # Errors
    /// `Invalid`, if there is none or it is damaged beyond use, saying how; else what reading answered.
    pub async fn read<E: Engine>(disk: &Checked<E>) -> Result<Self> {
        let source = Source {
            disk,
            size: disk.geometry().size,
        };
        let Some(boot) = source.bytes(0, mbr::SECTOR).await? else {
            return Err(invalid("the disk is too small for a partition table"));
        };
        match mbr::Sector::parse(&boot) {
            Some(sector) if sector.is_protective() => gpt::read(&source).await,
            Some(sector) => mbr::read(&source, sector).await,
            None => Err(invalid(
                "there is no partition table on this disk (its first sector is no MBR)",
            )),
        }
    }

    /// Which kind it is.
    pub fn kind(&self) -> TableKind {
        self.kind
    }

    /// What was found wrong with the table although it could be read: a damaged primary header, say.
    pub fn damage(&self) -> Option<&str> {
        self.damage.as_deref()
    }

    /// The partitions that lie inside the disk, by number.
    pub fn iter(&self) -> impl Iterator<Item = Partition> + '_ {
        self.partitions
            .iter()
            .filter_map(|(_, p)| p.as_ref().ok().copied())
    }

    /// The partition with this number.
    ///
    /// # Errors
    /// `Invalid`, if there is none, naming those that there are.
    pub fn get(&self, number: u32) -> Result<Partition> {
        match self.partitions.iter().find(|(n, _)| *n == number) {
            Some((_, Ok(partition))) => return Ok(*partition),
            Some((_, Err(why))) => return Err(invalid(format!("partition {number} {why}"))),
            None => {}
        }
        let numbers: Vec<String> = self.partitions.iter().map(|(n, _)| n.to_string()).collect();
        let mut text = format!("there is no partition {number}");
        match numbers.len() {
            0 => text.push_str("; the table is empty"),
            1 => text.push_str(&format!("; the only one is {}", numbers[0])),
            _ => text.push_str(&format!("; there are {}", numbers.join(", "))),
        }
        if let Some(damage) = &self.damage {
            text.push_str(&format!(" ({damage})"));
        }
        Err(invalid(text))
    }

    fn new(kind: TableKind) -> Self {
        PartitionTable {
            kind,
            partitions: Vec::new(),
            damage: None,
        }
    }

    /// Adds what a table says: blocks of `block` bytes from the block `first` on.
    fn add(&mut self, number: u32, first: u64, blocks: u64, block: u64, disk: u64) {
        let place = || {
            let start = first.checked_mul(block)?;
            let size = blocks.checked_mul(block)?;
            let end = start.checked_add(size)?;
            (size > 0 && end <= disk).then_some(Partition {
                number,
                start,
                size,
            })
        };
        let found = place().ok_or_else(|| {
            format!(
                "does not lie inside the disk: {blocks} blocks of {block} bytes from block {first} on, \
                 and the disk has {disk} bytes"
            )
        });
        self.partitions.push((number, found));
    }
}

fn invalid(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, text.into())
}

/// The disk that a table is read from.
struct Source<'a, E> {
    disk: &'a Checked<E>,
    size: u64,
}

impl<E: Engine> Source<'_, E> {
    /// `len` bytes at `offset`, or `None` where the disk has not got them.
    async fn bytes(&self, offset: u64, len: usize) -> Result<Option<Vec<u8>>> {
        match offset.checked_add(len as u64) {
            Some(end) if end <= self.size => {}
            _ => return Ok(None),
        }
        let mut bytes = vec![0; len];
        self.disk
            .read(&mut ReadBuf::new(&mut bytes), offset)
            .await?;
        Ok(Some(bytes))
    }

    /// The lengths that a table may count in, the likeliest first.
    fn block_sizes(&self) -> impl Iterator<Item = u64> + use<E> {
        let own = u64::from(self.disk.geometry().logical_block_size);
        let own = (512..=4096).contains(&own).then_some(own);
        let others = [512, 4096]
            .into_iter()
            .filter(move |&size| Some(size) != own);
        own.into_iter().chain(others)
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_le_bytes(*bytes))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u64::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests;
