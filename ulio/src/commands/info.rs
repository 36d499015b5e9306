//! `ulio info`: what a disk is, what it claims, and where its data lies.

use serde::Serialize;
use userland_io::stack::{Item, Plan, Registry};
use userland_io::transports::nbd::{Client, ConnectError, Uri};
use userland_io::{
    CrashLevel, Device, Discard, Error, Extent, ExtentKind, Extents, Features, Geometry,
};

use crate::cli::Info;
use crate::errors::Failure;
use crate::output::{Results, one_line, size};
use crate::stacks;

/// How many runs are asked for at once.
const RUNS_AT_ONCE: usize = 4096;

pub(crate) async fn run(arguments: Info, registry: &Registry) -> Result<(), Failure> {
    let plan = stacks::parse(&arguments.stack, registry)?;
    let name = plan.to_string();
    let exports = match server(&plan) {
        Some(uri) => list(&uri).await?,
        None => Vec::new(),
    };
    let disk = match stacks::open(&plan).await {
        Ok(disk) => disk,
        // There is no default export to show; what there is answers the question.
        Err(_) if !exports.is_empty() && exports.iter().all(|export| !export.name.is_empty()) => {
            return only_exports(&name, &exports, &arguments);
        }
        Err(failure) => return Err(failure),
    };
    let told = tell(&disk, &name, &exports, &arguments).await;
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

async fn tell(
    disk: &Device,
    name: &str,
    exports: &[Listed],
    arguments: &Info,
) -> Result<(), Failure> {
    let geometry = disk.geometry();
    let runs = match geometry.features.contains(Features::EXTENTS) {
        true => Some(walk(disk, geometry.size).await.map_err(|error| {
            Failure::of(format_args!("asking `{name}` for its extents"), error)
        })?),
        false => None,
    };
    let about = About {
        stack: name,
        geometry: &geometry,
        contexts: disk.contexts(),
        runs: runs.as_deref(),
        exports,
    };
    let mut results = Results::begin();
    match arguments.json {
        true => results.json(&about.json(arguments.map))?,
        false => about.text(arguments.map, &mut results)?,
    }
    results.end()
}

/// A run, and where it starts.
#[derive(Clone, Copy, Serialize)]
struct Placed {
    offset: u64,
    length: u64,
    kind: &'static str,
}

/// All runs of the disk. Neighbours of a kind are one, whatever pieces they came in.
async fn walk(disk: &Device, size: u64) -> Result<Vec<Placed>, Error> {
    let mut list: Vec<Placed> = Vec::new();
    let mut at = 0;
    while at < size {
        let mut out = Extents::new(RUNS_AT_ONCE);
        disk.extents(at..size, &mut out).await?;
        if out.is_empty() {
            return Err(Error::new(
                userland_io::ErrorKind::Io,
                format!("no extent was told at offset {at}"),
            ));
        }
        for &Extent { len, kind } in &out {
            let kind = match kind {
                ExtentKind::Data => "data",
                ExtentKind::Zero => "zero",
                ExtentKind::Hole => "hole",
            };
            match list.last_mut() {
                Some(last) if last.kind == kind => last.length += len,
                _ => list.push(Placed {
                    offset: at,
                    length: len,
                    kind,
                }),
            }
            at += len;
        }
    }
    Ok(list)
}

struct About<'a> {
    stack: &'a str,
    geometry: &'a Geometry,
    contexts: Vec<String>,
    runs: Option<&'a [Placed]>,
    exports: &'a [Listed],
}

#[derive(Serialize)]
struct Json<'a> {
    stack: &'a str,
    size: u64,
    read_only: bool,
    logical_block_size: u32,
    physical_block_size: u32,
    io_min: u32,
    io_opt: u32,
    max_transfer: u32,
    memory_alignment: u32,
    discard_granularity: u32,
    max_discard: u32,
    max_write_zeroes: u32,
    atomic_write_unit: u32,
    features: Vec<String>,
    discard: &'a str,
    crash: &'a str,
    contexts: &'a [String],
    extents: Option<Sums>,
    #[serde(skip_serializing_if = "Option::is_none")]
    map: Option<&'a [Placed]>,
    #[serde(skip_serializing_if = "<[Listed]>::is_empty")]
    exports: &'a [Listed],
}

/// Bytes of each kind.
#[derive(Serialize)]
struct Sums {
    data: u64,
    zero: u64,
    hole: u64,
    runs: usize,
}

