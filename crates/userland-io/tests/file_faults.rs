//! The file engine on real devices and file systems that fill up, fail or are in use.
//!
//! Needs root, loop devices and mounts: where those are not to be had, a test says that it skips.
#![cfg(target_os = "linux")]

use std::ffi::OsStr;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;
use tokio::sync::Mutex;
use userland_io::engines::File;
use userland_io::{
    Device, Discard, Engine, ErrorKind, Features, ReadBuf, Result, WriteBuf, WriteFlags,
};

#[path = "common/need.rs"]
mod need;

/// These tests start processes, which hold copies of all handles until they run their program: what one has
/// just closed, another may still be keeping open.
static ALONE: Mutex<()> = Mutex::const_new(());

const NONE: WriteFlags = WriteFlags::empty();

async fn read(engine: &impl Engine, range: Range<u64>) -> Result<Vec<u8>> {
    let mut bytes = vec![0xaa; (range.end - range.start) as usize];
    engine
        .read(&mut ReadBuf::new(&mut bytes), range.start)
        .await?;
    Ok(bytes)
}

async fn write(engine: &impl Engine, bytes: &[u8], offset: u64) -> Result {
    engine.write(&WriteBuf::new(bytes), offset, NONE).await
}

fn run<A: AsRef<OsStr>>(tool: &str, args: impl IntoIterator<Item = A>) -> Result<String, String> {
    match Command::new(tool).args(args).output() {
        Ok(output) if output.status.success() => {
            Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        }
        Ok(output) => Err(format!(
            "{tool}: {}",
            String::from_utf8_lossy(&output.stderr)
        )),
        Err(error) => Err(format!("{tool}: {error}")),
    }
}

/// Skips with the reason, if it cannot be had.
macro_rules! need {
    ($what:expr) => {
        match $what {
            Ok(it) => it,
            Err(reason) => {
                crate::need::impossible(&reason);
                return;
            }
        }
    };
}

/// A mount, taken away again.
struct Mount(TempDir);

impl Mount {
    fn tmpfs(bytes: u64) -> Result<Self, String> {
        let place = tempfile::tempdir().map_err(|error| error.to_string())?;
        let options = format!("size={bytes}");
        let args = ["-t", "tmpfs", "-o", &options, "tmpfs"].map(OsStr::new);
        run("mount", args.into_iter().chain([place.path().as_os_str()]))?;
        Ok(Mount(place))
    }
    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = run("umount", ["-l".as_ref(), self.0.path().as_os_str()]);
    }
}

/// A loop device, taken away again.
struct Loop(PathBuf);

/// A loop device over a file of 16 MiB.
struct Backed {
    device: Loop,
    backing: PathBuf,
    // After the device.
    _place: TempDir,
}

impl Backed {
    fn new(options: &[&str]) -> Result<Self, String> {
        let place = tempfile::tempdir().map_err(|error| error.to_string())?;
        let backing = place.path().join("backing");
        let file = fs::File::create(&backing).map_err(|error| error.to_string())?;
        file.set_len(16 << 20).map_err(|error| error.to_string())?;
        Ok(Backed {
            device: Loop::over(&backing, options)?,
            backing,
            _place: place,
        })
    }
}

impl Loop {
    fn over(path: &Path, options: &[&str]) -> Result<Self, String> {
        // One at a time: who tries for a device that another has just taken claims it for a moment.
        let lock = std::env::temp_dir().join("userland-io-losetup.lock");
        let args = ["losetup", "--show", "-f"].map(OsStr::new);
        let args = [lock.as_os_str()].into_iter().chain(args);
        let args = args.chain(options.iter().map(OsStr::new));
        let device = run("flock", args.chain([path.as_os_str()]))?;
        Ok(Loop(device.into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = run("losetup", ["-d".as_ref(), self.0.as_os_str()]);
    }
}

#[tokio::test]
async fn a_full_file_system_is_no_space_and_the_disk_goes_on() {
    let _alone = ALONE.lock().await;
    let mount = need!(Mount::tmpfs(2 << 20));
    let path = mount.path().join("disk.img");
    let disk = File::open(&path).size(8 << 20).await.unwrap();
    write(&disk, &[1; 1 << 20], 0).await.unwrap();
    for flags in [NONE, WriteFlags::FUA] {
        let bytes = vec![2; 4 << 20];
        let buf = WriteBuf::new(&bytes);
        let error = disk.write(&buf, 1 << 20, flags).await.unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::NoSpace, 28));
    }
    let small = WriteBuf::new(&[2; 4096]);
    let error = disk
        .write(&small, 7 << 20, WriteFlags::FUA)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    // Nothing was lost: what is there can be flushed, overwritten and read, and a discard makes room.
    disk.flush().await.unwrap();
    write(&disk, &[3; 4096], 0).await.unwrap();
    assert_eq!(read(&disk, 4095..4097).await.unwrap(), [3, 1]);
    disk.discard(1 << 20..8 << 20).await.unwrap();
    disk.write(&small, 7 << 20, WriteFlags::FUA).await.unwrap();
    assert_eq!(read(&disk, 7 << 20..(7 << 20) + 1).await.unwrap(), [2]);
}

