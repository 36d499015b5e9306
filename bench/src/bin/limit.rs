//! The limit as a program, so that it can be measured like any server: `limit SOCKET|PORT SIZE`.

use std::io;
use std::path::PathBuf;

use bench::nbd::endpoint::Endpoint;
use bench::nbd::limit;
use clap::Parser;

/// A server that does nothing but move the protocol's bytes
#[derive(Parser)]
struct Arguments {
    /// Where to listen: the path of a Unix socket, or a port of 127.0.0.1
    address: String,
    /// The size of the disk in bytes
    size: u64,
}

fn main() -> io::Result<()> {
    let Arguments { address, size } = Arguments::parse();
    let endpoint = match address.parse() {
        Ok(port) => Endpoint::Tcp(port),
        Err(_) => Endpoint::Unix(PathBuf::from(address)),
    };
    limit::serve(&endpoint, size)
}
