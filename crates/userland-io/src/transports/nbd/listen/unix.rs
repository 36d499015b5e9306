//! Unix domain sockets: open to their owner alone unless asked otherwise, at
//! no moment more open than that, and gone when the server is.
//!
//! What a dead server left behind is replaced; what a live one uses, and what
//! is no socket, is not touched. Servers that start at once on one path are
//! kept apart by a lock on its directory.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::FlockOperation;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::UnixListener;

use super::{BACKLOG, Kind, Listener, explain};
use crate::transports::nbd::uri::Address;

/// The longest path of a socket, in bytes: `sun_path` without its NUL.
const MAX_PATH: usize = if cfg!(any(target_os = "linux", target_os = "android")) {
    107
} else {
    103
};

/// Removes a socket's path when dropped, if it is still the same socket.
#[derive(Debug)]
pub(super) struct Unlink {
    path: PathBuf,
    identity: (u64, u64),
}

impl Drop for Unlink {
    fn drop(&mut self) {
        let ours = |meta: &fs::Metadata| (meta.dev(), meta.ino()) == self.identity;
        if fs::symlink_metadata(&self.path).as_ref().is_ok_and(ours) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

pub(super) async fn bind(path: &Path, mode: u32) -> Result<Listener, String> {
    let bytes = path.as_os_str().as_encoded_bytes();
    let shown = format!("unix:{}", path.display());
    if bytes.len() > MAX_PATH {
        return Err(format!(
            "cannot listen on {shown}: the path is {} bytes long, and a socket's is at most {MAX_PATH}; \
             choose a shorter one, or one relative to the working directory",
            bytes.len()
        ));
    }
    if bytes.first() == Some(&0) {
        tracing::warn!(
            name = shown,
            "a name in the abstract namespace has no permissions: every local user can connect"
        );
        let socket = open(path).map_err(|error| explain(&shown, &error))?;
        return listener(socket, path, None).map_err(|error| explain(&shown, &error));
    }
    let _lock = lock(path).await;
    clear(path, &shown)?;
    let bound = create(path, mode).and_then(|socket| {
        let path = std::path::absolute(path)?;
        let meta = fs::symlink_metadata(&path)?;
        let identity = (meta.dev(), meta.ino());
        let unlink = Unlink { path, identity };
        // At last, and exactly: the umask may have taken bits that were asked for.
        fs::set_permissions(&unlink.path, fs::Permissions::from_mode(mode))?;
        let path = unlink.path.clone();
        listener(socket, &path, Some(unlink))
    });
    bound.map_err(|error| explain(&shown, &error))
}

/// Takes a socket that somebody else has bound; its path stays.
pub(super) fn from_socket(socket: Socket) -> io::Result<Listener> {
    let address = socket.local_addr()?;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    if let Some(name) = address.as_abstract_namespace() {
        use std::os::unix::ffi::OsStringExt;
        let path = [b"\0", name].concat();
        let path = PathBuf::from(std::ffi::OsString::from_vec(path));
        return listener(socket, &path, None);
    }
    let path = address.as_pathname().unwrap_or(Path::new("")).to_owned();
    listener(socket, &path, None)
}

fn listener(socket: Socket, path: &Path, unlink: Option<Unlink>) -> io::Result<Listener> {
    socket.set_nonblocking(true)?;
    Ok(Listener {
        kind: Kind::Unix {
            listener: UnixListener::from_std(socket.into())?,
            _path: unlink,
        },
        address: Address::Unix(path.to_owned()),
    })
}

/// Waits a moment for others that are starting on the same directory. No lock is no reason to give up.
async fn lock(path: &Path) -> Option<fs::File> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let directory = fs::File::open(directory).ok()?;
    for _ in 0..100 {
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Some(directory),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(_) => return None,
        }
    }
    None
}

/// Removes what a dead server left at `path`, and nothing else.
fn clear(path: &Path, shown: &str) -> Result<(), String> {
    let Ok(meta) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !meta.file_type().is_socket() {
        return Err(format!(
            "cannot listen on {shown}: the path exists and is no socket; choose another, or remove it"
        ));
    }
    match probe(path) {
        // Nobody listens: its server is gone.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::debug!(
                socket = shown,
                "replacing a socket that a server left behind"
            );
            fs::remove_file(path).map_err(|error| explain(&shown, &error))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(explain(&shown, &error))
        }
        // It answers, or its queue is full, or it is of another type.
        Ok(()) | Err(_) => Err(format!(
            "cannot listen on {shown}: it is in use by a program that is running; choose another path, or stop that program"
        )),
    }
}

fn probe(path: &Path) -> io::Result<()> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.connect(&SockAddr::unix(path)?)
}

fn open(path: &Path) -> io::Result<Socket> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// Linux gives the path the mode that the socket has when it is bound, less the umask.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn create(path: &Path, mode: u32) -> io::Result<Socket> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    rustix::fs::fchmod(&socket, rustix::fs::Mode::from_raw_mode(mode))?;
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
use self::create_in_private as create;

/// Elsewhere the socket is made in a directory that nobody else can enter, and moved out of it.
#[cfg(any(test, not(any(target_os = "linux", target_os = "android"))))]
fn create_in_private(path: &Path, mode: u32) -> io::Result<Socket> {
    use std::os::unix::fs::DirBuilderExt;
    // Short, because the socket's own path has to fit.
    let name = format!(".{:x}{:x}", std::process::id(), fastrand::u32(..));
    let private = path.with_file_name(name);
    fs::DirBuilder::new().mode(0o700).create(&private)?;
    let inside = private.join("s");
    let socket = open(&inside).and_then(|socket| {
        fs::set_permissions(&inside, fs::Permissions::from_mode(mode))?;
        fs::rename(&inside, path)?;
        Ok(socket)
    });
    let _ = fs::remove_file(&inside);
    let _ = fs::remove_dir(&private);
    socket
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_at_no_moment_open_to_others() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        // Before anything has had the time to correct it.
        let socket = create(&path, 0o600).unwrap();
        let mode = fs::symlink_metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o177, 0);
        drop(socket);
    }

    #[test]
    fn a_socket_made_in_private_is_where_it_was_asked_for_and_nothing_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let socket = create_in_private(&path, 0o640).unwrap();
        let mode = fs::symlink_metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o640);
        probe(&path).unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        drop(socket);
        assert_eq!(
            probe(&path).unwrap_err().kind(),
            io::ErrorKind::ConnectionRefused
        );
    }
}
