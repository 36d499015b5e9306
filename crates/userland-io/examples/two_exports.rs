//! One server with two exports of one disk, one of them read-only, on TCP and on a Unix socket.
//!
//! `cargo run --example two_exports`, then `nbdinfo --list nbd://localhost:10810`; Ctrl-C ends it.

use userland_io::{Device, Result, engines::Memory, transports::nbd};

#[tokio::main]
async fn main() -> Result {
    let disk = Device::open(Memory::new(1 << 30)).await?;
    let mut addresses = vec!["nbd://localhost:10810".to_owned()];
    if cfg!(unix) {
        let socket = std::env::temp_dir().join("two_exports.sock");
        addresses.push(format!("unix:{}", socket.display()));
    }
    let server = nbd::Server::new()
        .export("disk", disk.clone())
        .description("yours to write to")
        .export("look", disk.read_only())
        .description("the same disk, for looking only")
        .bind(addresses)
        .await?;
    for uri in server.uris() {
        println!("{uri}");
    }
    tokio::signal::ctrl_c().await?;
    // Finishes what is in flight and flushes; the last handle closes the engine.
    server.shutdown().await?;
    disk.close().await
}