impl About<'_> {
    fn json(&self, map: bool) -> Json<'_> {
        let geometry = self.geometry;
        Json {
            stack: self.stack,
            size: geometry.size,
            read_only: geometry.is_read_only(),
            logical_block_size: geometry.logical_block_size,
            physical_block_size: geometry.physical_block(),
            io_min: geometry.io_min,
            io_opt: geometry.io_opt,
            max_transfer: geometry.max_transfer,
            memory_alignment: geometry.memory_alignment,
            discard_granularity: geometry.discard_granule(),
            max_discard: geometry.max_discard,
            max_write_zeroes: geometry.max_write_zeroes,
            atomic_write_unit: geometry.atomic_write_unit,
            features: features(geometry),
            discard: match geometry.discard {
                Discard::None => "none",
                Discard::Unspecified => "unspecified",
                Discard::OldOrZero => "old-or-zero",
                Discard::Zeroes => "zeroes",
            },
            crash: match geometry.crash {
                CrashLevel::None => "none",
                CrashLevel::Flush => "flush",
                CrashLevel::Prefix => "prefix",
                CrashLevel::Sync => "sync",
            },
            contexts: &self.contexts,
            extents: self.sums(),
            map: self.runs.filter(|_| map),
            exports: self.exports,
        }
    }

    fn sums(&self) -> Option<Sums> {
        let runs = self.runs?;
        let of = |kind| {
            let these = runs.iter().filter(|run| run.kind == kind);
            these.map(|run| run.length).sum()
        };
        Some(Sums {
            data: of("data"),
            zero: of("zero"),
            hole: of("hole"),
            runs: runs.len(),
        })
    }

    fn text(&self, map: bool, results: &mut Results) -> Result<(), Failure> {
        let geometry = self.geometry;
        let limit = |bytes: u32| match bytes {
            0 => "no limit".to_owned(),
            bytes => size(bytes.into()),
        };
        results.line(self.stack)?;
        let mut row = |label: &str, text: String| results.line(format_args!("  {label:<12}{text}"));
        row(
            "size",
            match geometry.size {
                bytes @ ..1024 => size(bytes),
                bytes => format!("{} ({bytes} bytes)", size(bytes)),
            },
        )?;
        row(
            "access",
            match geometry.is_read_only() {
                true => "read-only".to_owned(),
                false => "read and write".to_owned(),
            },
        )?;
        row(
            "blocks",
            format!(
                "{} logical, {} physical",
                size(geometry.logical_block_size.into()),
                size(geometry.physical_block().into())
            ),
        )?;
        row("transfers", limit(geometry.max_transfer))?;
        if geometry.io_min != 0 || geometry.io_opt != 0 {
            row(
                "preferred",
                format!(
                    "{} at least, {} best",
                    size(geometry.io_min.into()),
                    size(geometry.io_opt.into())
                ),
            )?;
        }
        if !geometry.is_read_only() {
            row("discard", discard(geometry))?;
            row("a crash", crash(geometry).to_owned())?;
        }
        let features = features(geometry);
        if !features.is_empty() {
            row("features", features.join(", "))?;
        }
        if !self.contexts.is_empty() {
            row("contexts", one_line(&self.contexts.join(", ")))?;
        }
        row(
            "allocation",
            match self.sums() {
                None => "not told: all counts as data".to_owned(),
                Some(sums) => format!(
                    "{} data, {} zero, {} hole, in {} run{}",
                    size(sums.data),
                    size(sums.zero),
                    size(sums.hole),
                    sums.runs,
                    if sums.runs == 1 { "" } else { "s" }
                ),
            },
        )?;
        // A single one is what is shown already.
        if self.exports.len() > 1 {
            text_of(self.exports, results)?;
        }
        if map {
            results.line("")?;
            results.line(format_args!("{:>20} {:>20}  kind", "offset", "length"))?;
            let whole = [Placed {
                offset: 0,
                length: geometry.size,
                kind: "data",
            }];
            for run in self.runs.unwrap_or(&whole) {
                results.line(format_args!(
                    "{:>20} {:>20}  {}",
                    run.offset, run.length, run.kind
                ))?;
            }
        }
        Ok(())
    }
}

/// The features' names, as the library spells them but in lower case.
fn features(geometry: &Geometry) -> Vec<String> {
    let names = geometry.features.iter_names();
    names.map(|(name, _)| name.to_lowercase()).collect()
}

fn discard(geometry: &Geometry) -> String {
    let reads = match geometry.discard {
        Discard::None => return "none".to_owned(),
        Discard::Unspecified => "reads as anything",
        Discard::OldOrZero => "reads as before or as zeroes",
        Discard::Zeroes => "reads as zeroes",
    };
    format!(
        "{reads}, in granules of {}",
        size(geometry.discard_granule().into())
    )
}

fn crash(geometry: &Geometry) -> &'static str {
    match geometry.crash {
        CrashLevel::None => "leaves nothing",
        CrashLevel::Flush => "keeps what a flush covered",
        CrashLevel::Prefix => "keeps what a flush covered, and of the rest a prefix",
        CrashLevel::Sync => "keeps every completed write",
    }
}
