//! The task that keeps a client connected.
//!
//! A session is all connections of a client at one time. It ends as a whole: when
//! one connection is lost, nothing new is sent on the others, their last replies
//! are awaited, and all are made anew. Then, in this order: size, flags and
//! contexts are compared with what they were; the journal is written to the
//! server again; and only then what was on its way is sent again, and what came
//! meanwhile.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::connection::Conn;
use super::export::Export;
use super::handshake::{Negotiated, Wanted};
use super::op::{Answer, Kind, Op, Origin, Wait};
use super::shared::{Phase, Shared};
use super::{ConnectError, dial, replies};
use crate::errno;
use crate::transports::nbd::Uri;
use crate::transports::nbd::socket::Stream;
use crate::transports::nbd::wire::TransmissionFlags;

const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// How long a server may take to hang up after goodbye.
const GOODBYE: Duration = Duration::from_secs(2);
/// How long the last replies are awaited when a client was dropped rather than closed.
const LAST_REPLIES: Duration = Duration::from_secs(5);
/// Mutations restored at a time.
const REPLAYS: usize = 64;

/// What it takes to connect, the first time and again.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) uri: Uri,
    pub(super) all_contexts: bool,
    /// Simple replies, whatever the server has.
    pub(super) simple: bool,
    pub(super) connections: usize,
    /// For a handshake.
    pub(super) timeout: Duration,
    /// How long requests wait for a lost server.
    pub(super) reconnect: Duration,
    /// Bytes.
    pub(super) journal: u64,
}

impl Plan {
    /// As many connections as are wanted, possible and sensible; at least one.
    pub(super) async fn connect(
        &self,
    ) -> Result<(Export, Vec<(Stream, Negotiated)>), ConnectError> {
        let wanted = Wanted {
            export: self.uri.export(),
            all_contexts: self.all_contexts,
            simple: self.simple,
        };
        let dial = || dial::dial(self.uri.address(), wanted, self.timeout);
        let first = dial().await?;
        let export = Export::new(&first.1, self.journal)?;
        let mut all = vec![first];
        // Without this flag a flush on one connection says nothing about the others.
        let several = export.has(TransmissionFlags::CAN_MULTI_CONN);
        while several && all.len() < self.connections {
            let problem = match dial().await {
                Ok(next) => match export.difference(&Export::new(&next.1, self.journal)?) {
                    None => {
                        all.push(next);
                        continue;
                    }
                    Some(difference) => difference,
                },
                Err(error) => error.to_string(),
            };
            tracing::warn!(
                "{}: going on with {} of {} connections: {problem}",
                self.uri,
                all.len(),
                self.connections
            );
            break;
        }
        Ok((export, all))
    }
}

/// Connections, and the tasks that serve them.
pub(super) struct Session {
    conns: Vec<Arc<Conn>>,
    /// They end with the session.
    tasks: JoinSet<()>,
}

impl Session {
    pub(super) fn start(shared: &Arc<Shared>, streams: Vec<(Stream, Negotiated)>) -> Self {
        let mut tasks = JoinSet::new();
        let conns = streams
            .into_iter()
            .map(|(stream, negotiated)| {
                let id = |name: &String| {
                    let found = negotiated.contexts.iter().find(|c| c.0 == *name);
                    found.map_or(u32::MAX, |c| c.1)
                };
                let ids = shared.export.contexts.iter().map(id).collect();
                let conn = Arc::new(Conn::new(negotiated.mode, ids));
                match stream {
                    Stream::Tcp(stream) => {
                        let (read, write) = stream.into_split();
                        serve(&mut tasks, shared, &conn, read, write);
                    }
                    #[cfg(unix)]
                    Stream::Unix(stream) => {
                        let (read, write) = stream.into_split();
                        serve(&mut tasks, shared, &conn, read, write);
                    }
                    #[cfg(target_os = "linux")]
                    Stream::Movable(stream) => {
                        let (read, write) = tokio::io::split(stream);
                        serve(&mut tasks, shared, &conn, read, write);
                    }
                    Stream::Memory(stream) => {
                        let (read, write) = tokio::io::split(stream);
                        serve(&mut tasks, shared, &conn, read, write);
                    }
                }
                conn
            })
            .collect();
        Session { conns, tasks }
    }

    pub(super) fn conns(&self) -> Vec<Arc<Conn>> {
        self.conns.clone()
    }

