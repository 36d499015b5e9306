//! Many devices, one after another and at once: they leave nothing behind, and do not get in each other's way.
#![cfg(all(feature = "attach", target_os = "linux"))]

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, MutexGuard};
use userland_io::engines::Memory;

#[path = "common/attach.rs"]
mod attach;
#[path = "common/need.rs"]
mod need;
use attach::{Aligned, PATIENCE, attached, detach, direct, is_free};

/// They count what the process has, so only one runs at a time.
static TURN: Mutex<()> = Mutex::const_new(());

async fn turn() -> MutexGuard<'static, ()> {
    let turn = TURN.lock().await;
    // An allocator that keeps what threads free for threads to come would hide a leak.
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, 128 << 10)] {
        // SAFETY: it sets a number that later allocations go by.
        assert_eq!(unsafe { libc::mallopt(parameter, value) }, 1);
    }
    turn
}

/// What a device that was taken away could have left.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    threads: usize,
    mounts: usize,
    /// Loop devices over this process's files, NBD devices of its name, all ublk devices where those are nobody else's, and what
    /// stands under `/run/ulio` about its devices.
    traces: Vec<String>,
}

impl Held {
    fn now() -> Self {
        let count = |directory: &str| fs::read_dir(directory).unwrap().count();
        let mine = format!("{}-", std::process::id());
        let mut traces = Vec::new();
        for entry in fs::read_dir("/sys/block").unwrap().flatten() {
            let file = fs::read_to_string(entry.path().join("loop/backing_file"));
            if let Ok(file) = file
                && file.starts_with(&format!("/ulio-{mine}"))
            {
                traces.push(file);
            }
            let backend = fs::read_to_string(entry.path().join("backend"));
            if let Ok(backend) = backend
                && backend.starts_with(&format!("userland-io {mine}"))
            {
                traces.push(backend);
            }
        }
        if std::env::var_os("ULIO_GUEST").is_some() {
            let devices = fs::read_dir("/sys/class/ublk-char").into_iter().flatten();
            let names = devices.flatten().map(|entry| entry.file_name());
            traces.extend(names.map(|name| name.to_string_lossy().into_owned()));
        }
        for entry in fs::read_dir("/run/ulio").into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(&mine) {
                traces.push(name);
            }
        }
        Held {
            descriptors: count("/proc/self/fd"),
            threads: count("/proc/self/task"),
            mounts: match std::env::var_os("ULIO_GUEST") {
                Some(_) => fs::read_to_string("/proc/self/mounts")
                    .unwrap()
                    .lines()
                    .count(),
                // Others mount, too.
                None => 0,
            },
            traces,
        }
    }
}

/// Memory of this process that is there, in bytes.
fn resident() -> usize {
    let text = fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = text.split(' ').nth(1).unwrap().parse().unwrap();
    pages * rustix::param::page_size()
}

/// Attaches, uses and detaches; false once the skip is told.
async fn cycle(index: u8) -> bool {
    let Some(disk) = attached(Memory::new(1 << 20)).await else {
        return false;
    };
    let mut block = Aligned::filled(4096, index);
    let file = direct(disk.path());
    file.write_all_at(&block, 8192).unwrap();
    block.fill(0);
    file.read_exact_at(&mut block, 8192).unwrap();
    assert!(block.iter().all(|byte| *byte == index));
    drop(file);
    detach(disk).await;
    true
}

async fn cycles(count: usize) {
    let _turn = turn().await;
    // What is made once and kept is made here.
    for index in 0..5 {
        if !cycle(index).await {
            return;
        }
    }
    // The last threads of a device may still be on their way out.
    let begun = Instant::now();
    let (mut before, mut memory) = (Held::now(), resident());
    while !before.traces.is_empty() || before != Held::now() {
        assert!(begun.elapsed() < PATIENCE, "{before:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
        (before, memory) = (Held::now(), resident());
    }
    for index in 0..count {
        assert!(cycle(index as u8).await);
    }
    let begun = Instant::now();
    loop {
        let after = Held::now();
        if after.descriptors <= before.descriptors
            && after.threads <= before.threads
            && after.mounts <= before.mounts
            && after.traces.is_empty()
        {
            break;
        }
        assert!(
            begun.elapsed() < PATIENCE,
            "{before:?}, and after {count} cycles {after:?}"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let grown = resident().saturating_sub(memory);
    let most = (1 << 20) + count * (16 << 10);
    assert!(grown < most, "{grown} bytes more after {count} cycles");
    eprintln!(
        "{}: {count} cycles; {} descriptors, {} threads, {} KiB more than before",
        attach::via(),
        Held::now().descriptors.saturating_sub(before.descriptors),
        Held::now().threads.saturating_sub(before.threads),
        grown >> 10
    );
}

#[tokio::test]
async fn twenty_cycles_leave_nothing() {
    cycles(20).await;
}

#[tokio::test]
#[ignore = "takes a minute"]
async fn two_hundred_cycles_leave_nothing() {
    cycles(200).await;
}

#[tokio::test]
async fn sixty_four_devices_at_once_are_apart() {
    const COUNT: u8 = 64;
    let _turn = turn().await;
    let Some(first) = attached(Memory::new(1 << 20)).await else {
        return;
    };
    let mut disks = vec![first];
    let others: Vec<_> = (1..COUNT)
        .map(|_| tokio::spawn(async { attached(Memory::new(1 << 20)).await.unwrap() }))
        .collect();
    for other in others {
        disks.push(other.await.unwrap());
    }
    let paths: Vec<PathBuf> = disks.iter().map(|disk| disk.path().to_owned()).collect();
    for (index, path) in paths.iter().enumerate() {
        let block = Aligned::filled(4096, index as u8 + 1);
        direct(path)
            .write_all_at(&block, index as u64 * 4096)
            .unwrap();
    }
    for (index, path) in paths.iter().enumerate() {
        let mut all = Aligned::new(1 << 20);
        direct(path).read_exact_at(&mut all, 0).unwrap();
        for (at, block) in all.chunks(4096).enumerate() {
            let byte = if at == index { index as u8 + 1 } else { 0 };
            assert!(
                block.iter().all(|found| *found == byte),
                "{} at {at}",
                path.display()
            );
        }
    }
    let ends: Vec<_> = disks
        .into_iter()
        .map(|disk| tokio::spawn(detach(disk)))
        .collect();
    for end in ends {
        end.await.unwrap();
    }
    assert!(paths.iter().all(|path| is_free(path)));
}
