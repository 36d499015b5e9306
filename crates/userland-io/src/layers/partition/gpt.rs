//! The GUID partition table (UEFI specification 2.10, section 5.3).

use super::{PartitionTable, Source, TableKind, invalid, u32_at, u64_at};
use crate::{Engine, Result};

const SIGNATURE: &[u8] = b"EFI PART";
/// The bytes of a header that mean something, and the least that it says of itself.
const HEADER: usize = 92;
/// The least length of an entry, and what ours of a longer one is read to.
const ENTRY: usize = 128;
/// The most bytes of entries that are read: 64 times what a usual table has.
const MAX_ENTRIES: u64 = 1 << 20;

struct Header {
    block: u64,
    alternate: u64,
    entries_at: u64,
    count: u32,
    entry_size: usize,
    entries_crc: u32,
}

pub(super) async fn read<E: Engine>(source: &Source<'_, E>) -> Result<PartitionTable> {
    let mut why = None;
    let mut elsewhere = Vec::new();
    for block in source.block_sizes() {
        match header(source, block, 1).await? {
            Ok(header) => match entries(source, &header).await? {
                Ok(table) => return Ok(table),
                Err(problem) => {
                    why = Some(format!("the primary table: {problem}"));
                    elsewhere.push((block, header.alternate));
                }
            },
            Err(problem) if why.is_none() => why = Some(format!("the primary header: {problem}")),
            Err(_) => {}
        }
        if let Some(last) = (source.size / block).checked_sub(1) {
            elsewhere.push((block, last));
        }
    }
    let why = why.unwrap_or_default();
    for (block, lba) in elsewhere {
        if let Ok(header) = header(source, block, lba).await?
            && let Ok(mut table) = entries(source, &header).await?
        {
            table.damage = Some(format!("the backup was used, because of {why}"));
            return Ok(table);
        }
    }
    Err(invalid(format!(
        "the GPT is damaged, and so is its backup; {why}"
    )))
}

/// The header at block `lba`, or what is wrong with it.
async fn header<E: Engine>(
    source: &Source<'_, E>,
    block: u64,
    lba: u64,
) -> Result<Result<Header, String>> {
    let Some(at) = lba.checked_mul(block) else {
        return Ok(Err("it would lie outside the disk".to_owned()));
    };
    let Some(bytes) = source.bytes(at, block as usize).await? else {
        return Ok(Err("it would lie outside the disk".to_owned()));
    };
    Ok(parse(&bytes, block, lba))
}

fn parse(bytes: &[u8], block: u64, lba: u64) -> Result<Header, String> {
    const SHORT: &str = "it is cut off";
    if bytes.get(..8) != Some(SIGNATURE) {
        return Err("it has no signature".to_owned());
    }
    let size = u32_at(bytes, 12).ok_or(SHORT)? as usize;
    if size < HEADER || size > bytes.len() {
        return Err(format!("it says that it is {size} bytes long"));
    }
    let mut summed = bytes.get(..size).ok_or(SHORT)?.to_vec();
    summed.get_mut(16..20).ok_or(SHORT)?.fill(0);
    if u32_at(bytes, 16) != Some(crc32(&summed)) {
        return Err("its checksum is wrong".to_owned());
    }
    let own = u64_at(bytes, 24).ok_or(SHORT)?;
    if own != lba {
        return Err(format!("it belongs at block {own}, not {lba}"));
    }
    Ok(Header {
        block,
        alternate: u64_at(bytes, 32).ok_or(SHORT)?,
        entries_at: u64_at(bytes, 72).ok_or(SHORT)?,
        count: u32_at(bytes, 80).ok_or(SHORT)?,
        entry_size: u32_at(bytes, 84).ok_or(SHORT)? as usize,
        entries_crc: u32_at(bytes, 88).ok_or(SHORT)?,
    })
}

/// The entries that `header` leads to, or what is wrong with them.
async fn entries<E: Engine>(
    source: &Source<'_, E>,
    header: &Header,
) -> Result<Result<PartitionTable, String>> {
    let size = header.entry_size;
    let len = u64::from(header.count).saturating_mul(size as u64);
    if size < ENTRY || !size.is_multiple_of(8) || len > MAX_ENTRIES {
        return Ok(Err(format!(
            "it says that it has {} entries of {size} bytes",
            header.count
        )));
    }
    let bytes = match header.entries_at.checked_mul(header.block) {
        Some(at) => source.bytes(at, len as usize).await?,
        None => None,
    };
    let Some(bytes) = bytes else {
        return Ok(Err("its entries would lie outside the disk".to_owned()));
    };
    if crc32(&bytes) != header.entries_crc {
        return Ok(Err("the checksum of its entries is wrong".to_owned()));
    }
    let mut table = PartitionTable::new(TableKind::Gpt);
    for (number, entry) in (1..).zip(bytes.chunks_exact(size)) {
        let is_unused = entry.iter().take(16).all(|&b| b == 0);
        if let (false, Some(first), Some(last)) = (is_unused, u64_at(entry, 32), u64_at(entry, 40))
        {
            // The last block belongs to it. One that ends before it starts has no length, and is refused as such.
            let blocks = last.checked_sub(first).map_or(0, |n| n.saturating_add(1));
            table.add(number, first, blocks, header.block, source.size);
        }
    }
    Ok(Ok(table))
}

/// CRC-32 as in IEEE 802.3, which the headers are summed with.
pub(super) fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, &byte| {
        (crc >> 8) ^ CRC_TABLE[usize::from(crc as u8 ^ byte)]
    })
}

const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut n = 0;
    while n < 256 {
        let mut crc = n as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = (crc >> 1) ^ (0xedb8_8320 * (crc & 1));
            bit += 1;
        }
        table[n] = crc;
        n += 1;
    }
    table
};
