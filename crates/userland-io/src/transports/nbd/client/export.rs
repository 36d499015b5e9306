//! What a server says about an export, as a geometry and its claims.
//!
//! * Writes are durable after a flush where the server has `FLUSH`
//!   ([`CrashLevel::Flush`]). One without `FLUSH` but with `FUA` gets `FUA` on
//!   every mutation, so that each is durable when it answers
//!   ([`CrashLevel::Sync`]). One with neither has no way to say that anything
//!   is durable, so nothing is claimed ([`CrashLevel::None`]).
//! * No `SURVIVES_KILL` for what can be written: each mutation that completed is
//!   at the server, which outlives us, but so is perhaps one without an answer. The
//!   server may carry it out after a new client's newer one, and the protocol has no
//!   way to wait for it.
//! * `TRIM` leaves contents open: [`Discard::Unspecified`] is the most it can be,
//!   and rests on servers not changing their mind about a trimmed block.

use super::ConnectError;
use super::handshake::Negotiated;
use crate::transports::nbd::wire::{
    BASE_ALLOCATION, BlockSizes, DEFAULT_MAX_PAYLOAD, MAX_MINIMUM_BLOCK, TransmissionFlags,
};
use crate::{CrashLevel, Discard, Features, Geometry};

/// The longest read or write that is sent, whatever the server would take: it bounds our buffers.
const MAX_TRANSFER: u32 = 64 << 20;
/// The longest discard or `write_zeroes` that is sent.
const MAX_EFFECT: u32 = 1 << 30;

/// How many of the longest writes fit into the journal, where there is one.
const JOURNALED: u64 = 4;

/// How mutations become durable at this server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Durability {
    /// By a flush.
    Flush,
    /// By `FUA` on each of them.
    Always,
    /// Not in any way that the server vouches for.
    Never,
}

/// An export as the engine above shows it; equal after a reconnect, or it is another disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Export {
    pub(super) geometry: Geometry,
    pub(super) flags: TransmissionFlags,
    pub(super) durability: Durability,
    /// Sorted; `base:allocation`, if granted, among them.
    pub(super) contexts: Vec<String>,
}

impl Export {
    /// What the server says, to a client whose journal holds `journal` bytes.
    pub(super) fn new(negotiated: &Negotiated, journal: u64) -> Result<Self, ConnectError> {
        // What depends on the kind of replies may differ from one connection to the next.
        let told = negotiated.info.flags;
        let flags = told
            & (TransmissionFlags::READ_ONLY
                | TransmissionFlags::SEND_FLUSH
                | TransmissionFlags::SEND_FUA
                | TransmissionFlags::ROTATIONAL
                | TransmissionFlags::SEND_TRIM
                | TransmissionFlags::SEND_WRITE_ZEROES
                | TransmissionFlags::SEND_FAST_ZERO
                | TransmissionFlags::SEND_CACHE
                | TransmissionFlags::CAN_MULTI_CONN);
        let mut contexts: Vec<String> = negotiated.contexts.iter().map(|c| c.0.clone()).collect();
        contexts.sort();
        contexts.dedup();
        let durability = if flags.contains(TransmissionFlags::SEND_FLUSH) {
            Durability::Flush
        } else if flags.contains(TransmissionFlags::SEND_FUA) {
            Durability::Always
        } else {
            Durability::Never
        };
        let blocks = blocks(negotiated.blocks)?;
        let size = negotiated.info.size;
        if size > Geometry::MAX_SIZE {
            return Err(ConnectError::Protocol(format!(
                "an export of {size} bytes, longer than any disk can be (2^63 - 1)"
            )));
        }
        let rest = size % u64::from(blocks.minimum);
        if rest != 0 {
            tracing::warn!(
                "the server serves blocks of {} bytes: the last {rest} bytes of its export are out of reach",
                blocks.minimum
            );
        }
        let mut geometry = match flags.contains(TransmissionFlags::READ_ONLY) {
            true => Geometry::read_only(size - rest),
            false => Geometry::writable(
                size - rest,
                match durability {
                    Durability::Flush => CrashLevel::Flush,
                    Durability::Always => CrashLevel::Sync,
                    Durability::Never => CrashLevel::None,
                },
            ),
        };
        geometry.logical_block_size = blocks.minimum;
        if negotiated.blocks.is_some() {
            geometry.io_min = blocks.preferred;
            geometry.io_opt = blocks.preferred;
        }
        geometry.max_transfer = match durability {
            // A write waits for room, and smaller ones could keep it from a large one for ever.
            Durability::Flush if journal > 0 => {
                let most = (journal / JOURNALED).min(blocks.maximum.into()) as u32;
                (most / blocks.minimum).max(1) * blocks.minimum
            }
            _ => blocks.maximum,
        };
        let features = &mut geometry.features;
        features.set(
            Features::ROTATIONAL,
            flags.contains(TransmissionFlags::ROTATIONAL),
        );
        features.set(
            Features::EXTENTS,
            contexts.iter().any(|name| name == BASE_ALLOCATION),
        );
        if flags.contains(TransmissionFlags::READ_ONLY) {
            // Nothing of ours can be on its way.
            features.insert(Features::SURVIVES_KILL);
        } else {
            features.set(Features::FUA, flags.contains(TransmissionFlags::SEND_FUA));
            features.set(
                Features::WRITE_ZEROES,
                flags.contains(TransmissionFlags::SEND_WRITE_ZEROES),
            );
            geometry.max_write_zeroes = MAX_EFFECT;
            if flags.contains(TransmissionFlags::SEND_TRIM) {
                geometry.discard = Discard::Unspecified;
                geometry.max_discard = MAX_EFFECT;
            }
        }
        geometry.validate()?;
        Ok(Export {
            geometry,
            flags,
            durability,
            contexts,
        })
    }

