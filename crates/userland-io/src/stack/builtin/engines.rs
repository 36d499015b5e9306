//! The engines' words.

use crate::AnyEngine;
use crate::EngineExt;
use crate::engines::{Aio, File, Memory, Null, Pattern};
use crate::stack::{Entry, Key, Kind, Options, Refusal, Registry};

pub(super) fn add(registry: Registry) -> Registry {
    let registry = registry.engine(file_entry(), file);

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

fn file_entry() -> Entry {
    Entry::new("file", "a disk in a file, or a block device")
        .positional(
            Key::new("path", Kind::Path, "the file or block device")
                .required()
                .example("disk.img"),
        )
        .key(
            Key::new(
                "size",
                Kind::Size,
                "creates the file with this length; one that exists must have it",
            )
            .example("10G"),
        )
        .key(Key::new(
            "direct",
            Kind::Flag,
            "go past the page cache (Linux)",
        ))
        .key(Key::new(
            "readonly",
            Kind::Flag,
            "refuse writes, and share the file with other readers",
        ))
        .key(Key::new(
            "existing",
            Kind::Flag,
            "create nothing: the file must be there, with the size if one is given",
        ))
        .key(
            Key::new(
                "aio",
                Kind::Choice(&["auto", "threads", "uring"]),
                "what waits for the disk: threads, or an io_uring ring (Linux)",
            )
            .example("threads")
            .default("auto"),
        )
        .key(
            Key::new(
                "threads",
                Kind::Number,
                "how many operations may wait for the file at once",
            )
            .default("16")
            .example("32"),
        )
        .example("file:disk.img,size=10G")
        .example("file:/dev/sdb,direct")
}

async fn file(options: Options) -> Result<AnyEngine, Refusal> {
    let threads: u64 = options.need("threads")?;
    if !(1..=1024).contains(&threads) {
        return Err(Refusal::key(
            "threads",
            format!("{threads} threads: use 1 to 1024"),
        ));
    }
    let mut open = File::open(options.need::<std::path::PathBuf>("path")?)
        .direct(options.flag("direct"))
        .read_only(options.flag("readonly"))
        .existing(options.flag("existing"))
        .aio(match options.need::<String>("aio")?.as_str() {
            "threads" => Aio::Threads,
            "uring" => Aio::Uring,
            _ => Aio::Auto,
        })
        .threads(threads as usize);
    if let Some(size) = options.get("size") {
        open = open.size(size);
    }
    Ok(open.await?.erase())
}
