//! C3: every mutation is durable when it answers.
//!
//! Whatever changes the disk below is followed by what makes it durable, so there is nothing left to lose: no map, no
//! cache, no recovery. A mutation whose flush fails answers the error, and may or may not be there.

use std::ops::Range;

use userland_io::{
    Checked, CrashLevel, Engine, Features, Filter, Geometry, Result, WriteBuf, WriteFlags,
};

/// A disk that keeps every mutation that answered.
#[derive(Debug)]
pub struct SyncDisk<E> {
    lower: Checked<E>,
}

impl<E: Engine> SyncDisk<E> {
    /// Opens it on what `lower` holds.
    ///
    /// # Errors
    /// If the geometry of `lower` contradicts itself.
    pub async fn open(lower: E) -> Result<Self> {
        Ok(SyncDisk {
            lower: Checked::new(lower)?,
        })
    }
}

impl<E: Engine> Filter for SyncDisk<E> {
    type Lower = E;

    fn lower(&self) -> &Checked<E> {
        &self.lower
    }

    fn geometry(&self) -> Geometry {
        let mut geometry = self.lower.geometry();
        geometry.crash = CrashLevel::Sync;
        // Every write is as durable as FUA makes it, so nobody need ask for that.
        geometry.features -= Features::VOLATILE_CACHE | Features::FUA;
        geometry
    }

    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        self.lower.write(buf, offset, flags | WriteFlags::FUA).await
    }

    async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        self.lower
            .write_zeroes(range, flags | WriteFlags::FUA)
            .await
    }

    async fn discard(&self, range: Range<u64>) -> Result {
        self.lower.discard(range).await?;
        self.lower.flush().await
    }
}
