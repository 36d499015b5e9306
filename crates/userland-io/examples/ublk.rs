//! A stack as a kernel block device, until Ctrl-C. As root, on a kernel with ublk:
//!
//!     cargo run --features ublk --example ublk -- memory:1G
//!     mkfs.ext4 /dev/ublkb0

use userland_io::stack::Registry;
use userland_io::transports::ublk;
use userland_io::{Device, Result};

#[tokio::main]
async fn main() -> Result {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let engine = Registry::builtin().open_args(&words).await?;
    let disk = Device::open(engine).await?;
    let block = ublk::Target::new(disk).add().await?;
    println!("{}", block.path().display());
    tokio::signal::ctrl_c().await?;
    block.shutdown().await?;
    Ok(())
}
