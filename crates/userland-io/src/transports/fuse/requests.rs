//! Requests on their way: each is served by a task with memory of its own, made when first needed and kept.
//!
//! The thread that read a request from the kernel polls its task once ([`Requests::start`]). Most requests of a fast engine
//! end there. A task that has to wait goes to one of a few threads that drive such tasks ([`finish`]), so
//! that the kernel's next request is read meanwhile. When all tasks are taken, reading pauses until one has
//! ended: that bounds the memory, and the kernel keeps the rest in its queue.
//!
//! Who may touch what: a task belongs to whoever has it out of the pool. What is to be done, and the bytes, pass
//! through its [`Place`], under a lock that nobody else wants at that time.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread::{self, JoinHandle};

use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::serve::{Request, serve};
use crate::{AlignedBuf, Device, Engine, Slots};

/// Where requests go.
pub(super) struct Requests {
    pool: Arc<Pool>,
    runtime: Handle,
    waiting: Vec<mpsc::UnboundedSender<Task>>,
    next: AtomicUsize,
}

impl Requests {
    /// Starts `threads` threads inside `runtime` for requests that wait. They end when this is dropped and no request is in
    /// flight; at most `depth` are at once.
    pub(super) fn new<E: Engine>(
        device: &Device<E>,
        depth: usize,
        threads: usize,
        runtime: &Handle,
    ) -> io::Result<(Self, Vec<JoinHandle<()>>)> {
        let alignment = device.geometry().memory_alignment.max(PAGE as u32);
        let device = device.clone();
        let make = move || Task::new(device.clone(), alignment as usize);
        let pool = Arc::new(Pool {
            make: Box::new(make),
            limit: depth.max(1),
            tasks: Mutex::default(),
            given: Condvar::new(),
        });
        let (mut waiting, mut joins) = (Vec::new(), Vec::new());
        for index in 0..threads.max(1) {
            let (to, from) = mpsc::unbounded_channel();
            let (pool, runtime) = (pool.clone(), runtime.clone());
            let thread = thread::Builder::new().name(format!("fuse-wait-{index}"));
            joins.push(thread.spawn(move || runtime.block_on(finish(from, &pool)))?);
            waiting.push(to);
        }
        let requests = Requests {
            pool,
            runtime: runtime.clone(),
            waiting,
            next: AtomicUsize::new(0),
        };
        Ok((requests, joins))
    }

    /// Begins to serve a request that needs `len` bytes of memory, which begins with `bytes`.
    pub(super) fn start(&self, len: usize, bytes: &[u8], request: Request) {
        let mut task = self.pool.take();
        task.put(len, bytes, request);
        let _inside = self.runtime.enter();
        // Without a waker: whoever takes it over polls it anew, which gives it one.
        if task.poll(&mut Context::from_waker(Waker::noop())) {
            return self.pool.give(task);
        }
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % self.waiting.len();
        if self.waiting[turn].send(task).is_err() {
            tracing::error!("a thread that serves a FUSE file has panicked");
        }
    }
}

