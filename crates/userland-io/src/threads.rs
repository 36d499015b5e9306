//! A bounded pool of named threads for work that blocks, without a runtime.
//!
//! [`Pool::run`] queues a job and gives a future of its result; the future's waker
//! is all that connects the two, so any executor will do. A job that mutates goes
//! through [`Pool::mutate`], and [`Pool::settle`] waits for every mutation handed in
//! before, whether its future is awaited, was dropped, or was forgotten.
//!
//! Who may touch what: a job belongs to the queue until a thread takes it, then to
//! that thread alone; its result belongs to the future. What passes between them is
//! one [`State`] under its own lock, and no job runs while a lock is held. Dropping a
//! future before its job began cancels the job; after that the job runs to its end
//! and the thread drops the result. A job owns all it touches (`'static`), which is
//! why dropping and forgetting are safe at any moment.

use std::any::Any;
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread;

/// Threads that run jobs. They start when there is work for them, and end, with the queue empty, when the
/// pool is dropped.
pub(crate) struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
    mutations: Epochs,
    name: String,
    limit: usize,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Arc<dyn Job>>,
    threads: usize,
    idle: usize,
    closed: bool,
}

impl Pool {
    /// A pool of up to `limit` threads (at least one) named `name-0` and so on. The first starts at once.
    ///
    /// # Errors
    /// If not even that thread can be started.
    pub(crate) fn new(name: &str, limit: usize) -> io::Result<Self> {
        let pool = Pool {
            shared: Arc::new(Shared {
                queue: Mutex::new(Queue {
                    threads: 1,
                    ..Queue::default()
                }),
                work: Condvar::new(),
                mutations: Epochs::new(),
                name: name.to_owned(),
                limit: limit.max(1),
            }),
        };
        pool.shared.start_thread(0)?;
        Ok(pool)
    }

    /// Runs `job` on a thread. A panic in it is raised again where the future is awaited.
    pub(crate) fn run<T, F>(&self, job: F) -> impl Future<Output = T> + Send + use<T, F>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        self.submit(job, None)
    }

    /// As [`run`](Self::run), for a job that [`settle`](Self::settle) must wait for.
    pub(crate) fn mutate<T, F>(&self, job: F) -> impl Future<Output = T> + Send + use<T, F>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let epoch = self.shared.mutations.enter();
        self.submit(job, Some(epoch))
    }

    /// Runs `job`, which nobody awaits. A panic in it is dropped.
    pub(crate) fn spawn(&self, job: impl FnOnce() + Send + 'static) {
        self.task(job, None);
    }

    /// Resolves when no mutation handed in before this call can act any more.
    pub(crate) fn settle(&self) -> impl Future<Output = ()> + Send + '_ {
        self.shared.mutations.settled()
    }

    fn submit<T, F>(&self, job: F, epoch: Option<u64>) -> Running<F, T>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let task = self.task(job, epoch);
        Running { task }
    }

    fn task<T, F>(&self, job: F, epoch: Option<u64>) -> Arc<Task<F, T>>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let task = Arc::new(Task {
            state: Mutex::new(State::Queued(job)),
            waker: Mutex::new(None),
            shared: self.shared.clone(),
            epoch,
        });
        self.shared.push(task.clone());
        task
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.shared.queue).closed = true;
        self.shared.work.notify_all();
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Pool({}, {} threads)",
            self.shared.name, self.shared.limit
        )
    }
}

impl Shared {
    fn push(self: &Arc<Self>, job: Arc<dyn Job>) {
        let mut queue = lock(&self.queue);
        queue.jobs.push_back(job);
        if queue.jobs.len() <= queue.idle {
            drop(queue);
            self.work.notify_one();
        } else if queue.threads < self.limit {
            let index = queue.threads;
            queue.threads += 1;
            drop(queue);
            // Without it the job waits for a thread there is: the first was started with the pool.
            if self.start_thread(index).is_err() {
                lock(&self.queue).threads -= 1;
            }
        }
    }

    fn start_thread(self: &Arc<Self>, index: usize) -> io::Result<()> {
        let shared = self.clone();
        thread::Builder::new()
            .name(format!("{}-{index}", self.name))
            .spawn(move || shared.work())
            .map(drop)
    }

