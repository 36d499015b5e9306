//! A disk that is open, and the scripts that are run on it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use userland_io::{AnyEngine, Checked, CrashLevel, Engine, ErrorKind, Features, Geometry};

use super::client::{Client, read};
use super::record::{Record, Stop};
use super::{Executor, Live};
use crate::check::{Clause, History, Request, Shape, Verdict};
use crate::script::{Action, End, Round, Script};
use crate::sim::{DiskConfig, Keep, SimDisk, World};

/// How long the window may be, in bytes.
const LONGEST: usize = 4 << 20;

pub(super) struct Session {
    world: World,
    disks: Vec<SimDisk>,
    fronts: Vec<Arc<Checked<AnyEngine>>>,
    geometry: Geometry,
    /// In every stamp, so that those of an earlier run cannot pass for this one's.
    run: u64,
    next: u32,
    /// Crashes and kills so far.
    pub(super) crashes: u64,
}

/// The part of the disk that a script works on.
#[derive(Clone, Copy)]
struct Window {
    base: u64,
    shape: Shape,
}

impl Session {
    pub(super) async fn begin<X: Executor>(live: &Live<'_, X>, seed: u64) -> Result<Self, Verdict> {
        let world = World::new(seed);
        let new = |config: &DiskConfig| {
            // Simulated time stands still here.
            let config = DiskConfig {
                delay: Duration::ZERO,
                ..config.clone()
            };
            SimDisk::new(&world, config)
        };
        let disks: Vec<SimDisk> = live.subject.disks.iter().map(new).collect();
        let fronts = open(live, &disks).await?;
        Ok(Session {
            geometry: fronts[0].geometry(),
            disks,
            fronts,
            run: fastrand::u64(..),
            next: 1,
            crashes: 0,
            world,
        })
    }

    /// Waits for what the clients gave up: of its mutations the next script's history knows nothing. False if a subject that may
    /// fail does not do that either.
    pub(super) async fn settle<X: Executor>(&self, live: &Live<'_, X>) -> Result<bool, Verdict> {
        for front in &self.fronts {
            let mut tries = live.tries();
            while let Err(error) = live.in_time("the last flush", front.flush()).await? {
                tries -= 1;
                if tries == 0 && live.errors {
                    return Ok(false);
                }
                if tries == 0 {
                    let what = format!("the last flush failed: {error}");
                    return Err(Verdict::new(Clause::Operation, what));
                }
            }
        }
        Ok(true)
    }

    pub(super) async fn end<X: Executor>(self, live: &Live<'_, X>) -> Result<(), Verdict> {
        match live.errors {
            true => self.discard(live).await,
            false => self.close(live).await,
        }
    }

    /// Closes what is of no more use, whatever it says, as long as it answers.
    async fn discard<X: Executor>(&self, live: &Live<'_, X>) -> Result<(), Verdict> {
        match self.close(live).await {
            Err(verdict) if verdict.clause == Clause::Answer => Err(verdict),
            _ => Ok(()),
        }
    }

    async fn close<X: Executor>(&self, live: &Live<'_, X>) -> Result<(), Verdict> {
        let mut first = Ok(());
        for front in &self.fronts {
            let closed = live.in_time("close", front.close()).await?;
            first = first.and(closed.map_err(|error| {
                Verdict::new(Clause::Operation, format!("close failed: {error}"))
            }));
        }
        first
    }

    pub(super) async fn script<X: Executor>(
        &mut self,
        live: &Live<'_, X>,
        script: &Script,
    ) -> Result<(), Verdict> {
        let window = self.window(live, script.seed);
        if window.shape.cells() == 0 {
            return Ok(());
        }
        let initial = self.image(live, window).await?;
        let mut history = History::new(self.run, self.next, window.shape, initial);
        for round in &script.rounds {
            history = self.round(live, window, history, round).await?;
            self.next = history.next_op();
        }
        Ok(())
    }

