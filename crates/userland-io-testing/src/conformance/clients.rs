//! Many clients at once, judged by the history of what they saw.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;

use userland_io::{Engine, Result};

use super::{finish, opened, read};
use crate::check::{History, Request, Shape, Verdict};
use crate::script::{Mix, Script};
use crate::sim::World;
use crate::torture::desk::Desk;

/// How many scripts are run. Each begins with what the last one left.
const ROUNDS: u64 = 40;

/// Several clients at once see each block as one register: what has answered is seen by all who ask later, and nothing
/// is seen that nobody wrote.
///
/// # Errors
/// The read that cannot be explained.
pub async fn concurrent_clients_see_registers<E: Engine>(
    open: impl AsyncFn() -> Result<E>,
) -> Result<(), Verdict> {
    let mix = Mix {
        clients: 8,
        ops: 60,
        ..Mix::default()
    };
    rounds(&open, &mix).await
}

/// Requests whose futures are dropped half-way act before the next flush has answered, or never.
///
/// # Errors
/// The read that shows one that acted later.
pub async fn abandoned_requests_never_act_late<E: Engine>(
    open: impl AsyncFn() -> Result<E>,
) -> Result<(), Verdict> {
    let mix = Mix {
        clients: 4,
        ops: 60,
        abandons: 4,
        ..Mix::default()
    };
    rounds(&open, &mix).await
}

async fn rounds<E: Engine>(open: &impl AsyncFn() -> Result<E>, mix: &Mix) -> Result<(), Verdict> {
    let disk = opened(open).await?;
    let geometry = disk.geometry();
    let shape = Shape::of(&geometry, None, usize::from(mix.blocks));
    if shape.cells() == 0 {
        return finish(disk).await;
    }
    let mut next = 1;
    let run = fastrand::u64(..);
    for seed in 0..ROUNDS {
        let script = Script::random(seed, mix);
        let world = World::new(seed);
        let initial = read(&disk, 0, shape.len).await?;
        let desk = Desk {
            world: &world,
            geometry,
            // Stamps of an earlier test must not pass for this one's.
            history: RefCell::new(History::new(run, next, shape, initial)),
            complaint: RefCell::new(None),
            forgot: Cell::new(false),
            may_fail: false,
        };
        let actions = &script.rounds[0].actions;
        let clients = actions.iter().map(|a| a.client).max().unwrap_or(0);
        join((0..=clients).map(|client| {
            let mine = actions.iter().filter(move |action| action.client == client);
            desk.client(&disk, usize::from(client), mine)
        }))
        .await;
        let mut history = desk.history.into_inner();
        if let Some(complaint) = desk.complaint.into_inner() {
            return Err(complaint);
        }
        if mix.abandons > 0 {
            let id = history.start(0, Request::Flush);
            history.end(id, &disk.flush().await);
        }
        // Twice: what comes late may come between them.
        for _ in 0..2 {
            let id = history.start(0, Request::Read(0..shape.cells()));
            let image = read(&disk, 0, shape.len).await?;
            history.end_read(id, &Ok(image));
        }
        history.check_live()?;
        next = history.next_op();
    }
    finish(disk).await
}

/// Polls them all until each has ended.
async fn join<F: Future<Output = ()>>(futures: impl Iterator<Item = F>) {
    let mut futures: Vec<Option<Pin<Box<F>>>> = futures.map(|f| Some(Box::pin(f))).collect();
    poll_fn(|cx| {
        let mut left = false;
        for slot in &mut futures {
            if let Some(future) = slot {
                match future.as_mut().poll(cx) {
                    Poll::Ready(()) => *slot = None,
                    Poll::Pending => left = true,
                }
            }
        }
        match left {
            true => Poll::Pending,
            false => Poll::Ready(()),
        }
    })
    .await;
}
