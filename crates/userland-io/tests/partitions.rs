//! Partition tables that nbdkit makes are read, and each partition shows its own file.

use std::path::Path;
use std::process::Command;

use userland_io::stack::Registry;
use userland_io::{Device, ReadBuf};

#[path = "common/need.rs"]
mod need;

/// An image of `count` partitions, the first 1 MiB long, the second 2 MiB, ..., each beginning with its number.
fn image(dir: &Path, kind: &str, count: u64) -> Option<std::path::PathBuf> {
    let nbdkit = need::program("nbdkit")?;
    need::program("nbdcopy")?;
    let mut command = Command::new(nbdkit);
    command.current_dir(dir).args(["-U", "-", "partitioning"]);
    for n in 1..=count {
        let name = format!("part{n}");
        let mut bytes = vec![0; (n << 20) as usize];
        bytes[..8].copy_from_slice(&n.to_be_bytes());
        std::fs::write(dir.join(&name), bytes).unwrap();
        command.arg(name);
    }
    let made = command
        .arg(format!("partition-type={kind}"))
        .args(["--run", "nbdcopy \"$uri\" disk.img"])
        .output()
        .unwrap();
    if !made.status.success() {
        need::skip(&format!(
            "nbdkit has no partitioning plugin: {}",
            String::from_utf8_lossy(&made.stderr)
        ));
        return None;
    }
    Some(dir.join("disk.img"))
}

async fn shows(image: &Path, number: u64) -> (u64, u64) {
    let words = format!("file:'{}',readonly partition:{number}", image.display());
    let disk = Device::open(Registry::builtin().open(&words).await.unwrap())
        .await
        .unwrap();
    let mut first = [0; 8];
    disk.read(&mut ReadBuf::new(&mut first), 0).await.unwrap();
    (disk.geometry().size >> 20, u64::from_be_bytes(first))
}

#[tokio::test]
async fn every_partition_of_a_gpt_shows_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let Some(image) = image(dir.path(), "gpt", 6) else {
        return;
    };
    for n in 1..=6 {
        assert_eq!(shows(&image, n).await, (n, n));
    }
}

#[tokio::test]
async fn every_partition_of_an_mbr_shows_its_file_logical_ones_too() {
    let dir = tempfile::tempdir().unwrap();
    let Some(image) = image(dir.path(), "mbr", 6) else {
        return;
    };
    // The fourth holds the logical ones, which begin at 5.
    for (number, file) in [(1, 1), (2, 2), (3, 3), (5, 4), (6, 5), (7, 6)] {
        assert_eq!(shows(&image, number).await, (file, file));
    }
    let words = format!("file:'{}',readonly partition:8", image.display());
    let error = Registry::builtin().open(&words).await.unwrap_err();
    assert_eq!(
        error.message(),
        "there is no partition 8; there are 1, 2, 3, 4, 5, 6, 7"
    );
}
