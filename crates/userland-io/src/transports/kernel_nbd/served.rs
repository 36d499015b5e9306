//! A disk of this process at the other end: what is made for it, and how its connections are looked after.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::fd::OwnedFd;
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::connections::{Connections, End};
use super::control::{self, Control, Identity, Waits};
use super::error::Error;
use super::life::{Message, Side};
use crate::transports::nbd::limits::Environment;
use crate::transports::nbd::session::Session;
use crate::{Device, Engine};

/// What it takes to serve a disk.
pub(super) struct Order<E: Engine> {
    pub(super) device: Device<E>,
    pub(super) session: Session,
    pub(super) environment: Environment,
    /// Gives what is under way in the end a limit of time.
    pub(super) stop: watch::Sender<bool>,
    pub(super) runtime: Handle,
    /// How long the kernel waits now.
    pub(super) timeout: Duration,
}

/// The longest that it is made to wait.
const LONGEST: Duration = Duration::from_secs(3600);
/// How often the time-out a disk may be too slow again and again. The kernel asks the same request without end, with the time-out that
/// it had at first.
const TIMES: u32 = 4;

/// Since when the kernel has hung up again and again, and when it did last.
#[derive(Debug)]
struct Row {
    since: Instant,
    last: Instant,
}

impl Row {
    /// It has again: how long that goes on. If the last time is longer than `lull` ago, the disk has recovered since.
    fn goes_on(row: &mut Option<Row>, lull: Duration) -> Duration {
        let now = Instant::now();
        let since = match row {
            Some(row) if now - row.last <= lull => row.since,
            _ => now,
        };
        *row = Some(Row { since, last: now });
        now - since
    }
}

/// A disk that is served.
pub(super) struct Served<E: Engine> {
    order: Order<E>,
    connections: Connections,
    /// As it was asked for.
    timeout: Duration,
    hung_up: Option<Row>,
    to: mpsc::Sender<Message>,
}

impl<E: Engine> Served<E> {
    /// Serves a disk by `count` connections, and gives their far ends.
    pub(super) fn new(
        order: Order<E>,
        count: usize,
        to: &mpsc::Sender<Message>,
    ) -> Result<(Self, Vec<OwnedFd>), Error> {
        let mut served = Served {
            timeout: order.timeout,
            order,
            connections: Connections::new(count)?,
            hung_up: None,
            to: to.clone(),
        };
        let far: Result<_, Error> = (0..count).map(|place| served.open(place)).collect();
        Ok((served, far?))
    }

    /// Makes the connection at `place`, and gives its far end.
    fn open(&mut self, place: usize) -> Result<OwnedFd, Error> {
        let to = self.to.clone();
        let ended = move |end| {
            // The device's thread may have ended before its connections did.
            let _ = to.send(Message::Ended { place, end });
        };
        let far = self.connections.open(place, &self.order, ended)?;
        Ok(far.into())
    }
}

impl<E: Engine> Side for Served<E> {
    fn ended(
        &mut self,
        place: usize,
        end: End,
        control: &mut Control,
        of: &Identity,
    ) -> Option<String> {
        if end == End::Left {
            return Some("somebody has disconnected it".to_owned());
        }
        tracing::warn!(
            device = %control::node(of.index).display(),
            connection = place,
            waited = ?self.order.timeout,
            "the kernel has given up waiting for an answer: connecting anew, now that the disk has answered"
        );
        self.connections.close(place);
        if Row::goes_on(&mut self.hung_up, 2 * self.timeout) > TIMES * self.timeout {
            return Some(format!(
                "its disk has been slower than the time-out again and again for {TIMES} times that"
            ));
        }
        // For what is new from now on; the kernel asks the same request again with the time-out that it had.
        let longer = (2 * self.order.timeout).min(LONGEST);
        self.order.timeout = longer.max(self.order.timeout);
        let far = self.open(place);
        let again =
            far.and_then(|far| control.reconnect(of, &[far], Waits::of(self.order.timeout)));
        again
            .err()
            .map(|error| format!("the kernel has hung up, and takes no new connection: {error}"))
    }

    fn end(&mut self) {
        // Without a receiver there are no threads any more.
        let _ = self.order.stop.send(true);
        self.connections.end();
    }
}
