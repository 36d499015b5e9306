//! This library's own names, each with its keys and how it is made of them.

mod engines;
mod layers;
mod nbd;

use super::Registry;

pub(super) fn add(registry: Registry) -> Registry {
    layers::add(nbd::add(engines::add(registry)))
}
