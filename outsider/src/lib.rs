//! A disk striped over several vectors.

use std::sync::Mutex;

use userland_io::{CrashLevel, Engine, Geometry, ReadBuf, Result, WriteBuf, WriteFlags};

/// The length of a stripe in bytes.
const STRIPE: usize = 1000;
/// How many vectors the stripes go round.
const LEGS: usize = 3;

/// A disk in memory, of stripes that lie in three vectors in turn.
pub struct Striped {
    size: u64,
    legs: [Mutex<Vec<u8>>; LEGS],
}

impl Striped {
    /// `size` zeroes.
    pub fn new(size: u64) -> Self {
        let leg = (size as usize).div_ceil(STRIPE * LEGS) * STRIPE;
        Striped {
            size,
            legs: std::array::from_fn(|_| Mutex::new(vec![0; leg])),
        }
    }

    /// The pieces of a request: which leg, where in it, and where in the buffer.
    fn pieces(
        offset: u64,
        len: usize,
    ) -> impl Iterator<Item = (usize, usize, std::ops::Range<usize>)> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let place = offset as usize + at;
            let (stripe, within) = (place / STRIPE, place % STRIPE);
            let piece = at..len.min(at + STRIPE - within);
            at = piece.end;
            let in_leg = stripe / LEGS * STRIPE + within;
            (!piece.is_empty()).then_some((stripe % LEGS, in_leg, piece))
        })
    }
}

impl Engine for Striped {
    fn geometry(&self) -> Geometry {
        Geometry::writable(self.size, CrashLevel::None)
    }

    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        for (leg, at, piece) in Self::pieces(offset, buf.len()) {
            let bytes = self.legs[leg].lock().unwrap();
            buf.slice(piece.clone())
                .copy_from(&bytes[at..][..piece.len()]);
        }
        Ok(())
    }

    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, _: WriteFlags) -> Result {
        for (leg, at, mut piece) in Self::pieces(offset, buf.len()) {
            if cfg!(feature = "bug") && piece.len() == STRIPE {
                // A whole stripe loses its last byte.
                piece.end -= 1;
            }
            let mut bytes = self.legs[leg].lock().unwrap();
            buf.slice(piece.clone())
                .copy_to(&mut bytes[at..][..piece.len()]);
        }
        Ok(())
    }
}
