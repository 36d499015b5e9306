//! Address space for the chunks of one table leaf, in regions that the kernel can back by huge pages.
//!
//! A huge page spares the processor most of what it takes to find a page of a large disk, and is made in one go. But it takes
//! its 2 MiB as soon as one byte of them is written. So only a region whose predecessor is written
//! half full asks for one: a disk that is filled has them, and a sparse one stays at most three times as large as what was written.
//! Others take ordinary pages, one by one.
//!
//! The counts are advice: they are read and written without order, and decide nothing but the size of pages.

use std::ffi::c_void;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::mm::{self, Advice, MapFlags, ProtFlags};

use super::chunk::CHUNK;

/// The length of a region in bytes: a huge page of x86-64, and of others with pages of 4 KiB.
const REGION: usize = 2 << 20;
const CHUNKS: usize = REGION / CHUNK;
/// With so many full chunks a region lets the next one be huge.
const DENSE: u8 = CHUNKS as u8 / 2;

#[derive(Debug, Default)]
struct Region {
    /// How many chunks hold bytes.
    used: AtomicU8,
    /// How many were written in every page.
    full: AtomicU8,
    /// Huge pages were asked for.
    is_huge: AtomicBool,
}

/// A mapping of its own, unmapped with the last of its parts.
#[derive(Debug)]
struct Mapping {
    start: NonNull<c_void>,
    len: usize,
    regions: Box<[Region]>,
}

// SAFETY: the mapping is this process's, whichever thread looks at it, and the struct itself touches none of its bytes.
unsafe impl Send for Mapping {}
// SAFETY: as above; what changes are atomics.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `parts` mapped exactly this, and whoever could point into it is gone: each `Part` keeps the mapping alive.
        let unmapped = unsafe { mm::munmap(self.start.as_ptr(), self.len) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

/// The memory of one chunk: zeroes at first. Nobody else has it.
#[derive(Debug)]
pub(super) struct Part {
    start: NonNull<u8>,
    index: usize,
    mapping: Arc<Mapping>,
}

// SAFETY: it owns its bytes, like a `Box<[u8]>`.
unsafe impl Send for Part {}
// SAFETY: shared, it gives shared bytes alone.
unsafe impl Sync for Part {}

impl Deref for Part {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `parts` cut `CHUNK` bytes at `start` out of a mapping that lives as long as `mapping` does, for this part
        // alone; the kernel gives zeroes for what was never written, so all are initialized.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), CHUNK) }
    }
}

impl DerefMut for Part {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), CHUNK) }
    }
}

/// True unless address space is short, or costs as much as memory: it is taken for many chunks at once.
fn is_space_free() -> bool {
    static IS_FREE: OnceLock<bool> = OnceLock::new();
    *IS_FREE.get_or_init(|| {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let is_charged = read("/proc/sys/vm/overcommit_memory").trim() == "2";
        let limits = read("/proc/self/limits");
        let mut limits = limits.lines();
        let limit = limits.find_map(|line| line.strip_prefix("Max address space"));
        let is_limited = limit.is_none_or(|limit| !limit.trim_start().starts_with("unlimited"));
        !is_charged && !is_limited
    })
}

