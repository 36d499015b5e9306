//! From a path and options to an open, locked image with its geometry.
//!
//! Every error is one line that names the path and says what to do.

use std::fmt::Display;
use std::fs::{self, Metadata};
use std::future::{Future, IntoFuture};
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use super::File;
use super::alone::{self, Alone};
#[cfg(target_os = "linux")]
use super::at_once::AtOnce;
use super::extents::KnownData;
use super::flushes::Flushes;
use super::image::{Buffers, Image, Lacks};
use super::lock::{self, Refused};
use super::ring::Ring;
use super::sys::{self, Calls, Os};
use crate::threads::{Epochs, Pool};
use crate::{CrashLevel, Error, ErrorKind, Features, Geometry, Result};

/// How to open a [`File`]; await it to do so.
///
/// # Errors
/// One line that names the path and says what to do: no such file, another size, a busy lock, a mounted device.
#[derive(Clone, Debug)]
#[must_use = "nothing is opened until this is awaited"]
pub struct OpenFile {
    path: PathBuf,
    size: Option<u64>,
    direct: bool,
    read_only: bool,
    existing: bool,
    aio: Aio,
    threads: usize,
}

/// What reads from the disk, and writes to it where they are direct.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aio {
    /// `Uring` where it is possible, else `Threads`.
    #[default]
    Auto,
    /// A thread for each transfer under way, up to [`OpenFile::threads`].
    Threads,
    /// An io_uring ring (Linux 5.13, and not where it is forbidden to the process, as in many containers).
    Uring,
}

impl File {
    /// A disk in the file, or on the block device, at `path`.
    pub fn open(path: impl Into<PathBuf>) -> OpenFile {
        OpenFile {
            path: path.into(),
            size: None,
            direct: false,
            read_only: false,
            existing: false,
            aio: Aio::Auto,
            threads: 16,
        }
    }
}

impl OpenFile {
    /// The disk's size in bytes. A file that does not exist is created, sparse and durably; so is one that is
    /// empty, as a creation that was cut short leaves it. Any other must be of this size. If left out: the size there is.
    pub fn size(mut self, bytes: u64) -> Self {
        self.size = Some(bytes);
        self
    }

    /// Goes past the page cache (`O_DIRECT`; Linux only). The logical block is then what the file system
    /// demands, often 512 or 4096 bytes. If left out: buffered.
    pub fn direct(mut self, direct: bool) -> Self {
        self.direct = direct;
        self
    }

    /// Accepts no mutation, and shares the file with other readers. If left out: writable.
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Creates nothing, and leaves an empty file as it is: a size is only compared. If left out: creates what a size is given for.
    pub fn existing(mut self, existing: bool) -> Self {
        self.existing = existing;
        self
    }

    /// What waits for the disk. If left out: [`Aio::Auto`].
    ///
    /// Within a runtime of several threads, a task of it hands transfers to the kernel and takes their ends. So its tasks must not keep all
    /// of its threads waiting for this file; and what a thread has handed in may end only once that thread is not stuck in a
    /// system call. A program that itself reads or writes a kernel device which it serves from a file does better with [`Aio::Threads`].
    pub fn aio(mut self, aio: Aio) -> Self {
        self.aio = aio;
        self
    }

    /// How many operations may wait for the file at once, at least one; threads start as they are needed.
    /// If left out: 16.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = threads;
        self
    }

    pub(super) async fn open_with(self, calls: Box<dyn Calls>) -> Result<File> {
        let pool = Pool::new("ulio-file", self.threads)?;
        let runtime = Handle::try_current().ok().filter(alone::others_go_on);
        let open = move || {
            let image = self.clone().image(calls)?;
            let ring = self.ring(&image, runtime.as_ref())?;
            Ok::<_, Error>((image, ring))
        };
        let (image, ring) = pool.run(open).await?;
        Ok(File {
            image: Arc::new(image),
            flushes: Flushes::default(),
            ring,
            pool,
        })
    }
}

