//! The trait that a storage engine implements.

use std::future::{Future, pending, ready};
use std::ops::Range;

use crate::{ErrorKind, Extents, Geometry, ReadBuf, Result, WriteBuf, WriteFlags};

/// A storage engine: what answers the requests to a disk.
///
/// Two methods make a read-only disk, four a writable one. Write each as
/// `async fn`; any number of requests run at once through `&self`.
///
/// # What callers guarantee
///
/// Nobody calls an engine directly. A transport goes through a
/// [`Device`](crate::Device), a layer through a [`Checked`](crate::Checked), and
/// that edge sees to it that
/// * a request lies inside the size, is never empty, and is at most `max_transfer` long;
/// * it starts and ends on logical blocks (or ends where the disk ends);
/// * no mutation reaches a read-only disk;
/// * `FUA`, `discard` and `write_zeroes` arrive only where they are claimed;
/// * nothing arrives after `close`.
///
/// # What an engine owes
///
/// * A completed mutation is visible to every read that starts later.
/// * `flush` makes durable all mutations that completed before it was called, whoever made them.
/// * A failed mutation leaves each block old or new, and has its effect, if any, before it answers.
/// * No panic for any request as above. A size that shrank meanwhile is answered `OutOfRange`.
/// * A request's future may be dropped, or forgotten, at any point: the buffer must not be touched after that.
///   A mutation dropped half-way may still take effect, but only until the next `flush` or `close` has answered.
///
/// The whole contract is in `docs/semantics.md`, and `userland-io-testing` checks it.
///
/// # Example
///
/// ```
/// use userland_io::{Engine, Geometry, ReadBuf, Result};
///
/// /// A disk on which each byte is its offset, modulo 256.
/// struct Ramp(u64);
///
/// impl Engine for Ramp {
///     fn geometry(&self) -> Geometry {
///         Geometry::read_only(self.0)
///     }
///     async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
///         let bytes: Vec<u8> = (offset..).take(buf.len()).map(|at| at as u8).collect();
///         buf.copy_from(&bytes);
///         Ok(())
///     }
/// }
/// ```
pub trait Engine: Send + Sync + 'static {
    /// Size, limits and claims. Cheap, and never blocks. Only `size` may change while open.
    fn geometry(&self) -> Geometry;

    /// Fills all of `buf` from `offset`.
    ///
    /// # Errors
    /// On an error the content of `buf` means nothing.
    fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> impl Future<Output = Result> + Send;

    /// Shows `to` the bytes of `range` where they are, if they are in memory and nothing has to be waited for: calls it once,
    /// with all of them, or not at all. A transport that sends them spares a copy so. It is a read of `range` that takes
    /// effect during the call. `to` does not wait, so a lock may be held meanwhile.
    ///
    /// If left out: never, and everybody reads. So does a layer that leaves it out: nothing passes its `read` by.
    fn lend(&self, range: Range<u64>, to: &mut dyn FnMut(&[u8])) {
        let _ = (range, to);
    }

    /// Stores all of `buf` at `offset`; durable on return if `flags` has `FUA`,
    /// which arrives only where [`Features::FUA`](crate::Features::FUA) is claimed.
    ///
    /// If left out: the engine is read-only, and its geometry must say so.
    fn write(
        &self,
        buf: &WriteBuf<'_>,
        offset: u64,
        flags: WriteFlags,
    ) -> impl Future<Output = Result> + Send {
        let _ = (buf, offset, flags);
        ready(Err(ErrorKind::ReadOnly.into()))
    }

    /// Does what [`write`](Self::write) does before it returns, if nothing has to be waited for; else `None`, and then
    /// nothing is done. A transport spares a future so. It is a write like any other: what it answers, and what it has stored
    /// then, are the same.
    ///
    /// If left out: never, and everybody writes. So does a layer that leaves it out: nothing passes its `write` by.
    fn write_nowait(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Option<Result> {
        let _ = (buf, offset, flags);
        None
    }

    /// Does what [`write_nowait`](Self::write_nowait) does, with bytes that `from` puts where they are kept: it is called with the
    /// memory of all of `range`, in order, in one piece or several. A transport that receives them there spares a copy. `from`
    /// does not wait, so a lock may be held meanwhile, and must be where others would see what a write must not show them.
    /// `None` only before `from` is called. Memory comes with what the range holds, for `from` may leave the end of it as it is:
    /// then the sender has failed. That is answered like any other write, and nobody is told of the answer.
    ///
    /// The NBD server asks for parts of writes of more than 32 KiB, by 256 KiB at most, of an engine whose `write_nowait` takes such
    /// parts, too, whose logical blocks and atomic unit are no longer than 32 KiB, and which has no `memory_alignment`.
    ///
    /// # Errors
    /// As [`write`](Self::write). The edge makes it an error, too, if less or more was lent than `range` is long.
    ///
    /// If left out: never, and everybody writes. So does a layer that leaves it out: nothing passes its `write` by.
    fn lend_mut(
        &self,
        range: Range<u64>,
        flags: WriteFlags,
        from: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Result> {
        let _ = (range, flags, from);
        None
    }

    /// Makes every mutation that completed before this call durable.
    ///
    /// If left out: `Unsupported`, and a [`Device`](crate::Device) opens only if the engine claims that
    /// nothing survives a crash ([`CrashLevel::None`](crate::CrashLevel::None)) or that every write is
    /// durable already ([`CrashLevel::Sync`](crate::CrashLevel::Sync)). Such an engine must not let a
    /// mutation act after its future was dropped, for there is no flush to wait for it.
    ///
    /// # Errors
    /// A failed flush promises nothing. The next may succeed only if everything completed before it
    /// is in fact durable.
    fn flush(&self) -> impl Future<Output = Result> + Send {
        ready(Err(ErrorKind::Unsupported.into()))
    }

    /// The bytes of `range`, whole granules, are no longer wanted. What reads return then is the
    /// claim [`Geometry::discard`]. It is a mutation like any other.
    ///
    /// If left out: that claim must be [`Discard::None`](crate::Discard::None), and nobody asks.
    fn discard(&self, range: Range<u64>) -> impl Future<Output = Result> + Send {
        let _ = range;
        ready(Err(ErrorKind::Unsupported.into()))
    }

    /// Makes `range` read as zeroes. With `NO_UNMAP` its space stays allocated; with `FAST_ONLY` it
    /// answers `Unsupported`, at once and with nothing changed, rather than write zeroes out. Asked only where
    /// [`Features::WRITE_ZEROES`](crate::Features::WRITE_ZEROES) is claimed.
    ///
    /// If left out, or on `Unsupported`: the edge writes zeroes, or hands the refusal of `FAST_ONLY` on.
    fn write_zeroes(
        &self,
        range: Range<u64>,
        flags: WriteFlags,
    ) -> impl Future<Output = Result> + Send {
        let _ = (range, flags);
        ready(Err(ErrorKind::Unsupported.into()))
    }

    /// Pushes what `range` begins with. An engine may stop after one run, or when `out` is full;
    /// callers ask again for the rest. Asked only where
    /// [`Features::EXTENTS`](crate::Features::EXTENTS) is claimed.
    ///
    /// If left out: everything is data.
    fn extents(&self, range: Range<u64>, out: &mut Extents) -> impl Future<Output = Result> + Send {
        let _ = (range, out);
        ready(Err(ErrorKind::Unsupported.into()))
    }

    /// The names of the further contexts whose [`status`](Self::status) can be asked for, such as
    /// `ulio:dirty`. Asked when a client negotiates, so it need not be fast. A name is
    /// `namespace:leaf`, at most 255 bytes of UTF-8; `base` is reserved.
    ///
    /// If left out: none.
    fn contexts(&self) -> Vec<String> {
        Vec::new()
    }

    /// Pushes the status words of `context`, one of [`contexts`](Self::contexts), that `range`
    /// begins with, as [`extents`](Self::extents) does its kinds.
    ///
    /// If left out: `Unsupported`, and nobody asks.
    fn status(
        &self,
        context: &str,
        range: Range<u64>,
        out: &mut Extents<u64>,
    ) -> impl Future<Output = Result> + Send {
        let _ = (context, range, out);
        ready(Err(ErrorKind::Unsupported.into()))
    }

    /// A hint that `range` will be read soon.
    ///
    /// If left out: nothing happens.
    fn prefetch(&self, range: Range<u64>) -> impl Future<Output = Result> + Send {
        let _ = range;
        ready(Ok(()))
    }

    /// Resolves once [`geometry`](Self::geometry) differs from `seen`. A layer uses
    /// [`changed_through`](crate::changed_through).
    ///
    /// If left out: never, which is right for a disk whose size is fixed.
    fn changed(&self, seen: Geometry) -> impl Future<Output = Geometry> + Send {
        let _ = seen;
        pending()
    }

    /// Ends the engine's work. Called once, after the last request.
    ///
    /// If left out: flushes, where the claims leave a flush something to do.
    fn close(&self) -> impl Future<Output = Result> + Send {
        async {
            match self.geometry().needs_flush() {
                true => self.flush().await,
                false => Ok(()),
            }
        }
    }
}
