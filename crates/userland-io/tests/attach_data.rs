//! What was written to an attached device is what is read, by whatever way applications have.
#![cfg(all(feature = "attach", target_os = "linux"))]

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;

use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap};
use serde_json::Value;
use userland_io::engines::Memory;
use userland_io::{Device, Engine, ReadBuf};

#[path = "common/attach.rs"]
mod attach;
#[path = "common/clients.rs"]
mod clients;
#[path = "common/need.rs"]
mod need;
use attach::{Aligned, attached, attached_as, buffered, detach, direct, opened};
use clients::{assert_same, image, succeed};

const SIZE: u64 = 16 << 20;

/// All that the engine holds, asked past the kernel.
async fn held<E: Engine>(device: &Device<E>) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    let mut buf = ReadBuf::new(&mut bytes);
    device.read(&mut buf, 0).await.unwrap();
    bytes
}

#[tokio::test]
async fn direct_requests_of_every_length_carry_their_bytes() {
    let device = opened(Memory::new(SIZE)).await;
    let Some(disk) = attached_as(&device, |builder| builder).await else {
        return;
    };
    // Four threads, each on a part of its own.
    let part = (SIZE / 4) as usize;
    let parts: Vec<Vec<u8>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|index: u64| {
                let path = disk.path();
                scope.spawn(move || direct_part(path, index * SIZE / 4, part, index))
            })
            .collect();
        let ended = threads.into_iter().map(|thread| thread.join().unwrap());
        ended.collect()
    });
    assert_same(&parts.concat(), &held(&device).await, "the engine");
    detach(disk).await;
}

/// Writes and reads at random in `len` bytes from `start`, and gives what they hold then.
fn direct_part(path: &Path, start: u64, len: usize, seed: u64) -> Vec<u8> {
    let file = direct(path);
    let mut random = fastrand::Rng::with_seed(seed);
    let mut model = vec![0; len];
    for round in 0..60 {
        // 512 bytes to 1 MiB, each power of two as often, into memory that is aligned to sectors alone.
        let size = (512 << random.u32(0..12)) - 512 * random.usize(0..2);
        let size = size.clamp(512, 1 << 20);
        let at = random.usize(0..=(len - size) / 512) * 512;
        let mut memory = Aligned::behind(size, 512 * random.usize(0..8));
        if round % 3 < 2 {
            random.fill(&mut memory);
            file.write_all_at(&memory, start + at as u64).unwrap();
            model[at..at + size].copy_from_slice(&memory);
        } else {
            file.read_exact_at(&mut memory, start + at as u64).unwrap();
            assert_same(&model[at..at + size], &memory, &format!("{size} at {at}"));
        }
    }
    model
}

#[tokio::test]
async fn buffered_writes_of_any_bytes_are_written_back() {
    let device = opened(Memory::new(SIZE)).await;
    let Some(disk) = attached_as(&device, |builder| builder).await else {
        return;
    };
    let mut random = fastrand::Rng::with_seed(5);
    let mut model = vec![0; SIZE as usize];
    for _ in 0..3 {
        let file = buffered(disk.path());
        for _ in 0..40 {
            let size = random.usize(1..150_000);
            let at = random.usize(0..=model.len() - size);
            let bytes = image(size, random.u64(..));
            file.write_all_at(&bytes, at as u64).unwrap();
            model[at..at + size].copy_from_slice(&bytes);
            let (size, at) = (random.usize(1..5000), random.usize(0..model.len() - 5000));
            let mut found = vec![1; size];
            file.read_exact_at(&mut found, at as u64).unwrap();
            assert_same(&model[at..at + size], &found, "read back");
        }
        file.sync_all().unwrap();
        assert_same(&model, &held(&device).await, "the engine");
        // The last one to close it drops what is cached: the next round reads from the engine.
        drop(file);
    }
    detach(disk).await;
}

#[tokio::test]
async fn what_is_written_to_mapped_memory_arrives() {
    let device = opened(Memory::new(SIZE)).await;
    let Some(disk) = attached_as(&device, |builder| builder).await else {
        return;
    };
    let file = buffered(disk.path());
    let (len, protection) = (SIZE as usize, ProtFlags::READ | ProtFlags::WRITE);
    // SAFETY: a new mapping at a place of the kernel's choice.
    let memory = unsafe {
        mmap(
            std::ptr::null_mut(),
            len,
            protection,
            MapFlags::SHARED,
            &file,
            0,
        )
    };
    let memory = memory.unwrap();
    let mut model = vec![0; len];
    let begin = image(1 << 20, 6);
    file.write_all_at(&begin, 0).unwrap();
    model[..begin.len()].copy_from_slice(&begin);
    {
        // SAFETY: the whole mapping, and the only slice of it. Nobody writes to the device meanwhile.
        let mapped = unsafe { std::slice::from_raw_parts_mut(memory.cast::<u8>(), len) };
        assert_same(&model, mapped, "mapped");
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..200 {
            let at = random.usize(0..len - 3000);
            let bytes = image(random.usize(1..3000), random.u64(..));
            mapped[at..at + bytes.len()].copy_from_slice(&bytes);
            model[at..at + bytes.len()].copy_from_slice(&bytes);
        }
    }
    // SAFETY: our own mapping; the slice is gone.
    unsafe { msync(memory, len, MsyncFlags::SYNC) }.unwrap();
    assert_same(&model, &held(&device).await, "the engine");
    // SAFETY: our own mapping, of that length, into which nothing points any more.
    unsafe { munmap(memory, len) }.unwrap();
    drop(file);
    detach(disk).await;
}

#[tokio::test]
async fn fio_verifies_what_it_wrote_at_random() {
    fio(
        "randwrite",
        &[
            "--direct=1",
            "--bsrange=512-64k",
            "--blockalign=512",
            "--fsync=64",
        ],
    )
    .await;
}

#[tokio::test]
async fn fio_verifies_reads_among_writes_in_order() {
    fio("rw", &["--direct=1", "--bs=1M"]).await;
}

#[tokio::test]
async fn fio_verifies_what_is_cached() {
    fio("randrw", &["--direct=0", "--bs=16k", "--end_fsync=1"]).await;
}

async fn fio(rw: &str, more: &[&str]) {
    let Some(fio) = need::program("fio") else {
        return;
    };
    let Some(disk) = attached(Memory::new(SIZE)).await else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let [name, rw, aux] = [
        format!("--filename={}", disk.path().display()),
        format!("--rw={rw}"),
        format!("--aux-path={}", directory.path().display()),
    ];
    let mut args = vec![
        "--name=verify",
        "--ioengine=libaio",
        "--iodepth=32",
        "--size=16M",
    ];
    args.extend([
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--randseed=7",
    ]);
    args.extend([
        "--verify_state_save=0",
        "--output-format=json",
        &name,
        &rw,
        &aux,
    ]);
    args.extend(more);
    let text = succeed(&fio, &args);
    let said: Value = serde_json::from_str(&text[text.find('{').unwrap()..]).unwrap();
    let job = &said["jobs"][0];
    assert_eq!(job["error"], 0, "{text}");
    let total = |what: &str| job[what]["io_bytes"].as_u64().unwrap();
    assert!(
        total("write") > SIZE / 4 && total("read") >= total("write"),
        "{text}"
    );
    detach(disk).await;
}
