//! The layers' words.

use std::time::Duration;

use crate::layers::{Delay, Fault, Offset, Operation, PartitionTable, ReadOnly, Stats};
use crate::stack::{Entry, Key, Kind, Options, Refusal, Registry};
use crate::{AnyEngine, Checked, EngineExt, Layer, errno};

pub(super) fn add(registry: Registry) -> Registry {
    let registry = registry.layer(
        Entry::new("readonly", "refuses writes").example("readonly"),
        async |_, lower| over(lower, ReadOnly),
    );
    let registry = registry.layer(
        Entry::new("offset", "a window of the disk below")
            .positional(
                Key::new("start", Kind::Size, "the first byte of the window")
                    .required()
                    .example("1M"),
            )
            .key(Key::new("size", Kind::Size, "its length; else to the end").example("512M"))
            .example("offset:1M,size=512M"),
        async |options, lower| {
            let mut window = Offset::new(options.need("start")?);
            if let Some(size) = options.get("size") {
                window = window.size(size);
            }
            over(lower, window)
        },
    );
    let registry = registry.layer(
        Entry::new("partition", "one partition of the disk below (MBR or GPT)")
            .positional(
                Key::new(
                    "number",
                    Kind::Number,
                    "which one, from 1; logical ones from 5",
                )
                .required()
                .example("1"),
            )
            .example("partition:1"),
        partition,
    );
    let registry = registry.layer(delay_entry(), async |options, lower| {
        over(lower, delay(&options))
    });
    let registry = registry.layer(fault_entry(), async |options, lower| {
        over(lower, fault(&options)?)
    });
    registry.layer(
        Entry::new(
            "stats",
            "counts requests, and logs the counts when the disk closes",
        )
        .positional(
            Key::new("name", Kind::Text, "what the log calls it")
                .default("stats")
                .example("top"),
        )
        .example("stats:top"),
        async |options, lower| over(lower, Stats::new().log(options.need::<String>("name")?)),
    )
}

fn over<L: Layer<AnyEngine>>(lower: Checked<AnyEngine>, layer: L) -> Result<AnyEngine, Refusal> {
    Ok(layer.layer(lower)?.erase())
}

async fn partition(options: Options, lower: Checked<AnyEngine>) -> Result<AnyEngine, Refusal> {
    let number: u64 = options.need("number")?;
    let table = PartitionTable::read(&lower).await?;
    if let Some(damage) = table.damage() {
        tracing::warn!("partition table: {damage}");
    }
    let found = table.get(number.try_into().unwrap_or(u32::MAX));
    let partition = found.map_err(|error| Refusal::key_error("number", error))?;
    over(lower, partition.window())
}

const DELAYS: [(Operation, &str, &str); 7] = [
    (Operation::Read, "read", "how long reads wait"),
    (Operation::Write, "write", "how long writes wait"),
    (Operation::Flush, "flush", "how long flushes wait"),
    (Operation::Discard, "discard", "how long discards wait"),
    (
        Operation::WriteZeroes,
        "write_zeroes",
        "how long writes of zeroes wait",
    ),
    (
        Operation::Extents,
        "extents",
        "how long questions for extents wait",
    ),
    (Operation::Prefetch, "prefetch", "how long prefetches wait"),
];

fn delay_entry() -> Entry {
    let mut entry = Entry::new("delay", "makes operations take longer").positional(
        Key::new("all", Kind::Duration, "how long every operation waits")
            .default("0")
            .example("1ms"),
    );
    for (_, key, meaning) in DELAYS {
        entry = entry.key(Key::new(key, Kind::Duration, meaning).example("5ms"));
    }
    entry.example("delay:read=5ms,flush=20ms")
}

fn delay(options: &Options) -> Delay {
    let mut delay = Delay::all(options.get("all").unwrap_or(Duration::ZERO));
    for (operation, key, _) in DELAYS {
        if let Some(time) = options.get(key) {
            delay = delay.on(operation, time);
        }
    }
    delay
}

const ERRORS: &[&str] = &[
    "EIO",
    "ENOSPC",
    "EROFS",
    "EPERM",
    "EACCES",
    "EINVAL",
    "ENOMEM",
    "EOPNOTSUPP",
    "EILSEQ",
    "ESHUTDOWN",
];

fn errno_of(name: &str) -> Option<i32> {
    Some(match name {
        "EIO" => errno::EIO,
        "ENOSPC" => errno::ENOSPC,
        "EROFS" => errno::EROFS,
        "EPERM" => errno::EPERM,
        "EACCES" => errno::EACCES,
        "EINVAL" => errno::EINVAL,
        "ENOMEM" => errno::ENOMEM,
        "EOPNOTSUPP" => errno::EOPNOTSUPP,
        "EILSEQ" => errno::EILSEQ,
        "ESHUTDOWN" => errno::ESHUTDOWN,
        _ => return None,
    })
}

const OPERATIONS: &[&str] = &[
    "read",
    "write",
    "flush",
    "discard",
    "write_zeroes",
    "extents",
    "status",
    "prefetch",
];

fn fault_entry() -> Entry {
    Entry::new(
        "fault",
        "makes operations fail; several rules are several words",
    )
    .positional(
        Key::new("error", Kind::Choice(ERRORS), "what they answer")
            .default("EIO")
            .example("ENOSPC"),
    )
    .key(
        Key::new(
            "on",
            Kind::Set(OPERATIONS),
            "which operations fail; else all",
        )
        .example("read+write"),
    )
    .key(Key::new("range", Kind::Range, "only those that touch these bytes").example("1M..2M"))
    .key(
        Key::new("probability", Kind::Fraction, "only this share of them")
            .default("1")
            .example("1%"),
    )
    .key(
        Key::new("after", Kind::Number, "the first so many pass")
            .default("0")
            .example("100"),
    )
    .key(Key::new("times", Kind::Number, "no more than so many fail").example("3"))
    .key(Key::new("once", Kind::Flag, "one fails, and no more"))
    .key(
        Key::new("seed", Kind::Number, "draws others")
            .default("0")
            .example("42"),
    )
    .key(Key::new(
        "late",
        Kind::Flag,
        "they are carried out first, then answered with the error",
    ))
    .example("fault:ENOSPC,on=write,after=100")
}

fn fault(options: &Options) -> Result<Fault, Refusal> {
    let error: String = options.need("error")?;
    let errno = errno_of(&error)
        .ok_or_else(|| Refusal::key("error", format!("`{error}` is no error that it knows")))?;
    let mut fault = Fault::new(errno)
        .probability(options.need("probability")?)
        .after(options.need("after")?)
        .seed(options.need("seed")?);
    for name in options.get::<Vec<String>>("on").unwrap_or_default() {
        if let Some(operation) = Operation::from_name(&name) {
            fault = fault.on(operation);
        }
    }
    if let Some(range) = options.get("range") {
        fault = fault.range(range);
    }
    match (options.flag("once"), options.get("times")) {
        (true, Some(_)) => {
            return Err(Refusal::key(
                "once",
                "`once` is `times=1`: give one of them",
            ));
        }
        (true, None) => fault = fault.once(),
        (false, Some(times)) => fault = fault.times(times),
        (false, None) => {}
    }
    Ok(match options.flag("late") {
        true => fault.late(),
        false => fault,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_error_and_operation_that_is_listed_is_known() {
        assert!(ERRORS.iter().all(|name| errno_of(name).is_some()));
        assert_eq!(OPERATIONS, Operation::ALL.map(Operation::name));
    }
}
