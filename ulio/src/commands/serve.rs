//! `ulio serve`: disks for NBD clients.

use userland_io::stack::{Plan, Registry};

use crate::cli::Serve;
use crate::errors::Failure;

pub(crate) async fn run(arguments: Serve, registry: &Registry) -> Result<(), Failure> {
    let _plans = plans(&arguments, registry)?;
    Err(Failure::Failed("this build has no server yet".to_owned()))
}

/// The exports' names and stacks, the default one first. Nothing is opened yet.
fn plans(arguments: &Serve, registry: &Registry) -> Result<Vec<(String, Plan)>, Failure> {
    let mut plans: Vec<(String, Plan)> = Vec::new();
    if !arguments.stack.is_empty() {
        plans.push((String::new(), registry.parse_args(&arguments.stack)?));
    }
    for export in &arguments.export {
        if plans.iter().any(|(name, _)| *name == export.name) {
            return Err(Failure::Usage(match export.name.as_str() {
                "" => {
                    "the default export is given twice: as words, and as --export =...".to_owned()
                }
                name => format!("the export `{name}` is given twice: choose another name"),
            }));
        }
        plans.push((export.name.clone(), registry.parse(&export.stack)?));
    }
    Ok(plans)
}
