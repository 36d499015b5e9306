//! `ulio copy`: opens two disks, and lets the library copy one onto the other.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

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
    if let Some(path) = same_file(&from, &to) {
        return Err(Failure::Failed(format!(
            "source and target are the same file, {}: a disk is not copied onto itself",
            path.display()
        )));
    }
    let mut signals = Signals::listen()?;

    // Removed when dropped, unless the copy began.
    let (source, target, created) = tokio::select! {
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
    signals.leave_on_next("without waiting for the disks");
    let closed = close(source, target, &arguments).await;
    let refused = matches!(
        result,
        Some(Err(CopyError::TooShort { .. } | CopyError::ReadOnly))
    );
    if let Some(created) = created.filter(|_| !refused) {
        created.keep();
    }

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
) -> Result<(Device, Device, Option<Created>), Failure> {
    let source = stacks::open(&stacks::read_only(from, registry)).await?;
    match open_target(to, registry, source.geometry()).await {
        Ok((target, created)) => Ok((source, target, created)),
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

/// Opens the target; a file that is not there gets the source's size, unless one is given.
async fn open_target(
    to: Plan,
    registry: &Registry,
    source: Geometry,
) -> Result<(Device, Option<Created>), Failure> {
    let Some(file) = file(&to).filter(|file| !file.refuses) else {
        return Ok((stacks::open(&to).await?, None));
    };
    // Where that fails, opening it says why.
    let Ok(created) = Created::new(&file.path) else {
        return Ok((stacks::open(&to).await?, None));
    };
    if file.sized {
        return Ok((stacks::open(&to).await?, Some(created)));
    }
    let sized = stacks::with_item(&to, &format!("size={}", source.size), registry);
    let target = stacks::open(&sized.unwrap_or(to)).await?;
    note(&format!(
        "created {} with the source's size, {}",
        file.path.display(),
        size(source.size)
    ));
    Ok((target, Some(created)))
}

/// The file that a stack rests on.
struct Bottom {
    path: PathBuf,
    sized: bool,
    /// It is not to be created.
    refuses: bool,
}

fn file(plan: &Plan) -> Option<Bottom> {
    let bottom = plan.options().next()?;
    (bottom.entry().name == "file").then_some(())?;
    Some(Bottom {
        path: bottom.get("path")?,
        sized: bottom.is_given("size"),
        refuses: bottom.flag("readonly") || bottom.flag("existing"),
    })
}

/// The file that both rest on, as the source names it.
fn same_file(from: &Plan, to: &Plan) -> Option<PathBuf> {
    let (from, to) = (file(from)?.path, file(to)?.path);
    (Identity::of(&from)? == Identity::of(&to)?).then_some(from)
}

/// Tells a file from others, whatever path leads to it.
#[derive(PartialEq, Eq)]
struct Identity(#[cfg(unix)] (u64, u64), #[cfg(not(unix))] PathBuf);

impl Identity {
    #[cfg(unix)]
    fn of(path: &Path) -> Option<Self> {
        use std::os::unix::fs::MetadataExt;
        let found = path.metadata().ok()?;
        Some(Identity((found.dev(), found.ino())))
    }

    #[cfg(not(unix))]
    fn of(path: &Path) -> Option<Self> {
        path.canonicalize().ok().map(Identity)
    }
}

/// A file that was not there before, still empty for the engine to size. Dropped, it is removed again.
struct Created {
    path: PathBuf,
    identity: Option<Identity>,
}

impl Created {
    fn new(path: &Path) -> io::Result<Self> {
        File::create_new(path)?;
        Ok(Created {
            path: path.to_owned(),
            identity: Identity::of(path),
        })
    }

    /// It stays.
    fn keep(mut self) {
        self.identity = None;
    }
}

impl Drop for Created {
    fn drop(&mut self) {
        // Another's by now, if it is another one.
        if self.identity.is_some() && Identity::of(&self.path) == self.identity {
            let _ = std::fs::remove_file(&self.path);
        }
    }
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
