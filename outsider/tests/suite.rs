//! The whole suite, in one line.

userland_io_testing::conformance!(striped, async || Ok(outsider::Striped::new(100_007)));
