//! The commands, one a module.

#[cfg(target_os = "linux")]
pub(crate) mod attach;
pub(crate) mod completions;
pub(crate) mod copy;
#[cfg(target_os = "linux")]
pub(crate) mod detach;
pub(crate) mod engines;
pub(crate) mod info;
#[cfg(target_os = "linux")]
pub(crate) mod list;
pub(crate) mod man;
pub(crate) mod serve;
pub(crate) mod torture;
