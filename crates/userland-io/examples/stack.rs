//! Layers over an engine, composed by the compiler and by words, and what goes through them.
//!
//! `cargo run --example stack`

use std::time::Duration;

use userland_io::layers::{Delay, Operation, Stats};
use userland_io::stack::Registry;
use userland_io::{Device, EngineExt, ReadBuf, Result, WriteBuf, WriteFlags, engines::Memory};

#[tokio::main]
async fn main() -> Result {
    // By the compiler: one type, no allocation for a request.
    let stats = Stats::new();
    let disk = Memory::new(64 << 20)
        .layer(Delay::new().read(Duration::from_millis(5)))?
        .layer(stats.clone())?;
    let disk = Device::open(disk).await?;
    disk.write(&WriteBuf::new(b"hello"), 4096, WriteFlags::FUA)
        .await?;
    let mut bytes = [0; 5];
    disk.read(&mut ReadBuf::new(&mut bytes), 4096).await?;
    println!("read back {:?}: {stats}", String::from_utf8_lossy(&bytes));
    println!("one read: {:?}", stats.get(Operation::Read));
    disk.close().await?;

    // By words, at run time: what `ulio serve` does with its arguments.
    let registry = Registry::builtin();
    let engine = registry
        .open("pattern:1T offset:1G,size=1M delay:read=1ms")
        .await?;
    let disk = Device::open(engine).await?;
    let mut place = [0; 8];
    disk.read(&mut ReadBuf::new(&mut place), 512).await?;
    println!(
        "byte 512 of the window is byte {} below",
        u64::from_be_bytes(place)
    );
    disk.close().await?;

    // A mistake is pointed at.
    if let Err(error) = registry.open("memory:1G delay:raed=5ms").await {
        println!("{}", error.render());
    }
    Ok(())
}
