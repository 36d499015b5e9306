//! A device as an engine, so that the way through it is checked, too.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use userland_io::{
    AnyEngine, Device, Engine, ErrorKind, Extents, Geometry, ReadBuf, Result, WriteBuf, WriteFlags,
};

/// Opens `engine` as a [`Device`] and gives it back as an engine: what is asked of that goes the way that a transport's
/// requests go.
///
/// # Errors
/// If the device refuses it.
pub async fn through_device(engine: AnyEngine) -> Result<AnyEngine> {
    let device = Device::open(engine).await?;
    Ok(AnyEngine::new(Through {
        geometry: device.geometry(),
        device: Mutex::new(Some(device)),
    }))
}

struct Through {
    geometry: Geometry,
    /// Until it is closed.
    device: Mutex<Option<Device>>,
}

impl Through {
    fn device(&self) -> Result<Device> {
        let device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        device.clone().ok_or_else(|| ErrorKind::Shutdown.into())
    }
}

impl Engine for Through {
    fn geometry(&self) -> Geometry {
        match self.device() {
            Ok(device) => device.geometry(),
            Err(_) => self.geometry,
        }
    }

    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        self.device()?.read(buf, offset).await
    }

    fn lend(&self, range: Range<u64>, to: &mut dyn FnMut(&[u8])) {
        if let Ok(device) = self.device() {
            device.lend(range, to);
        }
    }

    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        self.device()?.write(buf, offset, flags).await
    }

    fn write_nowait(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Option<Result> {
        self.device().ok()?.write_nowait(buf, offset, flags)
    }

    fn lend_mut(
        &self,
        range: Range<u64>,
        flags: WriteFlags,
        from: &mut dyn FnMut(&mut [u8]),
    ) -> Option<Result> {
        self.device().ok()?.lend_mut(range, flags, from)
    }

    async fn flush(&self) -> Result {
        self.device()?.flush().await
    }

    async fn discard(&self, range: Range<u64>) -> Result {
        self.device()?.discard(range).await
    }

    async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        self.device()?.write_zeroes(range, flags).await
    }

    async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        self.device()?.extents(range, out).await
    }

    fn contexts(&self) -> Vec<String> {
        self.device()
            .map_or_else(|_| Vec::new(), |device| device.contexts())
    }

    async fn status(&self, context: &str, range: Range<u64>, out: &mut Extents<u64>) -> Result {
        self.device()?.status(context, range, out).await
    }

    async fn prefetch(&self, range: Range<u64>) -> Result {
        self.device()?.prefetch(range).await
    }

    async fn changed(&self, seen: Geometry) -> Geometry {
        match self.device() {
            Ok(device) => device.changed(seen).await,
            Err(_) => std::future::pending().await,
        }
    }

    async fn close(&self) -> Result {
        let device = {
            let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
            device.take()
        };
        match device {
            Some(device) => device.close().await,
            None => Ok(()),
        }
    }
}
