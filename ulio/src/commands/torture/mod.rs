//! `ulio torture`: chooses the world that a stack can be checked in, and lets the proof kit do it.

mod live;
mod meter;
mod report;
mod simulated;

use userland_io::CrashLevel;
use userland_io::stack::{Plan, Registry};
use userland_io_testing::stack::simulate;

use crate::cli::{Claim, Torture};
use crate::errors::Failure;
use crate::output::{note, size};
use crate::signals::Signals;

pub(crate) async fn run(arguments: Torture, registry: &Registry) -> Result<(), Failure> {
    let mut signals = Signals::listen()?;
    if arguments.clients * arguments.connections > 1
        && arguments.uri.is_none()
        && arguments.through.is_none()
    {
        let text = "--clients and --connections are those of a server: say --through nbd, or --uri";
        return Err(Failure::Usage(text.to_owned()));
    }
    let Some(plan) = stack(&arguments, registry)? else {
        return live::somebodys(&arguments, &mut signals).await;
    };
    let simulation = match arguments.real {
        true => Err("--real says so".to_owned()),
        false => simulate(registry, &plan),
    };
    if matches!(&simulation, Ok(simulation) if simulation.size == 0) {
        return Err(Failure::Usage(format!("`{plan}` has no bytes to check")));
    }
    match simulation {
        Ok(simulation) => {
            // What is wrong with the words breaks no promise.
            let opened = simulation.subject(None).open_blank();
            opened.map_err(|error| Failure::Failed(error.to_string()))?;
            let len = size(simulation.size);
            note(&format!(
                "`{}` is played by a simulated disk: {len} in blocks of {} bytes, which fails and crashes; nothing real is touched",
                simulation.bottom, simulation.block
            ));
            match arguments.through {
                None => simulated::run(simulation, &arguments, &mut signals).await,
                Some(_) => live::served(simulation, &arguments, &mut signals).await,
            }
        }
        Err(why) => {
            if arguments.claim.is_some() {
                let rule = "--claim is about crashes, and only a simulated disk crashes";
                return Err(Failure::Usage(format!("{rule}: {why}")));
            }
            consent(&plan, &arguments)?;
            live::real(plan, &why, &arguments, &mut signals).await
        }
    }
}

fn stack(arguments: &Torture, registry: &Registry) -> Result<Option<Plan>, Failure> {
    match &arguments.uri {
        None => Ok(Some(registry.parse_args(&arguments.stack)?)),
        Some(uri) if arguments.overwrite => {
            if arguments.claim.is_some() {
                let text = "--claim is about crashes, and somebody else's server cannot be crashed";
                return Err(Failure::Usage(text.to_owned()));
            }
            note(&format!("what {uri} holds is being overwritten"));
            Ok(None)
        }
        Some(uri) => Err(Failure::Usage(format!(
            "this destroys what {uri} holds: say --overwrite if that is meant"
        ))),
    }
}

/// What is there already is not overwritten unasked.
fn consent(plan: &Plan, arguments: &Torture) -> Result<(), Failure> {
    let Some(bottom) = plan.options().next().filter(|_| !arguments.overwrite) else {
        return Ok(());
    };
    let there = match bottom.entry().name {
        "memory" | "null" | "pattern" => false,
        "file" => bottom
            .get::<std::path::PathBuf>("path")
            .is_none_or(|path| path.symlink_metadata().is_ok()),
        _ => true,
    };
    match there {
        true => Err(Failure::Usage(format!(
            "this destroys what `{plan}` holds: say --overwrite if that is meant"
        ))),
        false => Ok(()),
    }
}

impl From<Claim> for CrashLevel {
    fn from(claim: Claim) -> Self {
        match claim {
            Claim::Flush => CrashLevel::Flush,
            Claim::Prefix => CrashLevel::Prefix,
            Claim::Sync => CrashLevel::Sync,
            Claim::None => CrashLevel::None,
        }
    }
}

/// The seeds to run, and until when.
fn seeds(arguments: &Torture, most: u64) -> std::ops::Range<u64> {
    match (arguments.seed, &arguments.seeds, arguments.minutes) {
        (Some(seed), ..) => seed..seed.saturating_add(1),
        (_, Some(seeds), _) => seeds.clone(),
        (_, _, Some(_)) => 0..u64::MAX,
        _ => 0..most,
    }
}

fn deadline(arguments: &Torture) -> Option<std::time::Instant> {
    let minutes = arguments.minutes? as u64;
    std::time::Instant::now().checked_add(std::time::Duration::from_secs(60 * minutes))
}
