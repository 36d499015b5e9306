//! What stands in `/run/ulio` about a device: a file of lines, written anew as a whole when it changes.
//!
//! Its name is `ID.device`, where the ID is the process's and a number; beside it may be `ID.sock`, where the
//! process answers with its counters, `ID.lock`, which it has locked for as long as it looks after the device, and `ID/`, a
//! directory of the way's own. The file is there before anything is made that would outlive the process.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FlockOperation, flock};

use super::{AttachError, Via, process};

/// Where records are.
pub(super) const DIRECTORY: &str = "/run/ulio";
const SUFFIX: &str = "device";
const LOCK: &str = "lock";
/// More than a record can have.
const LONGEST: u64 = 64 << 10;

/// What is known of a device, living or dead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) id: String,
    pub(super) pid: u32,
    /// See [`process::started`].
    pub(super) started: u64,
    pub(super) via: Via,
    /// `None` until it is there.
    pub(super) device: Option<PathBuf>,
    /// In bytes.
    pub(super) size: u64,
    pub(super) read_only: bool,
    pub(super) recoverable: bool,
    pub(super) label: String,
    /// What the way has to know to clean up.
    pub(super) remains: Vec<(String, String)>,
}

impl Record {
    /// Writes the first record of a new device of this process. The file is the lock by which others see that it lives.
    pub(super) fn create(label: &str, read_only: bool) -> Result<(Self, File), AttachError> {
        let failed = |path: &Path, error| AttachError::Record {
            path: path.to_owned(),
            error,
        };
        let directory = Path::new(DIRECTORY);
        let mut builder = DirBuilder::new();
        let made = builder.recursive(true).mode(0o755).create(directory);
        made.map_err(|error| failed(directory, error))?;
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let pid = std::process::id();
        let started = process::started(pid).ok_or_else(|| {
            let stat = Path::new("/proc").join(pid.to_string()).join("stat");
            let error = io::Error::other("it does not say when this process was started");
            failed(&stat, error)
        })?;
        loop {
            let record = Record {
                id: format!("{pid}-{}", NEXT.fetch_add(1, Ordering::Relaxed)),
                pid,
                started,
                via: Via::Fuse,
                device: None,
                size: 0,
                read_only,
                recoverable: false,
                label: label.chars().map(visible).collect(),
                remains: Vec::new(),
            };
            // An ID that a process of the same number left behind is passed by.
            let lock = match record.lock() {
                Ok(lock) => lock,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(failed(&record.path(LOCK), error)),
            };
            let error =
                match record.write(OpenOptions::new().create_new(true), &record.path(SUFFIX)) {
                    Ok(()) => return Ok((record, lock)),
                    Err(error) => error,
                };
            let _ = fs::remove_file(record.path(LOCK));
            if error.kind() != io::ErrorKind::AlreadyExists {
                return Err(failed(&record.path(SUFFIX), error));
            }
        }
    }

    /// Makes and takes the lock that shows that this process lives.
    fn lock(&self) -> io::Result<File> {
        let mut options = OpenOptions::new();
        // Nobody but root has anything to lock there.
        let options = options.write(true).create_new(true).mode(0o600);
        let file = options.open(self.path(LOCK))?;
        flock(&file, FlockOperation::LockExclusive)?;
        Ok(file)
    }

    /// Writes it anew.
    pub(super) fn save(&self) -> io::Result<()> {
        let beside = self.path("new");
        self.write(OpenOptions::new().create(true).truncate(true), &beside)?;
        fs::rename(beside, self.path(SUFFIX))
    }

    fn write(&self, options: &mut OpenOptions, path: &Path) -> io::Result<()> {
        let mut file = options.write(true).mode(0o644).open(path)?;
        file.write_all(self.text().as_bytes())
    }

