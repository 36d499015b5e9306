//! The thread that owns an attached device: makes it, follows the disk's size, answers for it, and takes it away.
//!
//! Its runtime is of that one thread, and drives the timers and sockets of the engine too. So nothing here
//! waits for the device in a system call: that is for `spawn_blocking`.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime;
use tokio::sync::{mpsc, oneshot, watch};

use super::holders::holders_besides;
use super::list::{Counters, answer};
use super::record::Record;
use super::way::{self, Pending, Running, Settings, Undone, blocking};
use super::{AttachError, DetachError, PassedOver, Via, kernel_nbd, list, process};
use crate::{Device, Engine, ErrorKind, ExtentKind, Extents, Features, Geometry, ReadBuf};

/// How often a device whose handle was dropped is looked at: is it still in use?
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// How long whoever connects may take to say what they want.
const PATIENCE: Duration = Duration::from_secs(2);
/// How many stretches of data and holes are counted for one who asks, at most.
const MOST_STRETCHES: usize = 100_000;

/// What is to be attached.
pub(super) enum Source<E> {
    Disk(Device<E>),
    /// An export of somebody's NBD server, and how to have it as a disk.
    Export {
        uri: String,
        open: fn(String) -> Pending<'static, Result<Device<E>, AttachError>>,
    },
}

impl<E> fmt::Debug for Source<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Disk(_) => f.write_str("Disk"),
            Source::Export { uri, .. } => write!(f, "Export({uri})"),
        }
    }
}

/// What a handle can ask for, and where the answer goes.
#[derive(Debug)]
pub(super) enum Order {
    Detach(oneshot::Sender<Result<(), DetachError>>),
}

/// Who asked for the end, and hears how it went.
enum Asked {
    Handle(oneshot::Sender<Result<(), DetachError>>),
    Visitor(std::os::unix::net::UnixStream),
}

impl Asked {
    fn answer(self, result: Result<(), DetachError>) {
        // Nobody may be left to hear.
        match self {
            Asked::Handle(handle) => {
                let _ = handle.send(result);
            }
            Asked::Visitor(mut visitor) => {
                let text = answer(&result);
                let _ = visitor
                    .set_nonblocking(false)
                    .and_then(|()| visitor.set_write_timeout(Some(PATIENCE)))
                    .and_then(|()| visitor.write_all(text.as_bytes()));
            }
        }
    }
}

/// What a handle knows of its device.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) path: PathBuf,
    pub(super) via: Via,
    pub(super) passed_over: Vec<PassedOver>,
    pub(super) status: watch::Receiver<Status>,
}

/// What changes about it.
#[derive(Debug)]
pub(super) struct Status {
    pub(super) size: u64,
    /// Why it is gone; the inner `None` stands for detached.
    pub(super) ended: Option<Option<String>>,
    /// What went wrong with its end, or with the disk's last flush or its close.
    pub(super) failed: Option<String>,
}

/// Starts the thread.
pub(super) fn start<E: Engine>(
    source: Source<E>,
    settings: Settings,
    orders: mpsc::UnboundedReceiver<Order>,
    answer: oneshot::Sender<Result<Started, AttachError>>,
) -> Result<(), AttachError> {
    if !rustix::process::geteuid().is_root() {
        return Err(AttachError::NotRoot);
    }
    let work = move || {
        if let Err(error) = process::mark_thread() {
            tracing::debug!(%error, "this thread cannot be marked as one that writes back");
        }
        let runtime = match runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                let _ = answer.send(Err(AttachError::Thread(error)));
                return;
            }
        };
        let farewell = runtime.block_on(run(source, settings, orders, answer));
        // Its last threads and files are gone before anybody hears of the end.
        drop(runtime);
        farewell.tell();
    };
    let thread = thread::Builder::new().name("ulio-attach".to_owned());
    thread.spawn(work).map_err(AttachError::Thread)?;
    Ok(())
}

/// The last words, and who hears them.
#[derive(Default)]
struct Farewell {
    asked: Vec<(Asked, Result<(), DetachError>)>,
    status: Option<watch::Sender<Status>>,
    why: Option<String>,
    failed: Option<String>,
}

