//! Runs tasks on a thread of its own, over an io_uring ring.
//!
//! There are as many futures as operations can be under way (a hardware queue's tags, say), made once; each serves requests one after another,
//! from the ring and to it ([`Ring::operate`]). The thread polls a task when its operation in the ring has ended or when
//! it was woken, and sleeps in the ring when there is nothing else to do. A wake from another thread gets it out of there
//! without delay, by an eventfd that the ring polls ([`wake`](crate::wake)).
//!
//! A transport's thread is inside a tokio runtime ([`Executor::run_queue`]), so engines can use timers and sockets as
//! they do elsewhere; the runtime's own threads drive those. It is [`crate::queue::current`]'s queue.

mod ring;

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Waker};

use rustix::fd::AsFd;

use crate::bell::Eventfd;
use crate::queue::Queue;
use crate::wake::{self, Calls};
use ring::Event;
pub(crate) use ring::Ring;

/// Made, used and dropped by the tasks' thread.
pub(crate) struct Executor {
    ring: Rc<Ring>,
    calls: Arc<Calls<Eventfd>>,
    tasks: usize,
}

/// Stops an [`Executor`] from another thread.
#[derive(Clone)]
pub(crate) struct Stop(Arc<Calls<Eventfd>>);

impl Stop {
    /// Makes `run` return soon, whatever its tasks do.
    pub(crate) fn stop(&self) {
        self.0.quit();
    }
}

impl Executor {
    /// An executor of up to `tasks` tasks.
    ///
    /// # Errors
    /// If the kernel has no io_uring or denies it, or has no descriptor left.
    pub(crate) fn new(tasks: usize) -> io::Result<Self> {
        let bell = Eventfd::new()?;
        Ok(Executor {
            ring: Rc::new(Ring::new(tasks)?),
            calls: Arc::new(Calls::new(tasks, bell)),
            tasks,
        })
    }

    /// The ring, for the tasks.
    pub(crate) fn ring(&self) -> Rc<Ring> {
        self.ring.clone()
    }

    /// What stops it from another thread.
    pub(crate) fn stopper(&self) -> Stop {
        Stop(self.calls.clone())
    }

    /// As [`run`](Self::run), on a thread that serves `queue` from now on and is inside `runtime` meanwhile.
    pub(crate) fn run_queue<F: Future<Output = ()>>(
        self,
        queue: Queue,
        runtime: &tokio::runtime::Handle,
        tasks: impl ExactSizeIterator<Item = F>,
        started: impl FnOnce(usize),
    ) -> io::Result<()> {
        crate::queue::enter(queue);
        let _inside = runtime.enter();
        self.run(tasks, started)
    }

    /// Runs `tasks` to their ends on this thread.
    /// `started` is called once, after each task was polled and the kernel has what they put into the ring,
    /// with the number of tasks that still run.
    ///
    /// # Errors
    /// If the ring fails. Tasks that have not ended are dropped then, as after `Stop::stop`.
    ///
    /// # Panics
    /// If there are more tasks than the executor was made for.
    pub(crate) fn run<F: Future<Output = ()>>(
        self,
        tasks: impl ExactSizeIterator<Item = F>,
        started: impl FnOnce(usize),
    ) -> io::Result<()> {
        assert!(tasks.len() <= self.tasks, "more tasks than places");
        let mut tasks = Tasks {
            wakers: (0..tasks.len())
                .map(|n| wake::waker(&self.calls, n))
                .collect(),
            running: tasks.len(),
            futures: tasks.map(|task| Some(Box::pin(task))).collect(),
        };
        let mut started = Some(started);
        let mut events = Vec::with_capacity(self.tasks + 1);
        let mut taken = vec![0; self.tasks.div_ceil(64)];
        self.ring.arm(self.calls.bell().as_fd());
        (0..tasks.futures.len()).for_each(|n| tasks.poll(n));
        while tasks.running > 0 && !self.calls.has_quit() {
            let wait = started.is_none() && self.calls.fall_asleep();
            self.ring.turn(wait, &mut events)?;
            let called = self.calls.answer(&mut taken);
            for event in events.drain(..) {
                match event {
                    Event::Ended(task) => tasks.poll(task),
                    Event::Rung { armed: true } => {}
                    Event::Rung { armed: false } => self.ring.arm(self.calls.bell().as_fd()),
                }
            }
            if called {
                tasks.poll_taken(&mut taken);
            }
            if let Some(started) = started.take() {
                started(tasks.running);
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for Executor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Executor({} tasks)", self.tasks)
    }
}

struct Tasks<F> {
    /// `None`: it has ended.
    futures: Vec<Option<Pin<Box<F>>>>,
    wakers: Vec<Waker>,
    running: usize,
}

impl<F: Future<Output = ()>> Tasks<F> {
    fn poll(&mut self, task: usize) {
        let (Some(place), Some(waker)) = (self.futures.get_mut(task), self.wakers.get(task)) else {
            return;
        };
        if let Some(future) = place
            && future
                .as_mut()
                .poll(&mut Context::from_waker(waker))
                .is_ready()
        {
            *place = None;
            self.running -= 1;
        }
    }

    /// Polls the tasks whose bits are set, each once: one that wakes itself is polled in the next turn.
    fn poll_taken(&mut self, taken: &mut [u64]) {
        for (word, bits) in taken.iter_mut().enumerate() {
            while *bits != 0 {
                let bit = bits.trailing_zeros() as usize;
                *bits &= *bits - 1;
                self.poll(word * 64 + bit);
            }
        }
    }
}

#[cfg(all(test, not(userland_io_loom)))]
mod tests;
