//! The memory that a request's bytes come from or go to.
//!
//! A transport wraps its memory in a [`ReadBuf`] (the engine fills it) or a
//! [`WriteBuf`] (the engine drains it) and passes it by reference; nothing is
//! allocated. Most are one private slice. A virtual machine's may be many
//! segments of memory that the guest can change at any time: no `&[u8]` or
//! `&mut [u8]` is ever made over that ([`ReadBuf::as_mut_slice`] answers `None`),
//! and bytes move by copies that the compiler cannot look into ([`shared`]).
//!
//! This module is the one part of the contract with unsafe code; `segments` holds
//! the raw view that both buffers wrap.

mod aligned;
mod read;
mod segments;
mod shared;
mod write;

pub use aligned::AlignedBuf;
pub use read::ReadBuf;
pub use segments::Segment;
pub use write::WriteBuf;