    /// Both ends of the disk, and what lies between, in pieces of any size.
    fn window<X: Executor>(&self, live: &Live<'_, X>, seed: u64) -> Window {
        let geometry = &self.geometry;
        let mut rng = fastrand::Rng::with_seed(!seed);
        let block = geometry.logical_block_size;
        let sizes = [
            block.max(32),
            block.max(512),
            block.max(4096),
            block.max(64 << 10),
        ];
        let cell = match live.subject.cell {
            Some(cell) => cell,
            None if !self.disks.is_empty() => block.max(32) as usize,
            None => sizes[rng.usize(..sizes.len())] as usize,
        };
        let most = usize::from(live.mix.blocks).min(LONGEST / cell).max(1);
        let unit = u64::from(geometry.discard_granule().max(block)).max(1);
        let room = geometry.size.saturating_sub((cell * most) as u64);
        let base = match rng.u8(..3) {
            0 => 0,
            1 => room.next_multiple_of(unit),
            _ => rng.u64(..=room) / unit * unit,
        };
        let base = match base < geometry.size {
            true => base,
            false => 0,
        };
        Window {
            base,
            shape: Shape::of(&self.local(base), Some(cell), most),
        }
    }

    /// The geometry as if the disk began at `base`.
    fn local(&self, base: u64) -> Geometry {
        let mut geometry = self.geometry;
        geometry.size -= base;
        geometry
    }

    async fn round<X: Executor>(
        &mut self,
        live: &Live<'_, X>,
        window: Window,
        history: History,
        round: &Round,
    ) -> Result<History, Verdict> {
        let simulated = !self.disks.is_empty();
        let survives = self.geometry.features.contains(Features::SURVIVES_KILL);
        let left: Arc<Mutex<Vec<SimDisk>>> = Arc::default();
        let stop = |at: u32, keep: Option<Keep>| -> Option<(u64, Stop)> {
            let (disks, left) = (self.disks.clone(), left.clone());
            let stop = move || {
                let after = disks.iter().map(|disk| match keep {
                    Some(keep) => disk.crash(keep),
                    None => killed(disk, survives),
                });
                *left.lock().unwrap_or_else(PoisonError::into_inner) = after.collect();
            };
            // A script counts events of the simulated disks; here a request has two.
            Some((u64::from(at) / 2, Box::new(stop)))
        };
        let stop = match round.end {
            End::Crash { at, keep, .. } if simulated => stop(at, Some(keep)),
            End::Kill { at } if simulated => stop(at, None),
            _ => None,
        };
        self.inject(round);
        let mut history = self.act(live, window, history, round, stop).await?;
        for disk in &self.disks {
            disk.clear_faults();
        }
        if let Some(breach) = self.world.take_breaches().into_iter().next() {
            return Err(Verdict::new(Clause::Edge, breach));
        }
        match round.end {
            End::Crash { .. } | End::Kill { .. } if simulated => {
                history.check_live()?;
                self.crashes += 1;
                // The old world goes on to its end, unseen.
                self.discard(live).await?;
                let left = {
                    let mut left = left.lock().unwrap_or_else(PoisonError::into_inner);
                    std::mem::take(&mut *left)
                };
                let killed = survives && matches!(round.end, End::Kill { .. });
                self.recover(live, window, history, left, killed).await
            }
            End::Close if self.keeps() => {
                let id = history.start(0, Request::Close);
                match self.close(live).await {
                    Ok(()) => history.end(id, &Ok(())),
                    Err(verdict)
                        if verdict.clause == Clause::Answer
                            || !self.may_fail(live, round.fault.is_some()) =>
                    {
                        return Err(verdict);
                    }
                    Err(_) => {
                        history.end(id, &Err(ErrorKind::Io.into()));
                        return self.start_over(live, window, history).await;
                    }
                }
                self.disks = self.disks.iter().map(SimDisk::reopen).collect();
                history.killed();
                self.reopen(live).await?;
                self.look(live, window, &mut history).await?;
                history.check_live().map(|()| history)
            }
            _ if live.subject.ends_on_errors
                && (live.errors || round.fault.is_some())
                && self.has_ended(live, window).await =>
            {
                self.discard(live).await?;
                self.start_over(live, window, history).await
            }
            _ => {
                self.look(live, window, &mut history).await?;
                history.check_live().map(|()| history)
            }
        }
    }

