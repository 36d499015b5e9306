//! Everything that CI and a developer run.
#![forbid(unsafe_code)]
fn main() {}
