//! The file engine and the space that its file takes: holes, zeroes, discards, extents.
#![cfg(target_os = "linux")]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use userland_io::Discard;
use userland_io::engines::File;
use userland_io::{Engine, ErrorKind, ExtentKind, Extents, WriteFlags};
#[path = "common/file.rs"]
mod file;
#[path = "common/need.rs"]
mod need;
use file::{places, read, write};

fn used(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[tokio::test]
async fn a_discard_frees_space_and_reads_as_zeroes() {
    for place in places() {
        let path = place.path().join("disk.img");
        let disk = File::open(&path).size(8 << 20).await.unwrap();
        assert_eq!(disk.geometry().discard, Discard::Zeroes);
        write(&disk, &vec![9; 8 << 20], 0).await;
        disk.flush().await.unwrap();
        let before = used(&path);
        disk.discard(1 << 20..5 << 20).await.unwrap();
        disk.flush().await.unwrap();
        assert!(
            used(&path) + (4 << 20) <= before,
            "{before} then {}",
            used(&path)
        );
        assert_eq!(fs::metadata(&path).unwrap().len(), 8 << 20);
        let bytes = read(&disk, 0..8 << 20).await.unwrap();
        for (at, byte) in bytes.into_iter().enumerate() {
            let zero = (1 << 20..5 << 20).contains(&at);
            assert_eq!(byte, if zero { 0 } else { 9 }, "at {at}");
        }
    }
}

#[tokio::test]
async fn zeroes_free_space_keep_it_or_are_refused() {
    for place in places() {
        let path = place.path().join("disk.img");
        let disk = File::open(&path).size(8 << 20).await.unwrap();
        write(&disk, &vec![9; 8 << 20], 0).await;
        disk.flush().await.unwrap();
        let full = used(&path);
        let fast = WriteFlags::FAST_ONLY;
        match disk
            .write_zeroes(0..1 << 20, fast | WriteFlags::NO_UNMAP)
            .await
        {
            Ok(()) => {
                disk.flush().await.unwrap();
                assert!(used(&path) >= full, "space was given back");
                assert_eq!(read(&disk, 0..1 << 20).await.unwrap(), vec![0; 1 << 20]);
            }
            // tmpfs cannot: then nothing may have been written.
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Unsupported);
                assert_eq!(read(&disk, 0..1 << 20).await.unwrap(), vec![9; 1 << 20]);
            }
        }
        // To the byte, and no further.
        disk.write_zeroes((2 << 20) + 5..(4 << 20) - 7, fast)
            .await
            .unwrap();
        disk.flush().await.unwrap();
        assert!(used(&path) + (1 << 20) <= full);
        let edge = read(&disk, (2 << 20)..(2 << 20) + 10).await.unwrap();
        assert_eq!(edge, [9, 9, 9, 9, 9, 0, 0, 0, 0, 0]);
        let edge = read(&disk, (4 << 20) - 10..4 << 20).await.unwrap();
        assert_eq!(edge, [0, 0, 0, 9, 9, 9, 9, 9, 9, 9]);
    }
}

#[tokio::test]
async fn extents_are_those_of_the_file_system() {
    for place in places() {
        let path = place.path().join("disk.img");
        let disk = File::open(&path).size((16 << 20) + 100).await.unwrap();
        write(&disk, &[1; 8192], 4 << 20).await;
        write(&disk, &[1; 4096], 8 << 20).await;
        let mut all = Extents::new(99);
        disk.extents(0..(16 << 20) + 100, &mut all).await.unwrap();
        let runs: Vec<_> = all.iter().map(|run| (run.len, run.kind)).collect();
        let (hole, data) = (ExtentKind::Hole, ExtentKind::Data);
        assert_eq!(
            runs,
            [
                (4 << 20, hole),
                (8192, data),
                ((4 << 20) - 8192, hole),
                (4096, data),
                ((8 << 20) - 4096 + 100, hole)
            ]
        );
        // A window that begins and ends inside runs, and a cap.
        let mut some = Extents::new(9);
        let window = (4 << 20) + 10..(8 << 20) + 10;
        disk.extents(window, &mut some).await.unwrap();
        let runs: Vec<_> = some.iter().map(|run| (run.len, run.kind)).collect();
        assert_eq!(runs, [(8182, data), ((4 << 20) - 8192, hole), (10, data)]);
        let mut one = Extents::new(1);
        disk.extents(0..16 << 20, &mut one).await.unwrap();
        assert_eq!(one.covered(), 4 << 20);
    }
}

/// `filefrag` asks by another way (FIEMAP), so it is a second opinion.
#[tokio::test]
async fn filefrag_sees_the_same_data() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("disk.img");
    let disk = File::open(&path).size(64 << 20).await.unwrap();
    let mut rng = fastrand::Rng::with_seed(3);
    for _ in 0..20 {
        let at = rng.u64(0..63 << 8) << 12;
        write(&disk, &vec![5; 4096 * rng.usize(1..9)], at).await;
    }
    disk.flush().await.unwrap();
    let output = match Command::new("filefrag")
        .arg("-b4096")
        .arg("-v")
        .arg(&path)
        .output()
    {
        Ok(output) if output.status.success() => output,
        other => {
            need::skip(&format!("needs a filefrag that works: {other:?}"));
            return;
        }
    };
    // "   0:     1024..    1031:  99..106:   8: flags"
    let mut theirs = std::collections::BTreeSet::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let fields: Vec<_> = line.split(':').collect();
        let Some((first, last)) = fields.get(1).and_then(|range| range.split_once("..")) else {
            continue;
        };
        if let (Ok(first), Ok(last)) = (first.trim().parse(), last.trim().parse::<u64>()) {
            theirs.extend::<std::ops::RangeInclusive<u64>>(first..=last);
        }
    }
    assert!(!theirs.is_empty(), "{output:?}");
    let mut all = Extents::new(1000);
    disk.extents(0..64 << 20, &mut all).await.unwrap();
    let (mut ours, mut at) = (std::collections::BTreeSet::new(), 0);
    for run in &all {
        if run.kind == ExtentKind::Data {
            ours.extend(at / 4096..(at + run.len) / 4096);
        }
        at += run.len;
    }
    assert_eq!(ours, theirs);
}
