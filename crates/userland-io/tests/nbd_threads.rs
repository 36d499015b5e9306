//! Connections that work side by side are served by threads of their own, and nobody can tell but by the speed.

#![cfg(all(feature = "nbd", target_os = "linux"))]

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;
use userland_io::transports::nbd::wire::{
    ClientFlags, CommandFlags, ExportInfo, Greeting, OptionHeader, Request, SimpleReply, cmd, opt,
};
use userland_io::transports::nbd::{Limits, Server, ServerHandle};
use userland_io::{Device, ReadBuf};

#[path = "common/nbd_peer.rs"]
mod nbd_peer;
use nbd_peer::{MIB, Rig};

const BLOCK: usize = 4096;
/// What is waited for comes in milliseconds, or after the second that an idle thread has.
const SOON: Duration = Duration::from_secs(60);

/// Threads are counted by their name, so one test at a time has any.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn threads() -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let name =
        |task: io::Result<fs::DirEntry>| fs::read_to_string(task.ok()?.path().join("comm")).ok();
    tasks
        .filter_map(name)
        .filter(|name| name == "ulio-nbd\n")
        .count()
}

/// Asserts that no thread is left. One that has been waited for is listed until the kernel has taken it apart.
fn none_are_left() {
    let start = Instant::now();
    while threads() > 0 && start.elapsed() < Duration::from_millis(500) {
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(threads(), 0);
}

/// The events of this process: a thread has one.
fn events() -> usize {
    let files = fs::read_dir("/proc/self/fd").unwrap();
    let target = |file: io::Result<fs::DirEntry>| fs::read_link(file.ok()?.path()).ok();
    let is_event = |target: &std::path::PathBuf| target.ends_with("anon_inode:[eventfd]");
    files.filter_map(target).filter(is_event).count()
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < SOON, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A client that waits for each reply.
struct Client(UnixStream);

impl Client {
    fn connect(path: &Path) -> Client {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.read_exact(&mut [0; Greeting::LEN]).unwrap();
        let flags = ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES;
        let header = OptionHeader {
            option: opt::EXPORT_NAME,
            length: 0,
        };
        stream.write_all(&flags.bits().to_be_bytes()).unwrap();
        stream.write_all(&header.encode()).unwrap();
        stream.read_exact(&mut [0; ExportInfo::LEN]).unwrap();
        Client(stream)
    }

    fn ask(
        &mut self,
        command: u16,
        offset: u64,
        payload: &[u8],
        answer: &mut [u8],
    ) -> io::Result<()> {
        let request = Request {
            flags: CommandFlags::empty(),
            command,
            cookie: offset,
            offset,
            length: payload.len().max(answer.len()) as u64,
        };
        self.0
            .write_all(&[&request.encode_compact(), payload].concat())?;
        let mut reply = [0; SimpleReply::LEN];
        self.0.read_exact(&mut reply)?;
        let reply = SimpleReply::decode(&reply).unwrap();
        assert_eq!((reply.error, reply.cookie), (0, offset));
        self.0.read_exact(answer)
    }

    fn write(&mut self, offset: u64, byte: u8) -> io::Result<()> {
        self.ask(cmd::WRITE, offset, &[byte; BLOCK], &mut [])
    }

    fn read(&mut self, offset: u64) -> io::Result<u8> {
        let mut block = [0; BLOCK];
        self.ask(cmd::READ, offset, &[], &mut block)?;
        assert!(block.iter().all(|&byte| byte == block[0]), "torn");
        Ok(block[0])
    }
}

/// A server of one disk, with clients that work on parts of their own until they are told to stop.
struct Stand {
    runtime: tokio::runtime::Runtime,
    server: Option<ServerHandle>,
    rig: Rig,
    directory: tempfile::TempDir,
    is_over: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
}

/// A client that has ended: the last byte that was acknowledged, the error that ended it.
type Ended = thread::JoinHandle<(Client, u8, Option<io::Error>)>;

impl Stand {
    fn new(limits: Limits) -> Stand {
        let builder = &mut tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(2).enable_all().build().unwrap();
        let rig = Rig::new(MIB as u64);
        let directory = tempfile::tempdir().unwrap();
        let address = format!("unix:{}", directory.path().join("s").display());
        let server = runtime.block_on(async {
            let disk = Device::open(rig.clone()).await.unwrap();
            let server = Server::new().export("", disk).limits(limits);
            server.bind([address]).await.unwrap()
        });
        Stand {
            runtime,
            server: Some(server),
            rig,
            directory,
            is_over: Arc::default(),
            done: Arc::default(),
        }
    }

    fn connect(&self) -> Client {
        Client::connect(&self.directory.path().join("s"))
    }

    /// Lets `client` write and read back `number`'s block.
    fn work(&self, mut client: Client, number: u64) -> Ended {
        let (is_over, done) = (self.is_over.clone(), self.done.clone());
        thread::spawn(move || {
            let (offset, mut acknowledged) = (number * BLOCK as u64, 0);
            while !is_over.load(SeqCst) {
                let next = acknowledged % 250 + 1;
                if let Err(error) = client.write(offset, next) {
                    return (client, acknowledged, Some(error));
                }
                acknowledged = next;
                match client.read(offset) {
                    Ok(byte) => assert_eq!(byte, acknowledged),
                    Err(error) => return (client, acknowledged, Some(error)),
                }
                done.fetch_add(1, SeqCst);
            }
            (client, acknowledged, None)
        })
    }

    fn start(&self, count: u64) -> Vec<Ended> {
        let clients: Vec<_> = (0..count).map(|_| self.connect()).collect();
        let numbered = clients.into_iter().zip(0..);
        numbered.map(|(client, n)| self.work(client, n)).collect()
    }

    fn shutdown(&mut self) -> userland_io::Result {
        let server = self.server.take().unwrap();
        self.runtime.block_on(server.shutdown())
    }
}

fn stop(stand: &Stand, ended: Vec<Ended>) -> Vec<Client> {
    stand.is_over.store(true, SeqCst);
    let clients = ended.into_iter().map(|ended| {
        let (client, _, error) = ended.join().unwrap();
        assert!(error.is_none(), "{error:?}");
        client
    });
    let clients = clients.collect();
    stand.is_over.store(false, SeqCst);
    clients
}

#[test]
fn who_works_beside_others_has_a_thread_until_it_rests() {
    let _alone = alone();
    let mut stand = Stand::new(Limits::default());
    let before = events();
    let ended = stand.start(4);
    until("four threads", || threads() == 4);
    assert_eq!(events(), before + 4);
    // What is done by others, here a timer of the runtime, wakes a thread.
    *stand.rig.delay.lock().unwrap() = Duration::from_micros(100);
    let done = stand.done.load(SeqCst);
    until("answers", || stand.done.load(SeqCst) >= done + 400);
    assert_eq!(threads(), 4);
    *stand.rig.delay.lock().unwrap() = Duration::ZERO;
    let mut clients = stop(&stand, ended);
    until("threads given back", || threads() == 0);
    for (client, number) in clients.iter_mut().zip(0..) {
        client.write(number * BLOCK as u64, 251).unwrap();
        assert_eq!(client.read(number * BLOCK as u64).unwrap(), 251);
    }
    assert_eq!(threads(), 0);
    // And once more, with the events of the first time.
    let again: Vec<_> = clients
        .into_iter()
        .zip(0..)
        .map(|(client, n)| stand.work(client, n))
        .collect();
    until("four threads again", || threads() == 4);
    assert_eq!(events(), before + 4);
    let clients = stop(&stand, again);
    // A client that leaves takes its thread with it.
    drop(clients);
    until("threads gone", || threads() == 0);
    stand.shutdown().unwrap();
}

#[test]
fn one_that_works_alone_soon_has_none() {
    let _alone = alone();
    let mut stand = Stand::new(Limits::default());
    let mut idle = stand.connect();
    assert_eq!(threads(), 0);
    let ended = stand.start(1);
    // The other one is there, but does nothing.
    until("work", || stand.done.load(SeqCst) >= 1000);
    until("no thread", || threads() == 0);
    let before = stand.done.load(SeqCst);
    until("much work", || {
        assert_eq!(threads(), 0);
        stand.done.load(SeqCst) >= before + 10_000
    });
    idle.read(0).unwrap();
    stop(&stand, ended);
    stand.shutdown().unwrap();
}

#[test]
fn the_first_of_several_has_one_as_soon_as_it_works() {
    let _alone = alone();
    let mut stand = Stand::new(Limits::default());
    let mut first = stand.connect();
    first.read(0).unwrap();
    // It rests before there is another one.
    thread::sleep(Duration::from_millis(500));
    let _second = stand.connect();
    until("the second one's thread", || threads() == 1);
    until("given back, since it does nothing", || threads() == 0);
    first.read(0).unwrap();
    until("the first one's thread", || threads() == 1);
    // Only once: it is alone.
    until("given back", || threads() == 0);
    for _ in 0..100 {
        first.read(0).unwrap();
    }
    assert_eq!(threads(), 0);
    stand.shutdown().unwrap();
}

#[test]
fn a_server_that_ends_takes_back_all_threads_and_loses_nothing() {
    let _alone = alone();
    let mut stand = Stand::new(Limits::default());
    let ended = stand.start(4);
    until("four threads", || threads() == 4);
    stand.shutdown().unwrap();
    none_are_left();
    for (ended, number) in ended.into_iter().zip(0..) {
        let (_, acknowledged, error) = ended.join().unwrap();
        assert!(error.is_some(), "the server has gone");
        let mut block = [0; BLOCK];
        let read = async {
            let disk = Device::open(stand.rig.clone()).await?;
            let mut buf = ReadBuf::new(&mut block);
            disk.read(&mut buf, number * BLOCK as u64).await
        };
        stand.runtime.block_on(read).unwrap();
        // The next write may have been done without an answer.
        let next = acknowledged % 250 + 1;
        assert!(
            block[0] == acknowledged || block[0] == next,
            "{} {acknowledged}",
            block[0]
        );
    }
}

#[test]
fn a_request_that_never_ends_does_not_keep_its_thread() {
    let _alone = alone();
    let mut limits = Limits::default();
    limits.shutdown_grace = Duration::from_millis(50);
    let mut stand = Stand::new(limits);
    let ended = stand.start(4);
    until("four threads", || threads() == 4);
    let gate = Arc::new(Semaphore::new(0));
    *stand.rig.gate.lock().unwrap() = Some(gate.clone());
    until("all wait", || stand.rig.in_flight.load(SeqCst) == 4);
    assert_eq!(threads(), 4);
    stand.shutdown().unwrap();
    none_are_left();
    for ended in ended {
        assert!(ended.join().unwrap().2.is_some());
    }
    // Nobody waits any more for what the gate lets through.
    gate.add_permits(1);
    assert_eq!(gate.available_permits(), 1);
}

#[test]
fn a_client_that_never_pauses_does_not_keep_its_thread_either() {
    let _alone = alone();
    let mut limits = Limits::default();
    limits.shutdown_grace = Duration::from_millis(50);
    let mut stand = Stand::new(limits);
    let _other = stand.connect();
    let client = stand.connect();
    let mut replies = client.0.try_clone().unwrap();
    let flood = thread::spawn(move || {
        let mut stream = client.0;
        let request = Request {
            flags: CommandFlags::empty(),
            command: cmd::FLUSH,
            cookie: 0,
            offset: 0,
            length: 0,
        };
        // More than one receive takes, so that there is always more.
        let many = request.encode_compact().repeat(20_000);
        while stream.write_all(&many).is_ok() {}
    });
    let taken = Arc::new(AtomicUsize::new(0));
    let count = taken.clone();
    let drain = thread::spawn(move || {
        let mut bytes = vec![0; MIB];
        while let Ok(came @ 1..) = replies.read(&mut bytes) {
            count.fetch_add(came, SeqCst);
        }
    });
    until("replies", || taken.load(SeqCst) > 16 * 100_000);
    stand.shutdown().unwrap();
    none_are_left();
    flood.join().unwrap();
    drain.join().unwrap();
}