    fn work(&self) {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                drop(queue);
                job.execute();
                drop(job);
                queue = lock(&self.queue);
            } else if queue.closed {
                return;
            } else {
                queue.idle += 1;
                queue = self
                    .work
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
                queue.idle -= 1;
            }
        }
    }
}

trait Job: Send + Sync {
    fn execute(&self);
}

struct Task<F, T> {
    state: Mutex<State<F, T>>,
    waker: Mutex<Option<Waker>>,
    shared: Arc<Shared>,
    epoch: Option<u64>,
}

enum State<F, T> {
    Queued(F),
    Running,
    Done(Result<T, Box<dyn Any + Send>>),
    /// The future is gone: nobody wants the result.
    Over,
}

impl<F, T> Task<F, T> {
    fn swap(&self, next: State<F, T>) -> State<F, T> {
        std::mem::replace(&mut lock(&self.state), next)
    }

    /// The job can act no more.
    fn leave(&self) {
        if let Some(epoch) = self.epoch {
            self.shared.mutations.leave(epoch);
        }
    }
}

impl<F, T> Job for Task<F, T>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    fn execute(&self) {
        let job = {
            let mut state = lock(&self.state);
            match std::mem::replace(&mut *state, State::Running) {
                State::Queued(job) => job,
                // Cancelled while it was queued.
                other => {
                    *state = other;
                    return;
                }
            }
        };
        // All that the job captured is dropped in here, before anyone hears of its end.
        let result = catch_unwind(AssertUnwindSafe(job));
        self.leave();
        let unwanted = {
            let mut state = lock(&self.state);
            match *state {
                State::Over => Some(result),
                _ => {
                    *state = State::Done(result);
                    None
                }
            }
        };
        match unwanted {
            // A destructor that panics must not take the thread along.
            Some(result) => drop(catch_unwind(AssertUnwindSafe(|| drop(result)))),
            None => {
                let waker = lock(&self.waker).take();
                if let Some(waker) = waker {
                    wake(waker);
                }
            }
        }
    }
}

/// The future of a job's result.
struct Running<F, T> {
    task: Arc<Task<F, T>>,
}

impl<F, T> Future for Running<F, T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        // The waker first: a thread that ends the job after the look at the state below finds it.
        {
            let mut waker = lock(&self.task.waker);
            match &*waker {
                Some(known) if known.will_wake(cx.waker()) => {}
                _ => *waker = Some(cx.waker().clone()),
            }
        }
        let mut state = lock(&self.task.state);
        match &*state {
            State::Queued(_) | State::Running => Poll::Pending,
            State::Done(_) => match std::mem::replace(&mut *state, State::Over) {
                State::Done(Ok(value)) => Poll::Ready(value),
                State::Done(Err(panic)) => {
                    drop(state);
                    resume_unwind(panic)
                }
                _ => Poll::Pending,
            },
            // Polled again after it was ready, which no caller may do.
            State::Over => Poll::Pending,
        }
    }
}

impl<F, T> Drop for Running<F, T> {
    fn drop(&mut self) {
        // A guard is gone at the end of the statement, so the job's captures are dropped without the lock.
        if let State::Queued(job) = self.task.swap(State::Over) {
            drop(job);
            self.task.leave();
        }
    }
}

/// Counts what is under way in groups, so that one can wait for all that began before a moment
/// without waiting for what began since.
#[derive(Debug)]
pub(crate) struct Epochs {
    state: Mutex<EpochState>,
}

/// A moment in the life of an [`Epochs`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark(Option<u64>);

#[derive(Debug)]
struct EpochState {
    /// The number of the front group.
    first: u64,
    /// How many are under way in each group. The back one takes newcomers; there is always one.
    running: VecDeque<usize>,
    waiting: Vec<(u64, Waker)>,
}

impl Epochs {
    pub(crate) fn new() -> Self {
        Epochs {
            state: Mutex::new(EpochState {
                first: 0,
                running: VecDeque::from([0]),
                waiting: Vec::new(),
            }),
        }
    }

    /// Counts one in, and answers the group to [`leave`](Self::leave).
    pub(crate) fn enter(&self) -> u64 {
        let mut state = lock(&self.state);
        let last = state.first + (state.running.len() as u64).saturating_sub(1);
        if let Some(count) = state.running.back_mut() {
            *count += 1;
        }
        last
    }