/// The device takes the bytes into the page cache and has nowhere to put them.
#[tokio::test]
async fn a_device_that_loses_data_latches() {
    let _alone = ALONE.lock().await;
    let mount = need!(Mount::tmpfs(1 << 20));
    let backing = mount.path().join("backing");
    let file = fs::File::create(&backing).unwrap();
    file.set_len(8 << 20).unwrap();
    let device = need!(Loop::over(&backing, &[]));
    let disk = File::open(&device.0).await.unwrap();
    write(&disk, &[7; 4096], 0).await.unwrap();
    disk.flush().await.unwrap();
    write(&disk, &vec![9; 4 << 20], 1 << 20).await.unwrap();
    let error = disk.flush().await.unwrap_err();
    assert!(
        [ErrorKind::Io, ErrorKind::NoSpace].contains(&error.kind()),
        "{error:?}"
    );
    // The kernel has told once, and would answer the next one well.
    for result in [
        disk.flush().await,
        write(&disk, &[1; 512], 0).await,
        disk.write_zeroes(0..512, NONE).await,
        disk.close().await,
    ] {
        let text = result.unwrap_err().to_string();
        assert!(text.contains("open the disk again"), "{text}");
    }
    assert_eq!(read(&disk, 0..4096).await.unwrap(), [7; 4096]);
    drop(disk);
    let disk = File::open(&device.0).await.unwrap();
    write(&disk, &[8; 512], 0).await.unwrap();
    disk.flush().await.unwrap();
}

#[tokio::test]
async fn a_block_device_is_a_disk_with_the_blocks_it_has() {
    let _alone = ALONE.lock().await;
    for (block, direct) in [(512, false), (512, true), (4096, false), (4096, true)] {
        let Backed {
            device, backing, ..
        } = &need!(Backed::new(&["--sector-size", &block.to_string()]));
        let engine = File::open(&device.0).direct(direct).await.unwrap();
        let geometry = engine.geometry();
        geometry.validate().unwrap();
        assert_eq!(geometry.size, 16 << 20);
        assert_eq!(geometry.logical_block_size, block);
        assert!(!geometry.features.contains(Features::EXTENTS));
        assert_eq!(geometry.discard, Discard::Unspecified);
        let bytes: Vec<u8> = (0..3 << 20).map(|at: u32| (at % 251) as u8).collect();
        write(&engine, &bytes, 1 << 20).await.unwrap();
        let buf = WriteBuf::new(&bytes[..8192]);
        engine.write(&buf, 8 << 20, WriteFlags::FUA).await.unwrap();
        engine.flush().await.unwrap();
        assert!(read(&engine, 1 << 20..4 << 20).await.unwrap() == bytes);
        let below = fs::read(backing).unwrap();
        assert!(below[1 << 20..4 << 20] == bytes, "as the file below has it");
        assert!(below[8 << 20..][..8192] == bytes[..8192]);
        // Zeroes by the device, with and without its space.
        for (at, flags) in [(1 << 20, NONE), (2 << 20, WriteFlags::NO_UNMAP)] {
            engine
                .write_zeroes(at..at + (1 << 19), flags)
                .await
                .unwrap();
            let zeroed = read(&engine, at..at + (1 << 19)).await.unwrap();
            assert!(zeroed.iter().all(|&byte| byte == 0), "{flags:?}");
        }
        let kept = read(&engine, (2 << 20) + (1 << 19)..3 << 20).await.unwrap();
        assert!(kept == bytes[(1 << 20) + (1 << 19)..2 << 20]);
        // Not quickly: refused, and nothing written.
        let flags = WriteFlags::FAST_ONLY | WriteFlags::NO_UNMAP;
        let error = engine
            .write_zeroes(3 << 20..4 << 20, flags)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(read(&engine, 3 << 20..4 << 20).await.unwrap() == bytes[2 << 20..]);
        engine.discard(3 << 20..4 << 20).await.unwrap();
        engine.close().await.unwrap();
        drop(engine);
        // As one size says it must be, and no other.
        let error = File::open(&device.0).size(1 << 20).await.unwrap_err();
        assert!(error.to_string().contains("16777216"), "{error}");
        // Through the edge, to the byte.
        let engine = File::open(&device.0)
            .size(16 << 20)
            .direct(direct)
            .await
            .unwrap();
        let disk = Device::open(engine).await.unwrap();
        let buf = WriteBuf::new(b"odd");
        disk.write(&buf, (10 << 20) + 1, NONE).await.unwrap();
        let mut odd = [0xaa; 5];
        disk.read(&mut ReadBuf::new(&mut odd), 10 << 20)
            .await
            .unwrap();
        assert_eq!(&odd, b"\0odd\0");
        disk.close().await.unwrap();
    }
}