impl IntoFuture for OpenFile {
    type Output = Result<File>;
    type IntoFuture = Pin<Box<dyn Future<Output = Result<File>> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.open_with(Box::new(Os)))
    }
}

/// How long a busy file or device is tried for.
const PATIENCE: Duration = Duration::from_millis(250);

/// What is at the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    File,
    Device,
}

/// A file as opened, before it is known to be in order.
struct Opened {
    file: fs::File,
    metadata: Metadata,
    kind: Kind,
    created: bool,
}

impl OpenFile {
    fn image(self, calls: Box<dyn Calls>) -> Result<Image> {
        if self.size.is_some_and(|size| size > Geometry::MAX_SIZE) {
            return Err(self.refuse(ErrorKind::Invalid, "no disk is longer than 2^63 - 1 bytes"));
        }
        let opened = self.open_file()?;
        self.lock(&opened.file)?;
        let created = opened.created;
        let image = self.prepare(opened, calls);
        if image.is_err() && created {
            // Half-made, and nobody else's: the next may try again.
            let _ = fs::remove_file(&self.path);
        }
        image
    }

    fn open_file(&self) -> Result<Opened> {
        let known = match fs::metadata(&self.path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return self.create(),
            Err(error) => return Err(self.failed("cannot be opened", error)),
        };
        let kind = self.kind(&known)?;
        let options = self.options(kind, &known)?;
        let file = patiently(is_busy, || options.open(&self.path))
            .map_err(|error| self.not_opened(kind, &known, error))?;
        // The path may lead elsewhere by now.
        let metadata = self.metadata(&file)?;
        if self.kind(&metadata)? != kind {
            return Err(self.refuse(ErrorKind::Io, "was replaced while it was opened: try again"));
        }
        Ok(Opened {
            file,
            metadata,
            kind,
            created: false,
        })
    }

