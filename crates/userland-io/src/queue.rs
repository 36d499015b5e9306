//! Which queue of a transport the current thread serves.
//!
//! Some transports give each hardware queue of their device a thread of its own. An engine that
//! keeps something per queue (a ring, a shard, a connection) finds its place by [`current`];
//! requests from elsewhere come without one.

use std::cell::Cell;

/// A queue of a transport, as seen from the thread that serves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Queue {
    /// Its number, below `count`.
    pub index: usize,
    /// How many queues the device has.
    pub count: usize,
}

thread_local! {
    static CURRENT: Cell<Option<Queue>> = const { Cell::new(None) };
}

/// The queue that this thread serves; `None` on every other thread.
///
/// ```
/// assert_eq!(userland_io::queue::current(), None);
/// ```
pub fn current() -> Option<Queue> {
    CURRENT.get()
}

/// Makes `queue` this thread's, for the rest of its life.
#[cfg(any(
    test,
    all(any(feature = "ublk", feature = "kernel-nbd"), target_os = "linux")
))]
pub(crate) fn enter(queue: Queue) {
    CURRENT.set(Some(queue));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_is_its_threads_alone() {
        let queue = Queue { index: 1, count: 2 };
        let seen = std::thread::spawn(move || {
            enter(queue);
            current()
        });
        assert_eq!(seen.join().unwrap(), Some(queue));
        assert_eq!(current(), None);
    }
}
