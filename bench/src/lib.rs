//! What the programs that measure have in common; each of them is in `src/bin`.
//!
//! Servers and the limit are programs ([`process`]), so that each one's processor time,
//! memory and system calls can be told apart. What was measured lies in [`figures`], and goes
//! out as text ([`table`]), as a picture ([`plot`]) and into the documentation ([`page`]).
#![forbid(unsafe_code)]

pub mod attach;
pub mod cases;
pub mod figures;
pub mod machine;
pub mod nbd;
pub mod page;
pub mod plot;
pub mod process;
pub mod syscalls;
pub mod table;
