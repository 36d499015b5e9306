//! Bells, which get threads out of their sleep.

use std::io;
use std::sync::Arc;
use std::task::Wake;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// What gets a thread out of its sleep. A ring before it has fallen asleep must count too.
pub(crate) trait Bell: Send + Sync + 'static {
    fn ring(&self);
}

/// A bell for a thread that sleeps on a descriptor.
pub(crate) struct Eventfd(OwnedFd);

impl Eventfd {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Eventfd(eventfd(0, EventfdFlags::CLOEXEC)?))
    }
}

impl AsFd for Eventfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Eventfd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Bell for Eventfd {
    fn ring(&self) {
        // It cannot fail: the counter, which nobody resets, would have to reach 2^64.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

impl Wake for Eventfd {
    fn wake(self: Arc<Self>) {
        self.ring();
    }
}
