//! The commands, one a module.

pub(crate) mod completions;
pub(crate) mod copy;
pub(crate) mod engines;
pub(crate) mod info;
pub(crate) mod man;
pub(crate) mod serve;
pub(crate) mod torture;