impl Farewell {
    fn tell(self) {
        for (asked, result) in self.asked {
            asked.answer(result);
        }
        if let Some(status) = self.status {
            status.send_modify(|status| {
                status.ended = Some(self.why);
                status.failed = self.failed;
            });
        }
    }
}

async fn run<E: Engine>(
    source: Source<E>,
    settings: Settings,
    orders: mpsc::UnboundedReceiver<Order>,
    answer: oneshot::Sender<Result<Started, AttachError>>,
) -> Farewell {
    let mut passed_over = Vec::new();
    let opened = match source {
        Source::Disk(device) => Ok(device),
        Source::Export { uri, open } => match hand_over(&uri, &settings).await {
            Ok(attached) => {
                let device = attached.view.clone();
                return keep(device, attached, orders, answer).await;
            }
            Err(NotHandedOver::Failed(error)) => Err(error),
            Err(NotHandedOver::PassedOver(reason)) => {
                let via = Via::Nbd;
                let reason = format!("the kernel cannot talk to the server itself: {reason}");
                tracing::debug!(uri, reason, "passed over");
                passed_over.push(PassedOver { via, reason });
                open(uri).await
            }
            Err(NotHandedOver::OtherWay) => open(uri).await,
        },
    };
    let device = match opened {
        Ok(device) => device,
        Err(error) => {
            let _ = answer.send(Err(error));
            return Farewell::default();
        }
    };
    // What is closed in the end is the caller's handle, not a read-only view of it.
    let view = match settings.read_only {
        true => device.read_only(),
        false => device.clone(),
    };
    match attach(view, &settings).await {
        Ok(mut attached) => {
            attached.passed_over.splice(0..0, passed_over);
            keep(device, attached, orders, answer).await
        }
        Err(error) => {
            if let Err(error) = device.close().await {
                tracing::error!(%error, "the disk could not be closed");
            }
            let _ = answer.send(Err(error));
            Farewell::default()
        }
    }
}

/// Looks after a device from its beginning to its end.
async fn keep<E: Engine>(
    device: Device<E>,
    mut attached: Attached<E>,
    orders: mpsc::UnboundedReceiver<Order>,
    answer: oneshot::Sender<Result<Started, AttachError>>,
) -> Farewell {
    let (status, watched) = watch::channel(Status {
        size: attached.running.size(),
        ended: None,
        failed: None,
    });
    let started = Started {
        path: attached.running.path().to_owned(),
        via: attached.record.via,
        passed_over: std::mem::take(&mut attached.passed_over),
        status: watched,
    };
    // If nobody waits for it any more, the channel for orders is closed too, and it is detached.
    let _ = answer.send(Ok(started));
    let (asked, gone) = attached.serve(orders, &status).await;
    // What is left of one that did not end in order is for whoever reads the record.
    let is_left = !matches!(gone, Gone::Detached(Ok(()))) && attached.running.is_there();
    let (mut result, why) = match gone {
        Gone::Detached(result) => (result, None),
        Gone::Ended(why) => (Ok(()), Some(why)),
    };
    let Attached {
        view,
        record,
        lock,
        running,
        listener,
        ..
    } = attached;
    drop((view, running));
    let flushed = device.flush().await;
    if let Err(error) = flushed.and(device.close().await) {
        tracing::error!(%error, "the disk could not be flushed or closed");
        // What the kernel may have said before is this in other words.
        result = Err(DetachError::Disk(error));
    }
    // Until now it was ending.
    if is_left {
        let device = record.device.as_deref().unwrap_or(Path::new("")).display();
        tracing::warn!(%device, "the device has ended and is still there: it stays on record");
    } else if let Err(error) = record.remove() {
        tracing::warn!(%error, "the record of the device could not be removed");
    }
    // What is on record now is stale.
    drop(lock);
    let failed = result.as_ref().err().map(ToString::to_string);
    let told = || match &failed {
        None => Ok(()),
        Some(text) => Err(DetachError::Told(text.clone())),
    };
    // Before whoever asked first: with that answer this process may end.
    let late = match is_left {
        true => Vec::new(),
        false => late(listener),
    };
    let late = late.into_iter().map(|late| (late, told()));
    Farewell {
        asked: late.chain(asked.map(|asked| (asked, result))).collect(),
        status: Some(status),
        why: why.or_else(|| failed.clone()),
        failed,
    }
}

