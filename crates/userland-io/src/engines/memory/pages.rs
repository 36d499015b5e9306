//! The memory of one chunk, whatever it comes from: a [mapping](super::mapping) where there is one, or the allocator.

use std::ops::{Deref, DerefMut};

use super::chunk::CHUNK;
#[cfg(target_os = "linux")]
use super::mapping::{self, Part};

/// `CHUNK` bytes while it is open, and zeroes at first.
#[derive(Debug)]
pub(super) enum Pages {
    #[cfg(target_os = "linux")]
    Mapped(Part),
    /// Nothing while it is not open.
    Boxed(Box<[u8]>),
}

impl Pages {
    /// The memory of the chunks of a leaf, none of which is open.
    pub(super) fn of(count: usize) -> impl Iterator<Item = Pages> {
        #[cfg(target_os = "linux")]
        let mapped = mapping::parts(count)
            .into_iter()
            .flatten()
            .map(Pages::Mapped);
        #[cfg(not(target_os = "linux"))]
        let mapped = std::iter::empty();
        let boxed = std::iter::repeat_with(|| Pages::Boxed(Box::default()));
        mapped.chain(boxed).take(count)
    }

    /// Makes it ready to be written to.
    pub(super) fn open(&mut self) {
        match self {
            #[cfg(target_os = "linux")]
            Pages::Mapped(part) => part.open(),
            Pages::Boxed(bytes) => *bytes = vec![0; CHUNK].into(),
        }
    }

    /// Notes whether every page is written now, which has changed.
    pub(super) fn fill(&mut self, is_full: bool) {
        match self {
            #[cfg(target_os = "linux")]
            Pages::Mapped(part) => part.fill(is_full),
            // The allocator chooses its pages by itself.
            Pages::Boxed(_) => {
                let _ = is_full;
            }
        }
    }

    /// Gives the memory back: it is no longer open.
    pub(super) fn free(&mut self) {
        match self {
            #[cfg(target_os = "linux")]
            Pages::Mapped(part) => part.free(),
            Pages::Boxed(bytes) => *bytes = Box::default(),
        }
    }
}

impl Deref for Pages {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            #[cfg(target_os = "linux")]
            Pages::Mapped(part) => part,
            Pages::Boxed(bytes) => bytes,
        }
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            #[cfg(target_os = "linux")]
            Pages::Mapped(part) => part,
            Pages::Boxed(bytes) => bytes,
        }
    }
}
