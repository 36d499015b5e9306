//! Sockets that a service manager has opened and passed on (sd_listen_fds(3)):
//! `LISTEN_PID`, `LISTEN_FDS`, `LISTEN_FDNAMES`.
//!
//! They are taken once in a process, all together, and marked so that no child
//! inherits them; a server takes those of its name from there.

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;

use socket2::{Domain, Socket, Type};

use super::{Listener, tcp, unix};

/// The first descriptor that is passed (`SD_LISTEN_FDS_START`).
const FIRST: RawFd = 3;
/// More than this is a mistake.
const MOST: usize = 1024;

/// What was passed and is not in use yet. `None`: nobody has looked.
static PASSED: Mutex<Option<Vec<Passed>>> = Mutex::new(None);

struct Passed {
    name: String,
    fd: OwnedFd,
}

/// The sockets named `name`, or all of them if it is empty.
pub(super) fn take(name: &str) -> Result<Vec<Listener>, String> {
    let mut passed = PASSED.lock().unwrap_or_else(|error| error.into_inner());
    let passed = match &mut *passed {
        Some(passed) => passed,
        none => {
            let variable = |key| std::env::var(key).ok();
            let names = names(
                std::process::id(),
                variable("LISTEN_PID"),
                variable("LISTEN_FDS"),
                variable("LISTEN_FDNAMES"),
            )?;
            none.insert(adopt(names)?)
        }
    };
    let mine: Vec<_> = passed
        .extract_if(.., |socket| name.is_empty() || socket.name == name)
        .collect();
    if mine.is_empty() {
        let others: Vec<_> = passed.iter().map(|socket| socket.name.as_str()).collect();
        return Err(format!(
            "systemd:{name}: no such socket is left; there are {others:?}"
        ));
    }
    mine.into_iter()
        .map(|socket| listener(socket.fd).map_err(|why| format!("systemd:{}: {why}", socket.name)))
        .collect()
}

/// The name of each descriptor that the environment announces to process `own`.
fn names(
    own: u32,
    pid: Option<String>,
    count: Option<String>,
    names: Option<String>,
) -> Result<Vec<String>, String> {
    let (Some(pid), Some(count)) = (pid, count) else {
        return Err(
            "systemd: no sockets were passed to this process (LISTEN_PID and LISTEN_FDS are not set); \
             start it from a socket unit, or name an address"
                .into(),
        );
    };
    if pid.parse() != Ok(own) {
        return Err(format!(
            "systemd: the sockets are for process {pid} (LISTEN_PID), and this is {own}"
        ));
    }
    let count: usize = match count.parse() {
        Ok(count @ 1..=MOST) => count,
        _ => {
            return Err(format!(
                "systemd: LISTEN_FDS is {count:?}, where a number from 1 to {MOST} should be"
            ));
        }
    };
    let mut names: Vec<String> = match names {
        Some(names) => names.split(':').map(str::to_owned).collect(),
        None => Vec::new(),
    };
    // What sd_listen_fds calls a socket without a name.
    names.resize(count, "unknown".into());
    Ok(names)
}

fn adopt(names: Vec<String>) -> Result<Vec<Passed>, String> {
    // All are looked at before one is taken, so that an error takes none.
    for (fd, name) in (FIRST..).zip(&names) {
        // SAFETY: the borrow ends with this call, which only asks whether the descriptor is open, and
        // answers EBADF if it is not.
        let open = rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(fd) });
        if let Err(error) = open {
            return Err(format!(
                "systemd:{name}: descriptor {fd} was announced and is not open: {error}"
            ));
        }
    }
    let adopted = (FIRST..).zip(names).map(|(fd, name)| {
        // SAFETY: the descriptor is open, and the service manager has passed it to this very process
        // (LISTEN_PID is our pid) for it to own. `PASSED` sees to it that this happens once.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)
            .map_err(|error| format!("systemd:{name}: {error}"))?;
        Ok(Passed { name, fd })
    });
    adopted.collect()
}

fn listener(fd: OwnedFd) -> Result<Listener, String> {
    let socket = Socket::from(fd);
    let text = |error: std::io::Error| error.to_string();
    let kind = socket
        .r#type()
        .map_err(|error| format!("not a socket: {error}"))?;
    if kind != Type::STREAM {
        return Err("not a stream socket: use ListenStream= in the socket unit".into());
    }
    if !accepts(&socket) {
        return Err(
            "a connection, not a listening socket: set Accept=no in the socket unit".into(),
        );
    }
    let address = socket.local_addr().map_err(text)?;
    match address.domain() {
        Domain::UNIX => unix::from_socket(socket).map_err(text),
        Domain::IPV4 | Domain::IPV6 => tcp::from_socket(socket).map_err(text),
        _ => Err("neither TCP nor a Unix socket".into()),
    }
}

#[cfg(any(target_os = "linux", target_os = "android"))]
fn accepts(socket: &Socket) -> bool {
    socket.is_listener().unwrap_or(false)
}

/// What is connected does not listen.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn accepts(socket: &Socket) -> bool {
    socket.peer_addr().is_err()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_says_how_many_and_how_they_are_called() {
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(
            names(7, text("7"), text("2"), text("a:b")),
            Ok(vec!["a".into(), "b".into()])
        );
        assert_eq!(
            names(7, text("7"), text("2"), None),
            Ok(vec!["unknown".into(), "unknown".into()])
        );
        for (pid, count) in [
            (None, text("1")),
            (text("7"), None),
            (text("8"), text("1")),
            (text(""), text("1")),
            (text("7"), text("0")),
            (text("7"), text("-1")),
            (text("7"), text("1025")),
        ] {
            assert!(
                names(7, pid.clone(), count.clone(), None).is_err(),
                "{pid:?} {count:?}"
            );
        }
    }
}