/// Those who have asked for the end of a device that was ending already. Its socket has no name any more, so these are all.
fn late(listener: UnixListener) -> Vec<Asked> {
    let mut late = Vec::new();
    // It does not wait for any to come.
    let Ok(listener) = listener.into_std() else {
        return late;
    };
    while let Ok((mut visitor, _)) = listener.accept() {
        let mut order = [0; 16];
        let read = visitor
            .set_read_timeout(Some(PATIENCE))
            .and_then(|()| visitor.read(&mut order));
        if read.is_ok_and(|len| order[..len] == *b"detach\n") {
            late.push(Asked::Visitor(visitor));
        }
    }
    late
}

/// Makes the device, and puts it on record.
async fn attach<E: Engine>(
    view: Device<E>,
    settings: &Settings,
) -> Result<Attached<E>, AttachError> {
    let geometry = view.geometry();
    if settings.recoverable && !geometry.features.contains(Features::SURVIVES_KILL) {
        return Err(AttachError::Refused(
            "this disk cannot be recoverable: it does not claim SURVIVES_KILL, so writes that were answered may be \
             gone when its process dies, which a file system that goes on would not notice"
                .to_owned(),
        ));
    }
    if geometry.size < u64::from(geometry.logical_block_size.max(512)) {
        return Err(AttachError::Refused(format!(
            "a disk of {} bytes has not one whole block: nothing to attach",
            geometry.size
        )));
    }
    let (mut record, lock) = Record::create(&settings.label, geometry.is_read_only())?;
    let (passed_over, started) = way::start(&view, settings, &mut record).await;
    let Some((via, running)) = started else {
        let _ = record.remove();
        return Err(AttachError::NoWay(passed_over));
    };
    // What could be resumed once can be again.
    record.recoverable = settings.recoverable || settings.resume.is_some();
    publish(view, geometry, (record, lock), via, running, passed_over).await
}

/// Why the kernel does not talk to somebody's NBD server itself.
enum NotHandedOver {
    /// Another way was asked for.
    OtherWay,
    /// It cannot, for this reason.
    PassedOver(String),
    /// Nor could anybody.
    Failed(AttachError),
}

/// Has the kernel talk to the NBD server itself that has the export at `uri`.
async fn hand_over(uri: &str, settings: &Settings) -> Result<Attached<Elsewhere>, NotHandedOver> {
    if settings.via.is_some_and(|via| via != Via::Nbd) {
        return Err(NotHandedOver::OtherWay);
    }
    kernel_nbd::probe(settings).map_err(NotHandedOver::PassedOver)?;
    let record = Record::create(&settings.label, settings.read_only);
    let (mut record, lock) = record.map_err(NotHandedOver::Failed)?;
    record.via = Via::Nbd;
    let _ = record.save();
    let running = match kernel_nbd::hand_over(uri, settings, &mut record).await {
        Ok(running) => running,
        Err(error) => {
            let _ = record.remove();
            return Err(match error {
                kernel_nbd::Error::Connect(error) => {
                    NotHandedOver::Failed(AttachError::Connect(error))
                }
                error => NotHandedOver::PassedOver(kernel_nbd::words(error)),
            });
        }
    };
    let opened = Device::open(Elsewhere(running.size())).await;
    let view = match opened {
        Ok(view) => view,
        // A disk that cannot be written always opens.
        Err(error) => {
            let _ = record.remove();
            return Err(NotHandedOver::PassedOver(error.to_string()));
        }
    };
    let seen = view.geometry();
    let published = publish(view, seen, (record, lock), Via::Nbd, running, Vec::new()).await;
    published.map_err(NotHandedOver::Failed)
}

/// Stands for a disk that is not in this process, which nobody asks here for anything.
struct Elsewhere(u64);

