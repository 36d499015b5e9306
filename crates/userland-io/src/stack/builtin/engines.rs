//! The engines' words.

use crate::EngineExt;
use crate::engines::{Memory, Null, Pattern};
use crate::stack::{Entry, Key, Kind, Registry};

pub(super) fn add(registry: Registry) -> Registry {
    let memory = Entry::new("memory", "a disk in memory, gone when it closes")
        .positional(
            Key::new("size", Kind::Size, "the disk's length")
                .required()
                .example("1G"),
        )
        .example("memory:1G");
    let registry = registry.engine(memory, async |options| {
        Ok(Memory::new(options.need("size")?).erase())
    });

    let null = Entry::new("null", "reads zeroes and forgets writes")
        .positional(
            Key::new("size", Kind::Size, "the disk's length")
                .default("1G")
                .example("10G"),
        )
        .key(Key::new("readonly", Kind::Flag, "refuse writes"))
        .example("null:10G");
    let registry = registry.engine(null, async |options| {
        let null = Null::new(options.need("size")?);
        Ok(match options.flag("readonly") {
            true => null.read_only().erase(),
            false => null.erase(),
        })
    });

    let pattern = Entry::new(
        "pattern",
        "read-only; each aligned 8 bytes hold their own offset, big-endian",
    )
    .positional(
        Key::new("size", Kind::Size, "the disk's length")
            .default("1G")
            .example("10G"),
    )
    .example("pattern:10G");
    registry.engine(pattern, async |options| {
        Ok(Pattern::new(options.need("size")?).erase())
    })
}
