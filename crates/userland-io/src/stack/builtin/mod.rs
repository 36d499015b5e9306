//! This library's own names, each with its keys and how it is made of them.

mod engines;

use super::Registry;

pub(super) fn add(registry: Registry) -> Registry {
    engines::add(registry)
}
