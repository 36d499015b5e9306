//! `--background`: the program starts itself again, and leaves when that one is ready.
//!
//! The one in the background has a stream to the first as its standard input, and writes a byte there once its device
//! is ready. Until then it shares the first's stdout and stderr, so that it prints the path and any error itself. Then it
//! gives up all three: whoever reads its output sees the end of it.

use std::fs::OpenOptions;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};

use rustix::process::{Pid, Signal};
use tokio::io::AsyncReadExt;

use crate::errors::Failure;
use crate::output::{Told, note};
use crate::signals::Signals;

/// Says, in the environment, that the process with this socket as its standard input is the one in the background. So
/// those that it starts, which inherit it, are not.
const VARIABLE: &str = "ULIO_IN_BACKGROUND";
/// Where the log goes: a write there never waits for a disk.
const LOG: &str = "/dev/kmsg";

/// Starts the one in the background, and waits until it is ready.
pub(super) async fn start() -> Result<(), Failure> {
    let mut signals = Signals::listen()?;
    let (mut child, mut stream) =
        spawn().map_err(|error| Failure::of("starting in the background", error))?;
    let mut ready = [0];
    loop {
        let read = tokio::select! {
            read = stream.read(&mut ready) => read,
            () = signals.next() => {
                // It is in a session of its own, where no Ctrl-C arrives.
                terminate(&child);
                continue;
            }
        };
        return match read {
            Ok(1..) => Ok(()),
            _ => Err(ended(child.wait())),
        };
    }
}

fn spawn() -> io::Result<(Child, tokio::net::UnixStream)> {
    let (ours, its) = UnixStream::pair()?;
    let mut arguments = std::env::args_os();
    let mut command = Command::new(std::env::current_exe()?);
    if let Some(called) = arguments.next() {
        command.arg0(called);
    }
    let child = command
        .args(arguments)
        .env(VARIABLE, number(&its)?.to_string())
        .stdin(OwnedFd::from(its))
        .spawn()?;
    ours.set_nonblocking(true)?;
    Ok((child, tokio::net::UnixStream::from_std(ours)?))
}

/// What tells a socket from others that are open.
fn number(socket: impl AsFd) -> io::Result<u64> {
    Ok(rustix::fs::fstat(socket)?.st_ino)
}

fn terminate(child: &Child) {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // Not waited for yet, so the number is still its.
        let _ = rustix::process::kill_process(pid, Signal::TERM);
    }
}

/// Why it ended before it was ready.
fn ended(status: io::Result<ExitStatus>) -> Failure {
    let status = match status {
        Ok(status) => status,
        Err(error) => return Failure::of("waiting for the process in the background", error),
    };
    match (status.code().map(u8::try_from), status.signal()) {
        (Some(Ok(code @ 1..)), _) => Failure::Told(code),
        (_, Some(signal)) => Failure::Failed(format!(
            "signal {signal} ended the process in the background before its device was ready"
        )),
        _ => Failure::Failed(
            "the process in the background ended before its device was ready".to_owned(),
        ),
    }
}

/// The one in the background, until it is ready.
pub(super) struct Detached(());

impl Detached {
    /// This process, if it is that one. To be called first.
    pub(super) fn this() -> Result<Option<Self>, Failure> {
        let named = std::env::var(VARIABLE).ok();
        let named: Option<u64> = named.and_then(|number| number.parse().ok());
        if named.is_none() || named != number(rustix::stdio::stdin()).ok() {
            return Ok(None);
        }
        // Away from the terminal, and what comes from it.
        rustix::process::setsid()
            .map_err(|error| Failure::of("beginning a session in the background", error))?;
        Ok(Some(Detached(())))
    }

    /// Lets the first process go, and everything else that is not its own.
    pub(super) fn ready(self) -> Result<(), Failure> {
        let failed = |error| Failure::of("going to the background", error);
        let null = OpenOptions::new().read(true).write(true).open("/dev/null");
        let null = null.map_err(failed)?;
        let log = match OpenOptions::new().write(true).open(LOG) {
            Ok(log) => log,
            Err(error) => {
                if error.kind() != ErrorKind::NotFound {
                    note(&format!("nothing will be logged: {LOG}: {error}"));
                }
                null.try_clone().map_err(failed)?
            }
        };
        let first = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3);
        let first = first.map_err(io::Error::from).map_err(failed)?;
        let given_up = rustix::stdio::dup2_stdin(null.as_fd())
            .and_then(|()| rustix::stdio::dup2_stdout(null.as_fd()))
            .and_then(|()| rustix::stdio::dup2_stderr(log.as_fd()));
        given_up.map_err(io::Error::from).map_err(failed)?;
        Told::name_lines();
        // Last of all: after it nothing fails any more that the first should have told.
        let told = rustix::io::write(&first, &[1]);
        told.map_err(io::Error::from).map_err(failed)?;
        Ok(())
    }
}
