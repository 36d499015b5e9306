//! Leaving a mount namespace that may end with this process.
//!
//! When the last process of one ends, the kernel unmounts there before it closes the process's files. If one of
//! its own devices is mounted there, the file system writes to a device that nobody serves any more and that has not
//! failed yet either, and waits for ever; SIGKILL does not help, it is how one gets there.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;

use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};
use rustix::process::{chroot, fchdir};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use super::holders;
use super::record::Record;

/// The namespaces that are there from boot on (linux/nsfs.h). The one of mounts has this number since Linux 6.18.
const FIRST_PROCESSES: &str = "pid:[4026531836]";
const FIRST_MOUNTS: &str = "mnt:[4026531832]";

/// Goes on in a copy, unless the namespace is that of the machine's first process, which outlives all.
///
/// What is mounted later arrives in the copy only where mounts are shared with others, who end it there, too.
pub(super) fn leave() -> io::Result<()> {
    let of = |what: &str| fs::read_link(format!("/proc/{what}"));
    let own = of("self/ns/mnt")?;
    let is_of_the_first_process = || {
        let is_first = of("self/ns/pid").is_ok_and(|pids| pids.as_os_str() == FIRST_PROCESSES);
        is_first && of("1/ns/mnt").is_ok_and(|its| its == own)
    };
    if own.as_os_str() == FIRST_MOUNTS || is_of_the_first_process() {
        return Ok(());
    }
    let back = WayBack::new()?;
    // SAFETY: this flag alone gives the thread mounts of its own. Its files stay as they are: no descriptor changes
    // its meaning, which is what makes other flags unsafe.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
    let following = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    if let Err(error) = mount_change("/", following) {
        // The copies would keep what is mounted in use, and dropping them might unmount it for others too.
        back.take()?;
        let kind = io::Error::from(error).kind();
        let text = format!("the copy cannot be made to follow this one: {error}");
        return Err(io::Error::new(kind, text));
    }
    forget_devices();
    Ok(())
}

/// Where this process was before it went on in a copy.
struct WayBack {
    namespace: File,
    root: File,
    directory: File,
}

impl WayBack {
    fn new() -> io::Result<Self> {
        let namespace = File::open("/proc/self/ns/mnt")?;
        let (root, directory) = (File::open("/")?, File::open(".")?);
        Ok(WayBack {
            namespace,
            root,
            directory,
        })
    }

    fn take(self) -> io::Result<()> {
        let of_mounts = Some(LinkNameSpaceType::Mount);
        move_into_link_name_space(self.namespace.as_fd(), of_mounts)?;
        // The root is that of the namespace now.
        fchdir(&self.root)?;
        chroot(".")?;
        fchdir(&self.directory)?;
        Ok(())
    }
}

/// Drops the copies of mounts of devices like ours: they would keep them in use for as long as this process lives.
fn forget_devices() {
    for record in Record::all().unwrap_or_default() {
        let Some(device) = &record.device else {
            continue;
        };
        for at in holders::mounted_here(device) {
            // The file system itself stays where it was copied from.
            if let Err(error) = unmount(&at, UnmountFlags::DETACH) {
                tracing::debug!(at = %at.display(), %error, "the copy of a mount");
            }
        }
    }
}