impl Engine for Elsewhere {
    fn geometry(&self) -> Geometry {
        Geometry::read_only(self.0)
    }
    async fn read(&self, _: &mut ReadBuf<'_>, _: u64) -> crate::Result {
        Err(ErrorKind::Unsupported.into())
    }
}

/// Puts a device on record that is there, and was made for what `seen` says.
async fn publish<E: Engine>(
    view: Device<E>,
    seen: Geometry,
    (mut record, lock): (Record, File),
    via: Via,
    mut running: Box<dyn Running>,
    passed_over: Vec<PassedOver>,
) -> Result<Attached<E>, AttachError> {
    record.via = via;
    record.device = Some(running.path().to_owned());
    record.size = running.size();
    let remains = running.remains().into_iter();
    record.remains = remains
        .map(|(key, value)| (key.to_owned(), value))
        .collect();
    let listener = match record.save().and_then(|()| listen(&record)) {
        Ok(listener) => listener,
        Err(error) => {
            let path = record.socket();
            match way::detach(&mut *running).await {
                Ok(()) => drop(record.remove()),
                // It goes all the same with what serves it. The record, as far as there is one, tells of what stays.
                Err(Undone::Refused(error) | Undone::Ended(error)) => {
                    tracing::warn!(%error, "detaching");
                }
            }
            return Err(AttachError::Record { path, error });
        }
    };
    adopt(&record);
    Ok(Attached {
        view,
        seen,
        record,
        lock,
        running,
        listener,
        passed_over,
    })
}

/// Removes the record of a dead process about the device that is ours now.
fn adopt(own: &Record) {
    for other in Record::all().unwrap_or_default() {
        if other.id != own.id && other.device == own.device && !other.is_alive() {
            let _ = other.remove();
        }
    }
}

fn listen(record: &Record) -> io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    let path = record.socket();
    // Left by a process that had the same number.
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

struct Attached<E> {
    view: Device<E>,
    /// As the disk was before the device was made: what changed since then is still to be followed.
    seen: Geometry,
    record: Record,
    /// Kept until the end: see [`Record::is_alive`].
    lock: File,
    running: Box<dyn Running>,
    listener: UnixListener,
    passed_over: Vec<PassedOver>,
}

enum Gone {
    Detached(Result<(), DetachError>),
    Ended(String),
}