    fn create(&self) -> Result<Opened> {
        if self.size.is_none() || self.read_only || self.existing {
            let advice = match (self.read_only, self.existing, self.size) {
                (_, true, Some(_)) => "does not exist, and was not to be created now",
                (true, ..) => "does not exist, and a read-only disk is not created",
                (false, ..) => "does not exist: give a size (size=10G, say) to create it",
            };
            return Err(self.refuse(ErrorKind::Io, advice));
        }
        let mut options = self.file_options();
        let file = match options.create_new(true).open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(self.refuse(
                    ErrorKind::Io,
                    "was created by somebody else, or is a dangling link: try again",
                ));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let text = "cannot be created: its directory does not exist";
                return Err(self.refuse(ErrorKind::Io, text));
            }
            Err(error) => {
                // With O_DIRECT, Linux creates the file before it refuses to open it.
                if error.kind() == io::ErrorKind::InvalidInput {
                    let _ = fs::remove_file(&self.path);
                }
                return Err(self.no_direct(error, "cannot be created"));
            }
        };
        let metadata = self.metadata(&file)?;
        Ok(Opened {
            file,
            metadata,
            kind: Kind::File,
            created: true,
        })
    }

    fn prepare(&self, opened: Opened, calls: Box<dyn Calls>) -> Result<Image> {
        let Opened {
            file,
            metadata,
            kind,
            ..
        } = opened;
        let mut there = self.length(kind, &file)?;
        // The lock is held, and an empty file has nothing to lose.
        let keeps = self.read_only || self.existing;
        if let (Kind::File, false, 0, Some(size)) = (kind, keeps, there, self.size) {
            self.grow(&file, size)?;
            there = size;
        }
        if let Some(size) = self.size.filter(|size| *size != there) {
            let text = format!(
                "has {there} bytes, but a size of {size} was asked for: leave the size out to open it as it is"
            );
            return Err(self.refuse(ErrorKind::Invalid, text));
        }
        if there > Geometry::MAX_SIZE {
            return Err(self.refuse(ErrorKind::Invalid, "is longer than 2^63 - 1 bytes"));
        }
        // Device nodes lie on such a file system too.
        let in_memory = kind == Kind::File && sys::is_in_memory(&file);
        let mut geometry = match (self.read_only, in_memory) {
            (true, _) => Geometry::read_only(there),
            (false, true) => Geometry::writable(there, CrashLevel::None),
            (false, false) => Geometry::writable(there, CrashLevel::Flush),
        };
        geometry.features |= Features::SURVIVES_KILL;
        let mut image = Image {
            calls,
            never_waits: in_memory,
            at_once: None,
            alone: Alone::new(false),
            file,
            beside: None,
            geometry,
            is_device: kind == Kind::Device,
            direct: self.direct,
            align: 1,
            tail_start: there,
            lacks: Lacks::default(),
            known_data: KnownData::default(),
            buffers: Buffers::new(1),
            latch: AtomicBool::new(false),
            syncs: Epochs::new(),
            unsynced: AtomicU64::new(0),
        };
        self.fit(&mut image, &metadata)?;
        Ok(image)
    }

    fn lock(&self, file: &fs::File) -> Result {
        let is_busy = |refused: &Refused| matches!(refused, Refused::Busy);
        let locked = patiently(is_busy, || lock::lock(file, !self.read_only));
        locked.map_err(|refused| match refused {
            Refused::Busy => {
                let holder = lock::holder(file, &self.path);
                let holder = holder.as_deref().unwrap_or("another program");
                let advice = match self.read_only {
                    true => "stop that first",
                    false => "stop that first, or open both read-only",
                };
                self.refuse(ErrorKind::Io, format!("is in use by {holder}: {advice}"))
            }
            Refused::Failed(error) => self.failed("cannot be locked", error),
        })
    }

    /// Gives a new file its size, so that a crash from here on finds it whole or not at all.
    fn grow(&self, file: &fs::File, size: u64) -> Result {
        let directory = match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        file.set_len(size)
            .and_then(|()| file.sync_all())
            .and_then(|()| sys::sync_directory(directory))
            .map_err(|error| self.failed(format_args!("cannot be made {size} bytes long"), error))
    }

    fn metadata(&self, file: &fs::File) -> Result<Metadata> {
        file.metadata()
            .map_err(|error| self.failed("cannot be looked at", error))
    }

    /// The ring, if there is to be one.
    fn ring(&self, image: &Image, runtime: Option<&Handle>) -> Result<Option<Ring>> {
        if self.aio == Aio::Threads || (self.aio == Aio::Auto && image.never_waits) {
            return Ok(None);
        }
        match Ring::new(runtime) {
            Ok(ring) => {
                tracing::info!(path = %self.path.display(), "io_uring waits for the disk");
                Ok(Some(ring))
            }
            Err(error) if self.aio == Aio::Uring => {
                let text = format!("cannot have an io_uring ring ({error}): use threads");
                Err(self.refuse(ErrorKind::Unsupported, text))
            }
            Err(error) => {
                let path = self.path.display();
                tracing::info!(%path, %error, "no io_uring: threads wait for the disk");
                Ok(None)
            }
        }
    }

    fn file_options(&self) -> fs::OpenOptions {
        #[cfg(target_os = "linux")]
        return sys::open_options(!self.read_only, self.direct, false);
        #[cfg(not(target_os = "linux"))]
        return sys::open_options(!self.read_only);
    }

    fn no_direct(&self, error: io::Error, what: &str) -> Error {
        match self.direct && error.kind() == io::ErrorKind::InvalidInput {
            true => self.refuse(
                ErrorKind::Unsupported,
                "is on a file system without direct I/O: open it without",
            ),
            false => self.failed(what, error),
        }
    }

    fn refuse(&self, kind: ErrorKind, text: impl Display) -> Error {
        Error::new(kind, format!("{} {text}", self.path.display()))
    }

    fn failed(&self, what: impl Display, error: io::Error) -> Error {
        let text = format!("{} {what}: {error}", self.path.display());
        Error::new(Error::from(error).kind(), text)
    }
}

