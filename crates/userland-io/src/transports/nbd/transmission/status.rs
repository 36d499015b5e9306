//! `BLOCK_STATUS`: what each negotiated context says about a range.

use std::ops::Range;

use super::super::session::{ContextKind, MetaContext};
use super::super::wire::AllocationFlags;
use crate::{Device, Engine, Extent, ExtentKind, Extents, Result};

/// The most extents told of one context: what clients ask for again, from where the answer ends.
pub(super) const MOST_EXTENTS: usize = 1024;

/// How often an engine is asked for one context, or for the holes of a read: one that tells a byte at a time, as another's
/// server behind it may, would keep the request busy for ever.
pub(super) const MOST_ASKED: usize = 64;

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
        for _ in 0..MOST_ASKED {
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::{Features, Geometry, ReadBuf};

    /// Tells of one byte, whatever it is asked.
    #[derive(Default)]
    struct Byte(AtomicUsize);

    impl Engine for Byte {
        fn geometry(&self) -> Geometry {
            let mut geometry = Geometry::read_only(1 << 24);
            geometry.features |= Features::EXTENTS;
            geometry
        }
        async fn read(&self, buf: &mut ReadBuf<'_>, _: u64) -> Result {
            buf.fill(0);
            Ok(())
        }
        async fn extents(&self, _: Range<u64>, out: &mut Extents) -> Result {
            self.0.fetch_add(1, Ordering::Relaxed);
            out.push(1, ExtentKind::Data);
            Ok(())
        }
        fn contexts(&self) -> Vec<String> {
            vec!["x-test:byte".into()]
        }
        async fn status(&self, _: &str, _: Range<u64>, out: &mut Extents<u64>) -> Result {
            self.0.fetch_add(1, Ordering::Relaxed);
            out.push(1, 7);
            Ok(())
        }
    }

    #[tokio::test]
    async fn an_engine_that_tells_a_byte_at_a_time_is_not_asked_for_ever() {
        let device = Device::open(Byte::default()).await.unwrap();
        for kind in [
            ContextKind::Allocation,
            ContextKind::Engine("x-test:byte".into()),
        ] {
            let before = device.get_ref().0.load(Ordering::Relaxed);
            let context = MetaContext { id: 1, kind };
            let told = ask(&device, 0..1 << 24, [&context].into_iter(), false).await;
            // What was told by then is a whole answer: the client goes on from there.
            let asked = device.get_ref().0.load(Ordering::Relaxed) - before;
            assert!(asked <= MOST_ASKED, "asked {asked} times");
            assert_eq!(told.unwrap()[0].extents.covered(), asked as u64);
        }
    }
}
