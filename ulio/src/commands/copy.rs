//! `ulio copy`: opens two disks, and lets the library copy one onto the other.

use std::path::PathBuf;

use userland_io::copy::{Copied, CopyError, CopyOptions, copy};
use userland_io::stack::{Plan, Registry};
use userland_io::{Device, Geometry};

use crate::cli::Copy;
use crate::errors::Failure;
use crate::output::{note, size};
use crate::progress::Meter;
use crate::signals::Signals;
use crate::stacks;

pub(crate) async fn run(arguments: Copy, registry: &Registry) -> Result<(), Failure> {
    // Both are read before either is opened: a slip in the second leaves nothing behind.
    let from = registry.parse(&arguments.source)?;
    let to = registry.parse(&arguments.target)?;
    let mut signals = Signals::listen()?;

    let (source, target) = tokio::select! {
        opened = open(from, to, &arguments, registry) => opened?,
        () = signals.next() => return Err(Failure::Failed("interrupted before it began".to_owned())),
    };

    let mut meter = Meter::new(match (arguments.progress, arguments.no_progress) {
        (true, _) => Some(true),
        (_, true) => Some(false),
        _ => None,
    });
    let mut options = CopyOptions::default();
    options.in_flight = arguments.jobs;
    options.request_size = arguments.request_size;
    options.verify = arguments.verify;
    let result = tokio::select! {
        result = copy(&source, &target, &options, |step| meter.tell(step)) => Some(result),
        () = signals.next() => None,
    };
    meter.end();
    signals.leave_on_next();
    let closed = close(source, target, &arguments).await;

    let copied = match result {
        Some(result) => result.map_err(|error| explain(error, &arguments))?,
        None => {
            return Err(Failure::Failed(
                "interrupted: the target is incomplete".to_owned(),
            ));
        }
    };
    closed?;
    note(&summary(&copied, arguments.verify));
    Ok(())
}

async fn open(
    from: Plan,
    to: Plan,
    arguments: &Copy,
    registry: &Registry,
) -> Result<(Device, Device), Failure> {
    let source = stacks::open(&stacks::read_only(from, registry)).await?;
    match open_target(to, registry, source.geometry()).await {
        Ok(target) => Ok((source, target)),
        Err(failure) => {
            stacks::close(source, &arguments.source).await?;
            Err(failure)
        }
    }
}

async fn close(source: Device, target: Device, arguments: &Copy) -> Result<(), Failure> {
    let target = stacks::close(target, &arguments.target).await;
    let source = stacks::close(source, &arguments.source).await;
    target.and(source)
}

/// Opens the target; a file that is not there gets the source's size.
async fn open_target(to: Plan, registry: &Registry, source: Geometry) -> Result<Device, Failure> {
    let Some(path) = missing_file(&to) else {
        return stacks::open(&to).await;
    };
    let sized = stacks::with_item(&to, &format!("size={}", source.size), registry);
    let target = stacks::open(&sized.unwrap_or(to)).await?;
    note(&format!(
        "created {} with the source's size, {}",
        path.display(),
        size(source.size)
    ));
    Ok(target)
}

/// The file that `plan` rests on, if it does not exist and no size for it is given.
fn missing_file(plan: &Plan) -> Option<PathBuf> {
    let bottom = plan.options().next()?;
    if bottom.entry().name != "file" || bottom.is_given("size") {
        return None;
    }
    let path: PathBuf = bottom.get("path")?;
    // A dangling link is not "not there": opening it tells.
    (path.symlink_metadata().err()?.kind() == std::io::ErrorKind::NotFound).then_some(path)
}

fn explain(error: CopyError, arguments: &Copy) -> Failure {
    let target = &arguments.target;
    Failure::Failed(match error {
        CopyError::TooShort { source_size, .. } => format!(
            "{error}: nothing was written; give it at least {source_size} bytes ({}), or take a part of the source",
            size(source_size)
        ),
        CopyError::ReadOnly => format!("`{target}` is read-only: nothing was written"),
        CopyError::Flush(_) => {
            format!("{error}: everything was written, but may not survive a crash; copy again")
        }
        CopyError::Differs { .. } => {
            format!("{error}: one of the disks is faulty, or was written to meanwhile")
        }
        error => format!("{error}; the target is incomplete"),
    })
}

fn summary(copied: &Copied, verified: bool) -> String {
    let mut text = format!(
        "copied {}: {} written, {} made zero, {} zero in both",
        size(copied.size),
        size(copied.data),
        size(copied.zeroed),
        size(copied.skipped)
    );
    if verified {
        text.push_str("; verified");
    }
    if copied.tail > 0 {
        text.push_str(&format!(
            "; the target is longer: its last {} were left as they were",
            size(copied.tail)
        ));
    }
    text
}