    /// Counts one out.
    pub(crate) fn leave(&self, epoch: u64) {
        let mut state = lock(&self.state);
        let index = epoch.saturating_sub(state.first) as usize;
        if let Some(count) = state.running.get_mut(index) {
            *count = count.saturating_sub(1);
        }
        while state.running.len() > 1 && state.running.front() == Some(&0) {
            state.running.pop_front();
            state.first += 1;
        }
        let first = state.first;
        let ready: Vec<_> = state
            .waiting
            .extract_if(.., |(of, _)| *of < first)
            .collect();
        drop(state);
        for (_, waker) in ready {
            wake(waker);
        }
    }

    /// Resolves when all that was counted in before this call is counted out.
    pub(crate) fn settled(&self) -> impl Future<Output = ()> + Send + '_ {
        self.passed(self.mark())
    }

    /// What is under way now, for [`passed`](Self::passed).
    pub(crate) fn mark(&self) -> Mark {
        let mut state = lock(&self.state);
        match state.running.iter().all(|&count| count == 0) {
            true => Mark(None),
            false => {
                let last = state.first + (state.running.len() as u64).saturating_sub(1);
                state.running.push_back(0);
                Mark(Some(last))
            }
        }
    }

    /// Resolves when all that was under way at `mark` is counted out.
    pub(crate) fn passed(&self, mark: Mark) -> impl Future<Output = ()> + Send + '_ {
        poll_fn(move |cx| {
            let Mark(Some(target)) = mark else {
                return Poll::Ready(());
            };
            let mut state = lock(&self.state);
            if state.first > target {
                return Poll::Ready(());
            }
            let known = state
                .waiting
                .iter()
                .any(|(of, waker)| *of == target && waker.will_wake(cx.waker()));
            if !known {
                state.waiting.push((target, cx.waker().clone()));
            }
            Poll::Pending
        })
    }
}

/// A waker is foreign code, and must not take a thread along either.
fn wake(waker: Waker) {
    drop(catch_unwind(AssertUnwindSafe(|| waker.wake())));
}

