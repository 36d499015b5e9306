//! An engine of plain functions over slices, run on threads: a disk in a file by `std` alone.
//!
//! `truncate -s 64M disk.img`, `cargo run --example blocking -- disk.img`, then `nbdinfo nbd://localhost`

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::Mutex;

use userland_io::{Blocking, BlockingEngine, CrashLevel, Device, Geometry, Result, WriteFlags};
use userland_io::{errno, transports::nbd};

/// `None` once a sync has failed: the system may have dropped what it could not write, and
/// would answer the next sync as if all were well.
struct Plain(Mutex<Option<File>>, u64);

impl Plain {
    fn at(&self, offset: u64, act: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result {
        let mut file = self.0.lock().unwrap();
        let file = file
            .as_mut()
            .ok_or(userland_io::Error::from_errno(errno::EIO))?;
        file.seek(SeekFrom::Start(offset))?;
        Ok(act(file)?)
    }
}

impl BlockingEngine for Plain {
    fn geometry(&self) -> Geometry {
        Geometry::writable(self.1, CrashLevel::Flush)
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result {
        self.at(offset, |file| file.read_exact(buf))
    }

    fn write(&self, buf: &[u8], offset: u64, _: WriteFlags) -> Result {
        self.at(offset, |file| file.write_all(buf))
    }

    // `Write::flush` of a `File` does nothing: durable is what was synced.
    fn flush(&self) -> Result {
        self.at(0, |file| file.sync_data())
            .inspect_err(|_| *self.0.lock().unwrap() = None)
    }
}

#[tokio::main]
async fn main() -> Result {
    let path = std::env::args().nth(1).unwrap_or("disk.img".into());
    let file = File::options().read(true).write(true).open(path)?;
    let size = file.metadata()?.len();
    let engine = Blocking::new(Plain(Mutex::new(Some(file)), size), 4)?;
    let disk = Device::open(engine).await?;
    nbd::Server::new()
        .export("plain", disk)
        .serve("nbd://")
        .await
}
