//! A disk in memory. `cargo run --example ramdisk`, then `nbdinfo nbd://localhost`
use std::sync::RwLock;
use userland_io::transports::nbd;
use userland_io::{CrashLevel, Device, Engine, Geometry, ReadBuf, Result, WriteBuf, WriteFlags};

struct Ramdisk(RwLock<Vec<u8>>);

impl Engine for Ramdisk {
    fn geometry(&self) -> Geometry {
        Geometry::writable(self.0.read().unwrap().len() as u64, CrashLevel::None)
    }

    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        buf.copy_from(&self.0.read().unwrap()[offset as usize..][..buf.len()]);
        Ok(())
    }

    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, _: WriteFlags) -> Result {
        buf.copy_to(&mut self.0.write().unwrap()[offset as usize..][..buf.len()]);
        Ok(())
    }
}

#[tokio::main]
async fn main() -> Result {
    let disk = Device::open(Ramdisk(RwLock::new(vec![0; 64 << 20]))).await?;
    nbd::Server::new().export("ram", disk).serve("nbd://").await
}