#[cfg(not(target_os = "linux"))]
impl OpenFile {
    fn kind(&self, metadata: &Metadata) -> Result<Kind> {
        if self.direct {
            return Err(self.refuse(
                ErrorKind::Unsupported,
                "cannot be opened for direct I/O here",
            ));
        }
        match metadata.is_file() {
            true => Ok(Kind::File),
            false => Err(self.refuse(ErrorKind::Invalid, "is no file")),
        }
    }

    fn options(&self, _: Kind, _: &Metadata) -> Result<fs::OpenOptions> {
        Ok(self.file_options())
    }

    fn not_opened(&self, _: Kind, _: &Metadata, error: io::Error) -> Error {
        if is_busy(&error) {
            let text = "is in use by another program: stop that first";
            return self.refuse(ErrorKind::Io, text);
        }
        match error.kind() {
            io::ErrorKind::PermissionDenied if !self.read_only => self.failed(
                "cannot be opened for writing, so open it read-only or change its permissions",
                error,
            ),
            _ => self.failed("cannot be opened", error),
        }
    }

    fn length(&self, _: Kind, file: &fs::File) -> Result<u64> {
        Ok(self.metadata(file)?.len())
    }

    fn fit(&self, image: &mut Image, metadata: &Metadata) -> Result {
        image.geometry.physical_block_size = block(sys::allocation_unit(metadata), 1).unwrap_or(0);
        Ok(())
    }
}

#[cfg(target_os = "linux")]
impl OpenFile {
    fn kind(&self, metadata: &Metadata) -> Result<Kind> {
        use std::os::unix::fs::FileTypeExt;
        let what = metadata.file_type();
        if what.is_file() {
            Ok(Kind::File)
        } else if what.is_block_device() {
            Ok(Kind::Device)
        } else if what.is_dir() {
            Err(self.refuse(ErrorKind::Invalid, "is a directory: name a file in it"))
        } else {
            Err(self.refuse(ErrorKind::Invalid, "is neither a file nor a block device"))
        }
    }

    fn options(&self, kind: Kind, metadata: &Metadata) -> Result<fs::OpenOptions> {
        if kind == Kind::File {
            return Ok(self.file_options());
        }
        if self.read_only {
            // Readers share a device, so none has it for itself; but none may come beside a mount.
            let alone = sys::open_options(false, false, true);
            let alone = patiently(is_busy, || alone.open(&self.path));
            alone.map_err(|error| self.not_opened(kind, metadata, error))?;
        }
        Ok(sys::open_options(
            !self.read_only,
            self.direct,
            !self.read_only,
        ))
    }

    fn not_opened(&self, kind: Kind, metadata: &Metadata, error: io::Error) -> Error {
        match error.kind() {
            io::ErrorKind::ResourceBusy if kind == Kind::Device => {
                let user = super::blockdev::user(metadata);
                self.refuse(ErrorKind::Io, format_args!("is in use: {user}"))
            }
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
                if !self.read_only =>
            {
                self.failed(
                    "cannot be opened for writing, so open it read-only or change its permissions",
                    error,
                )
            }
            _ => self.no_direct(error, "cannot be opened"),
        }
    }

    fn length(&self, kind: Kind, file: &fs::File) -> Result<u64> {
        match kind {
            Kind::File => Ok(self.metadata(file)?.len()),
            Kind::Device => {
                sys::device_size(file).map_err(|error| self.failed("does not tell its size", error))
            }
        }
    }