    /// All that are there and can be read.
    pub(super) fn all() -> io::Result<Vec<Record>> {
        let entries = match fs::read_dir(DIRECTORY) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut all = Vec::new();
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|suffix| suffix == SUFFIX)
                && let Some(id) = path.file_stem().and_then(|id| id.to_str())
                && fs::metadata(&path).is_ok_and(|of| of.len() <= LONGEST)
                && let Ok(text) = fs::read_to_string(&path)
            {
                match Record::parse(id, &text) {
                    Some(record) => all.push(record),
                    None => tracing::warn!(path = %path.display(), "not a record of a device"),
                }
            }
        }
        all.sort_by(|a, b| (a.pid, &a.device, &a.id).cmp(&(b.pid, &b.device, &b.id)));
        Ok(all)
    }

    /// True if the process that wrote it lives, and looks after the device. For root that is sure in every namespace: a
    /// process has another number in each.
    pub(super) fn is_alive(&self) -> bool {
        match File::open(self.path(LOCK)) {
            Ok(lock) => flock(&lock, FlockOperation::NonBlockingLockShared).is_err(),
            Err(_) => process::started(self.pid) == Some(self.started),
        }
    }

    /// What drivers are told a device is that this is the record of: no other record, living or dead, has the same.
    pub(super) fn identifier(&self) -> String {
        format!("userland-io {} {}", self.id, self.started)
    }

    /// Where the process answers with its counters.
    pub(super) fn socket(&self) -> PathBuf {
        self.path("sock")
    }

    /// A directory for the way's own purposes. It is not made yet.
    pub(super) fn directory(&self) -> PathBuf {
        Path::new(DIRECTORY).join(&self.id)
    }

    /// What the way noted under `key`.
    pub(super) fn remains(&self, key: &str) -> Option<&str> {
        let found = self.remains.iter().find(|(name, _)| name == key);
        found.map(|(_, value)| value.as_str())
    }

    /// Takes away all that stands in the directory about it. The record itself goes last.
    pub(super) fn remove(&self) -> io::Result<()> {
        gone(fs::remove_file(self.socket()))?;
        gone(fs::remove_file(self.path("new")))?;
        gone(fs::remove_dir(self.directory()))?;
        gone(fs::remove_file(self.path(LOCK)))?;
        gone(fs::remove_file(self.path(SUFFIX)))
    }

    fn path(&self, suffix: &str) -> PathBuf {
        Path::new(DIRECTORY).join(format!("{}.{suffix}", self.id))
    }

    fn text(&self) -> String {
        let device = self.device.as_deref().map(Path::display);
        let mut text = format!(
            "pid {}\nstarted {}\nvia {}\nsize {}\nread_only {}\nrecoverable {}\nlabel {}\n",
            self.pid,
            self.started,
            self.via,
            self.size,
            self.read_only,
            self.recoverable,
            self.label
        );
        if let Some(device) = device {
            text += &format!("device {device}\n");
        }
        for (key, value) in &self.remains {
            text += &format!("{WAY}{key} {value}\n");
        }
        text
    }

    fn parse(id: &str, text: &str) -> Option<Record> {
        let field = |name: &str| {
            let mut lines = text.lines();
            lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
        };
        let remains = text.lines().filter_map(|line| {
            let (key, value) = line.strip_prefix(WAY)?.split_once(' ')?;
            Some((key.to_owned(), value.to_owned()))
        });
        Some(Record {
            id: id.to_owned(),
            pid: field("pid")?.parse().ok()?,
            started: field("started")?.parse().ok()?,
            via: field("via")?.parse().ok()?,
            device: field("device").map(PathBuf::from),
            size: field("size")?.parse().ok()?,
            read_only: field("read_only")?.parse().ok()?,
            recoverable: field("recoverable")?.parse().ok()?,
            label: field("label")?.to_owned(),
            remains: remains.collect(),
        })
    }
}

/// Begins the fields that are a way's own.
const WAY: &str = "way-";

fn visible(c: char) -> char {
    if c.is_control() { ' ' } else { c }
}

/// What is not there need not be removed.
fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_back() {
        let record = Record {
            id: "17-3".to_owned(),
            pid: 17,
            started: 4711,
            via: Via::Nbd,
            device: Some("/dev/nbd3".into()),
            size: 1 << 40,
            read_only: true,
            recoverable: false,
            label: "file:a b.img  cow:c".to_owned(),
            remains: vec![("mount".to_owned(), "/a b".to_owned())],
        };
        assert_eq!(Record::parse("17-3", &record.text()), Some(record.clone()));
        assert_eq!(record.remains("mount"), Some("/a b"));
        let early = Record {
            device: None,
            label: String::new(),
            ..record
        };
        assert_eq!(Record::parse("17-3", &early.text()), Some(early));
    }

    /// As 0.1.0 wrote it: a newer program has to know the device that an older one left.
    #[test]
    fn the_first_versions_records_are_read() {
        let text = "pid 16157\nstarted 140732\nvia ublk\nsize 67108864\nread_only false\nrecoverable true\n\
                    label file:/srv/disk.img,size=64M\ndevice /dev/ublkb0\nway-index 0\nway-identity 4711\n";
        let record = Record::parse("16157-0", text).unwrap();
        assert_eq!(
            (record.via, record.pid, record.started),
            (Via::Ublk, 16157, 140_732)
        );
        assert_eq!(record.device.as_deref(), Some(Path::new("/dev/ublkb0")));
        assert_eq!(
            (record.size, record.read_only, record.recoverable),
            (64 << 20, false, true)
        );
        assert_eq!(record.label, "file:/srv/disk.img,size=64M");
        let noted = ["index", "identity"].map(|key| record.remains(key));
        assert_eq!(noted, [Some("0"), Some("4711")]);
        assert_eq!(record.identifier(), "userland-io 16157-0 140732");
        // What a later one adds does no harm.
        let later = text.replace("via ublk", "shape round\nvia ublk");
        assert_eq!(Record::parse("16157-0", &later), Some(record));
    }

    #[test]
    fn what_is_no_record_is_not_taken_for_one() {
        for text in ["", "pid x\n", "pid 1\nstarted 2\nvia smoke\nsize 3\n"] {
            assert_eq!(Record::parse("1-1", text), None, "{text:?}");
        }
    }
}