/// Runs tasks that wait to their ends, until no more can come.
async fn finish(mut from: mpsc::UnboundedReceiver<Task>, pool: &Pool) {
    let mut slots = Slots::new(pool.limit);
    poll_fn(|cx| {
        loop {
            while let Poll::Ready(Some(task)) = slots.poll(cx) {
                pool.give(task);
            }
            match from.poll_recv(cx) {
                Poll::Ready(Some(task)) => {
                    if let Poll::Ready(task) = slots.start(Waiting(Some(task))) {
                        pool.give(task);
                    }
                }
                Poll::Ready(None) if slots.in_flight() == 0 => return Poll::Ready(()),
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
    })
    .await;
}

/// A task until it has answered.
struct Waiting(Option<Task>);

impl Future for Waiting {
    type Output = Task;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Task> {
        match self.0.as_mut().map(|task| task.poll(cx)) {
            Some(true) => self.0.take().map_or(Poll::Pending, Poll::Ready),
            _ => Poll::Pending,
        }
    }
}

/// Tasks that have nothing to do, and how many there are in all.
struct Pool {
    make: Box<dyn Fn() -> Task + Send + Sync>,
    limit: usize,
    tasks: Mutex<Tasks>,
    given: Condvar,
}

#[derive(Default)]
struct Tasks {
    idle: Vec<Task>,
    made: usize,
    /// How many threads wait for one.
    wanted: usize,
}

impl Pool {
    /// A task that has nothing to do. Waits for one if all are taken.
    fn take(&self) -> Task {
        let mut tasks = lock(&self.tasks);
        loop {
            if let Some(task) = tasks.idle.pop() {
                return task;
            }
            if tasks.made < self.limit {
                tasks.made += 1;
                drop(tasks);
                return (self.make)();
            }
            tasks.wanted += 1;
            tasks = self
                .given
                .wait(tasks)
                .unwrap_or_else(PoisonError::into_inner);
            tasks.wanted -= 1;
        }
    }

    fn give(&self, mut task: Task) {
        let mut tasks = lock(&self.tasks);
        if tasks.idle.len() >= KEPT_LONG {
            task.shorten();
        }
        tasks.idle.push(task);
        if tasks.wanted > 0 {
            drop(tasks);
            self.given.notify_one();
        }
    }
}

/// The length of memory that a task begins with, and the alignment of all of it.
const PAGE: usize = 4096;
/// Memory of up to this length is kept by every task,
const SHORT: usize = 64 << 10;
/// longer memory by so many idle ones.
const KEPT_LONG: usize = 16;

/// Serves one request after another.
struct Task {
    place: Arc<Mutex<Place>>,
    run: Pin<Box<dyn Future<Output = ()> + Send>>,
}

struct Place {
    /// Taken while a request is served.
    memory: Option<AlignedBuf>,
    request: Option<Request>,
    alignment: usize,
}

impl Task {
    fn new<E: Engine>(device: Device<E>, alignment: usize) -> Self {
        let place = Arc::new(Mutex::new(Place {
            memory: Some(AlignedBuf::zeroed(PAGE, alignment)),
            request: None,
            alignment,
        }));
        let run = Box::pin(work(device, place.clone()));
        Task { place, run }
    }

    fn put(&mut self, len: usize, bytes: &[u8], request: Request) {
        let place = &mut *lock(&self.place);
        let alignment = place.alignment;
        let memory = place
            .memory
            .get_or_insert_with(|| AlignedBuf::zeroed(len.next_power_of_two(), alignment));
        if memory.len() < len {
            *memory = AlignedBuf::zeroed(len.next_power_of_two(), alignment);
        }
        memory[..bytes.len()].copy_from_slice(bytes);
        place.request = Some(request);
    }

    /// True once the request is answered.
    fn poll(&mut self, cx: &mut Context<'_>) -> bool {
        let polled = self.run.as_mut().poll(cx);
        debug_assert!(polled.is_pending(), "a task serves until it is dropped");
        lock(&self.place).memory.is_some()
    }

    /// Gives long memory back.
    fn shorten(&mut self) {
        let place = &mut *lock(&self.place);
        if place
            .memory
            .as_ref()
            .is_some_and(|memory| memory.len() > SHORT)
        {
            place.memory = Some(AlignedBuf::zeroed(PAGE, place.alignment));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn work<E: Engine>(device: Device<E>, place: Arc<Mutex<Place>>) {
    loop {
        // Whoever puts a request there polls next: no waker is needed for that.
        let (request, mut memory) = poll_fn(|_| {
            let place = &mut *lock(&place);
            match (place.request.take(), &mut place.memory) {
                (Some(request), memory @ Some(_)) => Poll::Ready((request, memory.take())),
                _ => Poll::Pending,
            }
        })
        .await;
        let bytes = memory.as_deref_mut().unwrap_or_default();
        serve(&device, request, bytes).await;
        lock(&place).memory = memory;
    }
}
