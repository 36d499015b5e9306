//! `write_zeroes`: by the engine where it can, else by writing zeroes.

use std::ops::Range;

use super::bounce::Source;
use super::{Checked, limit, pieces};
use crate::give_way::give_way;
use crate::{Engine, ErrorKind, Features, Geometry, Result, WriteBuf, WriteFlags};

const ZEROES_LEN: usize = Geometry::MAX_ATOMIC_WRITE as usize;

/// Aligned, so that direct I/O takes it as it is.
#[repr(align(4096))]
struct Zeroes([u8; ZEROES_LEN]);

static ZEROES: Zeroes = Zeroes([0; ZEROES_LEN]);

impl<E: Engine> Checked<E> {
    /// Makes `range` read as zeroes. `flags` has FUA only if the engine takes it.
    pub(super) async fn zero(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        let fast_only = flags.contains(WriteFlags::FAST_ONLY);
        let blocks = self.round_in(&range, self.block());
        if fast_only && (blocks.is_empty() || !self.facts.features.contains(Features::WRITE_ZEROES))
        {
            return Err(ErrorKind::Unsupported.into());
        }
        // The blocks first: a refusal of the first piece then leaves everything as it was.
        if !blocks.is_empty() {
            let guard = self.beside_rmw(&blocks).await?;
            let result = self.zero_blocks(blocks.clone(), flags).await;
            guard.finish();
            result?;
        }
        let edges = match blocks.is_empty() {
            true => [range, 0..0],
            false => [range.start..blocks.start, blocks.end..range.end],
        };
        for edge in edges {
            if !edge.is_empty() {
                self.modify(Source::Zeroes, edge, flags & WriteFlags::FUA)
                    .await?;
            }
        }
        Ok(())
    }

    async fn zero_blocks(&self, blocks: Range<u64>, flags: WriteFlags) -> Result {
        let mut rest = blocks;
        if self.facts.features.contains(Features::WRITE_ZEROES) {
            let max = limit(self.facts.max_write_zeroes);
            for piece in pieces(rest.clone(), max, self.unit()) {
                match self.engine.write_zeroes(piece.clone(), flags).await {
                    Err(error)
                        if error.kind() == ErrorKind::Unsupported
                            && !flags.contains(WriteFlags::FAST_ONLY) =>
                    {
                        break;
                    }
                    result => result?,
                }
                rest.start = piece.end;
            }
        }
        let max = limit(self.facts.max_transfer).min(ZEROES_LEN as u64);
        let start = rest.start;
        for piece in pieces(rest, max.max(self.unit()), self.unit()) {
            // An engine that answers at once would keep everybody else waiting for all of it.
            if piece.start > start {
                give_way().await;
            }
            let zeroes = &ZEROES.0[..(piece.end - piece.start) as usize];
            self.engine
                .write(&WriteBuf::new(zeroes), piece.start, flags & WriteFlags::FUA)
                .await?;
        }
        Ok(())
    }
}
