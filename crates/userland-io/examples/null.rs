//! The smallest disk: an exbibyte of zeroes.
//!
//! `cargo run --example null`, then `nbdinfo nbd://localhost`

use userland_io::{Device, Engine, Geometry, ReadBuf, Result, transports::nbd};

struct Zeroes;

impl Engine for Zeroes {
    fn geometry(&self) -> Geometry {
        Geometry::read_only(1 << 60)
    }

    async fn read(&self, buf: &mut ReadBuf<'_>, _: u64) -> Result {
        buf.fill(0);
        Ok(())
    }
}

#[tokio::main]
async fn main() -> Result {
    let disk = Device::open(Zeroes).await?;
    nbd::Server::new()
        .export("zeroes", disk)
        .serve("nbd://")
        .await
}