    /// Learns what the file and what is below it can do, and says so in the geometry.
    fn fit(&self, image: &mut Image, metadata: &Metadata) -> Result {
        use super::{blockdev, direct};
        use crate::Discard;

        let mut logical = 1;
        let mut device_block = None;
        let mut unit = sys::allocation_unit(metadata);
        let mut queue = blockdev::Queue::default();
        if image.is_device {
            let (block, physical) = sys::device_blocks(&image.file)
                .map_err(|error| self.failed("does not tell its block size", error))?;
            (logical, device_block) = (block, Some(block));
            unit = u64::from(physical);
            queue = blockdev::Queue::of(metadata);
        }
        if self.direct {
            let alignment = direct::alignment(&*image.calls, &image.file, device_block)
                .map_err(|error| self.failed("fails a first direct read", error))?
                .ok_or_else(|| self.no_direct(io::ErrorKind::InvalidInput.into(), ""))?;
            logical = logical.max(alignment.offset);
            image.align = logical;
            image.buffers = Buffers::new(alignment.memory.max(logical).max(4096) as usize);
            image.geometry.memory_alignment = alignment.memory;
        }

        let size = image.geometry.size;
        let writable = !self.read_only;
        // No other party has a hand in writes: what they do and how long they take is this kernel's affair.
        let is_local = image.is_device || sys::honours_durable_writes(&image.file);
        let durable = writable && is_local;
        image.at_once = (durable && !self.direct).then(AtOnce::new);
        image.alone = Alone::new(is_local);
        if self.direct {
            image.tail_start = direct::tail_start(size, logical, unit);
        }
        if durable || image.tail_start < size {
            image.beside = Some(self.open_beside(metadata)?);
        }

        let geometry = &mut image.geometry;
        geometry.logical_block_size = logical;
        geometry.physical_block_size = block(unit, logical).unwrap_or(0);
        geometry
            .features
            .set(Features::ROTATIONAL, queue.rotational);
        geometry.features.set(Features::EXTENTS, !image.is_device);
        if writable {
            geometry.features.set(Features::FUA, durable);
            geometry.features |= Features::WRITE_ZEROES;
            if image.is_device {
                // What a device answers after a discard is its own affair.
                if queue.max_discard > 0 {
                    geometry.discard = Discard::Unspecified;
                }
                let granularity = block(queue.discard_granularity, logical).unwrap_or(0);
                geometry.discard_granularity = granularity;
            } else if self.can_punch(image) {
                // All of a punched range reads as zeroes; whole units of it are freed.
                image.geometry.discard = Discard::Zeroes;
                image.geometry.discard_granularity = block(unit, logical).unwrap_or(0);
            }
        }
        Ok(())
    }

    /// A punch behind the end changes nothing, and tells.
    fn can_punch(&self, image: &Image) -> bool {
        let behind = image.geometry.size.next_multiple_of(1 << 20);
        image.calls.punch(&image.file, behind, 1 << 20).is_ok()
    }

    /// A buffered handle of the same file.
    fn open_beside(&self, metadata: &Metadata) -> Result<fs::File> {
        let file = sys::open_options(!self.read_only, false, false)
            .open(&self.path)
            .map_err(|error| self.failed("cannot be opened a second time", error))?;
        if !sys::is_same(&self.metadata(&file)?, metadata) {
            return Err(self.refuse(ErrorKind::Io, "was replaced while it was opened: try again"));
        }
        sys::advise_random(&file);
        Ok(file)
    }
}

/// Opened by somebody who shares it with nobody: `EBUSY`, or Windows' ERROR_SHARING_VIOLATION.
fn is_busy(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::ResourceBusy
        || (cfg!(windows) && error.raw_os_error() == Some(32))
}

/// Tries again for a moment while busy: a process that has ended may not have let go yet, one that is being
/// started holds copies of its parent's handles until it runs its program, and two who come at once may have
/// refused each other.
fn patiently<T, E>(
    is_busy: impl Fn(&E) -> bool,
    mut attempt: impl FnMut() -> std::result::Result<T, E>,
) -> std::result::Result<T, E> {
    let start = Instant::now();
    loop {
        match attempt() {
            Err(error) if is_busy(&error) && start.elapsed() < PATIENCE => {
                thread::sleep(Duration::from_millis(fastrand::u64(1..20)));
            }
            other => return other,
        }
    }
}

/// `unit` as a block size over `logical`, if it is one.
fn block(unit: u64, logical: u32) -> Option<u32> {
    u32::try_from(unit).ok().filter(|unit| {
        unit.is_power_of_two() && *unit >= logical && *unit <= Geometry::MAX_LOGICAL_BLOCK
    })
}
