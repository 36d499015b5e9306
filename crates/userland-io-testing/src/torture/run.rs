//! One script against one subject, from the first opening to the last verdict.

use std::cell::{Cell, RefCell};

use userland_io::{
    AnyEngine, Checked, CrashLevel, Engine, ErrorKind, Features, Geometry, ReadBuf, Result,
};

use super::Subject;
use super::desk::{Desk, left_alone, unread};
use crate::check::{Clause, History, Request, Shape, Verdict};
use crate::script::{End, Round, Script};
use crate::sim::{Executor, Keep, SimDisk, Step, World};

/// The longest window that is looked at, in cells.
const MOST_CELLS: usize = 128;

pub(super) struct Run<'s> {
    subject: &'s Subject,
    pub(super) world: World,
    pub(super) disks: Vec<SimDisk>,
    pub(super) fronts: Vec<Checked<AnyEngine>>,
    pub(super) geometry: Geometry,
    pub(super) history: History,
    seed: u64,
    /// A future was forgotten since the disk was opened: what it held may stay held.
    forgot: bool,
    /// Crashes and kills so far.
    pub(super) crashes: u64,
}

/// What came of a script.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) verdict: Result<(), Verdict>,
    pub(super) crashes: u64,
}

/// Runs a script to its end, or to the first thing that is wrong.
pub(super) fn run(subject: &Subject, script: &Script) -> Outcome {
    match Run::begin(subject, script.seed) {
        Err(verdict) => Outcome {
            verdict: Err(verdict),
            crashes: 0,
        },
        Ok(mut run) => {
            let mut rounds = script.rounds.iter();
            let verdict = rounds.try_for_each(|round| run.round(round));
            Outcome {
                verdict,
                crashes: run.crashes,
            }
        }
    }
}

impl<'s> Run<'s> {
    pub(super) fn begin(subject: &'s Subject, seed: u64) -> Result<Self, Verdict> {
        let world = World::new(seed);
        let new = |config: &crate::sim::DiskConfig| SimDisk::new(&world, config.clone());
        let disks: Vec<SimDisk> = subject.disks.iter().map(new).collect();
        let opened = open(subject, &world, &disks)?;
        let fronts = opened.ok_or_else(|| Verdict::new(Clause::Answer, "opening never ends"))?;
        let geometry = fronts[0].geometry();
        let shape = shape_of(subject, &geometry);
        let image = read_image(&world, &fronts[0], shape)?;
        Ok(Run {
            subject,
            disks,
            fronts,
            geometry,
            history: History::new(seed, 1, shape, image),
            seed,
            forgot: false,
            crashes: 0,
            world,
        })
    }

    fn round(&mut self, round: &Round) -> Result<(), Verdict> {
        let stop = match round.end {
            End::Crash { at, .. } | End::Kill { at } if at != u32::MAX => Some(u64::from(at)),
            _ => None,
        };
        self.act(round, stop)?;
        match round.end {
            End::Done => {
                self.look()?;
                self.history.check_live()
            }
            // What is held by a forgotten future, close would wait for.
            End::Close if self.forgot => {
                self.kill()?;
                self.look()?;
                self.history.check_live()
            }
            End::Close => {
                self.close()?;
                self.look()?;
                self.history.check_live()
            }
            End::Kill { .. } => {
                self.kill()?;
                self.look()?;
                self.history.check_live()
            }
            End::Crash { keep, again, .. } => {
                self.history.check_live()?;
                self.crash(keep, again)
            }
        }
    }

