//! The transmission phase: requests in, replies out, until the client leaves.
//!
//! One task serves one connection, and spawns nothing. One receive brings many
//! requests (`input`); each is checked (`request`), started in a slot and polled
//! once at once (`command`), but for reads and writes that the device does there and then (`nowait`); replies gather
//! (`reply`, `output`) and go out together when the input is used up or enough of them wait. A short write stays where it was
//! received; other bytes are in buffers of a `pool`, so that a request allocates nothing, and who rests lends what it works with
//! to others (`kits`). With nothing to do it stays awake for the next request a little (`linger`) before it sleeps, unless too many
//! others work (`company`). `connection` is that loop.
//!
//! Requests finish in any order. What is in flight is bounded in number and in bytes
//! (`budget`); beyond that, and while a slow reader leaves replies unsent, no request is taken.

mod budget;
mod command;
mod company;
mod connection;
mod holes;
mod input;
mod kits;
mod linger;
mod nowait;
mod output;
mod pool;
mod reply;
mod request;
mod status;

use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;

pub use budget::Budget;
pub(super) use kits::Kits;
pub use linger::Chairs;

use super::limits::Environment;
use super::session::Session;
use super::socket::Socket;
use crate::{Device, Engine};
use connection::Connection;

/// Serves `device` to the client at the other end of `stream` until either leaves, with what
/// `session` has agreed on. `input` holds bytes that were received behind the handshake.
///
/// A client that leaves loses the replies, not the operations: they run to their end before this
/// returns. At shutdown, those that take longer than the grace period are dropped. Needs a tokio
/// runtime with time.
///
/// # Errors
/// If the stream fails, or the client breaks the protocol beyond repair.
pub async fn run<S: Socket, E: Engine>(
    stream: S,
    input: Vec<u8>,
    session: Session,
    device: Device<E>,
    environment: Environment,
) -> io::Result<()> {
    let mut shutdown = environment.shutdown.clone();
    let run = |job| command::run(&device, &session, job);
    let mut connection = Connection::new(stream, input, &session, &environment, run, &device);
    connection.suit(&device.geometry());
    let mut shutdown = pin!(shutdown.wait());
    let mut is_stopping = false;
    poll_fn(|cx| {
        if !is_stopping && shutdown.as_mut().poll(cx).is_ready() {
            is_stopping = true;
            connection.stop();
        }
        connection.poll(cx)
    })
    .await
}
