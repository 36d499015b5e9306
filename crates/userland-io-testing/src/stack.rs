//! Subjects from words: a stack as `ulio` takes it, over a simulated disk where that is possible.
//!
//! The word at the bottom that only holds bytes (`file:...`, `memory:SIZE`) opens a [`SimDisk`] instead; the
//! layers above it are the real ones. What needs real time, fails on purpose, or keeps its bytes elsewhere stays real:
//! then [`simulate`] says why.

use std::cell::RefCell;
use std::io::{Seek, SeekFrom};

use userland_io::stack::{Plan, Registry};
use userland_io::{
    AnyEngine, Checked, CrashLevel, Engine, EngineExt, Features, Filter, Geometry, Result,
};

use crate::Subject;
use crate::sim::{DiskConfig, SimDisk};

/// The engines that only hold bytes.
const HOLDERS: [&str; 2] = ["file", "memory"];

/// The layers that cannot run in a simulated world, and why.
const REAL: [(&str, &str); 3] = [
    ("delay", "needs real time"),
    ("fault", "fails by itself"),
    ("partition", "needs a partition table on the disk"),
];

/// How long a simulated disk is at most beyond what the layers need of it: a blank one is made for every run.
const ENOUGH: u64 = 1 << 20;

/// The block of a simulated disk in bytes: what a crash does not tear.
const BLOCK: u32 = 512;

thread_local! {
    /// The disk that the next bottom word opens on this thread. Put there and taken within one poll.
    static NEXT: RefCell<Option<SimDisk>> = const { RefCell::new(None) };
}

/// A stack over a simulated disk.
#[derive(Debug)]
pub struct Simulation {
    /// The word that the simulated disk stands for.
    pub bottom: String,
    /// The length of the simulated disk in bytes.
    pub size: u64,
    /// Its logical block size in bytes.
    pub block: u32,
    plan: Plan,
}

/// The words of `plan` over a simulated disk.
///
/// # Errors
/// Why that cannot be, in words.
pub fn simulate(registry: &Registry, plan: &Plan) -> Result<Simulation, String> {
    let mut words = plan.options();
    let bottom = words.next().ok_or("a stack has at least one word")?;
    let name = bottom.entry().name;
    if !HOLDERS.contains(&name) {
        return Err(format!(
            "`{name}` keeps its bytes elsewhere than on a disk below"
        ));
    }
    let mut needed = Some(0_u64);
    for layer in words {
        let name = layer.entry().name;
        if let Some((_, why)) = REAL.iter().find(|(real, _)| *real == name) {
            return Err(format!("`{name}` {why}"));
        }
        needed = match (needed, name) {
            (_, "readonly" | "stats") => needed,
            (Some(needed), "offset") => {
                let [start, size] = ["start", "size"].map(|key| layer.get::<u64>(key));
                let window = start.unwrap_or(0).saturating_add(size.unwrap_or(0));
                Some(needed.saturating_add(window))
            }
            _ => None,
        };
    }
    let given: Option<u64> = bottom.get("size");
    let size = match given {
        Some(size) => size,
        None => bottom
            .get::<std::path::PathBuf>("path")
            .and_then(|path| length(&path))
            .ok_or("how long is it? Give a size, such as file:disk.img,size=1M")?,
    };
    let size = match needed {
        Some(needed) => size.min(needed.saturating_add(ENOUGH)),
        None => size,
    };
    let mut simulated = registry.clone();
    for (_, entry) in registry.entries() {
        if HOLDERS.contains(&entry.name) {
            simulated = simulated.engine(entry.clone(), |_| {
                let disk = NEXT.with(|next| next.borrow_mut().take());
                async {
                    let missing = || userland_io::Error::from(userland_io::ErrorKind::Invalid);
                    Ok(disk.ok_or_else(missing)?.erase())
                }
            });
        }
    }
    let plan = simulated
        .plan(plan.words().clone())
        .map_err(|error| error.to_string())?;
    Ok(Simulation {
        bottom: plan
            .words()
            .iter()
            .next()
            .map(ToString::to_string)
            .unwrap_or_default(),
        size,
        block: BLOCK,
        plan,
    })
}

/// How long a file or a block device is.
fn length(path: &std::path::Path) -> Option<u64> {
    let mut file = std::fs::File::open(path).ok()?;
    match file.metadata().ok()?.is_dir() {
        true => None,
        false => file.seek(SeekFrom::End(0)).ok(),
    }
}

impl Simulation {
    /// The stack, named by its words, checked against `claim` or, if that is none, its own.
    pub fn subject(&self, claim: Option<CrashLevel>) -> Subject {
        let plan = self.plan.clone();
        let name = plan.to_string();
        Subject::new(name, self.disk(), move |disk| {
            let plan = plan.clone();
            async move {
                let engine = open(&plan, disk).await?;
                claimed(engine, claim)
            }
        })
    }

    /// As [`subject`](Self::subject), with whatever `over` makes of the stack above it: ways to it.
    pub fn subject_over<F>(
        &self,
        claim: Option<CrashLevel>,
        over: impl Fn(AnyEngine) -> F + Clone + Send + Sync + 'static,
    ) -> Subject
    where
        F: Future<Output = Result<Vec<AnyEngine>>> + 'static,
    {
        let plan = self.plan.clone();
        let name = plan.to_string();
        Subject::over(name, vec![self.disk()], move |mut disks| {
            let (plan, over) = (plan.clone(), over.clone());
            let disk = disks.remove(0);
            async move {
                let engine = open(&plan, disk).await?;
                let fronts = over(engine).await?;
                fronts
                    .into_iter()
                    .map(|front| claimed(front, claim))
                    .collect()
            }
        })
    }

    fn disk(&self) -> DiskConfig {
        DiskConfig::new(self.size, self.block)
    }
}

async fn open(plan: &Plan, disk: SimDisk) -> Result<AnyEngine> {
    // The bottom is opened in the first poll, before anything else can run on this thread.
    NEXT.with(|next| *next.borrow_mut() = Some(disk));
    let opened = plan.open().await;
    opened.map_err(|error| userland_io::Error::new(userland_io::ErrorKind::Io, error))
}

/// The engine with another claim about crashes than its own; `None`: with its own.
///
/// # Errors
/// If its geometry contradicts itself.
pub fn claimed(engine: AnyEngine, claim: Option<CrashLevel>) -> Result<AnyEngine> {
    Ok(match claim {
        None => engine,
        Some(level) => Claimed {
            lower: Checked::new(engine)?,
            level,
        }
        .erase(),
    })
}

struct Claimed {
    lower: Checked<AnyEngine>,
    level: CrashLevel,
}

impl Filter for Claimed {
    type Lower = AnyEngine;

    fn lower(&self) -> &Checked<AnyEngine> {
        &self.lower
    }

    fn geometry(&self) -> Geometry {
        let mut geometry = self.lower.geometry();
        geometry.crash = self.level;
        if self.level == CrashLevel::Sync {
            geometry.features.remove(Features::VOLATILE_CACHE);
        }
        geometry
    }
}
