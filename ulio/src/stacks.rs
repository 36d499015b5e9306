//! From words to open disks.

use userland_io::Device;
#[cfg(target_os = "linux")]
use userland_io::stack::{Entry, Item, Key, Kind};
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

/// The URI of an NBD server's export, if that alone is the stack: no layers, no options.
#[cfg(target_os = "linux")]
pub(crate) fn bare_uri(plan: &Plan) -> Option<String> {
    let mut words = plan.words().iter();
    let (Some(word), None) = (words.next(), words.next()) else {
        return None;
    };
    match (bottom(plan), word.items.as_slice()) {
        (Some("nbd"), [Item::Bare(uri)]) => Some(uri.text.clone()),
        _ => None,
    }
}

/// The words of `plan` with each path absolute, so that they name the same disk in any directory.
#[cfg(target_os = "linux")]
pub(crate) fn absolute(plan: &Plan) -> String {
    fn key<'a>(entry: &'a Entry, n: usize, item: &Item) -> Option<&'a Key> {
        match item {
            Item::Pair(name, _) => entry.keys.iter().find(|key| key.name == name.text),
            Item::Bare(_) if n == 0 => entry.positional_key(),
            Item::Bare(_) => None,
        }
    }
    let mut words = Vec::new();
    for (word, options) in plan.words().iter().zip(plan.options()) {
        let mut word = word.clone();
        for (n, item) in word.items.iter_mut().enumerate() {
            let is_path = key(options.entry(), n, item).is_some_and(|key| key.kind == Kind::Path);
            let (Item::Bare(value) | Item::Pair(_, value)) = item;
            if is_path
                && !word.is_uri
                && let Ok(path) = std::path::absolute(&value.text)
            {
                value.text = path.display().to_string();
            }
        }
        words.push(word.to_string());
    }
    words.join(" ")
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

    #[cfg(target_os = "linux")]
    #[test]
    fn only_a_uri_alone_is_bare() {
        let registry = Registry::builtin();
        let bare = |words: &str| bare_uri(&registry.parse(words).unwrap());
        let uri = Some("nbd://host/a".to_owned());
        assert_eq!(bare("nbd://host/a"), uri);
        assert_eq!(bare("nbd:'nbd://host/a'"), uri);
        for words in [
            "nbd://host/a,connections=4",
            "nbd://host/a readonly",
            "memory:1M",
        ] {
            assert_eq!(bare(words), None, "{words}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_path_is_made_absolute_and_nothing_else_is() {
        let registry = Registry::builtin();
        let here = std::env::current_dir().unwrap();
        for (words, expected) in [
            ("file:a,size=1G readonly", "file:HERE/a,size=1G readonly"),
            ("file:/a offset:1M", "file:/a offset:1M"),
            ("memory:1G", "memory:1G"),
            ("file:size=1G,path=a", "file:size=1G,path=HERE/a"),
        ] {
            let plan = registry.parse(words).unwrap();
            let expected = expected.replace("HERE", here.to_str().unwrap());
            assert_eq!(absolute(&plan), expected);
        }
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
