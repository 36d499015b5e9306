//! The executor on a thread of its own, against real rings, timers, sockets and other threads.

use std::cell::Cell;
use std::future::{pending, poll_fn};
use std::sync::mpsc;
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};

use io_uring::opcode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

use super::*;

const QUEUE: Queue = Queue { index: 1, count: 3 };

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

/// Runs what `make` gives for each index below `tasks`.
fn run<F: Future<Output = ()>>(tasks: usize, make: impl Fn(usize, Rc<Ring>) -> F) {
    let runtime = runtime();
    let executor = Executor::new(tasks).unwrap();
    let ring = executor.ring();
    let futures = (0..tasks).map(|n| make(n, ring.clone()));
    executor
        .run_queue(QUEUE, runtime.handle(), futures, |_| {})
        .unwrap();
}

#[test]
fn every_task_gets_the_ends_of_its_own_operations() {
    let ended = &Cell::new(0);
    run(100, |n, ring| async move {
        for round in 0..50 {
            // SAFETY: a nop refers to nothing; a poll of a descriptor that is not open fails.
            let result = unsafe {
                match (n + round) % 3 {
                    0 => {
                        let poll = opcode::PollAdd::new(io_uring::types::Fd(-1), 1);
                        ring.operate(n, poll.build()).await
                    }
                    _ => ring.operate(n, opcode::Nop::new().build()).await,
                }
            };
            let expected = if (n + round) % 3 == 0 {
                -libc::EBADF
            } else {
                0
            };
            assert_eq!(result, expected);
        }
        ended.set(ended.get() + 1);
    });
    assert_eq!(ended.get(), 100);
}

#[test]
fn the_thread_is_the_queue_and_tells_that_it_has_started() {
    let runtime = runtime();
    let started = thread::spawn(move || {
        let executor = Executor::new(2).unwrap();
        let ring = executor.ring();
        let (tell, told) = mpsc::channel();
        let tasks = (0..2).map(|n| {
            let ring = ring.clone();
            let tell = tell.clone();
            async move {
                if n == 0 {
                    return;
                }
                // SAFETY: a nop refers to nothing.
                unsafe { ring.operate(n, opcode::Nop::new().build()) }.await;
                tell.send(crate::queue::current()).unwrap();
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        let mut running = None;
        executor
            .run_queue(QUEUE, runtime.handle(), tasks, |n| running = Some(n))
            .unwrap();
        (running, told.recv().unwrap())
    });
    assert_eq!(started.join().unwrap(), (Some(1), Some(QUEUE)));
}

#[test]
fn timers_and_sockets_work_and_are_noticed_at_once() {
    let begun = Instant::now();
    run(32, |_, _| async {
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        let mut byte = [0];
        for n in 0..10 {
            client.write_all(&[n]).await.unwrap();
            server.read_exact(&mut byte).await.unwrap();
            assert_eq!(byte, [n]);
        }
    });
    // A wake that waits for some other event or a time-out would make it many times this.
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
}

#[test]
fn no_wake_from_another_thread_is_lost_or_late() {
    let (to, from) = mpsc::channel::<oneshot::Sender<usize>>();
    // Answers from outside, now at once, now when the executor has long been asleep.
    let answers = thread::spawn(move || {
        for (n, answer) in from.into_iter().enumerate() {
            if n % 64 == 0 {
                thread::sleep(Duration::from_micros(200));
            }
            answer.send(n).unwrap();
        }
    });
    let worst = &Cell::new(Duration::ZERO);
    let sum = &Cell::new(0);
    run(8, |_, _| {
        let to = to.clone();
        async move {
            for _ in 0..2000 {
                let (answer, answered) = oneshot::channel();
                let asked = Instant::now();
                to.send(answer).unwrap();
                let n = answered.await.unwrap();
                sum.set(sum.get() + n);
                worst.set(worst.get().max(asked.elapsed()));
            }
        }
    });
    drop(to);
    answers.join().unwrap();
    assert_eq!(sum.get(), 16_000 * 15_999 / 2);
    assert!(
        worst.get() < Duration::from_millis(900),
        "{:?}",
        worst.get()
    );
}

#[test]
fn one_that_wakes_itself_does_not_keep_others_from_running() {
    let turns = &Cell::new(0);
    run(2, |n, ring| async move {
        if n == 0 {
            for _ in 0..20 {
                // SAFETY: a nop refers to nothing.
                unsafe { ring.operate(0, opcode::Nop::new().build()) }.await;
            }
            turns.set(usize::MAX);
            return;
        }
        poll_fn(|cx| match turns.get() {
            usize::MAX => Poll::Ready(()),
            spins => {
                turns.set(spins + 1);
                cx.waker().wake_by_ref();
                Poll::Pending
            }
        })
        .await;
    });
}

#[test]
fn stopping_ends_it_whatever_its_tasks_do() {
    let runtime = runtime();
    let (tell, told) = mpsc::channel();
    let dropped = Arc::new(());
    let held = dropped.clone();
    let thread = thread::spawn(move || {
        let executor = Executor::new(1).unwrap();
        tell.send(executor.stopper()).unwrap();
        let never = async move {
            let _held = held;
            pending::<()>().await;
        };
        executor
            .run_queue(QUEUE, runtime.handle(), std::iter::once(never), |_| {})
            .unwrap();
    });
    let stop = told.recv().unwrap();
    thread::sleep(Duration::from_millis(20));
    stop.stop();
    thread.join().unwrap();
    assert_eq!(Arc::strong_count(&dropped), 1);
}