    /// Lets the clients work until all have answered, or until event `stop`.
    pub(super) fn act(&mut self, round: &Round, stop: Option<u64>) -> Result<(), Verdict> {
        if let Some(fault) = round.fault
            && let Some(disk) = self.disks.get(usize::from(fault.disk))
        {
            let nth = u64::from(fault.call);
            match fault.flush {
                true => disk.fail_flush(disk.flushes() + nth, fault.kind),
                false => disk.fail(disk.calls() + nth, fault.kind),
            }
        }
        let clients = round.actions.iter().map(|a| usize::from(a.client) + 1);
        let clients = clients.max().unwrap_or(0);
        let shape = self.history.shape();
        let first = self.history.next_op();
        let nothing = History::new(self.seed, 1, Shape { len: 0, ..shape }, Vec::new());
        let desk = Desk {
            world: &self.world,
            geometry: self.geometry,
            history: RefCell::new(std::mem::replace(&mut self.history, nothing)),
            complaint: RefCell::new(None),
            forgot: Cell::new(self.forgot),
            may_fail: round.fault.is_some()
                || self.subject.disks.iter().any(|d| d.capacity.is_some())
                || self.disks.iter().any(SimDisk::has_failed),
        };
        self.world.stop_after(stop);
        let mut executor = Executor::new(&self.world);
        for client in 0..clients {
            let mine = round.actions.iter();
            let mine = mine.filter(move |action| usize::from(action.client) == client);
            let front = &self.fronts[client % self.fronts.len()];
            executor.spawn(desk.client(front, client, mine));
        }
        let end = executor.run();
        drop(executor);
        self.world.stop_after(None);
        for disk in &self.disks {
            disk.clear_faults();
        }
        self.forgot = desk.forgot.get();
        self.history = desk.history.into_inner();
        self.check_edge()?;
        if let Some(complaint) = desk.complaint.into_inner() {
            return Err(complaint);
        }
        if end == Step::Stuck && !self.forgot {
            let open = self.history.unanswered(first);
            let what = format!("the disk is idle, but these never answer: {open}");
            return Err(Verdict::new(Clause::Answer, what));
        }
        Ok(())
    }

    /// What the layers did to the disks below.
    fn check_edge(&self) -> Result<(), Verdict> {
        match self.world.take_breaches().into_iter().next() {
            Some(breach) => Err(Verdict::new(Clause::Edge, breach)),
            None => Ok(()),
        }
    }

    /// Reads the whole window, as a client.
    fn look(&mut self) -> Result<(), Verdict> {
        let shape = self.history.shape();
        if self.forgot {
            self.kill()?;
            return self.look();
        }
        let id = self.history.start(0, Request::Read(0..shape.cells()));
        match read_image(&self.world, &self.fronts[0], shape) {
            Ok(image) => self.history.end_read(id, &Ok(image)),
            // A layer that cannot say what it holds while the disk below refuses to flush must say so.
            Err(_) if self.disks.iter().any(SimDisk::has_failed) => {
                self.history.end_read(id, &Err(ErrorKind::Io.into()));
                self.kill()?;
                return self.look();
            }
            Err(verdict) => return Err(verdict),
        }
        self.check_edge()
    }

    fn close(&mut self) -> Result<(), Verdict> {
        let id = self.history.start(0, Request::Close);
        let fronts = &self.fronts;
        let closing = async {
            let mut result = Ok(());
            for front in fronts {
                result = result.and(front.close().await);
            }
            result
        };
        let Some(result) = self.world.run(closing) else {
            return Err(Verdict::new(Clause::Answer, "close never answers"));
        };
        self.history.end(id, &result);
        self.check_edge()?;
        if result.is_err() {
            // It promised nothing: whoever opens the disk again has as much as if the process had died.
            return self.kill();
        }
        self.disks = self.disks.iter().map(SimDisk::reopen).collect();
        if self.geometry.crash == CrashLevel::None {
            // A memory: what it held is gone with it.
            return self.recover(CrashLevel::None, None);
        }
        self.history.killed();
        self.reopen()
    }

    fn kill(&mut self) -> Result<(), Verdict> {
        self.crashes += 1;
        self.disks = self.disks.iter().map(SimDisk::kill).collect();
        if !self.geometry.features.contains(Features::SURVIVES_KILL) {
            // Then it counts as a crash, after which all that the kernel had was written back.
            let disks = self.disks.iter();
            self.disks = disks.map(|disk| disk.crash(Keep::Everything)).collect();
            let level = self.geometry.crash;
            self.history.check_live()?;
            return self.recover(level, None);
        }
        self.history.killed();
        self.reopen()
    }

    fn reopen(&mut self) -> Result<(), Verdict> {
        let opened = open(self.subject, &self.world, &self.disks)?;
        self.forgot = false;
        self.fronts = opened.ok_or_else(|| Verdict::new(Clause::Answer, "opening never ends"))?;
        self.check_edge()
    }

    fn crash(&mut self, keep: Keep, again: Option<u32>) -> Result<(), Verdict> {
        self.crashes += 1;
        self.disks = self.disks.iter().map(|disk| disk.crash(keep)).collect();
        self.recover(self.geometry.crash, again)
    }

