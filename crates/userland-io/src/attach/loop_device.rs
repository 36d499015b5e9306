//! Loop devices: made over a file, resized, and taken away, by ioctls (loop(4), linux/loop.h).
//!
//! A device is known by what it is over: `/sys/block/loopN/loop/backing_file`, which can be read when the file behind it
//! is dead, too. Nothing here keeps a device open: closing the last handle writes back what is
//! cached, which would wait for ever where the process that serves it is the one that exits.

use std::ffi::{c_int, c_ulong};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::FileType;

use crate::transports::node::{self, ensure};

/// What makes loop devices.
pub(super) const CONTROL: &str = "/dev/loop-control";

const LOOP_CLR_FD: c_ulong = 0x4c01;
const LOOP_SET_STATUS64: c_ulong = 0x4c04;
const LOOP_GET_STATUS64: c_ulong = 0x4c05;
const LOOP_SET_CAPACITY: c_ulong = 0x4c07;
const LOOP_CONFIGURE: c_ulong = 0x4c0a;
const LOOP_CTL_GET_FREE: c_ulong = 0x4c82;
const BLKGETSIZE64: c_ulong = 0x8008_1272;

const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_PARTSCAN: u32 = 8;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// How often another free device is tried when somebody else was quicker.
const TRIES: usize = 1000;
/// How long those that look at a device for a moment, such as udev, may take to close it.
const LOOKERS: Duration = Duration::from_secs(2);

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

impl Info {
    const EMPTY: Info = Info {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

/// A loop device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LoopDevice {
    number: u32,
    /// What it is over, as sysfs has it.
    backing: String,
}

impl LoopDevice {
    /// Makes one over `file`, with direct I/O and blocks of `block` bytes. Partitions are looked for, which waits
    /// for whoever serves the file.
    pub(super) fn over(file: &File, block: u32, is_read_only: bool) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let control = options.read(true).write(true).open(CONTROL);
        let control =
            control.map_err(|error| io::Error::new(error.kind(), format!("{CONTROL}: {error}")))?;
        let mut config = Config {
            fd: file.as_raw_fd() as u32,
            block_size: block,
            info: Info::EMPTY,
            reserved: [0; 8],
        };
        config.info.flags = LO_FLAGS_DIRECT_IO | LO_FLAGS_PARTSCAN;
        if is_read_only {
            config.info.flags |= LO_FLAGS_READ_ONLY;
        }
        for _ in 0..TRIES {
            // SAFETY: this call takes no argument.
            let number = unsafe { call(&control, LOOP_CTL_GET_FREE, 0) }? as u32;
            let path = node_of(number);
            let device = ensure(&path, &sysfs(number), FileType::BlockDevice).and_then(|()| {
                let mut options = OpenOptions::new();
                options.read(true).write(!is_read_only).open(&path)
            });
            // SAFETY: the call reads a `loop_config`, which `config` is laid out as.
            let configured = device.and_then(|device| unsafe {
                call(&device, LOOP_CONFIGURE, (&raw const config).addr()).map(|_| device)
            });
            match configured {
                Ok(device) => return LoopDevice::known(number, device),
                // Somebody else has it by now, or it is just going.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::ENXIO)) => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            "others take every free loop device at once",
        ))
    }

    /// The one that was just made, and is open as `device`.
    fn known(number: u32, device: File) -> io::Result<Self> {
        if let Some(backing) = backing_of(number) {
            return Ok(LoopDevice { number, backing });
        }
        // Nobody could tell it from others later.
        // SAFETY: this call takes no argument.
        let cleared = unsafe { call(&device, LOOP_CLR_FD, 0) };
        let left = match cleared {
            Ok(_) => String::new(),
            Err(error) => format!(", and it is left: {error}"),
        };
        Err(io::Error::new(
            io::ErrorKind::NotFound,
            format!(
                "{}: sysfs does not say what it is over{left}",
                node_of(number).display()
            ),
        ))
    }

