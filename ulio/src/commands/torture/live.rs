//! In the real world: requests that truly run at the same time, on a disk that is there.

use std::time::Instant;

use userland_io::stack::Plan;
use userland_io::transports::nbd::Client;
use userland_io::{AnyEngine, Error, ErrorKind};
use userland_io_testing::live::{Live, Tokio, through_device};
use userland_io_testing::nbd::{Clients, connect, through_nbd};
use userland_io_testing::script::Mix;
use userland_io_testing::stack::Simulation;
use userland_io_testing::{Report, Subject, conformance};

use super::meter::Meter;
use super::report::Told;
use crate::cli::{Through, Torture};
use crate::errors::Failure;
use crate::output::note;
use crate::signals::Signals;

/// How often a script that is given is run.
const REPLAYS: u64 = 300;

/// A stack over a simulated disk, behind a socket.
pub(super) async fn served(
    simulation: Simulation,
    arguments: &Torture,
    signals: &mut Signals,
) -> Result<(), Failure> {
    let clients = clients(arguments);
    let claim = arguments.claim.map(Into::into);
    let subject = simulation.subject_over(claim, move |engine| through_nbd(engine, clients));
    let subject = shared(subject, clients);
    let name = subject.name().to_owned();
    scripts(&subject, name, false, arguments, signals).await
}

/// A stack as it is; `why` says why it is not simulated.
pub(super) async fn real(
    plan: Plan,
    why: &str,
    arguments: &Torture,
    signals: &mut Signals,
) -> Result<(), Failure> {
    let name = plan.to_string();
    let fails = plan.options().any(|word| word.entry().name == "fault");
    let (through, clients) = (arguments.through, clients(arguments));
    // What is wrong with the words, or the disk, is said as everywhere else.
    let engine = crate::stacks::open(&plan).await?;
    crate::stacks::close(engine, &name).await?;
    note(&format!(
        "no crashes, because nothing is simulated: {why}; the checks run on the disk itself"
    ));
    let subject = Subject::over(name.clone(), Vec::new(), move |_| {
        let plan = plan.clone();
        async move { fronts(&plan, through, clients).await }
    });
    let subject = shared(subject, clients);
    suite_then_scripts(&subject, name, fails, arguments, signals).await
}

fn clients(arguments: &Torture) -> Clients {
    Clients {
        count: arguments.clients,
        connections: arguments.connections,
    }
}

/// Clients that share a disk give up at an error.
fn shared(subject: Subject, clients: Clients) -> Subject {
    match clients.count {
        1 => subject,
        _ => subject.ends_on_errors(),
    }
}

async fn fronts(
    plan: &Plan,
    through: Option<Through>,
    clients: Clients,
) -> userland_io::Result<Vec<AnyEngine>> {
    let opened = plan.open().await;
    let engine = opened.map_err(|error| Error::new(ErrorKind::Io, error))?;
    match through {
        Some(Through::Nbd) => through_nbd(engine, clients).await,
        None => Ok(vec![through_device(engine).await?]),
    }
}

/// Somebody else's server.
pub(super) async fn somebodys(arguments: &Torture, signals: &mut Signals) -> Result<(), Failure> {
    let uri = arguments.uri.clone().unwrap_or_default();
    let clients = clients(arguments);
    let several = clients.count * clients.connections > 1;
    // What is wrong with the address, or the server, is said as everywhere else.
    let client = Client::connect(&uri).await;
    let client = client.map_err(|error| Failure::Failed(error.to_string()))?;
    if several && !client.can_multi_conn() {
        note("the server does not say that several connections are one disk: there is one");
    }
    let closed = userland_io::Engine::close(&client).await;
    closed.map_err(|error| Failure::of(&uri, error))?;
    let address = uri.clone();
    let subject = Subject::over(uri.clone(), Vec::new(), move |_| {
        let uri = address.clone();
        async move { connect(&uri, clients).await }
    });
    let subject = shared(subject, clients);
    suite_then_scripts(&subject, uri, false, arguments, signals).await
}

async fn suite_then_scripts(
    subject: &Subject,
    name: String,
    fails: bool,
    arguments: &Torture,
    signals: &mut Signals,
) -> Result<(), Failure> {
    let only_one = arguments.script.is_some() || arguments.seed.is_some();
    if !fails && !only_one {
        let told = Told {
            arguments,
            name: name.clone(),
            live: true,
            simulated: false,
        };
        let open = async || {
            let mut fronts = subject.open_real().await?;
            Ok(fronts.remove(0))
        };
        let checked = tokio::select! {
            checked = conformance::all(open) => checked,
            () = signals.next() => return Err(Failure::Failed("interrupted".to_owned())),
        };
        checked.map_err(|verdict| told.suite(&verdict))?;
        note("the conformance suite passed; now many clients at once");
    }
    scripts(subject, name, fails, arguments, signals).await
}

async fn scripts(
    subject: &Subject,
    name: String,
    fails: bool,
    arguments: &Torture,
    signals: &mut Signals,
) -> Result<(), Failure> {
    let told = Told {
        arguments,
        name,
        live: true,
        simulated: !subject.is_real(),
    };
    let mut live = Live::new(subject, &Tokio);
    if !arguments.gentle {
        let mix = Mix {
            clients: 16,
            ops: 80,
            ..Mix::default()
        };
        live = live.mix(mix.hostile());
    }
    if fails {
        live = live.errors_allowed();
    }
    if let Some(script) = &arguments.script {
        return match live.replay(script, REPLAYS).await {
            Ok(report) => told.well(&report),
            Err(found) => Err(told.failed(&found)),
        };
    }
    let meter = Meter::new();
    let deadline = super::deadline(arguments);
    let seeds = super::seeds(arguments, 300);
    let last = std::cell::Cell::new(None);
    let result = tokio::select! {
        result = live.run(seeds, |report: &Report| {
            meter.tell(report);
            last.set(Some(*report));
            deadline.is_none_or(|deadline| Instant::now() < deadline)
        }) => result,
        () = signals.next() => {
            meter.end();
            return match last.get() {
                Some(report) => told.interrupted(&report),
                None => Err(Failure::Failed("interrupted".to_owned())),
            };
        }
    };
    meter.end();
    match result {
        Ok(report) => told.well(&report),
        Err(found) => Err(told.failed(&found)),
    }
}