    /// True if one of the fronts answers nothing any more.
    async fn has_ended<X: Executor>(&self, live: &Live<'_, X>, window: Window) -> bool {
        let len = window.shape.bytes(0..1).len();
        for front in &self.fronts {
            let mut tries = live.tries();
            while tries > 0
                && let Ok(Err(_)) = live.in_time("a read", read(front, window.base, len)).await
            {
                tries -= 1;
            }
            if tries == 0 {
                return true;
            }
        }
        false
    }

    /// Opens anew what could not be closed. It promised nothing, so there is as much as if the process had died.
    async fn start_over<X: Executor>(
        &mut self,
        live: &Live<'_, X>,
        window: Window,
        history: History,
    ) -> Result<History, Verdict> {
        let survives = self.geometry.features.contains(Features::SURVIVES_KILL);
        let left = self.disks.iter().map(|disk| killed(disk, survives));
        let left = left.collect();
        self.recover(live, window, history, left, survives).await
    }

    /// True if what is written is still there when the disk is opened again.
    fn keeps(&self) -> bool {
        self.geometry.crash != CrashLevel::None || self.geometry.is_read_only()
    }

    fn inject(&self, round: &Round) {
        if let Some(fault) = round.fault
            && let Some(disk) = self.disks.get(usize::from(fault.disk))
        {
            let nth = u64::from(fault.call);
            match fault.flush {
                true => disk.fail_flush(disk.flushes() + nth, fault.kind),
                false => disk.fail(disk.calls() + nth, fault.kind),
            }
        }
    }

    /// True if errors are to be expected. A real disk that may be full is one that may fail: over NBD a write beyond the end
    /// is refused by the same number.
    fn may_fail<X: Executor>(&self, live: &Live<'_, X>, fault: bool) -> bool {
        let limited = live.subject.disks.iter().any(|d| d.capacity.is_some());
        let failed = self.disks.iter().any(SimDisk::has_failed);
        live.errors || fault || limited || failed
    }

    /// Lets the clients work until all have answered, or the history is cut.
    async fn act<X: Executor>(
        &self,
        live: &Live<'_, X>,
        window: Window,
        history: History,
        round: &Round,
        stop: Option<(u64, Stop)>,
    ) -> Result<History, Verdict> {
        let clients = round.actions.iter().map(|a| usize::from(a.client) + 1);
        let clients = clients.max().unwrap_or(0);
        let first = history.next_op();
        let record = Arc::new(Record::new(history, stop));
        let ended = Arc::new(Semaphore::new(0));
        for number in 0..clients {
            let mine = round.actions.iter().copied();
            let mine = mine.filter(|action| usize::from(action.client) == number);
            let mine = mine.map(|action| match self.fronts.len() {
                1 => action,
                // Only the engine that it was asked of waits for what was given up half-way.
                _ => Action {
                    abandon: None,
                    ..action
                },
            });
            let client = Client {
                record: record.clone(),
                front: self.fronts[number % self.fronts.len()].clone(),
                number,
                base: window.base,
                shape: window.shape,
                geometry: self.local(window.base),
                may_fail: self.may_fail(live, round.fault.is_some()),
            };
            let (mine, end) = (mine.collect(), Ended(ended.clone()));
            live.executor.spawn(Box::pin(async move {
                client.run(mine).await;
                drop(end);
            }));
        }
        let all = ended.acquire_many(clients as u32);
        let in_time = live.in_time("the clients", all).await.is_ok();
        let shape = Shape {
            len: 0,
            ..window.shape
        };
        let (history, complaint, stopped) = record.end(History::new(0, 1, shape, Vec::new()));
        let open = history.unanswered(first);
        if !in_time {
            let mut what = format!("after {:?} these have not answered: {open}", live.patience);
            if let Some(complaint) = complaint {
                what = format!("{what}; and {}", complaint.what);
            }
            return Err(Verdict::new(Clause::Answer, what));
        }
        if let Some(complaint) = complaint {
            return Err(complaint);
        }
        if !stopped && !open.is_empty() {
            let what = format!("the clients panicked within: {open}");
            return Err(Verdict::new(Clause::Operation, what));
        }
        Ok(history)
    }