    /// Opens what a crash left, perhaps after another crash on the way, and judges it.
    pub(super) fn recover(&mut self, level: CrashLevel, again: Option<u32>) -> Result<(), Verdict> {
        if let Some(again) = again {
            self.world.stop_after(Some(u64::from(again)));
            let opened = open(self.subject, &self.world, &self.disks);
            let keep = self.any_keep();
            self.disks = self.disks.iter().map(|disk| disk.crash(keep)).collect();
            drop(opened?);
            self.world.stop_after(None);
        }
        self.reopen()?;
        let shape = shape_of(self.subject, &self.fronts[0].geometry());
        if shape != self.history.shape() {
            let what = format!(
                "the disk was {} bytes long, and after the crash it is {}",
                self.history.shape().len,
                shape.len
            );
            return Err(Verdict::new(Clause::Recovery, what));
        }
        let image = read_image(&self.world, &self.fronts[0], shape)?;
        self.history.check_crash(level, &image)?;
        if level != CrashLevel::None && self.world.one_in(4) {
            // Nothing was written since, so nothing may change.
            self.crashes += 1;
            let keep = self.any_keep();
            self.disks = self.disks.iter().map(|disk| disk.crash(keep)).collect();
            self.reopen()?;
            let second = read_image(&self.world, &self.fronts[0], shape)?;
            self.history.check_recovered(&image, &second)?;
        }
        self.geometry = self.fronts[0].geometry();
        self.history = History::new(self.seed, self.history.next_op(), shape, image);
        self.check_edge()
    }

    fn any_keep(&self) -> Keep {
        match self.world.draw(4) {
            0 => Keep::Nothing,
            1 => Keep::Everything,
            2 => Keep::Prefix,
            _ => Keep::Subset,
        }
    }

    /// Opens a copy of the disks as a crash would leave them, and judges that image. The run goes on untouched.
    pub(super) fn judge_image(&self, disks: Vec<SimDisk>) -> Result<(), Verdict> {
        let opened = open(self.subject, &self.world, &disks)?;
        let fronts = opened.ok_or_else(|| Verdict::new(Clause::Answer, "opening never ends"))?;
        let image = read_image(&self.world, &fronts[0], self.history.shape())?;
        self.history.check_crash(self.geometry.crash, &image)?;
        self.check_edge()
    }

    /// How many events opening a copy of the disks takes.
    pub(super) fn recovery_events(&self, disks: &[SimDisk]) -> Result<u64, Verdict> {
        let before = self.world.events();
        let copies: Vec<SimDisk> = disks.iter().map(|d| d.crash(Keep::Nothing)).collect();
        drop(open(self.subject, &self.world, &copies)?);
        Ok(self.world.events() - before)
    }

    /// Opens the disks, and stops at event `at` of that.
    pub(super) fn open_until(&self, disks: &[SimDisk], at: u64) {
        self.world.stop_after(Some(at));
        drop(open(self.subject, &self.world, disks));
        self.world.stop_after(None);
    }
}

type Fronts = Vec<Checked<AnyEngine>>;

/// Opens the stack. `None`: the world stopped on the way.
fn open(subject: &Subject, world: &World, disks: &[SimDisk]) -> Result<Option<Fronts>, Verdict> {
    match world.run((subject.open)(disks.to_vec())) {
        None => Ok(None),
        Some(Ok(fronts)) if fronts.is_empty() => {
            let what = "the subject was opened as no engine at all";
            Err(Verdict::new(Clause::Operation, what))
        }
        Some(Ok(fronts)) => Ok(Some(fronts)),
        Some(Err(error)) => {
            let what = format!("the disk cannot be opened: {error}");
            Err(Verdict::new(Clause::Operation, what))
        }
    }
}

fn shape_of(subject: &Subject, geometry: &Geometry) -> Shape {
    Shape::of(geometry, subject.cell, MOST_CELLS)
}

fn read_image(world: &World, front: &Checked<AnyEngine>, shape: Shape) -> Result<Vec<u8>, Verdict> {
    let (mut image, pattern) = unread(world, shape.len);
    let mut buf = ReadBuf::new(&mut image);
    match world.run(front.read(&mut buf, 0)) {
        Some(Ok(())) => match left_alone(&image, pattern) {
            None => Ok(image),
            Some(at) => {
                let what = format!(
                    "a read of 0..{} did not fill its buffer: not at {at}",
                    shape.len
                );
                Err(Verdict::new(Clause::Operation, what))
            }
        },
        Some(Err(error)) => {
            let what = format!("the disk cannot be read after it was opened: {error}");
            Err(Verdict::new(Clause::Operation, what))
        }
        None => Err(Verdict::new(Clause::Answer, "a read never answers")),
    }
}