/// No code of others runs under these locks, so a poisoned one is in order.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    /// Polls on this thread alone: a pool needs no runtime.
    fn block_on<T>(future: impl Future<Output = T>) -> T {
        struct Unpark(thread::Thread);
        impl std::task::Wake for Unpark {
            fn wake(self: Arc<Self>) {
                self.0.unpark();
            }
        }
        let mut future = std::pin::pin!(future);
        let waker = Waker::from(Arc::new(Unpark(thread::current())));
        loop {
            match future.as_mut().poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(value) => return value,
                Poll::Pending => thread::park(),
            }
        }
    }

    fn is_pending(future: Pin<&mut impl Future>) -> bool {
        future
            .poll(&mut Context::from_waker(Waker::noop()))
            .is_pending()
    }

    #[test]
    fn jobs_run_on_named_threads_and_no_more_than_asked_for() {
        let pool = Pool::new("here", 3).unwrap();
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let jobs: Vec<_> = (0..50)
            .map(|i| {
                let (now, most) = (now.clone(), most.clone());
                pool.run(move || {
                    most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    thread::sleep(Duration::from_millis(1));
                    now.fetch_sub(1, Ordering::SeqCst);
                    (i, thread::current().name().unwrap().to_owned())
                })
            })
            .collect();
        for (i, job) in jobs.into_iter().enumerate() {
            let (j, name) = block_on(job);
            assert_eq!(i, j);
            assert!(["here-0", "here-1", "here-2"].contains(&&*name), "{name}");
        }
        assert!((2..=3).contains(&most.load(Ordering::SeqCst)));
    }

    #[test]
    fn a_panic_reaches_who_awaits_and_the_thread_lives_on() {
        let pool = Pool::new("panics", 1).unwrap();
        let job = pool.run(|| -> u32 { panic!("as ordered") });
        let panic = catch_unwind(AssertUnwindSafe(|| block_on(job))).unwrap_err();
        assert_eq!(panic.downcast_ref(), Some(&"as ordered"));
        drop(pool.run(|| panic!("nobody listens")));
        assert_eq!(block_on(pool.run(|| 7)), 7);
    }

    #[test]
    fn settle_waits_for_a_mutation_whose_future_is_gone() {
        for forget in [false, true] {
            let pool = Pool::new("settle", 2).unwrap();
            let (started, has_started) = mpsc::channel();
            let (go, may_go) = mpsc::channel();
            let done = Arc::new(AtomicBool::new(false));
            let job = pool.mutate({
                let done = done.clone();
                move || {
                    started.send(()).unwrap();
                    may_go.recv().unwrap();
                    done.store(true, Ordering::SeqCst);
                }
            });
            has_started.recv().unwrap();
            match forget {
                true => std::mem::forget(job),
                false => drop(job),
            }
            let mut settle = std::pin::pin!(pool.settle());
            assert!(is_pending(settle.as_mut()));
            // What begins later is not waited for.
            let (go_late, may_go_late) = mpsc::channel::<()>();
            let late = pool.mutate(move || may_go_late.recv());
            go.send(()).unwrap();
            block_on(settle);
            assert!(done.load(Ordering::SeqCst));
            go_late.send(()).unwrap();
            block_on(late).unwrap();
        }
    }

    #[test]
    fn a_future_dropped_in_the_queue_cancels_its_job() {
        let pool = Pool::new("cancel", 1).unwrap();
        let (go, may_go) = mpsc::channel::<()>();
        let first = pool.run(move || may_go.recv());
        let owned = Arc::new(());
        let captured = owned.clone();
        let second = pool.mutate(move || drop(captured));
        assert_eq!(Arc::strong_count(&owned), 2);
        drop(second);
        assert_eq!(
            Arc::strong_count(&owned),
            1,
            "what it captured is freed at once"
        );
        block_on(pool.settle());
        go.send(()).unwrap();
        block_on(first).unwrap();
    }

    #[test]
    fn threads_finish_the_queue_and_end_with_the_pool() {
        let pool = Pool::new("end", 2).unwrap();
        let ended = Arc::downgrade(&pool.shared);
        let jobs: Vec<_> = (0..10).map(|i| pool.run(move || i)).collect();
        drop(pool);
        for (i, job) in jobs.into_iter().enumerate() {
            assert_eq!(block_on(job), i);
        }
        let patience = std::time::Instant::now();
        while ended.strong_count() > 0 {
            assert!(
                patience.elapsed() < Duration::from_secs(30),
                "a thread is left"
            );
            thread::yield_now();
        }
    }

    #[test]
    fn nothing_is_lost_when_many_threads_drop_futures_at_random_points() {
        let pool = Arc::new(Pool::new("storm", 4).unwrap());
        let (running, ran) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        thread::scope(|scope| {
            for seed in 0..8 {
                let (pool, running, ran) = (pool.clone(), running.clone(), ran.clone());
                scope.spawn(move || {
                    let mut rng = fastrand::Rng::with_seed(seed);
                    for i in 0..500_u64 {
                        let (running, ran) = (running.clone(), ran.clone());
                        let spin = rng.u32(0..200);
                        let mut job = Box::pin(pool.mutate(move || {
                            running.fetch_add(1, Ordering::SeqCst);
                            for _ in 0..spin {
                                std::hint::spin_loop();
                            }
                            ran.fetch_add(1, Ordering::SeqCst);
                            running.fetch_sub(1, Ordering::SeqCst);
                            i
                        }));
                        match rng.u8(0..5) {
                            0 => drop(job),
                            1 => {
                                let _ = is_pending(job.as_mut());
                            }
                            2 => std::mem::forget(job),
                            3 => {
                                thread::yield_now();
                                drop(job);
                                block_on(pool.settle());
                            }
                            _ => assert_eq!(block_on(job), i),
                        }
                    }
                });
            }
        });
        block_on(pool.settle());
        assert_eq!(running.load(Ordering::SeqCst), 0);
        let ran_then = ran.load(Ordering::SeqCst);
        assert!(ran_then > 8 * 100, "only {ran_then} ran");
        block_on(pool.run(|| ()));
        assert_eq!(ran.load(Ordering::SeqCst), ran_then, "one ran after settle");
    }
}