    /// The one that is over `backing`, if there is any.
    pub(super) fn find(backing: &str) -> io::Result<Option<Self>> {
        for entry in fs::read_dir("/sys/block")? {
            let name = entry?.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix("loop"));
            if let Some(number) = number.and_then(|number| number.parse().ok())
                && backing_of(number).as_deref() == Some(backing)
            {
                let backing = backing.to_owned();
                return Ok(Some(LoopDevice { number, backing }));
            }
        }
        Ok(None)
    }

    /// Its node: `/dev/loopN`.
    pub(super) fn path(&self) -> PathBuf {
        node_of(self.number)
    }

    /// True until it is over another file, or none.
    pub(super) fn is_there(&self) -> bool {
        backing_of(self.number).as_deref() == Some(&self.backing)
    }

    /// Its size in bytes.
    pub(super) fn size(&self) -> io::Result<u64> {
        let device = self.open()?;
        let mut size = 0_u64;
        // SAFETY: the call writes a u64.
        unsafe { call(&device, BLKGETSIZE64, (&raw mut size).addr()) }?;
        Ok(size)
    }

    /// Makes it as long as its file is now.
    pub(super) fn follow_file(&self) -> io::Result<()> {
        let device = self.open()?;
        // Older kernels take the length that they know of, and this makes them ask for it.
        self.info(&device)?;
        // SAFETY: this call takes no argument.
        unsafe { call(&device, LOOP_SET_CAPACITY, 0) }?;
        Ok(())
    }

    /// Sets an attribute of its queue, unless it has that value.
    ///
    /// # Errors
    /// If it has another value then, or none that can be read.
    pub(super) fn set(&self, attribute: &str, value: &str) -> io::Result<()> {
        let path = sysfs(self.number).join("queue").join(attribute);
        let failed = |error: io::Error| {
            let text = format!("{} cannot be `{value}`: {error}", path.display());
            io::Error::new(error.kind(), text)
        };
        let has = || fs::read_to_string(&path).map(|now| now.trim() == value);
        // Each change stops the queue for some milliseconds.
        if has().map_err(failed)? {
            return Ok(());
        }
        fs::write(&path, value).map_err(failed)?;
        match has().map_err(failed)? {
            true => Ok(()),
            false => Err(failed(io::ErrorKind::InvalidInput.into())),
        }
    }

    /// Takes it away, if nobody uses it. In use: `ResourceBusy`, and it stays as it is.
    pub(super) fn remove(&self) -> io::Result<()> {
        if !self.is_there() {
            return Ok(());
        }
        let claimed = node::claim(&self.path())?;
        self.remove_claimed(claimed)
    }

    /// As [`remove`](Self::remove), by one who has claimed it.
    pub(super) fn remove_claimed(&self, device: File) -> io::Result<()> {
        // While it is open it stays what it is.
        if !self.is_there() {
            return Ok(());
        }
        // What somebody wrote and nobody has waited for.
        let synced = device.sync_data();
        // SAFETY: this call takes no argument.
        match unsafe { call(&device, LOOP_CLR_FD, 0) } {
            // It has none any more.
            Err(error) if is_gone(&error) => {}
            cleared => drop(cleared?),
        }
        // If others have it open, it goes when the last of them closes it.
        drop(device);
        let until = Instant::now() + LOOKERS;
        let mut step = Duration::from_micros(100);
        while self.is_there() {
            if Instant::now() > until {
                return match self.keep() {
                    // The last has just closed it.
                    Err(error) if is_gone(&error) => synced,
                    Err(error) => Err(error),
                    Ok(()) => Err(io::Error::new(
                        io::ErrorKind::ResourceBusy,
                        "a program has it open",
                    )),
                };
            }
            thread::sleep(step);
            step = (step * 2).min(Duration::from_millis(20));
        }
        synced
    }

    /// Takes back that it goes when it is closed.
    fn keep(&self) -> io::Result<()> {
        let device = self.open()?;
        let mut info = self.info(&device)?;
        info.flags &= !LO_FLAGS_AUTOCLEAR;
        // SAFETY: the call reads a `loop_info64`, which `info` is laid out as.
        unsafe { call(&device, LOOP_SET_STATUS64, (&raw const info).addr()) }?;
        Ok(())
    }

    fn info(&self, device: &File) -> io::Result<Info> {
        let mut info = Info::EMPTY;
        // SAFETY: the call writes a `loop_info64`, which `info` is laid out as; all bytes are valid in it.
        unsafe { call(device, LOOP_GET_STATUS64, (&raw mut info).addr()) }?;
        Ok(info)
    }

    /// Opens it. If it is gone, or another by now: see [`is_gone`].
    fn open(&self) -> io::Result<File> {
        let device = File::open(self.path())?;
        // Asked again: while it is open here it does not become another.
        match self.is_there() {
            true => Ok(device),
            false => Err(io::Error::from_raw_os_error(libc::ENXIO)),
        }
    }
}

/// True for what the kernel says of a loop device that is over nothing.
fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENXIO)
}

fn node_of(number: u32) -> PathBuf {
    Path::new("/dev").join(format!("loop{number}"))
}

fn sysfs(number: u32) -> PathBuf {
    Path::new("/sys/block").join(format!("loop{number}"))
}

fn backing_of(number: u32) -> Option<String> {
    let text = fs::read_to_string(sysfs(number).join("loop/backing_file")).ok()?;
    Some(text.trim_end_matches('\n').to_owned())
}

/// # Safety
/// `argument` must be what `request` takes: nothing, or the address of what it reads or writes, valid for that.
unsafe fn call(file: &File, request: c_ulong, argument: usize) -> io::Result<c_int> {
    // SAFETY: by the caller's word. The request's type differs between C libraries, not its bits.
    match unsafe { libc::ioctl(file.as_raw_fd(), request as _, argument) } {
        -1 => Err(io::Error::last_os_error()),
        answer => Ok(answer),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where the device has become another between a look at it and an open of it.
    #[test]
    fn a_device_that_is_another_by_now_is_not_touched() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        // Not root, or no loop devices here: nothing to see.
        let Ok(device) = LoopDevice::over(file.as_file(), 512, false) else {
            return;
        };
        let other = LoopDevice {
            number: device.number,
            backing: "/another".to_owned(),
        };
        for done in [
            other.open().map(drop),
            other.follow_file(),
            other.size().map(drop),
            other.keep(),
        ] {
            assert!(done.as_ref().is_err_and(is_gone), "{done:?}");
        }
        other.remove().unwrap();
        assert!(device.is_there());
        // Nor is what the kernel does not take told as set.
        device.set("write_cache", "write back").unwrap();
        for (attribute, value) in [("write_cache", "neither"), ("no such", "1")] {
            let error = device.set(attribute, value).unwrap_err().to_string();
            assert!(
                error.contains(attribute) && error.contains(value),
                "{error}"
            );
        }
        assert_eq!(device.size().unwrap(), 1 << 20);
        device.remove().unwrap();
        assert!(!device.is_there());
    }

    #[test]
    fn structures_have_the_kernels_layout() {
        assert_eq!(size_of::<Info>(), 232);
        assert_eq!(std::mem::offset_of!(Info, flags), 52);
        assert_eq!(std::mem::offset_of!(Info, file_name), 56);
        assert_eq!(size_of::<Config>(), 304);
        assert_eq!(std::mem::offset_of!(Config, info), 8);
    }
}
