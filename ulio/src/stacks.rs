//! From words to open disks.

use userland_io::Device;
use userland_io::stack::{Plan, Registry};

use crate::errors::Failure;

/// Opens what `plan` says.
pub(crate) async fn open(plan: &Plan) -> Result<Device, Failure> {
    let engine = plan.open().await?;
    Device::open(engine)
        .await
        .map_err(|error| Failure::of(format_args!("`{plan}`"), error))
}

/// Gives a disk back: the last handle flushes and closes.
pub(crate) async fn close(disk: Device, name: &str) -> Result<(), Failure> {
    disk.close()
        .await
        .map_err(|error| Failure::of(format_args!("closing `{name}`"), error))
}

/// `plan` with its bottom word marked `readonly`, if that has such a flag and nothing in it speaks against that.
pub(crate) fn read_only(plan: Plan, registry: &Registry) -> Plan {
    let Some(bottom) = plan.options().next() else {
        return plan;
    };
    let has = |key: &str| bottom.entry().keys.iter().any(|known| known.name == key);
    // Beside a path, a size asks for the file to be created.
    let positional = bottom.entry().positional_key().map(|key| key.name);
    let creates = has("size") && bottom.is_given("size") && positional != Some("size");
    if !has("readonly") || bottom.is_given("readonly") || creates {
        return plan;
    }
    with_item(&plan, "readonly", registry).unwrap_or(plan)
}

/// `plan` with `item` added to its bottom word.
pub(crate) fn with_item(plan: &Plan, item: &str, registry: &Registry) -> Option<Plan> {
    let mut words = plan.words().iter();
    // A word without items would take the first for its positional.
    let bottom = words.next().filter(|word| !word.items.is_empty())?;
    let mut text = format!("{bottom},{item}");
    for word in words {
        text.push_str(&format!(" {word}"));
    }
    registry.parse(&text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_marked_read_only_where_that_can_be() {
        let registry = Registry::builtin();
        let marked = |words: &str| {
            let plan = registry.parse(words).unwrap();
            read_only(plan, &registry).to_string()
        };
        assert_eq!(marked("null:1G"), "null:1G,readonly");
        assert_eq!(marked("null:1G,readonly=no"), "null:1G,readonly=no");
        assert_eq!(marked("memory:1G"), "memory:1G");
        assert_eq!(marked("null"), "null");
    }
}