impl<E: Engine> Attached<E> {
    /// Serves until the device is gone.
    async fn serve(
        &mut self,
        mut orders: mpsc::UnboundedReceiver<Order>,
        status: &watch::Sender<Status>,
    ) -> (Option<Asked>, Gone) {
        let mut is_dropped = false;
        loop {
            enum Event {
                Order(Option<Order>),
                Changed(Geometry),
                Ended(String),
                Visitor(io::Result<UnixStream>),
                Look,
            }
            let event = tokio::select! {
                order = orders.recv(), if !is_dropped => Event::Order(order),
                geometry = self.view.changed(self.seen) => Event::Changed(geometry),
                why = self.running.ended() => Event::Ended(why),
                visitor = self.listener.accept() => Event::Visitor(visitor.map(|(visitor, _)| visitor)),
                () = tokio::time::sleep(LOOK_AGAIN), if is_dropped => Event::Look,
            };
            match event {
                Event::Order(Some(Order::Detach(asked))) => match self.detach().await {
                    Err(Undone::Refused(error)) => {
                        let _ = asked.send(Err(self.refusal(error).await));
                    }
                    result => {
                        let gone = Gone::Detached(self.ended_so(result));
                        return (Some(Asked::Handle(asked)), gone);
                    }
                },
                Event::Order(None) => is_dropped = true,
                Event::Look => match self.detach().await {
                    Err(Undone::Refused(_)) => {}
                    result => {
                        let result = self.ended_so(result);
                        if let Err(error) = &result {
                            tracing::error!(%error, "detaching a device whose handle was dropped");
                        }
                        return (None, Gone::Detached(result));
                    }
                },
                Event::Changed(geometry) => {
                    self.seen = geometry;
                    if let Err(error) = self.running.resize(geometry.size).await {
                        let (device, to) = (self.running.path().display(), geometry.size);
                        tracing::error!(%device, to, %error, "the device cannot follow the disk's size");
                    }
                    self.record.size = self.running.size();
                    let _ = self.record.save();
                    status.send_modify(|status| status.size = self.running.size());
                }
                Event::Ended(why) => return (None, Gone::Ended(why)),
                Event::Visitor(Ok(visitor)) => {
                    if let Some((asked, result)) = self.receive(visitor).await {
                        return (asked, Gone::Detached(result));
                    }
                }
                Event::Visitor(Err(error)) => {
                    tracing::debug!(%error, "accept");
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
            }
        }
    }

    /// Answers another process; later, if it has asked for the end and that is how it went.
    async fn receive(
        &mut self,
        mut visitor: UnixStream,
    ) -> Option<(Option<Asked>, Result<(), DetachError>)> {
        let mut order = [0; 16];
        let read = tokio::time::timeout(PATIENCE, visitor.read(&mut order)).await;
        let Ok(Ok(len)) = read else {
            return None;
        };
        match &order[..len] {
            b"counters\n" => {
                let counting = tokio::time::timeout(PATIENCE / 2, count_data(&self.view));
                let data = counting.await.ok().flatten();
                let text = Counters::text(&self.view.stats(), data);
                let sending = visitor.write_all(text.as_bytes());
                let _ = tokio::time::timeout(PATIENCE, sending).await;
                None
            }
            b"detach\n" => {
                match self.detach().await {
                    Err(Undone::Refused(error)) => {
                        let text = match error.kind() {
                            // Whoever asked can tell who uses it.
                            io::ErrorKind::ResourceBusy => list::IN_USE.to_owned(),
                            _ => answer(&Err(self.refusal(error).await)),
                        };
                        let sending = visitor.write_all(text.as_bytes());
                        let _ = tokio::time::timeout(PATIENCE, sending).await;
                        None
                    }
                    result => {
                        // The runtime ends before the answer is known.
                        let visitor = visitor.into_std().ok().map(Asked::Visitor);
                        Some((visitor, self.ended_so(result)))
                    }
                }
            }
            _ => None,
        }
    }

    /// Takes the device away, unless it is in use or that cannot be told.
    async fn detach(&mut self) -> Result<(), Undone> {
        way::detach(&mut *self.running).await
    }

    /// What to tell of a device that goes on.
    async fn refusal(&self, error: io::Error) -> DetachError {
        let path = self.running.path().to_owned();
        if error.kind() != io::ErrorKind::ResourceBusy {
            return DetachError::Refused { path, error };
        }
        let of = path.clone();
        let holders = blocking(move || holders_besides(&of, Some(std::process::id()))).await;
        DetachError::InUse {
            path,
            holders: holders.unwrap_or_default(),
        }
    }

    /// What to tell of a device that has ended.
    fn ended_so(&self, result: Result<(), Undone>) -> Result<(), DetachError> {
        let path = self.running.path().to_owned();
        result.map_err(|undone| match undone {
            Undone::Refused(error) | Undone::Ended(error) => DetachError::Kernel { path, error },
        })
    }
}

/// How many bytes are data. `None` if the disk cannot tell, or it takes too long.
async fn count_data<E: Engine>(device: &Device<E>) -> Option<u64> {
    let geometry = device.geometry();
    if !geometry.features.contains(Features::EXTENTS) {
        return None;
    }
    let (mut at, mut data, mut left) = (0, 0, MOST_STRETCHES);
    while at < geometry.size {
        let mut extents = Extents::new(left.min(1024));
        device.extents(at..geometry.size, &mut extents).await.ok()?;
        let covered = extents.covered();
        let is_data = |kind| kind == ExtentKind::Data;
        data += extents
            .iter()
            .filter(|e| is_data(e.kind))
            .map(|e| e.len)
            .sum::<u64>();
        left = left.saturating_sub(extents.iter().count());
        if covered == 0 || left == 0 {
            return None;
        }
        at += covered;
        tokio::task::yield_now().await;
    }
    Some(data)
}