    /// Waits for the last replies, says goodbye and hangs up.
    async fn finish(mut self, shared: &Shared) {
        for conn in &self.conns {
            conn.start_draining();
        }
        while !self.conns.iter().all(|conn| conn.is_drained()) {
            shared.event.notified().await;
        }
        for conn in &self.conns {
            conn.say_goodbye();
        }
        let goodbye = async { while self.tasks.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(GOODBYE, goodbye).await;
    }
}

fn serve(
    tasks: &mut JoinSet<()>,
    shared: &Arc<Shared>,
    conn: &Arc<Conn>,
    read: impl AsyncRead + Unpin + Send + 'static,
    write: impl AsyncWrite + Unpin + Send + 'static,
) {
    let (shared_too, conn_too) = (shared.clone(), conn.clone());
    tasks.spawn(async move {
        let loss = replies::receive(&shared_too, &conn_too, read).await;
        shared_too.lost(&conn_too, &loss);
    });
    let (shared, conn) = (shared.clone(), conn.clone());
    tasks.spawn(async move {
        if let Err(loss) = conn.send(write).await {
            shared.lost(&conn, &loss);
        }
    });
}

/// Runs until the client is closed or has failed for good.
pub(super) async fn supervise(shared: Arc<Shared>, plan: Plan, first: Session) {
    let _last = Last(shared.clone());
    let mut session = Some(first);
    let mut pause = Pause::default();
    loop {
        shared.event.notified().await;
        if shared.is_closing() {
            break;
        }
        if let Phase::Failed(_) = shared.phase() {
            break;
        }
        if shared.is_giving_up()
            && let Some(old) = session.take()
        {
            // What is on its way would act at any time, were its replies not waited for.
            let _ = tokio::time::timeout(LAST_REPLIES, old.finish(&shared)).await;
        }
        let Some(why) = shared.trouble() else {
            continue;
        };
        let Some(old) = session.take() else {
            break;
        };
        if old.conns.iter().any(|conn| conn.has_answered()) {
            pause = Pause::default();
        }
        let again = reconnect(&shared, &plan, old, &mut pause);
        session = patiently(&shared, &plan, &why, again).await;
        if session.is_none() || shared.is_closing() {
            break;
        }
    }
    if let Some(session) = session
        && !matches!(shared.phase(), Phase::Failed(_))
    {
        let _ = tokio::time::timeout(LAST_REPLIES, session.finish(&shared)).await;
    }
}

/// Ends all requests with the supervisor, also where its runtime is shut down under it.
struct Last(Arc<Shared>);

impl Drop for Last {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// `None` once the client is being closed.
async fn unless_closing<T>(shared: &Shared, work: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        () = shared.closing() => None,
        done = work => Some(done),
    }
}

/// Lets requests fail once `work` has taken too long, and goes on with it.
async fn patiently<T>(shared: &Shared, plan: &Plan, why: &str, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    tokio::select! {
        biased;
        done = &mut work => return done,
        () = tokio::time::sleep(plan.reconnect) => {}
    }
    shared.overdue(why);
    work.await
}

/// A new session in place of `old`; `None` if the client is being closed or has failed for good.
async fn reconnect(
    shared: &Arc<Shared>,
    plan: &Plan,
    old: Session,
    pause: &mut Pause,
) -> Option<Session> {
    unless_closing(shared, old.finish(shared)).await?;
    loop {
        if let Phase::Failed(_) = shared.phase() {
            return None;
        }
        unless_closing(shared, pause.wait()).await?;
        let (export, streams) = match unless_closing(shared, plan.connect()).await? {
            Ok(connected) => connected,
            Err(error) => {
                tracing::debug!("{}: {error}", shared.address);
                continue;
            }
        };
        if let Some(difference) = shared.export.difference(&export) {
            shared.fail(format!(
                "the export is another one since the connection was lost: {difference}"
            ));
            return None;
        }
        let session = Session::start(shared, streams);
        let restored = tokio::select! {
            biased;
            restored = restore(shared, &session) => restored,
            // What is being restored may not act after a close has answered, if the server lets us know.
            () = async {
                shared.closing().await;
                tokio::time::sleep(LAST_REPLIES).await;
            } => return None,
        };
        match restored {
            Ok(()) => {
                tracing::info!("{}: connected again", shared.address);
                shared.up(session.conns());
                return Some(session);
            }
            Err(Restore::Again(why)) => {
                tracing::debug!("{}: {why}", shared.address);
                unless_closing(shared, session.finish(shared)).await?;
            }
            Err(Restore::Never(why)) => {
                shared.fail(why);
                return None;
            }
        }
    }
}

enum Restore {
    Again(String),
    Never(String),
}

/// Writes the journal to the server of a new session.
async fn restore(shared: &Shared, session: &Session) -> Result<(), Restore> {
    let pieces = shared.restorable().map_err(Restore::Never)?;
    let Some(conn) = session.conns.first() else {
        return Err(Restore::Again("no connection".to_owned()));
    };
    let mut waiting: VecDeque<Wait> = VecDeque::new();
    let mut result = Ok(Answer::Done);
    for (range, content) in pieces {
        let mut op = Op::new(content.kind, range);
        op.flags = content.flags;
        op.data = Some(content.data);
        op.origin = Origin::Replay;
        debug_assert!(op.kind != Kind::Write || op.len() == op.payload().len() as u64);
        let op = Arc::new(op);
        if conn.push(op.clone()).is_err() {
            return Err(Restore::Again("the connection was lost again".to_owned()));
        }
        waiting.push_back(Wait(op));
        if waiting.len() >= REPLAYS
            && let Some(oldest) = waiting.pop_front()
        {
            result = result.and(oldest.await);
        }
    }
    for wait in waiting {
        result = result.and(wait.await);
    }
    match result {
        Ok(_) => Ok(()),
        Err(error) if conn.is_dead() || error.errno() == errno::ESHUTDOWN => {
            Err(Restore::Again(error.to_string()))
        }
        Err(error) => Err(Restore::Never(format!(
            "the server does not take again what it may have lost: {error}"
        ))),
    }
}

/// Between attempts: none before the first, then twice as long each time.
#[derive(Default)]
struct Pause(Option<(Duration, Instant)>);

impl Pause {
    async fn wait(&mut self) {
        let next = match self.0 {
            None => FIRST_PAUSE,
            Some((pause, since)) => {
                tokio::time::sleep_until(since + pause).await;
                (pause * 2).min(LONGEST_PAUSE)
            }
        };
        self.0 = Some((next, Instant::now()));
    }
}
