//! `ulio info`: what a disk is, what it claims, and where its data lies.

mod about;
mod walk;

use serde::Serialize;
use userland_io::stack::{Item, Plan, Registry};
use userland_io::transports::nbd::{Client, ConnectError, Uri};
use userland_io::{Device, Features};

use crate::cli::Info;
use crate::errors::Failure;
use crate::output::{Results, one_line};
use crate::stacks;
use about::About;
use walk::{Placed, walk};

pub(crate) async fn run(arguments: Info, registry: &Registry) -> Result<(), Failure> {
    let plan = stacks::parse(&arguments.stack, registry)?;
    let name = plan.to_string();
    let exports = match server(&plan) {
        Some(uri) => list(&uri).await?,
        None => Vec::new(),
    };
    let disk = match stacks::open(&stacks::existing(&plan, registry)).await {
        Ok(disk) => disk,
        // There is no default export to show; what there is answers the question.
        Err(_) if !exports.is_empty() && exports.iter().all(|export| !export.name.is_empty()) => {
            return only_exports(&name, &exports, &arguments);
        }
        Err(failure) => return Err(failure),
    };
    let is_remote = stacks::bottom(&plan) == Some("nbd");
    let about = About {
        stack: &name,
        geometry: &disk.geometry(),
        is_remote,
        contexts: disk.contexts(),
        exports: &exports,
    };
    let told = tell(&disk, &about, &arguments).await;
    let closed = stacks::close(disk, &name).await;
    told.and(closed)
}

/// The server's address, if the stack is that alone, and names no export.
fn server(plan: &Plan) -> Option<Uri> {
    let word = plan
        .words()
        .iter()
        .next()
        .filter(|_| plan.words().len() == 1)?;
    let is_nbd = plan.options().next()?.entry().name == "nbd";
    let Item::Bare(text) = word.items.first().filter(|_| is_nbd)? else {
        return None;
    };
    text.text
        .parse()
        .ok()
        .filter(|uri: &Uri| uri.export().is_empty())
}

/// What a server lists. One that keeps its list to itself has none.
async fn list(server: &Uri) -> Result<Vec<Listed>, Failure> {
    let listed = match Client::list(&server.to_string()).await {
        Ok(listed) => listed,
        // Once is long enough. Every other reason is told when the disk is opened.
        Err(error @ ConnectError::Timeout { .. }) => return Err(Failure::of(server, error)),
        Err(error) => {
            tracing::debug!(%server, %error, "no list of exports");
            Vec::new()
        }
    };
    let listed = listed.into_iter().map(|export| Listed {
        uri: Uri::new(server.address().clone(), &export.name).to_string(),
        name: export.name,
        description: export.description,
    });
    Ok(listed.collect())
}

/// Prints `about` and where the data lies. A map is printed as it is told: it may be longer than memory.
async fn tell(disk: &Device, about: &About<'_>, arguments: &Info) -> Result<(), Failure> {
    let size = about.geometry.size;
    let asking = format!("asking `{}` for its extents", about.stack);
    let failed = |error| Failure::of(&asking, error);
    if !about.geometry.features.contains(Features::EXTENTS) {
        let mut results = Results::begin();
        match arguments.json {
            true => {
                about.json_head(&mut results)?;
                about::json_end(None, &mut results)?;
            }
            false => {
                about.text(&mut results)?;
                about::allocation(None, &mut results)?;
                about.text_of_exports(&mut results)?;
                if arguments.map {
                    about::map_head(&mut results)?;
                    results.line(Placed::whole(size))?;
                }
            }
        }
        return results.end();
    }
    match (arguments.map, arguments.json) {
        (false, json) => {
            // What fails is known before anything is printed.
            let sums = walk(disk, size, failed, |_| Ok(())).await?;
            let mut results = Results::begin();
            if json {
                about.json_head(&mut results)?;
                about::json_end(Some(sums), &mut results)?;
            } else {
                about.text(&mut results)?;
                about::allocation(Some(sums), &mut results)?;
                about.text_of_exports(&mut results)?;
            }
            results.end()
        }
        (true, true) => {
            let mut results = Results::begin();
            about.json_head(&mut results)?;
            results.bytes(b",\n  \"map\": [")?;
            let mut comma = "";
            let sums = walk(disk, size, failed, |run| {
                let run = serde_json::to_string(&run).map_err(|e| Failure::of("JSON", e))?;
                results.bytes(format!("{comma}\n    {run}").as_bytes())?;
                comma = ",";
                Ok(())
            });
            let sums = sums.await?;
            results.bytes(b"\n  ]")?;
            about::json_end(Some(sums), &mut results)?;
            results.end()
        }
        (true, false) => {
            let mut results = Results::begin();
            about.text(&mut results)?;
            about.text_of_exports(&mut results)?;
            about::map_head(&mut results)?;
            let sums = walk(disk, size, failed, |run| results.line(run)).await?;
            results.line("")?;
            about::allocation(Some(sums), &mut results)?;
            results.end()
        }
    }
}

/// An export that a server lists.
#[derive(Serialize)]
struct Listed {
    name: String,
    description: String,
    uri: String,
}

fn only_exports(name: &str, exports: &[Listed], arguments: &Info) -> Result<(), Failure> {
    let mut results = Results::begin();
    match arguments.json {
        true => results.json(&serde_json::json!({ "stack": name, "exports": exports }))?,
        false => {
            results.line(name)?;
            results.line("  there is no default export; name one of these:")?;
            text_of(exports, &mut results)?;
        }
    }
    results.end()
}

fn text_of(exports: &[Listed], results: &mut Results) -> Result<(), Failure> {
    for export in exports {
        results.line(format_args!("  {:<12}{}", "export", export.uri))?;
        if !export.description.is_empty() {
            results.line(format_args!(
                "  {:<14}{}",
                "",
                one_line(&export.description)
            ))?;
        }
    }
    Ok(())
}
