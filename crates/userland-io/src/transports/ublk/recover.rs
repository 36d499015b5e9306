//! Taking over a device whose process has died.

use std::thread;
use std::time::{Duration, Instant};

use super::abi::{Attributes, Control, DeviceInfo, Flags, Params};
use super::control::ControlDevice;
use super::error::Error;
use super::params;
use super::places::{block_path, identity, is_alive};
use crate::Geometry;

/// How long the driver may take to notice that a process has died.
pub(super) const DYING: Duration = Duration::from_secs(5);
/// How long a process that seems to live may take to die: its end may have begun just now.
const ALIVE: Duration = Duration::from_secs(1);
pub(super) const STEP: Duration = Duration::from_millis(1);

/// What the device of that index is, if it is the one that is known as this, and `geometry`'s disk can serve it.
pub(super) fn examine(
    control: &mut ControlDevice,
    geometry: &Geometry,
    index: u32,
    known_as: Option<u64>,
) -> Result<DeviceInfo, Error> {
    let path = || block_path(index).display().to_string();
    if known_as.is_some() && identity(index) != known_as {
        return Err(Error::Unsuitable(format!(
            "{} is not the device that is on record, which is gone: `ulio detach --stale` removes the record",
            path()
        )));
    }
    let info = control.info(index).map_err(|_| Error::NotFound(path()))?;
    if !info
        .flags
        .contains(Flags::USER_RECOVERY | Flags::USER_RECOVERY_REISSUE)
    {
        return Err(Error::Unsuitable(format!(
            "{} was not made recoverable: its requests have failed when its process died",
            path()
        )));
    }
    let was = control
        .params(index)
        .map_err(Error::command(Control::GetParams))?;
    let page = rustix::param::page_size() as u32;
    let is = params::of(geometry, info.max_transfer, page);
    if let Some(difference) = difference(&was, &is) {
        return Err(Error::Mismatch { index, difference });
    }
    Ok(info)
}

/// Readies the device for new queues, which are to start at once: drivers of some kernels let nobody begin a second time.
pub(super) fn begin(control: &mut ControlDevice, info: &DeviceInfo) -> Result<(), Error> {
    let index = info.index;
    let begun = Instant::now();
    loop {
        match control.tell(Control::StartUserRecovery, index, 0) {
            Ok(()) => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                let pid = info.pid;
                if is_alive(pid) && begun.elapsed() > ALIVE {
                    return Err(Error::Served { index, pid });
                }
                if begun.elapsed() > DYING {
                    return Err(Error::command(Control::StartUserRecovery)(error));
                }
                thread::sleep(STEP);
            }
            Err(error) => return Err(Error::command(Control::StartUserRecovery)(error)),
        }
    }
}

/// What of the kernel's idea of a disk would be wrong of this one. Wishes (`io_min` and the like) may differ.
fn difference(was: &Params, is: &Params) -> Option<String> {
    if was.sectors != is.sectors {
        return Some(format!(
            "it has {} bytes, and the disk {}",
            was.sectors.saturating_mul(512),
            is.sectors * 512
        ));
    }
    if was.logical_block_shift != is.logical_block_shift {
        return Some(format!(
            "it has blocks of {} bytes, and the disk of {}",
            1_u64 << was.logical_block_shift.min(63),
            1_u64 << is.logical_block_shift
        ));
    }
    let promises = [
        (Attributes::READ_ONLY, "read-only"),
        (Attributes::VOLATILE_CACHE, "a volatile cache"),
        (Attributes::FUA, "FUA"),
    ];
    for (attribute, name) in promises {
        let (had, has) = (
            was.attributes.contains(attribute),
            is.attributes.contains(attribute),
        );
        if had != has {
            let [it, disk] = [had, has].map(|yes| if yes { "with" } else { "without" });
            return Some(format!("it is {it} {name}, and the disk {disk}"));
        }
    }
    let lost = |was, is| was > 0 && is == 0;
    if lost(was.max_discard_sectors, is.max_discard_sectors) {
        return Some("it has discard, and the disk has none".to_owned());
    }
    if lost(was.max_write_zeroes_sectors, is.max_write_zeroes_sectors) {
        return Some("it has write_zeroes, and the disk has none".to_owned());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CrashLevel, Discard, Features};

    #[test]
    fn what_the_kernel_relies_on_must_be_the_same() {
        let mut disk = Geometry::writable(1 << 20, CrashLevel::Flush);
        disk.discard = Discard::Zeroes;
        disk.features |= Features::FUA;
        let params = |geometry: &Geometry| params::of(geometry, 4096, 4096);
        let was = params(&disk);
        let change = |change: &dyn Fn(&mut Geometry)| {
            let mut other = disk;
            change(&mut other);
            difference(&was, &params(&other))
        };
        assert_eq!(change(&|_| {}), None);
        assert_eq!(change(&|g| g.io_opt = 1 << 20), None);
        assert_eq!(change(&|g| g.features |= Features::WRITE_ZEROES), None);
        let said = |difference: Option<String>, what: &str| {
            let text = difference.unwrap();
            assert!(text.contains(what), "{text}");
        };
        said(
            change(&|g| g.size += 512),
            "1048576 bytes, and the disk 1049088",
        );
        said(
            change(&|g| g.logical_block_size = 4096),
            "blocks of 512 bytes",
        );
        said(
            change(&|g| g.features -= Features::FUA),
            "with FUA, and the disk without",
        );
        said(
            change(&|g| {
                g.crash = CrashLevel::None;
                g.features -= Features::VOLATILE_CACHE;
            }),
            "with a volatile cache",
        );
        said(change(&|g| g.discard = Discard::None), "has discard");
        said(
            change(&|g| g.features |= Features::READ_ONLY),
            "without read-only",
        );
    }
}
