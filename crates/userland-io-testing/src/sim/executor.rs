//! A single-threaded executor that polls whatever is ready in random order.

use std::fmt;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use super::World;

/// The tasks of one simulated run.
pub struct Executor<'a> {
    world: World,
    ready: Arc<Mutex<Vec<usize>>>,
    tasks: Vec<Option<Task<'a>>>,
    live: usize,
}

struct Task<'a> {
    future: Pin<Box<dyn Future<Output = ()> + 'a>>,
    flag: Arc<Flag>,
    waker: Waker,
}

/// What [`Executor::step`] found to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It polled a task.
    Polled,
    /// Every task has ended.
    Done,
    /// The world has stopped (see [`World::stop_after`]).
    Stopped,
    /// Tasks are left, and nothing will ever wake them.
    Stuck,
}

struct Flag {
    index: usize,
    queued: AtomicBool,
    ready: Arc<Mutex<Vec<usize>>>,
}

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }
    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::Relaxed) {
            let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
            ready.push(self.index);
        }
    }
}

impl<'a> Executor<'a> {
    /// An executor without tasks.
    pub fn new(world: &World) -> Self {
        Executor {
            world: world.clone(),
            ready: Arc::default(),
            tasks: Vec::new(),
            live: 0,
        }
    }

    /// Adds a task. It is polled when [`step`](Self::step) picks it.
    pub fn spawn(&mut self, future: impl Future<Output = ()> + 'a) {
        let flag = Arc::new(Flag {
            index: self.tasks.len(),
            queued: AtomicBool::new(false),
            ready: self.ready.clone(),
        });
        flag.wake_by_ref();
        self.tasks.push(Some(Task {
            future: Box::pin(future),
            waker: flag.clone().into(),
            flag,
        }));
        self.live += 1;
    }

    /// Polls one ready task, or lets time pass until one is ready.
    pub fn step(&mut self) -> Step {
        loop {
            if self.world.has_stopped() {
                return Step::Stopped;
            }
            if self.live == 0 {
                return Step::Done;
            }
            let Some(index) = self.pick() else {
                match self.world.advance() {
                    true => continue,
                    false => return Step::Stuck,
                }
            };
            let Some(task) = &mut self.tasks[index] else {
                continue;
            };
            task.flag.queued.store(false, Ordering::Relaxed);
            let mut cx = Context::from_waker(&task.waker);
            if task.future.as_mut().poll(&mut cx).is_ready() {
                self.tasks[index] = None;
                self.live -= 1;
            }
            return Step::Polled;
        }
    }

    /// Steps until there is nothing left to do, and says why.
    pub fn run(&mut self) -> Step {
        loop {
            match self.step() {
                Step::Polled => {}
                end => return end,
            }
        }
    }

    fn pick(&self) -> Option<usize> {
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        let at = match ready.len() {
            0 => return None,
            1 => 0,
            n => self.world.draw(n as u64) as usize,
        };
        Some(ready.swap_remove(at))
    }
}

impl fmt::Debug for Executor<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Executor")
            .field("live", &self.live)
            .finish_non_exhaustive()
    }
}

impl World {
    /// Runs one future to its end, alone. `None` if the world stopped, or nothing will ever wake it.
    pub fn run<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        let flag = Arc::new(Flag {
            index: 0,
            queued: AtomicBool::new(true),
            ready: Arc::default(),
        });
        let waker: Waker = flag.clone().into();
        let mut cx = Context::from_waker(&waker);
        let mut future = pin!(future);
        loop {
            if flag.queued.swap(false, Ordering::Relaxed) {
                if let Poll::Ready(out) = future.as_mut().poll(&mut cx) {
                    return Some(out);
                }
                flag.ready
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .clear();
            } else if self.has_stopped() || !self.advance() {
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::time::Duration;

    fn order(seed: u64) -> Vec<u32> {
        let world = World::new(seed);
        let order = RefCell::new(Vec::new());
        let mut executor = Executor::new(&world);
        for id in 0..6 {
            let (world, order) = (&world, &order);
            executor.spawn(async move {
                world.pause().await;
                order.borrow_mut().push(id);
            });
        }
        assert_eq!(executor.run(), Step::Done);
        drop(executor);
        order.into_inner()
    }

    #[test]
    fn a_seed_repeats_and_seeds_differ() {
        assert_eq!(order(1), order(1));
        assert!((0..20).any(|seed| order(seed) != order(1)));
    }

    #[test]
    fn time_passes_only_when_nothing_else_can_happen() {
        let world = World::new(0);
        let woken = RefCell::new(Vec::new());
        let mut executor = Executor::new(&world);
        for seconds in [3, 1, 2] {
            let (world, woken) = (world.clone(), &woken);
            executor.spawn(async move {
                world.sleep(Duration::from_secs(seconds)).await;
                woken.borrow_mut().push((seconds, world.now().as_secs()));
            });
        }
        assert_eq!(executor.run(), Step::Done);
        assert_eq!(*woken.borrow(), [(1, 1), (2, 2), (3, 3)]);
    }

    #[test]
    fn the_world_stops_before_the_event_after_the_last() {
        let world = World::new(0);
        world.stop_after(Some(2));
        let count = RefCell::new(0);
        let mut executor = Executor::new(&world);
        executor.spawn(async {
            loop {
                world.event().await;
                *count.borrow_mut() += 1;
            }
        });
        assert_eq!(executor.run(), Step::Stopped);
        assert_eq!(*count.borrow(), 2);
    }

    #[test]
    fn a_task_that_nothing_wakes_is_stuck() {
        let world = World::new(0);
        let mut executor = Executor::new(&world);
        executor.spawn(std::future::pending());
        assert_eq!(executor.run(), Step::Stuck);
        assert_eq!(world.run(std::future::pending::<()>()), None);
    }
}
