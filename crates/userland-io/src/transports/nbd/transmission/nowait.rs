//! What a device may do without waiting, so that a request needs no future: and when to ask it, since most engines never
//! do, and are asked ever less.

use std::ops::Range;

use crate::{Device, Engine, Result, WriteBuf, WriteFlags};

/// A device, as far as it does not wait.
pub(super) trait Nowait: Sync {
    /// See [`Device::lend`].
    fn lend(&self, range: Range<u64>, to: &mut dyn FnMut(&[u8])) -> bool;
    /// See [`Device::write_nowait`].
    fn write(&self, bytes: &[u8], offset: u64, flags: WriteFlags) -> Option<Result>;
    /// See [`Device::lend_mut`].
    fn lend_mut(
        &self,
        range: Range<u64>,
        flags: WriteFlags,
        from: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Result>;
}

impl<E: Engine> Nowait for Device<E> {
    fn lend(&self, range: Range<u64>, to: &mut dyn FnMut(&[u8])) -> bool {
        Device::lend(self, range, to)
    }
    fn write(&self, bytes: &[u8], offset: u64, flags: WriteFlags) -> Option<Result> {
        self.write_nowait(&WriteBuf::new(bytes), offset, flags)
    }
    fn lend_mut(
        &self,
        range: Range<u64>,
        flags: WriteFlags,
        from: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Result> {
        Device::lend_mut(self, range, flags, from)
    }
}

/// The most requests in a row that are not asked for.
const MOST_SKIPPED: u32 = 63;

/// What a connection learned about one kind of request.
#[derive(Debug, Default)]
pub(super) struct Asking {
    skip: u32,
    /// How many were skipped after the last refusal.
    pause: u32,
}

impl Asking {
    /// True if the device should be asked to do the next request without waiting.
    pub(super) fn ask(&mut self) -> bool {
        let asks = self.skip == 0;
        self.skip = self.skip.saturating_sub(1);
        asks
    }

    /// Takes the answer.
    pub(super) fn learn(&mut self, done: bool) {
        self.pause = match done {
            true => 0,
            false => (2 * self.pause + 1).min(MOST_SKIPPED),
        };
        self.skip = self.pause;
    }
}

/// Longer writes are not done without waiting by some engines that do shorter ones, in bytes.
const SHORT: usize = 64 << 10;

/// What a connection learned about writes: some engines do without waiting only what is short, or need not be durable.
#[derive(Debug, Default)]
pub(super) struct AskingToWrite {
    short: Asking,
    long: Asking,
    durable: Asking,
}

impl AskingToWrite {
    /// What was learned about such writes of `length` bytes.
    pub(super) fn of(&mut self, length: usize, flags: WriteFlags) -> &mut Asking {
        match flags.contains(WriteFlags::FUA) {
            true => &mut self.durable,
            false if length <= SHORT => &mut self.short,
            false => &mut self.long,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_that_always_waits_is_asked_ever_less() {
        let mut asking = Asking::default();
        let mut asked = 0;
        for _ in 0..6400 {
            if asking.ask() {
                asked += 1;
                asking.learn(false);
            }
        }
        assert!((100..110).contains(&asked), "{asked}");
        while !asking.ask() {}
        asking.learn(true);
        assert!(asking.ask(), "what was done brings the questions back");
    }
}
