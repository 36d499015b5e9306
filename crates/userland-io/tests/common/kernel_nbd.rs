//! What tests of the kernel's NBD client share.
#![allow(dead_code)]

use std::fs;
use std::path::Path;

use tokio::sync::{Mutex, MutexGuard};
use userland_io::Device;
use userland_io::engines::Memory;
use userland_io::transports::kernel_nbd;

use crate::need;

/// The size of the disks.
pub(crate) const SIZE: u64 = 16 << 20;

/// Tests look at what the driver has in all, so there is one at a time.
static ALONE: Mutex<()> = Mutex::const_new(());

/// A turn, if this kernel has what is tested here.
pub(crate) async fn turn() -> Option<MutexGuard<'static, ()>> {
    if kernel_nbd::available().is_err() {
        need::guest("an NBD client in the kernel");
        return None;
    }
    Some(ALONE.lock().await)
}

pub(crate) async fn memory(size: u64) -> Device<Memory> {
    Device::open(Memory::new(size)).await.unwrap()
}

/// The driver's devices: all there are, and those of them that are connected.
pub(crate) fn devices() -> (Vec<String>, Vec<String>) {
    let entries = fs::read_dir("/sys/block").unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut all: Vec<_> = names.filter(|name| name.starts_with("nbd")).collect();
    all.sort();
    let is_connected = |name: &&String| Path::new("/sys/block").join(name).join("pid").exists();
    let connected = all.iter().filter(is_connected).cloned().collect();
    (all, connected)
}
