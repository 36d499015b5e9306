//! What is claimed about zeroes, discards and extents.

use userland_io::{
    Checked, Discard, Engine, ErrorKind, ExtentKind, Extents, Features, Result, WriteFlags,
};

use super::model::names;
use super::{broken, finish, must, opened, read, require, write};
use crate::check::Verdict;

/// How much of the disk is looked at, in bytes.
const LOOK: u64 = 1 << 20;

/// The extents cover what they were asked for, step by step and with room for one run; what they call zero reads as
/// zeroes; what was just written is data.
///
/// # Errors
/// What is not so.
pub async fn extents_agree_with_content<E: Engine>(
    open: impl AsyncFn() -> Result<E>,
) -> Result<(), Verdict> {
    let disk = opened(&open).await?;
    let geometry = disk.geometry();
    let block = u64::from(geometry.logical_block_size);
    let size = geometry.size.min(LOOK.max(8 * block));
    check_runs(&disk, size).await?;
    if !geometry.is_read_only() && size > 2 * block {
        let granule = u64::from(geometry.discard_granule());
        let bytes = vec![0x5a; block as usize];
        let none = WriteFlags::empty();
        must("a write", write(&disk, block, &bytes).await)?;
        must_be_data(&disk, block).await?;
        check_runs(&disk, size).await?;
        let zeroes = 0..(2 * granule).min(size);
        must("write_zeroes", disk.write_zeroes(zeroes, none).await)?;
        check_runs(&disk, size).await?;
        let over = write(&disk, block, &bytes).await;
        must("a write over zeroes", over)?;
        must_be_data(&disk, block).await?;
        check_runs(&disk, size).await?;
    }
    finish(disk).await
}

async fn must_be_data<E: Engine>(disk: &Checked<E>, at: u64) -> Result<(), Verdict> {
    let mut out = Extents::new(1);
    must("extents", disk.extents(at..at + 1, &mut out).await)?;
    let kind = out.iter().next().map(|run| run.kind);
    require(kind == Some(ExtentKind::Data), || {
        format!("byte {at} was just written, but the extents say {kind:?}")
    })
}

/// Walks over the extents, and reads what they call zero.
async fn check_runs<E: Engine>(disk: &Checked<E>, size: u64) -> Result<(), Verdict> {
    for cap in [1, 64] {
        let mut at = 0;
        while at < size {
            let mut out = Extents::new(cap);
            must("extents", disk.extents(at..size, &mut out).await)?;
            let covered = out.covered();
            if covered == 0 || covered > size - at || out.len() > cap {
                return Err(broken(format!(
                    "the extents of {at}..{size}, at most {cap}, are {out:?}"
                )));
            }
            for run in &out {
                if run.kind != ExtentKind::Data {
                    let bytes = read(disk, at, run.len as usize).await?;
                    if let Some(off) = bytes.iter().position(|&byte| byte != 0) {
                        return Err(broken(format!(
                            "the extents say {:?} for {at}..{}, but byte {} is {:#04x}",
                            run.kind,
                            at + run.len,
                            at + off as u64,
                            bytes[off]
                        )));
                    }
                }
                at += run.len;
            }
        }
    }
    Ok(())
}

/// After `write_zeroes` a range reads as zeroes, whatever was there; a refusal of `FAST_ONLY` leaves all as it was;
/// with `NO_UNMAP` no hole is left.
///
/// # Errors
/// What is not so.
pub async fn zeroes_read_as_zeroes<E: Engine>(
    open: impl AsyncFn() -> Result<E>,
) -> Result<(), Verdict> {
    let disk = opened(&open).await?;
    let geometry = disk.geometry();
    let block = u64::from(geometry.logical_block_size);
    let len = geometry.size.min(16 * block.max(64));
    if geometry.is_read_only() || len == 0 {
        return finish(disk).await;
    }
    for bits in 0..8 {
        let flags = WriteFlags::from_bits_truncate(bits);
        let full = vec![0xa5; len as usize];
        must("a write", write(&disk, 0, &full).await)?;
        let zeroed = len / 4..len - len / 4;
        let result = disk.write_zeroes(zeroed.clone(), flags).await;
        let refused = matches!(&result, Err(error)
            if error.kind() == ErrorKind::Unsupported && flags.contains(WriteFlags::FAST_ONLY));
        let mut should = full;
        if !refused {
            must(&format!("write_zeroes {zeroed:?}{}", names(flags)), result)?;
            should[zeroed.start as usize..zeroed.end as usize].fill(0);
        }
        let now = read(&disk, 0, len as usize).await?;
        if let Some(at) = (0..now.len()).find(|&at| now[at] != should[at]) {
            return Err(broken(format!(
                "after write_zeroes {zeroed:?}{}{} byte {at} is {:#04x}, not {:#04x}",
                names(flags),
                if refused { ", which was refused," } else { "" },
                now[at],
                should[at]
            )));
        }
        if flags.contains(WriteFlags::NO_UNMAP) && !refused && !zeroed.is_empty() {
            let mut out = Extents::new(64);
            let extents = disk.extents(zeroed.clone(), &mut out).await;
            must("extents", extents)?;
            require(out.iter().all(|run| run.kind != ExtentKind::Hole), || {
                format!("after write_zeroes {zeroed:?} NO_UNMAP there are holes: {out:?}")
            })?;
        }
    }
    finish(disk).await
}

/// A discarded range reads as its claim says, each time the same; the bytes beside whole granules stay; a disk that
/// claims no discard has none.
///
/// # Errors
/// What is not so.
pub async fn discard_follows_its_claim<E: Engine>(
    open: impl AsyncFn() -> Result<E>,
) -> Result<(), Verdict> {
    let disk = opened(&open).await?;
    let geometry = disk.geometry();
    let granule = u64::from(geometry.discard_granule());
    let len = geometry.size.min(8 * granule.max(64));
    if geometry.is_read_only() || geometry.discard == Discard::None || len == 0 {
        return finish(disk).await;
    }
    let old = vec![0x3c; len as usize];
    for (start, end) in [(0, len), (granule, len), (1, len - 1), (granule + 1, len)] {
        must("a write", write(&disk, 0, &old).await)?;
        let (start, end) = (start.min(len), end.min(len));
        if start >= end {
            continue;
        }
        must("a discard", disk.discard(start..end).await)?;
        let first = read(&disk, 0, len as usize).await?;
        must("a flush", disk.flush().await)?;
        let second = read(&disk, 0, len as usize).await?;
        require(first == second, || {
            format!("after discard {start}..{end} two reads differ")
        })?;
        let whole = start.next_multiple_of(granule)..match end == geometry.size {
            true => end,
            false => end - end % granule,
        };
        for (at, &byte) in first.iter().enumerate() {
            let legal = match (whole.contains(&(at as u64)), geometry.discard) {
                (false, _) => byte == 0x3c,
                (true, Discard::Zeroes) => byte == 0,
                (true, Discard::OldOrZero) => byte == 0 || byte == 0x3c,
                (true, _) => true,
            };
            if !legal {
                return Err(broken(format!(
                    "the claim is Discard::{:?} in granules of {granule}, but after discard {start}..{end} byte {at} is {byte:#04x}",
                    geometry.discard
                )));
            }
        }
    }
    // Extents are the other way to tell.
    if geometry.features.contains(Features::EXTENTS) {
        check_runs(&disk, len).await?;
    }
    finish(disk).await
}
