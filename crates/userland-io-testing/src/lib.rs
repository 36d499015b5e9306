//! Proves that a userland-io engine keeps its promises.
#![forbid(unsafe_code)]
