//! The command line of userland-io.
#![forbid(unsafe_code)]
fn main() {}
