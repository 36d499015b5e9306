//! `ulio attach`: a block device under /dev, until a signal or `ulio detach` ends it.
//!
//! The words are read before anything is opened. The first signal waits until nobody uses the device, then the library
//! flushes the disk and takes the device away; what goes wrong there is the command's failure.

mod background;

use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use userland_io::Engine;
use userland_io::attach::{self, AttachError, Attached, Builder, DetachError, State};
use userland_io::stack::{Plan, Registry};

use crate::cli::Attach;
use crate::errors::Failure;
use crate::output::{Results, note, one_line, size};
use crate::process::block_on;
use crate::service::Service;
use crate::signals::Signals;
use crate::stacks;
use background::Detached;

/// How often a device that is to go is looked at: is it still in use?
const LOOK_AGAIN: Duration = Duration::from_millis(500);

pub(crate) fn run(arguments: Attach, registry: &Registry) -> Result<(), Failure> {
    let plan = stacks::parse(&arguments.stack, registry)?;
    need_root(AttachError::NotRoot)?;
    let mut detached = None;
    if arguments.background {
        detached = Detached::this()?;
        if detached.is_none() {
            return block_on(background::start());
        }
    }
    // Threads that are made from here on inherit it.
    let protected = attach::protect();
    block_on(serve(arguments, plan, detached, protected))
}

/// Refuses whoever is not root, before anything is opened or created.
pub(super) fn need_root(error: impl std::fmt::Display) -> Result<(), Failure> {
    match rustix::process::geteuid().is_root() {
        true => Ok(()),
        false => Err(Failure::Failed(error.to_string())),
    }
}

async fn serve(
    arguments: Attach,
    plan: Plan,
    detached: Option<Detached>,
    protected: io::Result<()>,
) -> Result<(), Failure> {
    let service = Service::find();
    // Before an image is created: from here on a signal ends it in order.
    let mut signals = Signals::listen()?;
    let mut attaching = tokio::select! {
        attaching = prepare(&arguments, &plan) => attaching?,
        () = signals.next() => return Err(Failure::Failed(INTERRUPTED.to_owned())),
    };
    let is_recoverable = arguments.recoverable || arguments.resume.is_some();
    // Once begun it is not broken off: that could leave a device behind.
    let attached = tokio::select! {
        attached = &mut attaching => attached,
        () = signals.next() => {
            signals.leave_on_next("while the device was made: `ulio list --stale` shows what is left");
            if let Ok(attached) = attaching.await {
                end(attached, &plan, &service).await?;
            }
            return Err(Failure::Failed(INTERRUPTED.to_owned()));
        }
    };
    let attached = attached.map_err(|error| Failure::Failed(error.to_string()))?;
    let told = announce(&attached, &plan, arguments.background, protected)
        .and_then(|()| detached.map_or(Ok(()), Detached::ready));
    if let Err(failure) = told {
        // Nobody was told where it is. What comes of its end matters less than why.
        let _ = end(attached, &plan, &service).await;
        return Err(failure);
    }
    let path = attached.path().display().to_string();
    service.ready(&format!("{path}: {plan}"));

    tokio::select! {
        why = attached.ended() => match why {
            None => {
                note(&format!("{path} was detached"));
                Ok(())
            }
            Some(why) => Err(Failure::of(path, why)),
        },
        () = signals.next() => {
            note("stopping: flushing and detaching; once more leaves at once");
            signals.leave_on_next(left(&attached, &plan, is_recoverable));
            end(attached, &plan, &service).await
        }
    }
}

const INTERRUPTED: &str = "interrupted before the device was ready";

/// What attaches, once it is polled.
type Attaching = Pin<Box<dyn Future<Output = Result<Attached, AttachError>>>>;

