//! The driver's control device: commands that add, start, stop and describe devices. They block.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use rustix::fd::AsRawFd;
use rustix::fs::FileType;

use super::abi::{Control, ControlCommand, DeviceInfo, Flags, Params};
use super::error::Error;
use crate::transports::node;

const PATH: &str = "/dev/ublk-control";
/// Its directory in sysfs.
const DEVICE: &str = "/sys/class/misc/ublk-control";

/// The longest buffer of a command: a set of the most CPUs that Linux can be built for.
const BUFFER: usize = 1024;

/// The control device, opened, with a ring of its own for one command at a time.
pub(super) struct ControlDevice {
    file: File,
    uring: IoUring<squeue::Entry128>,
    /// What the driver reads and fills; it belongs to it while a command is under way.
    memory: Box<[u8; BUFFER]>,
    /// The ring has failed with a command in it.
    broken: bool,
    features: Flags,
}

impl ControlDevice {
    /// Opens it, and asks what the driver can do.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if this kernel has no ublk, too old a one, or does not let us.
    pub(super) fn open() -> Result<Self, Error> {
        // Where this fails, to open it does too.
        let _ = node::ensure(
            Path::new(PATH),
            Path::new(DEVICE),
            FileType::CharacterDevice,
        );
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC)
            .open(PATH)
            .map_err(|error| {
                Error::Unavailable(match error.kind() {
                    io::ErrorKind::NotFound => format!("there is no {PATH}: this kernel has no ublk driver, or it is not loaded (modprobe ublk_drv)"),
                    io::ErrorKind::PermissionDenied => format!("{PATH} may not be opened: ublk needs root"),
                    _ => format!("{PATH}: {error}"),
                })
            })?;
        let uring = IoUring::builder()
            .build(4)
            .map_err(|error| Error::Unavailable(format!("io_uring: {error}")))?;
        let mut control = ControlDevice {
            file,
            uring,
            memory: Box::new([0; BUFFER]),
            broken: false,
            features: Flags::empty(),
        };
        let mut features = [0; 8];
        control
            .ask(Control::GetFeatures, u32::MAX, 0, &mut features)
            .map_err(|error| {
                Error::Unavailable(match error.raw_os_error() {
                    Some(libc::EPERM | libc::EACCES) => "ublk needs root".to_owned(),
                    _ => format!("the ublk driver of this kernel is too old (Linux 6.5 or later is needed): GET_FEATURES: {error}"),
                })
            })?;
        control.features = Flags::from_bits_retain(u64::from_ne_bytes(features));
        match control.can(Flags::CMD_IOCTL_ENCODE) {
            true => Ok(control),
            false => Err(Error::Unavailable(
                "the ublk driver of this kernel is too old: it does not take commands encoded as ioctls".to_owned(),
            )),
        }
    }

    /// True if the driver can do all of `features`.
    pub(super) fn can(&self, features: Flags) -> bool {
        self.features.contains(features)
    }

    /// Adds a device as `info` says, where `index` may be `u32::MAX` for any. Answers what it has become.
    pub(super) fn add(&mut self, info: &DeviceInfo) -> Result<DeviceInfo, Error> {
        let mut bytes = info.encode();
        self.ask(Control::AddDev, info.index, 0, &mut bytes)
            .map_err(|error| match error.raw_os_error() {
                Some(libc::EEXIST) => Error::Exists(info.index),
                _ => Error::command(Control::AddDev)(error),
            })?;
        Ok(DeviceInfo::decode(&bytes))
    }

    pub(super) fn info(&mut self, index: u32) -> io::Result<DeviceInfo> {
        let mut bytes = [0; DeviceInfo::LEN];
        self.ask(Control::GetDevInfo, index, 0, &mut bytes)?;
        Ok(DeviceInfo::decode(&bytes))
    }

    pub(super) fn set_params(&mut self, index: u32, params: &Params) -> io::Result<()> {
        self.ask(Control::SetParams, index, 0, &mut params.encode())
    }

    pub(super) fn params(&mut self, index: u32) -> io::Result<Params> {
        let mut bytes = Params::request();
        self.ask(Control::GetParams, index, 0, &mut bytes)?;
        Ok(Params::decode(&bytes))
    }

    /// The CPUs whose requests go to `queue`: a bit for each, from the lowest bit of the first byte.
    pub(super) fn affinity(&mut self, index: u32, queue: u16) -> io::Result<Vec<u8>> {
        let mut cpus = vec![0; BUFFER];
        self.ask(
            Control::GetQueueAffinity,
            index,
            u64::from(queue),
            &mut cpus,
        )?;
        Ok(cpus)
    }

    /// A command without a buffer. Blocks until the driver has done it.
    pub(super) fn tell(&mut self, command: Control, index: u32, data: u64) -> io::Result<()> {
        self.ask(command, index, data, &mut [])
    }

    /// A command with a buffer that the driver reads or fills. Blocks until the driver has done it.
    fn ask(
        &mut self,
        command: Control,
        index: u32,
        data: u64,
        buffer: &mut [u8],
    ) -> io::Result<()> {
        let memory = self
            .memory
            .get_mut(..buffer.len())
            .filter(|_| !self.broken)
            .ok_or(io::ErrorKind::InvalidInput)?;
        memory.copy_from_slice(buffer);
        let body = ControlCommand {
            device: index,
            len: buffer.len() as u16,
            addr: match buffer.is_empty() {
                true => 0,
                false => memory.as_mut_ptr().expose_provenance() as u64,
            },
            data,
        };
        let entry = opcode::UringCmd80::new(types::Fd(self.file.as_raw_fd()), command.opcode())
            .cmd(body.encode())
            .build();
        // SAFETY: the entry's buffer is `self.memory`, whose first `len` bytes nobody touches until the command has
        // ended: `wait` waits for that, and gives the memory up for ever if it cannot. The kernel holds the file itself.
        unsafe { self.uring.submission().push(&entry) }
            .map_err(|_| io::Error::from_raw_os_error(libc::EBUSY))?;
        let done = self.wait();
        if let Err(error) = &done
            && self.broken
        {
            tracing::error!(%error, "io_uring failed on {PATH}");
            // The command may be under way, or still be in the ring: the memory is the kernel's for ever. The ring itself is not used
            // again, and what it shares with us the kernel keeps until its commands have ended.
            std::mem::forget(std::mem::replace(&mut self.memory, Box::new([0; BUFFER])));
        }
        done?;
        buffer.copy_from_slice(&self.memory[..buffer.len()]);
        Ok(())
    }

    /// Waits for the one command under way, and tells how it went.
    fn wait(&mut self) -> io::Result<()> {
        loop {
            match self.uring.submit_and_wait(1) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    self.broken = true;
                    return Err(error);
                }
                _ => {}
            }
            if let Some(done) = self.uring.completion().next() {
                return result(&done);
            }
        }
    }
}

fn result(done: &cqueue::Entry) -> io::Result<()> {
    match done.result() {
        result if result < 0 => Err(io::Error::from_raw_os_error(-result)),
        _ => Ok(()),
    }
}

impl std::fmt::Debug for ControlDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ControlDevice({:?})", self.features)
    }
}