    /// Opens the disks anew; what was open is gone before, with its locks.
    async fn reopen<X: Executor>(&mut self, live: &Live<'_, X>) -> Result<(), Verdict> {
        self.fronts.clear();
        self.fronts = open(live, &self.disks).await?;
        Ok(())
    }

    /// Reads the whole window, twice: what comes late may come between.
    async fn look<X: Executor>(
        &mut self,
        live: &Live<'_, X>,
        window: Window,
        history: &mut History,
    ) -> Result<(), Verdict> {
        for _ in 0..2 {
            let all = Request::Read(0..window.shape.cells());
            let id = history.start(0, all);
            let image = self.image(live, window).await?;
            history.end_read(id, &Ok(image));
        }
        Ok(())
    }

    async fn recover<X: Executor>(
        &mut self,
        live: &Live<'_, X>,
        window: Window,
        mut history: History,
        left: Vec<SimDisk>,
        killed: bool,
    ) -> Result<History, Verdict> {
        self.disks = left;
        self.reopen(live).await?;
        let before = self.geometry;
        self.geometry = self.fronts[0].geometry();
        if self.geometry.size != before.size {
            let (was, is) = (before.size, self.geometry.size);
            let what = format!("the disk was {was} bytes long, and after the crash it is {is}");
            return Err(Verdict::new(Clause::Recovery, what));
        }
        if killed {
            history.killed();
            self.look(live, window, &mut history).await?;
            return history.check_live().map(|()| history);
        }
        let image = self.image(live, window).await?;
        history.check_crash(before.crash, &image)?;
        if before.crash != CrashLevel::None && self.world.one_in(4) {
            // Nothing was written since, so nothing may change.
            self.crashes += 1;
            self.discard(live).await?;
            self.disks = self.disks.iter().map(|d| d.crash(Keep::Subset)).collect();
            self.reopen(live).await?;
            let second = self.image(live, window).await?;
            history.check_recovered(&image, &second)?;
        }
        Ok(History::new(
            self.run,
            history.next_op(),
            window.shape,
            image,
        ))
    }

    async fn image<X: Executor>(
        &self,
        live: &Live<'_, X>,
        window: Window,
    ) -> Result<Vec<u8>, Verdict> {
        let broken = |what: String| Verdict::new(Clause::Operation, what);
        let front = &self.fronts[fastrand::usize(..self.fronts.len())];
        let (base, len) = (window.base, window.shape.len);
        let mut tries = live.tries();
        loop {
            tries -= 1;
            match live.in_time("a read", read(front, base, len)).await? {
                Ok((image, None)) => return Ok(image),
                Ok((_, Some(at))) => {
                    let at = base + at as u64;
                    let what = format!(
                        "a read of {len} bytes from {base} did not fill its buffer: not at {at}"
                    );
                    return Err(broken(what));
                }
                Err(_) if tries > 0 => {}
                Err(error) => return Err(broken(format!("the disk cannot be read: {error}"))),
            }
        }
    }
}

/// What the death of a process leaves. Where the claims say nothing of that it counts as a crash, after which all
/// that the kernel had was written back.
fn killed(disk: &SimDisk, survives: bool) -> SimDisk {
    match survives {
        true => disk.kill(),
        false => disk.kill().crash(Keep::Everything),
    }
}

async fn open<X: Executor>(
    live: &Live<'_, X>,
    disks: &[SimDisk],
) -> Result<Vec<Arc<Checked<AnyEngine>>>, Verdict> {
    let opened = (live.subject.open)(disks.to_vec());
    let fronts = live.in_time("opening", opened).await?;
    match fronts {
        Ok(fronts) if fronts.is_empty() => {
            let what = "the subject was opened as no engine at all";
            Err(Verdict::new(Clause::Operation, what))
        }
        Ok(fronts) => Ok(fronts.into_iter().map(Arc::new).collect()),
        Err(error) => {
            let what = format!("the disk cannot be opened: {error}");
            Err(Verdict::new(Clause::Operation, what))
        }
    }
}

/// Says that a client has ended, even if it panicked.
struct Ended(Arc<Semaphore>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.add_permits(1);
    }
}