/// Opens the disk, and says how it is to be attached.
async fn prepare(arguments: &Attach, plan: &Plan) -> Result<Attaching, Failure> {
    let label = stacks::absolute(plan);
    let mut resume = arguments.resume.clone();
    if resume.is_none() && arguments.recoverable {
        resume = waiting(&label)?;
    }
    let how = How {
        arguments,
        label,
        resume,
    };
    Ok(match stacks::bare_uri(plan) {
        // The kernel can talk to the server itself, perhaps.
        Some(uri) => Box::pin(how.tell(Builder::export(uri)).attach()),
        None => Box::pin(how.tell(Builder::new(stacks::open(plan).await?)).attach()),
    })
}

/// How a disk is to be attached, whatever it is.
struct How<'a> {
    arguments: &'a Attach,
    label: String,
    resume: Option<PathBuf>,
}

impl How<'_> {
    fn tell<E: Engine>(self, builder: Builder<E>) -> Builder<E> {
        let mut builder = builder
            .read_only(self.arguments.read_only)
            .recoverable(self.arguments.recoverable)
            .label(self.label);
        if let Some(via) = self.arguments.via {
            builder = builder.via(via);
        }
        if let Some(queues) = self.arguments.queues {
            builder = builder.queues(queues);
        }
        if let Some(depth) = self.arguments.depth {
            builder = builder.depth(depth);
        }
        if let Some(timeout) = self.arguments.timeout {
            builder = builder.timeout(timeout);
        }
        match self.resume {
            Some(path) => builder.resume(path),
            None => builder,
        }
    }
}

/// The device that a process before this one made of the same stack, and that waits for it. Another beside it would
/// make two disks of one.
fn waiting(label: &str) -> Result<Option<PathBuf>, Failure> {
    let listed = attach::list().map_err(|error| Failure::of("listing what is attached", error))?;
    let mut of_it = listed
        .iter()
        .filter(|listed| listed.state() == State::Waiting && listed.label() == label);
    let path = of_it.find_map(|listed| listed.path());
    if let Some(path) = path {
        note(&format!("resuming {}, which waits for it", path.display()));
    }
    Ok(path.map(ToOwned::to_owned))
}

/// Tells programs where the device is, and people how it came about.
fn announce(
    attached: &Attached,
    plan: &Plan,
    background: bool,
    protected: io::Result<()>,
) -> Result<(), Failure> {
    let path = attached.path().display();
    let mut results = Results::begin();
    match results.line(&path).and_then(|()| results.end()) {
        // It serves all the same.
        Err(Failure::OutputGone) => {}
        other => other?,
    }
    let (size, via) = (size(attached.size()), attached.via());
    let end = if background { "" } else { "Ctrl-C or " };
    note(&format!(
        "attached `{plan}`, {size}, by {via}; {end}`ulio detach {path}` detaches it"
    ));
    for passed in attached.passed_over() {
        note(&format!("  not by {}", one_line(&passed.to_string())));
    }
    if let Err(error) = protected {
        note(&format!("  it may get stuck when memory is short: {error}"));
    }
    Ok(())
}

/// What stays behind when this process leaves now.
fn left(attached: &Attached, plan: &Plan, is_recoverable: bool) -> String {
    let path = attached.path().display();
    match is_recoverable {
        true => format!("and {path} waits: `ulio attach --resume {path} {plan}` goes on with it"),
        false => format!(
            "and {path} fails from now on: `ulio detach --stale` removes it once nobody uses it"
        ),
    }
}

/// Detaches it as soon as nobody uses it, and tells who does.
async fn end(mut attached: Attached, plan: &Plan, service: &Service) -> Result<(), Failure> {
    service.stopping(&format!("detaching {}: {plan}", attached.path().display()));
    let mut told = String::new();
    loop {
        match attached.detach().await {
            Ok(()) => return Ok(()),
            Err(error @ (DetachError::InUse { .. } | DetachError::Refused { .. })) => {
                let text = format!("waiting: {}", one_line(&error.to_string()));
                if text != told {
                    note(&text);
                    service.stopping(&text);
                    told = text;
                }
            }
            Err(error) => return Err(Failure::Failed(error.to_string())),
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}
