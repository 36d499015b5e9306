//! `BLOCK_STATUS`: what each negotiated context says about a range.

use std::ops::Range;

use super::super::session::{ContextKind, MetaContext};
use super::super::wire::AllocationFlags;
use crate::{Device, Engine, Extent, ExtentKind, Extents, Result};

/// The most extents told of one context: what clients ask for again, from where the answer ends.
pub(super) const MOST_EXTENTS: usize = 1024;

/// What one context says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Status {
    /// The context's number.
    pub(super) id: u32,
    /// Runs from the start of the range, at least one. None goes beyond it.
    pub(super) extents: Extents<u64>,
}

/// Asks `device` about `range`, which is not empty, for each of `contexts`. `one`: for one run each.
pub(super) async fn ask<'a, E: Engine>(
    device: &Device<E>,
    range: Range<u64>,
    contexts: impl Iterator<Item = &'a MetaContext>,
    one: bool,
) -> Result<Vec<Status>> {
    let cap = if one { 1 } else { MOST_EXTENTS };
    let mut all = Vec::new();
    for context in contexts {
        let mut extents = Extents::new(cap);
        loop {
            let (covered, room) = (extents.covered(), extents.room());
            let rest = range.start + covered..range.end;
            if rest.is_empty() || room == 0 {
                break;
            }
            match &context.kind {
                ContextKind::Allocation => {
                    let mut more = Extents::new(room);
                    device.extents(rest, &mut more).await?;
                    let flagged = more.iter().map(|extent| Extent {
                        len: extent.len,
                        kind: allocation(extent.kind),
                    });
                    flagged.for_each(|extent| extents.push(extent.len, extent.kind));
                }
                ContextKind::Engine(name) => {
                    let mut more = Extents::new(room);
                    device.status(name, rest, &mut more).await?;
                    let more = more.iter();
                    more.for_each(|extent| extents.push(extent.len, extent.kind));
                }
            }
            // An engine that tells nothing more ends the answer.
            if extents.covered() == covered {
                break;
            }
        }
        // A reply holds at least one run, and a status of 0 is always right.
        if extents.is_empty() {
            extents.push(range.end - range.start, 0);
        }
        extents.truncate(range.end - range.start);
        all.push(Status {
            id: context.id,
            extents,
        });
    }
    Ok(all)
}

fn allocation(kind: ExtentKind) -> u64 {
    let flags = match kind {
        ExtentKind::Data => AllocationFlags::empty(),
        ExtentKind::Zero => AllocationFlags::ZERO,
        ExtentKind::Hole => AllocationFlags::ZERO | AllocationFlags::HOLE,
    };
    flags.bits().into()
}
