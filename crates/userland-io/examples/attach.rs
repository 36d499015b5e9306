//! A stack as a block device of the kernel's, until Ctrl-C. As root, on Linux:
//!
//!     cargo run --features attach --example attach -- memory:1G
//!     mkfs.ext4 /dev/loop0

#[cfg(target_os = "linux")]
#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    use userland_io::{Device, attach, stack::Registry};

    let words: Vec<String> = std::env::args().skip(1).collect();
    let engine = Registry::builtin().open_args(&words).await?;
    let mut attached = attach(Device::open(engine).await?).await?;
    println!("{}", attached.path().display());
    tokio::signal::ctrl_c().await?;
    attached.detach().await?;
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn main() {
    eprintln!("only Linux has block devices of this kind");
}
