//! What each key of the library's own engines and layers does.

use std::sync::{Arc, Mutex};
use std::time::Duration;
use userland_io::stack::{Registry, StackErrorKind};
use userland_io::{Device, Engine, ReadBuf, WriteBuf, WriteFlags, errno};

async fn open(words: &str) -> Device {
    Device::open(Registry::builtin().open(words).await.unwrap())
        .await
        .unwrap()
}

async fn read(disk: &Device, at: u64) -> userland_io::Result<[u8; 8]> {
    let mut bytes = [0xee; 8];
    disk.read(&mut ReadBuf::new(&mut bytes), at).await?;
    Ok(bytes)
}

async fn write(disk: &Device, at: u64) -> userland_io::Result {
    disk.write(&WriteBuf::new(b"12345678"), at, WriteFlags::empty())
        .await
}

#[tokio::test]
async fn engines_take_their_size() {
    for name in ["memory", "null", "pattern"] {
        for words in [format!("{name}:3M"), format!("{name}:size=3M")] {
            assert_eq!(open(&words).await.geometry().size, 3 << 20, "{words}");
        }
    }
    assert_eq!(open("null").await.geometry().size, 1 << 30);
    assert_eq!(open("pattern").await.geometry().size, 1 << 30);
    assert!(open("null:readonly").await.geometry().is_read_only());
    assert!(open("null:1G,readonly").await.geometry().is_read_only());
    assert!(!open("null:1G,readonly=no").await.geometry().is_read_only());
    assert_eq!(
        read(&open("pattern:1M").await, 4096).await.unwrap(),
        4096u64.to_be_bytes()
    );
}

#[tokio::test]
async fn file_takes_its_keys() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a disk, mine.img");
    let text = path.to_str().unwrap();
    let absent = Registry::builtin()
        .open(&format!("file:'{text}'"))
        .await
        .unwrap_err();
    assert_eq!(absent.kind(), StackErrorKind::Open);
    assert!(absent.to_string().contains(text), "{absent}");
    let disk = open(&format!("file:'{text}',size=1M,threads=2")).await;
    assert_eq!(disk.geometry().size, 1 << 20);
    write(&disk, 0).await.unwrap();
    disk.close().await.unwrap();
    let disk = open(&format!("file:path='{text}',readonly")).await;
    assert!(disk.geometry().is_read_only());
    assert_eq!(&read(&disk, 0).await.unwrap(), b"12345678");
    disk.close().await.unwrap();
    let other = format!("file:'{text}',size=2M");
    assert!(Registry::builtin().open(&other).await.is_err());
    let error = Registry::builtin()
        .open("file:x,threads=0")
        .await
        .unwrap_err();
    assert_eq!(error.to_string(), "0 threads: use 1 to 1024");
    assert_eq!(&error.text()[error.span()], "0");
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn direct_asks_for_blocks_where_the_file_system_has_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    let words = format!("file:{},size=1M,direct", path.display());
    // Some file systems (tmpfs of old) know no direct I/O, and say so.
    match Registry::builtin().open(&words).await {
        Ok(engine) => assert!(engine.geometry().logical_block_size >= 512),
        Err(error) => assert_eq!(error.kind(), StackErrorKind::Open),
    }
}

#[tokio::test]
async fn readonly_and_offset_do_as_they_say() {
    let disk = open("memory:1M readonly").await;
    assert_eq!(write(&disk, 0).await.unwrap_err().errno(), errno::EROFS);
    let disk = open("pattern:1M offset:64K,size=8K").await;
    assert_eq!(disk.geometry().size, 8192);
    assert_eq!(read(&disk, 0).await.unwrap(), 65536u64.to_be_bytes());
    assert_eq!(
        open("pattern:1M offset:start=64K").await.geometry().size,
        (1 << 20) - 65536
    );
    let error = Registry::builtin()
        .open("null:1M offset:2M")
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "`offset:2M`: the window starts at byte 2097152, but the disk below has only 1048576"
    );
    assert_eq!(error.word_index(), Some(1));
}

#[tokio::test]
async fn a_partition_that_is_not_there_is_pointed_at() {
    let error = Registry::builtin()
        .open("null:1M partition:1")
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "`partition:1`: there is no partition table on this disk (its first sector is no MBR)"
    );
}

#[tokio::test(start_paused = true)]
async fn delay_waits_by_its_keys() {
    for (words, reads, writes) in [
        ("memory:1M delay:5ms", 5, 5),
        ("memory:1M delay:read=7ms", 7, 0),
        ("memory:1M delay:5ms,write=9ms", 5, 9),
        ("memory:1M delay:5ms,write=0", 5, 0),
    ] {
        let disk = open(words).await;
        let start = tokio::time::Instant::now();
        read(&disk, 0).await.unwrap();
        let read_took = start.elapsed();
        write(&disk, 0).await.unwrap();
        let write_took = start.elapsed() - read_took;
        let near = |took: Duration, wanted: u64| {
            let wanted = Duration::from_millis(wanted);
            took >= wanted && took <= wanted + Duration::from_millis(2)
        };
        assert!(
            near(read_took, reads) && near(write_took, writes),
            "{words}: {read_took:?} {write_took:?}"
        );
    }
}

#[tokio::test]
async fn fault_fails_by_its_keys() {
    // The word, and which of six writes of 8 bytes each at 0, 1K, 2K, ... fail, with what.
    let table = [
        ("fault", "111111", errno::EIO),
        ("fault:ENOSPC", "111111", errno::ENOSPC),
        ("fault:error=erofs", "111111", errno::EROFS),
        ("fault:on=read+flush", "000000", 0),
        ("fault:on=write", "111111", errno::EIO),
        ("fault:range=1K..3K", "011000", errno::EIO),
        ("fault:after=4", "000011", errno::EIO),
        ("fault:times=2", "110000", errno::EIO),
        ("fault:once", "100000", errno::EIO),
        ("fault:probability=0", "000000", 0),
        ("fault:late", "111111", errno::EIO),
    ];
    for (word, expected, number) in table {
        let disk = open(&format!("memory:1M {word}")).await;
        let mut failed = String::new();
        for n in 0..6 {
            match write(&disk, n * 1024).await {
                Ok(()) => failed.push('0'),
                Err(error) => {
                    assert_eq!(error.errno(), number, "{word}");
                    failed.push('1');
                }
            }
        }
        assert_eq!(failed, expected, "{word}");
    }
    let draws = async |word: &str| {
        let disk = open(&format!("memory:1M {word}")).await;
        let mut draws = Vec::new();
        for _ in 0..200 {
            draws.push(write(&disk, 0).await.is_err());
        }
        draws
    };
    let first = draws("fault:probability=50%,seed=1").await;
    assert_eq!(first, draws("fault:probability=1/2,seed=1").await);
    assert_ne!(first, draws("fault:probability=0.5,seed=2").await);
    let both = Registry::builtin()
        .open("null fault:once,times=2")
        .await
        .unwrap_err();
    assert_eq!(both.to_string(), "`once` is `times=1`: give one of them");
    assert_eq!(&both.text()[both.span()], "once");
}

#[tokio::test]
async fn stats_log_what_went_through_when_the_disk_closes() {
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);
    impl std::io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    let guard = tracing::subscriber::set_default(subscriber);
    let disk = open("memory:1M stats:top").await;
    write(&disk, 8).await.unwrap();
    assert_eq!(&read(&disk, 8).await.unwrap(), b"12345678");
    disk.close().await.unwrap();
    drop(guard);
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert!(
        text.contains("top: read 1 (8 bytes), write 1 (8 bytes)"),
        "{text}"
    );
}
