//! Telling a service manager how it goes (sd_notify(3)): a datagram of lines to the socket that it names.

use std::env;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Where the manager listens.
const VARIABLE: &str = "NOTIFY_SOCKET";

/// The service manager that started this process; perhaps none.
pub(crate) struct Service(Option<(UnixDatagram, SocketAddr)>);

impl Service {
    /// What the environment names.
    pub(crate) fn find() -> Self {
        let name = env::var_os(VARIABLE).filter(|name| !name.is_empty());
        let address = name.and_then(|name| match name.as_bytes() {
            [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest).ok(),
            _ => SocketAddr::from_pathname(&name).ok(),
        });
        Service(address.and_then(|address| {
            let socket = UnixDatagram::unbound().ok()?;
            // A manager that is stuck, on this very disk perhaps, is not waited for.
            socket.set_nonblocking(true).ok()?;
            Some((socket, address))
        }))
    }

    /// It is ready, and does what `status` says.
    pub(crate) fn ready(&self, status: &str) {
        self.tell("READY=1", status);
    }

    /// It is on its way to its end, and does what `status` says.
    pub(crate) fn stopping(&self, status: &str) {
        self.tell("STOPPING=1", status);
    }

    fn tell(&self, state: &str, status: &str) {
        let Service(Some((socket, address))) = self else {
            return;
        };
        let status = status.replace(['\n', '\r'], " ");
        let text = format!("{state}\nSTATUS={status}\n");
        if let Err(error) = socket.send_to_addr(text.as_bytes(), address) {
            tracing::debug!(%error, "telling the service manager");
        }
    }
}
