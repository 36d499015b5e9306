//! From words to open disks.

use userland_io::Device;
use userland_io::stack::{Plan, Registry};

use crate::errors::Failure;

/// The stack whose words are `arguments`, one each.
///
/// A whole stack in quotes, as `copy` takes it, would be one word with a strange value: a file named
/// `disk.img readonly`, say.
pub(crate) fn parse(arguments: &[String], registry: &Registry) -> Result<Plan, Failure> {
    if let Some(first) = arguments.first()
        && registry
            .parse(first)
            .is_ok_and(|plan| plan.words().len() > 1)
    {
        return Err(Failure::Usage(format!(
            "`{first}` is several words in one argument: leave out the quotes around them; a value with spaces \
             has quotes of its own, such as \"file:'my disk.img'\""
        )));
    }
    Ok(registry.parse_args(arguments)?)
}

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

/// `plan` with its bottom word told to create nothing, if it is one that creates.
pub(crate) fn existing(plan: &Plan, registry: &Registry) -> Plan {
    let bottom = plan.options().next();
    let creates = bottom.is_some_and(|options| {
        let mut keys = options.entry().keys.iter();
        keys.any(|key| key.name == "existing") && !options.is_given("existing")
    });
    let marked = creates.then(|| with_item(plan, "existing", registry));
    marked.flatten().unwrap_or_else(|| plan.clone())
}

/// The name of what `plan` rests on.
pub(crate) fn bottom(plan: &Plan) -> Option<&'static str> {
    Some(plan.options().next()?.entry().name)
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
    fn a_whole_stack_in_one_argument_is_refused_and_a_value_with_spaces_is_not() {
        let registry = Registry::builtin();
        let parsed = |words: &[&str]| {
            let words: Vec<_> = words.iter().map(|&word| word.to_owned()).collect();
            parse(&words, &registry).map(|plan| plan.words().len())
        };
        for whole in ["file:disk.img readonly", "memory:1G delay:read=5ms"] {
            let refused = format!("{:?}", parsed(&[whole]).unwrap_err());
            assert!(refused.contains("several words"), "{refused}");
        }
        assert_eq!(parsed(&["memory:1G", "readonly"]).unwrap(), 2);
        assert_eq!(parsed(&["file:my disk.img"]).unwrap(), 1);
        assert_eq!(parsed(&["file:'disk.img readonly'"]).unwrap(), 1);
    }

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

    #[test]
    fn what_would_create_is_told_not_to() {
        let registry = Registry::builtin();
        let marked = |words: &str| {
            let plan = registry.parse(words).unwrap();
            existing(&plan, &registry).to_string()
        };
        assert_eq!(
            marked("file:a,size=1G readonly"),
            "file:a,size=1G,existing readonly"
        );
        assert_eq!(marked("file:a,existing"), "file:a,existing");
        assert_eq!(marked("memory:1G"), "memory:1G");
    }
}