    /// What differs between this and what the server says now.
    pub(super) fn difference(&self, now: &Export) -> Option<String> {
        let (old, new) = (&self.geometry, &now.geometry);
        if self == now {
            None
        } else if old.size != new.size {
            Some(format!("its size was {} and is {}", old.size, new.size))
        } else if self.flags != now.flags {
            Some(format!(
                "its flags were {:?} and are {:?}",
                self.flags, now.flags
            ))
        } else if self.contexts != now.contexts {
            Some(format!(
                "its metadata contexts were {:?} and are {:?}",
                self.contexts, now.contexts
            ))
        } else {
            Some("its block sizes are others".to_owned())
        }
    }

    pub(super) fn has(&self, flag: TransmissionFlags) -> bool {
        self.flags.contains(flag)
    }
}

/// The sizes to keep to, checked: the specification's rules ("Size constraints").
fn blocks(stated: Option<BlockSizes>) -> Result<BlockSizes, ConnectError> {
    let Some(stated) = stated else {
        return Ok(BlockSizes {
            minimum: 1,
            preferred: 0,
            maximum: DEFAULT_MAX_PAYLOAD,
        });
    };
    let BlockSizes {
        minimum,
        preferred,
        maximum,
    } = stated;
    let sane = minimum.is_power_of_two()
        && minimum <= MAX_MINIMUM_BLOCK
        && preferred.is_power_of_two()
        && preferred >= minimum
        && maximum >= minimum;
    if !sane {
        return Err(ConnectError::Protocol(format!(
            "block sizes of {minimum} (minimum), {preferred} (preferred), {maximum} (maximum) bytes: minimum and \
             preferred must be powers of two, the minimum up to {MAX_MINIMUM_BLOCK}, and none below the one before"
        )));
    }
    Ok(BlockSizes {
        minimum,
        preferred,
        maximum: maximum.min(MAX_TRANSFER) / minimum * minimum,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transports::nbd::session::ReplyMode;
    use crate::transports::nbd::wire::ExportInfo;

    const JOURNAL: u64 = 64 << 20;

    fn negotiated(flags: TransmissionFlags, blocks: Option<BlockSizes>) -> Negotiated {
        Negotiated {
            info: ExportInfo {
                size: 10_000,
                flags,
            },
            blocks,
            mode: ReplyMode::Structured,
            contexts: vec![],
        }
    }

    #[test]
    fn what_survives_a_crash_is_what_the_server_can_vouch_for() {
        use TransmissionFlags as F;
        for (flags, crash, needs_flush) in [
            (F::SEND_FLUSH, CrashLevel::Flush, true),
            (F::SEND_FLUSH | F::SEND_FUA, CrashLevel::Flush, true),
            (F::SEND_FUA, CrashLevel::Sync, false),
            (F::empty(), CrashLevel::None, false),
        ] {
            let geometry = Export::new(&negotiated(flags, None), JOURNAL)
                .unwrap()
                .geometry;
            assert_eq!(
                (geometry.crash, geometry.needs_flush()),
                (crash, needs_flush),
                "{flags:?}"
            );
            assert_eq!(
                geometry.features.contains(Features::FUA),
                flags.contains(F::SEND_FUA)
            );
        }
    }

    /// A write without an answer may act at the server, which lives on, after a new client's newer one.
    #[test]
    fn the_end_of_this_process_is_survived_only_by_what_cannot_be_written() {
        use TransmissionFlags as F;
        let all = F::SEND_FLUSH | F::SEND_FUA | F::CAN_MULTI_CONN;
        for (flags, survives) in [
            (F::empty(), false),
            (all, false),
            (all | F::READ_ONLY, true),
        ] {
            let geometry = Export::new(&negotiated(flags, None), JOURNAL)
                .unwrap()
                .geometry;
            assert_eq!(
                geometry.features.contains(Features::SURVIVES_KILL),
                survives,
                "{flags:?}"
            );
        }
    }

    #[test]
    fn block_sizes_bound_requests_and_the_odd_tail_is_cut() {
        let stated = BlockSizes {
            minimum: 512,
            preferred: 4096,
            maximum: 1_000_000,
        };
        let geometry = Export::new(
            &negotiated(TransmissionFlags::empty(), Some(stated)),
            JOURNAL,
        )
        .unwrap()
        .geometry;
        assert_eq!(
            (
                geometry.size,
                geometry.logical_block_size,
                geometry.io_min,
                geometry.max_transfer
            ),
            (9728, 512, 4096, 999_936)
        );
        let geometry = Export::new(&negotiated(TransmissionFlags::empty(), None), JOURNAL)
            .unwrap()
            .geometry;
        assert_eq!(
            (
                geometry.size,
                geometry.logical_block_size,
                geometry.max_transfer
            ),
            (10_000, 1, 32 << 20)
        );
    }

    #[test]
    fn writes_are_no_longer_than_a_quarter_of_the_journal() {
        let most = |flags, journal, maximum| {
            let stated = BlockSizes {
                minimum: 512,
                preferred: 4096,
                maximum,
            };
            let export = Export::new(&negotiated(flags, Some(stated)), journal);
            export.unwrap().geometry.max_transfer
        };
        let flush = TransmissionFlags::SEND_FLUSH;
        assert_eq!(most(flush, 64 << 20, u32::MAX), 16 << 20);
        assert_eq!(most(flush, 64 << 20, 1 << 20), 1 << 20);
        assert_eq!(most(flush, 10_000, 1 << 20), 2048);
        assert_eq!(most(flush, 1, 1 << 20), 512);
        // Where nothing waits for room.
        assert_eq!(most(flush, 0, 1 << 20), 1 << 20);
        assert_eq!(most(TransmissionFlags::SEND_FUA, 1, 1 << 20), 1 << 20);
    }

    #[test]
    fn nonsense_is_refused() {
        for (minimum, preferred, maximum) in [
            (0, 4096, 1 << 20),
            (3, 4096, 1 << 20),
            (1 << 17, 1 << 17, 1 << 20),
            (512, 0, 1 << 20),
            (512, 256, 1 << 20),
            (512, 4096, 100),
        ] {
            let stated = BlockSizes {
                minimum,
                preferred,
                maximum,
            };
            let refused = Export::new(
                &negotiated(TransmissionFlags::empty(), Some(stated)),
                JOURNAL,
            );
            assert!(
                matches!(refused, Err(ConnectError::Protocol(_))),
                "{stated:?}"
            );
        }
        let mut endless = negotiated(TransmissionFlags::empty(), None);
        endless.info.size = u64::MAX;
        assert!(Export::new(&endless, JOURNAL).is_err());
    }
}