/// The memory of `count` chunks side by side, a multiple of those of a region. `None` if the system gives no such address space.
pub(super) fn parts(count: usize) -> Option<impl Iterator<Item = Part>> {
    if !is_space_free() {
        return None;
    }
    // One region more, since a mapping begins at any page.
    let len = count * CHUNK + REGION;
    // SAFETY: without an address the kernel takes one that nothing else uses.
    let start = unsafe {
        mm::mmap_anonymous(
            ptr::null_mut(),
            len,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    };
    let start = NonNull::new(start.ok()?)?;
    let regions = std::iter::repeat_with(Region::default);
    let mapping = Arc::new(Mapping {
        start,
        len,
        regions: regions.take(count / CHUNKS).collect(),
    });
    // Where the system makes pages huge unasked, too.
    // SAFETY: the mapping is this one's, and with pages of another size its bytes are the same.
    let advised = unsafe { mm::madvise(start.as_ptr(), len, Advice::LinuxNoHugepage) };
    told(advised);
    let skip = start.cast::<u8>().align_offset(REGION);
    Some((0..count).map(move |index| Part {
        // SAFETY: `skip` is less than a region, so this and the `CHUNK` bytes behind it are inside the mapping.
        start: unsafe { start.cast::<u8>().add(skip + index * CHUNK) },
        index,
        mapping: mapping.clone(),
    }))
}

/// Advice may be refused, by a kernel without huge pages.
fn told(advised: rustix::io::Result<()>) {
    if let Err(error) = advised {
        tracing::debug!(%error, "advice on huge pages was refused");
    }
}

impl Part {
    fn region(&self) -> &Region {
        &self.mapping.regions[self.index / CHUNKS]
    }

    /// Notes that its first byte is about to be written.
    pub(super) fn open(&mut self) {
        let number = self.index / CHUNKS;
        let is_first = self.region().used.fetch_add(1, Ordering::Relaxed) == 0;
        let before = number.checked_sub(1);
        let is_dense = before.is_some_and(|before| {
            self.mapping.regions[before].full.load(Ordering::Relaxed) >= DENSE
        });
        if is_first && is_dense {
            self.region().is_huge.store(true, Ordering::Relaxed);
            self.advise(Advice::LinuxHugepage);
        }
    }

    /// Advises the system on the region.
    fn advise(&self, advice: Advice) {
        // SAFETY: the region lies inside the mapping, and with pages of another size its bytes are the same.
        let advised = unsafe {
            let start = self.start.sub(self.index % CHUNKS * CHUNK);
            mm::madvise(start.as_ptr().cast(), REGION, advice)
        };
        told(advised);
    }

    /// Notes whether every page is written now, which has changed.
    pub(super) fn fill(&mut self, is_full: bool) {
        let full = &self.region().full;
        match is_full {
            true => full.fetch_add(1, Ordering::Relaxed),
            false => full.fetch_sub(1, Ordering::Relaxed),
        };
    }

    /// Gives its memory back; it holds zeroes afterwards, and is not [open](Self::open).
    pub(super) fn free(&mut self) {
        self.region().used.fetch_sub(1, Ordering::Relaxed);
        // Or the system might fill the gap again.
        if self.region().is_huge.swap(false, Ordering::Relaxed) {
            self.advise(Advice::LinuxNoHugepage);
        }
        // A process that serves a kernel device may have locked its memory, which older kernels do not give back.
        let ways = [Advice::LinuxDontNeed, Advice::LinuxDontneedLocked];
        let is_free = ways.into_iter().any(|advice| {
            // SAFETY: the bytes are this part's, which is borrowed mutably, so nobody looks at them; the kernel replaces them by
            // zeroes, since the mapping is private and anonymous.
            unsafe { mm::madvise(self.start.as_ptr().cast(), CHUNK, advice) }.is_ok()
        });
        if !is_free {
            self.deref_mut().fill(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::super::chunk::PAGE;
    use super::*;

    /// What the kernel tells of the mapping around `part`: whether huge pages are asked for, or forbidden, and how many KiB of them there are.
    fn huge(part: &Part) -> (bool, u64) {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let address = part.start.as_ptr() as usize;
        let (mut is_here, mut is_asked, mut kib) = (false, false, 0);
        for line in smaps.lines() {
            let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
            let number = |text| usize::from_str_radix(text, 16).ok();
            let range = first.split_once('-');
            if let Some((start, end)) = range.and_then(|r| Some((number(r.0)?, number(r.1)?))) {
                is_here = (start..end).contains(&address);
            } else if is_here && first == "VmFlags:" {
                let has = |flag| rest.split_whitespace().any(|other| other == flag);
                is_asked = has("hg");
                assert!(is_asked != has("nh"), "{rest}");
            } else if is_here && first == "AnonHugePages:" {
                kib = rest.trim().trim_end_matches(" kB").parse().unwrap();
            }
        }
        (is_asked, kib)
    }

    fn write(part: &mut Part, pages: Range<usize>) {
        part.open();
        for page in pages.clone() {
            part[page * PAGE] = page as u8 | 1;
        }
        if pages.len() == CHUNK / PAGE {
            part.fill(true);
        }
    }

    #[test]
    fn what_is_filled_in_order_lies_in_huge_pages_but_for_the_first_region() {
        let mut parts: Vec<Part> = parts(3 * CHUNKS).unwrap().collect();
        for part in &mut parts {
            write(part, 0..CHUNK / PAGE);
        }
        let regions: Vec<_> = parts
            .chunks(CHUNKS)
            .map(|region| huge(&region[0]))
            .collect();
        assert_eq!(
            regions.iter().map(|r| r.0).collect::<Vec<_>>(),
            [false, true, true]
        );
        let setting = "/sys/kernel/mm/transparent_hugepage/enabled";
        match std::fs::read_to_string(setting).unwrap_or_default() {
            off if !off.contains("[madvise]") && !off.contains("[always]") => {
                eprintln!("nothing is huge here: {setting} is {off:?}");
            }
            // The mapping that the two share.
            _ => assert!(regions[1].1 >= 2 * REGION as u64 / 1024, "{regions:?}"),
        }
        assert!(
            parts
                .iter()
                .all(|part| part[3 * PAGE] == 3 && part[PAGE + 1] == 0)
        );
    }

    #[test]
    fn a_sparse_disk_takes_ordinary_pages() {
        let mut parts: Vec<Part> = parts(3 * CHUNKS).unwrap().collect();
        // Less than half of the region in full, and all of it but in part.
        for (at, part) in parts[..CHUNKS].iter_mut().enumerate() {
            let pages = if at < DENSE as usize - 1 {
                CHUNK / PAGE
            } else {
                1
            };
            write(part, 0..pages);
        }
        write(&mut parts[CHUNKS], 0..1);
        assert!(!huge(&parts[CHUNKS]).0);
        // One that was full counts no more.
        write(&mut parts[DENSE as usize - 1], 0..CHUNK / PAGE);
        parts[0].fill(false);
        parts[0].free();
        parts[CHUNKS].free();
        write(&mut parts[CHUNKS], 0..1);
        assert!(!huge(&parts[CHUNKS]).0);
        // Nor does a region become huge that is in use.
        write(&mut parts[0], 0..CHUNK / PAGE);
        write(&mut parts[CHUNKS + 1], 0..1);
        assert!(!huge(&parts[CHUNKS + 1]).0);
    }

    #[test]
    fn freed_memory_is_zero_and_the_neighbours_keep_theirs() {
        let mut parts: Vec<Part> = parts(2 * CHUNKS).unwrap().collect();
        for part in &mut parts {
            write(part, 0..CHUNK / PAGE);
        }
        let at = CHUNKS + 1;
        parts[at].fill(false);
        parts[at].free();
        assert!(parts[at].iter().all(|&byte| byte == 0));
        assert!(!huge(&parts[at]).0, "no more memory behind it");
        for near in [at - 1, at + 1] {
            assert!((0..CHUNK / PAGE).all(|page| parts[near][page * PAGE] == page as u8 | 1));
        }
    }

    #[test]
    fn the_memory_outlives_all_parts_but_one() {
        let mut last = parts(CHUNKS).unwrap().last().unwrap();
        write(&mut last, 0..2);
        assert_eq!((last[0], last[PAGE], last[CHUNK - 1]), (1, 1, 0));
    }
}
