//! From an engine's claims to what the kernel is told of the block device.

use super::abi::{Attributes, Params};
use crate::{Discard, Features, Geometry};

/// The kernel's smallest block.
const SECTOR: u32 = 512;
/// The longest discard or zeroing of one request: what counts in 32 bits, in whole MiB.
const MAX_RANGE: u32 = !((1 << 20) - 1);

/// The block size that the kernel is told: the engine's, where the driver takes it. It takes no larger than a page; the
/// device's edge makes up for the rest.
fn logical_block(geometry: &Geometry, page: u32) -> u32 {
    geometry.logical_block_size.clamp(SECTOR, page)
}

/// How many bytes of a disk of `size` the kernel can address, in its own blocks.
pub(super) fn whole_blocks(geometry: &Geometry, page: u32) -> u64 {
    let block = u64::from(logical_block(geometry, page));
    geometry.size - geometry.size % block
}

/// What the kernel is told of a disk, whose requests are to be `max_transfer` bytes at most.
pub(super) fn of(geometry: &Geometry, max_transfer: u32, page: u32) -> Params {
    let logical = logical_block(geometry, page);
    let physical = geometry.physical_block().max(logical);
    let mut attributes = Attributes::empty();
    let claims = |feature| geometry.features.contains(feature);
    attributes.set(Attributes::READ_ONLY, geometry.is_read_only());
    attributes.set(Attributes::ROTATIONAL, claims(Features::ROTATIONAL));
    attributes.set(Attributes::VOLATILE_CACHE, geometry.needs_flush());
    // Where the engine has none the kernel flushes by itself, and knows that it does.
    let fua = geometry.needs_flush() && claims(Features::FUA);
    attributes.set(Attributes::FUA, fua);
    let writable = !geometry.is_read_only();
    let discards = writable && geometry.discard != Discard::None;
    let zeroes = writable && claims(Features::WRITE_ZEROES);
    Params {
        attributes,
        logical_block_shift: shift(logical),
        physical_block_shift: shift(physical),
        io_opt_shift: power(geometry.io_opt),
        io_min_shift: power(geometry.io_min).max(shift(physical)),
        max_sectors: max_transfer / SECTOR,
        sectors: whole_blocks(geometry, page) / u64::from(SECTOR),
        discard_granularity: geometry.discard_granule().max(logical),
        max_discard_sectors: sectors(discards, geometry.max_discard, logical),
        max_write_zeroes_sectors: sectors(zeroes, geometry.max_write_zeroes, logical),
    }
}

fn shift(power_of_two: u32) -> u8 {
    power_of_two.trailing_zeros() as u8
}

/// The shift of a wish, where it is a power of two; 0, which the kernel takes for none, if it cannot be said.
fn power(wish: u32) -> u8 {
    match wish.is_power_of_two() {
        true => shift(wish),
        false => 0,
    }
}

/// The limit of requests that carry no bytes: none of them at all, or up to `limit` bytes, where 0 is as many as can be
/// said. A limit below a block is not kept: the edge splits.
fn sectors(has: bool, limit: u32, logical: u32) -> u32 {
    match (has, limit) {
        (false, _) => 0,
        (true, 0) => MAX_RANGE / SECTOR,
        (true, limit) => (limit & !(logical - 1)).max(logical) / SECTOR,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CrashLevel;

    fn told(geometry: &Geometry) -> Params {
        of(geometry, 512 << 10, 4096)
    }

    #[test]
    fn claims_become_attributes() {
        let mut geometry = Geometry::writable(1 << 20, CrashLevel::Flush);
        assert_eq!(told(&geometry).attributes, Attributes::VOLATILE_CACHE);
        assert_eq!(told(&geometry).max_discard_sectors, 0);
        assert_eq!(told(&geometry).max_write_zeroes_sectors, 0);
        geometry.features |= Features::FUA | Features::ROTATIONAL | Features::WRITE_ZEROES;
        geometry.discard = Discard::Unspecified;
        geometry.discard_granularity = 64 << 10;
        geometry.max_discard = 128 << 10;
        let params = told(&geometry);
        let all = Attributes::VOLATILE_CACHE | Attributes::FUA | Attributes::ROTATIONAL;
        assert_eq!(params.attributes, all);
        assert_eq!(params.discard_granularity, 64 << 10);
        assert_eq!(params.max_discard_sectors, 256);
        assert_eq!(params.max_write_zeroes_sectors, 0xfff0_0000 / 512);
        let params = told(&geometry.into_read_only());
        assert_eq!(
            params.attributes,
            Attributes::READ_ONLY | Attributes::ROTATIONAL
        );
        assert_eq!(
            (params.max_discard_sectors, params.max_write_zeroes_sectors),
            (0, 0)
        );
    }

    #[test]
    fn no_cache_no_flushes() {
        for crash in [CrashLevel::None, CrashLevel::Sync] {
            let mut geometry = Geometry::writable(1 << 20, crash);
            geometry.features |= Features::FUA;
            assert_eq!(told(&geometry).attributes, Attributes::empty());
        }
    }

    #[test]
    fn blocks_are_what_the_driver_takes() {
        let mut geometry = Geometry::writable((1 << 20) + 700, CrashLevel::Flush);
        let params = told(&geometry);
        assert_eq!((params.logical_block_shift, params.sectors), (9, 2049));
        geometry.logical_block_size = 4096;
        geometry.io_opt = 64 << 10;
        let params = told(&geometry);
        assert_eq!((params.logical_block_shift, params.sectors), (12, 2048));
        assert_eq!((params.io_min_shift, params.io_opt_shift), (12, 16));
        geometry.logical_block_size = 64 << 10;
        geometry.io_opt = 192 << 10;
        let params = told(&geometry);
        assert_eq!(
            (params.logical_block_shift, params.physical_block_shift),
            (12, 16)
        );
        assert_eq!((params.io_opt_shift, params.io_min_shift), (0, 16));
    }
}