#[tokio::test]
async fn a_block_device_in_use_is_refused_with_its_user() {
    let _alone = ALONE.lock().await;
    let Backed {
        device, backing: _, ..
    } = &need!(Backed::new(&[]));

    let disk = File::open(&device.0).await.unwrap();
    let error = File::open(&device.0).await.unwrap_err().to_string();
    assert!(error.contains("is in use: "), "{error}");
    drop(disk);
    let readers = [
        File::open(&device.0).read_only(true).await.unwrap(),
        File::open(&device.0).read_only(true).await.unwrap(),
    ];
    let error = File::open(&device.0).await.unwrap_err().to_string();
    assert!(error.contains("is in use by this process"), "{error}");
    drop(readers);

    need!(run("mkfs.ext4", ["-q".as_ref(), device.0.as_os_str()]));
    let at = tempfile::tempdir().unwrap();
    need!(run("mount", [&device.0, at.path()]));
    let mount = Mount(at);
    for read_only in [false, true] {
        let open = File::open(&device.0).read_only(read_only);
        let error = open.await.unwrap_err().to_string();
        let expected = format!(
            "it is mounted at {}, unmount it first",
            mount.path().display()
        );
        assert!(error.contains(&expected), "{error}");
    }
    drop(mount);
    File::open(&device.0).await.unwrap();
}

/// ext4, in its own file system: small blocks, odd tails and a full disk, by direct I/O.
#[tokio::test]
async fn direct_io_on_a_file_system_that_fills_up() {
    let _alone = ALONE.lock().await;
    let Backed {
        device, backing: _, ..
    } = &need!(Backed::new(&[]));
    let args = ["-q", "-b", "1024"].map(OsStr::new);
    need!(run(
        "mkfs.ext4",
        args.into_iter().chain([device.0.as_os_str()])
    ));
    let at = tempfile::tempdir().unwrap();
    need!(run("mount", [&device.0, at.path()]));
    let mount = Mount(at);
    let path = mount.path().join("disk.img");
    let size = (64 << 20) + 300;
    let disk = File::open(&path).size(size).direct(true).await.unwrap();
    let tail = size - 300;
    write(&disk, &[5; 300], tail).await.unwrap();
    write(&disk, &[6; 4096], 0).await.unwrap();
    let bytes = vec![7; 32 << 20];
    let error = write(&disk, &bytes, 1 << 20).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    let buf = WriteBuf::new(&bytes[..1 << 20]);
    let error = disk
        .write(&buf, 48 << 20, WriteFlags::FUA)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    disk.flush().await.unwrap();
    assert_eq!(read(&disk, tail..size).await.unwrap(), [5; 300]);
    assert_eq!(read(&disk, 0..4096).await.unwrap(), [6; 4096]);
    disk.discard(1 << 20..40 << 20).await.unwrap();
    disk.write(&buf, 48 << 20, WriteFlags::FUA).await.unwrap();
    disk.close().await.unwrap();
}
