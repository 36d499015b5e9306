//! Where an NBD server listens, whom it lets in, and how it ends.

#![cfg(all(feature = "nbd", unix))]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Semaphore;
use userland_io::transports::nbd::wire::{
    CommandFlags, OptionHeader, OptionReply, Request, SimpleReply, cmd, opt, rep,
};
use userland_io::transports::nbd::{Address, Limits, Server, ServerHandle, Uri};
use userland_io::{CrashLevel, Device, Engine, Geometry, ReadBuf, Result, WriteBuf, WriteFlags};

/// A writable disk that counts how often it is flushed and closed.
#[derive(Clone, Default)]
struct Counting(Arc<[AtomicUsize; 2]>);

impl Counting {
    fn flushes(&self) -> usize {
        self.0[0].load(Ordering::SeqCst)
    }
    fn closes(&self) -> usize {
        self.0[1].load(Ordering::SeqCst)
    }
}

impl Engine for Counting {
    fn geometry(&self) -> Geometry {
        Geometry::writable(1 << 20, CrashLevel::Flush)
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, _: u64) -> Result {
        buf.fill(0);
        Ok(())
    }
    async fn write(&self, _: &WriteBuf<'_>, _: u64, _: WriteFlags) -> Result {
        Ok(())
    }
    async fn flush(&self) -> Result {
        self.0[0].fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    async fn close(&self) -> Result {
        self.0[1].fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// A disk whose reads begin, and end when they are let through.
#[derive(Clone)]
struct Gated {
    counts: Counting,
    begun: Arc<Semaphore>,
    gate: Arc<Semaphore>,
}

impl Gated {
    fn new() -> Self {
        Gated {
            counts: Counting::default(),
            begun: Arc::new(Semaphore::new(0)),
            gate: Arc::new(Semaphore::new(0)),
        }
    }
}

impl Engine for Gated {
    fn geometry(&self) -> Geometry {
        self.counts.geometry()
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, _: u64) -> Result {
        self.begun.add_permits(1);
        self.gate.acquire().await.unwrap().forget();
        buf.fill(7);
        Ok(())
    }
    async fn write(&self, _: &WriteBuf<'_>, _: u64, _: WriteFlags) -> Result {
        Ok(())
    }
    async fn flush(&self) -> Result {
        self.counts.flush().await
    }
}

async fn server() -> Server {
    let disk = Device::open(Counting::default()).await.unwrap();
    Server::new().export("disk", disk)
}

async fn bind(address: &str) -> Result<ServerHandle> {
    server().await.bind([address]).await
}

async fn refusal(address: &str) -> String {
    bind(address).await.expect_err(address).to_string()
}

fn unix(path: &Path) -> String {
    format!("unix:{}", path.display())
}

/// True if a server greets here, and not only accepts.
async fn greets(stream: &mut (impl AsyncRead + Unpin)) -> bool {
    let mut greeting = [0; 18];
    let read = tokio::time::timeout(Duration::from_secs(10), stream.read_exact(&mut greeting));
    matches!(read.await, Ok(Ok(_))) && &greeting[..16] == b"NBDMAGICIHAVEOPT"
}

async fn serves(address: &Address) -> bool {
    match address {
        Address::Tcp { host, port } => {
            let stream = TcpStream::connect((host.as_str(), *port)).await;
            match stream {
                Ok(mut stream) => greets(&mut stream).await,
                Err(_) => false,
            }
        }
        Address::Unix(path) => match UnixStream::connect(path).await {
            Ok(mut stream) => greets(&mut stream).await,
            Err(_) => false,
        },
        _ => false,
    }
}

async fn until_closed(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut bytes));
    let _ = read.await.expect("the connection should have been closed");
}

#[tokio::test]
async fn without_a_host_both_loopbacks_listen_on_one_port() {
    let server = bind("nbd://:0").await.unwrap();
    let addresses = server.addresses().to_vec();
    let has_v6 = std::net::TcpListener::bind("[::1]:0").is_ok();
    assert_eq!(addresses.len(), if has_v6 { 2 } else { 1 });
    let mut ports = Vec::new();
    for (address, expected) in addresses.iter().zip(["127.0.0.1", "::1"]) {
        let Address::Tcp { host, port } = address else {
            panic!("{address:?}");
        };
        assert_eq!(host, expected);
        ports.push(*port);
        assert!(serves(address).await);
    }
    ports.dedup();
    assert_eq!(ports.len(), 1);
    assert_ne!(ports[0], 0);
    server.shutdown().await.unwrap();
}

#[tokio::test]
async fn every_form_of_a_tcp_address_is_bound() {
    for (text, uri) in [
        ("127.0.0.1:0", "nbd://127.0.0.1:"),
        ("nbd://127.0.0.1:0/", "nbd://127.0.0.1:"),
        ("[::1]:0", "nbd://[::1]:"),
        ("nbd://[::1]:0", "nbd://[::1]:"),
    ] {
        if text.contains("::1") && std::net::TcpListener::bind("[::1]:0").is_err() {
            continue;
        }
        let server = bind(text).await.unwrap();
        let printed = server.uri("disk").to_string();
        assert!(
            printed.starts_with(uri) && printed.ends_with("/disk"),
            "{printed}"
        );
        let parsed: Uri = printed.parse().unwrap();
        assert!(serves(parsed.address()).await);
        server.shutdown().await.unwrap();
    }
}

#[tokio::test]
async fn several_addresses_serve_every_export() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let disk = Device::open(Counting::default()).await.unwrap();
    let server = Server::new()
        .export("a b", disk.clone())
        .export("c", disk.read_only())
        .bind(["127.0.0.1:0", "127.0.0.1:0", &unix(&path)])
        .await
        .unwrap();
    let uris = server.uris();
    assert_eq!(uris.len(), 6);
    assert_eq!(
        uris[2].to_string(),
        format!("nbd+unix:///a%20b?socket={}", path.display())
    );
    for uri in &uris {
        assert!(serves(uri.address()).await, "{uri}");
    }
    server.shutdown().await.unwrap();
    for uri in &uris {
        assert!(!serves(uri.address()).await, "{uri}");
    }
}

#[tokio::test]
async fn what_cannot_be_bound_is_said_with_what_to_do() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let held = std::net::TcpListener::bind(&taken);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "not a socket").unwrap();
    let missing = directory.path().join("missing/s");
    let long = directory.path().join("x".repeat(108));
    let mut cases = vec![
        ("nbds://localhost".to_owned(), "TLS is not supported"),
        ("nbd://localhost/disk".into(), "write nbd://localhost/"),
        ("nowhere".into(), "the port is missing"),
        (
            "192.0.2.1:0".into(),
            "no interface of this machine has this address",
        ),
        (
            "nbd://no.such.host.invalid".into(),
            "cannot listen on no.such.host.invalid",
        ),
        (unix(&file), "exists and is no socket"),
        (unix(&missing), "the directory does not exist"),
        (unix(&long), "is at most 10"),
        ("systemd:".into(), "no sockets were passed to this process"),
    ];
    if held.is_ok() {
        cases.push((taken, "another program uses it"));
    }
    for (address, expected) in cases {
        let error = refusal(&address).await;
        assert!(error.contains(expected), "{address}: {error}");
    }
    assert_eq!(fs::read(&file).unwrap(), b"not a socket");
}

#[tokio::test]
async fn what_cannot_be_offered_is_said() {
    let disk = || async { Device::open(Counting::default()).await.unwrap() };
    let long = "x".repeat(4097);
    for (server, expected) in [
        (Server::new(), "without an export"),
        (
            Server::new()
                .export("a", disk().await)
                .export("a", disk().await),
            "two exports are named \"a\"",
        ),
        (Server::new().export("a\0", disk().await), "NUL"),
        (
            Server::new().export(long.clone(), disk().await),
            "4097 bytes long",
        ),
        (
            Server::new().export("a", disk().await).description(long),
            "description of export \"a\"",
        ),
        (
            Server::new().export("a", disk().await).default_export("b"),
            "default export \"b\" is not among",
        ),
    ] {
        let error = server.bind(["127.0.0.1:0"]).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let none: [&str; 0] = [];
    let error = server().await.bind(none).await.unwrap_err().to_string();
    assert!(error.contains("without an address"), "{error}");
}

#[tokio::test]
async fn an_address_that_fails_closes_those_before_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let failed = server().await.bind([unix(&path), "nowhere".into()]).await;
    assert!(failed.is_err() && !path.exists());
}

#[tokio::test]
async fn a_unix_socket_is_its_owners_unless_said_otherwise_and_gone_in_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
    let handle = bind(&unix(&path)).await.unwrap();
    assert_eq!(mode(), 0o600);
    assert!(serves(&handle.addresses()[0]).await);
    handle.shutdown().await.unwrap();
    assert!(!path.exists());
    // Whatever the umask is.
    let handle = server()
        .await
        .socket_mode(0o666)
        .bind([unix(&path)])
        .await
        .unwrap();
    assert_eq!(mode(), 0o666);
    drop(handle);
    gone(&path).await;
}

/// What is dropped ends soon, but on a task of its own.
async fn gone(path: &Path) {
    let waiting = async {
        while path.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(10), waiting).await;
    assert!(waited.is_ok(), "{} is still there", path.display());
}

#[tokio::test]
async fn a_stale_socket_is_replaced_and_a_live_one_is_in_use() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let first = bind(&unix(&path)).await.unwrap();
    let error = refusal(&unix(&path)).await;
    assert!(
        error.contains("in use by a program that is running"),
        "{error}"
    );
    assert!(serves(&first.addresses()[0]).await);
    first.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_live_socket_of_another_kind_is_not_touched() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let datagrams = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    assert!(refusal(&unix(&path)).await.contains("in use"));
    assert!(path.exists());
    drop(datagrams);
}

#[test]
fn of_servers_that_race_for_a_stale_socket_one_wins() {
    const RACERS: usize = 8;
    for _ in 0..50 {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let address = unix(&path);
        let line = std::sync::Barrier::new(RACERS);
        let race = || {
            let runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = { runtime }.enable_all().build().unwrap();
            line.wait();
            let bound = runtime.block_on(bind(&address));
            // Whoever has won stays until all have tried.
            line.wait();
            bound.is_ok()
        };
        let winners = std::thread::scope(|scope| {
            let racers: Vec<_> = (0..RACERS).map(|_| scope.spawn(race)).collect();
            let won = racers.into_iter().map(|racer| racer.join().unwrap());
            won.filter(|won| *won).count()
        });
        assert_eq!(winners, 1);
    }
}

#[tokio::test]
async fn a_path_that_somebody_has_taken_over_is_not_removed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let server = bind(&unix(&path)).await.unwrap();
    fs::remove_file(&path).unwrap();
    let other = std::os::unix::net::UnixListener::bind(&path).unwrap();
    server.shutdown().await.unwrap();
    assert!(path.exists());
    drop(other);
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_name_in_the_abstract_namespace_is_served() {
    let name = format!(
        "nbd+unix:///?socket=%00userland-io-test-{}",
        std::process::id()
    );
    let server = bind(&name).await.unwrap();
    assert_eq!(server.uri("").to_string(), name);
    assert!(serves(&server.addresses()[0]).await);
    server.shutdown().await.unwrap();
}

#[tokio::test]
async fn connections_beyond_the_cap_are_closed_and_room_is_given_back() {
    let mut limits = Limits::default();
    limits.max_connections = 2;
    let server = server()
        .await
        .limits(limits)
        .bind(["127.0.0.1:0"])
        .await
        .unwrap();
    let Address::Tcp { port, .. } = server.addresses()[0] else {
        panic!("not TCP");
    };
    let connect = || async { TcpStream::connect(("127.0.0.1", port)).await.unwrap() };
    let (mut first, mut second) = (connect().await, connect().await);
    assert!(greets(&mut first).await && greets(&mut second).await);
    let mut third = connect().await;
    assert!(!greets(&mut third).await);
    drop(first);
    let again = async {
        while !greets(&mut connect().await).await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), again)
        .await
        .unwrap();
    server.shutdown().await.unwrap();
}

#[tokio::test]
async fn shutdown_flushes_and_gives_the_device_back_open() {
    let engine = Counting::default();
    let disk = Device::open(engine.clone()).await.unwrap();
    let opened = engine.flushes();
    let server = Server::new()
        .export("disk", disk.clone())
        .bind(["127.0.0.1:0"])
        .await
        .unwrap();
    server.shutdown().await.unwrap();
    assert_eq!((engine.flushes(), engine.closes()), (opened + 1, 0));
    disk.flush().await.unwrap();
    disk.close().await.unwrap();
    assert_eq!(engine.closes(), 1);
}

#[tokio::test]
async fn shutdown_closes_an_engine_of_which_the_server_had_the_last_handle() {
    let engine = Counting::default();
    let disk = Device::open(engine.clone()).await.unwrap();
    let server = Server::new()
        .export("disk", disk)
        .bind(["127.0.0.1:0"])
        .await
        .unwrap();
    server.shutdown().await.unwrap();
    assert_eq!(engine.closes(), 1);
}

#[tokio::test]
async fn a_dropped_handle_ends_the_server_and_cuts_its_connections() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let server = bind(&unix(&path)).await.unwrap();
    let mut stream = UnixStream::connect(&path).await.unwrap();
    assert!(greets(&mut stream).await);
    drop(server);
    until_closed(&mut stream).await;
    gone(&path).await;
}

/// A client in the transmission phase that has sent a read of 512 bytes, which has begun.
async fn reader(path: &Path, disk: &Gated) -> UnixStream {
    let mut stream = UnixStream::connect(path).await.unwrap();
    assert!(greets(&mut stream).await);
    stream.write_all(&[0, 0, 0, 3]).await.unwrap();
    let (option, length) = (opt::GO, 6);
    stream
        .write_all(&OptionHeader { option, length }.encode())
        .await
        .unwrap();
    stream.write_all(&[0; 6]).await.unwrap();
    loop {
        let mut head = [0; OptionReply::LEN];
        stream.read_exact(&mut head).await.unwrap();
        let head = OptionReply::decode(&head).unwrap();
        stream
            .read_exact(&mut vec![0; head.length as usize])
            .await
            .unwrap();
        if head.kind == rep::ACK {
            break;
        }
    }
    let request = Request {
        flags: CommandFlags::empty(),
        command: cmd::READ,
        cookie: 5,
        offset: 0,
        length: 512,
    };
    stream.write_all(&request.encode_compact()).await.unwrap();
    disk.begun.acquire().await.unwrap().forget();
    stream
}

#[tokio::test]
async fn shutdown_closes_the_door_then_waits_for_what_is_in_flight_then_flushes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let engine = Gated::new();
    let disk = Device::open(engine.clone()).await.unwrap();
    let flushes = engine.counts.flushes();
    let server = Server::new()
        .export("disk", disk.clone())
        .bind([unix(&path)])
        .await
        .unwrap();
    let mut client = reader(&path, &engine).await;
    let stopping = tokio::spawn(server.shutdown());
    // The door is closed while the request still runs.
    gone(&path).await;
    assert!(!stopping.is_finished());
    assert_eq!(engine.counts.flushes(), flushes);
    engine.gate.add_permits(1);
    let mut reply = [0; SimpleReply::LEN + 512];
    client.read_exact(&mut reply).await.unwrap();
    let head = SimpleReply::decode(reply.first_chunk().unwrap()).unwrap();
    assert_eq!((head.error, head.cookie), (0, 5));
    assert_eq!(reply[SimpleReply::LEN..], [7; 512]);
    let stopped = tokio::time::timeout(Duration::from_secs(5), stopping).await;
    stopped.unwrap().unwrap().unwrap();
    assert_eq!(engine.counts.flushes(), flushes + 1);
    until_closed(&mut client).await;
}

#[tokio::test]
async fn requests_that_outlast_the_grace_period_are_cut_off() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let engine = Gated::new();
    let disk = Device::open(engine.clone()).await.unwrap();
    let mut limits = Limits::default();
    limits.shutdown_grace = Duration::from_millis(200);
    let server = Server::new().export("disk", disk).limits(limits);
    let server = server.bind([unix(&path)]).await.unwrap();
    let mut client = reader(&path, &engine).await;
    let stopped = tokio::time::timeout(Duration::from_secs(10), server.shutdown()).await;
    stopped.unwrap().unwrap();
    until_closed(&mut client).await;
}

#[tokio::test]
async fn a_dropped_handle_does_not_wait_for_what_is_in_flight() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let engine = Gated::new();
    let disk = Device::open(engine.clone()).await.unwrap();
    let mut limits = Limits::default();
    limits.shutdown_grace = Duration::from_secs(3600);
    let server = Server::new().export("disk", disk).limits(limits);
    let server = server.bind([unix(&path)]).await.unwrap();
    let mut client = reader(&path, &engine).await;
    drop(server);
    until_closed(&mut client).await;
}

/// What is logged on this thread while the guard lives.
fn log() -> (Arc<Mutex<Vec<u8>>>, tracing::subscriber::DefaultGuard) {
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);
    impl std::io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let log = Log::default();
    let bytes = log.0.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_writer(move || log.clone())
        .with_ansi(false);
    (bytes, tracing::subscriber::set_default(subscriber.finish()))
}

#[tokio::test]
async fn off_loopback_and_dropped_servers_are_warned_of() {
    let (log, _guard) = log();
    let taken = || String::from_utf8(std::mem::take(&mut *log.lock().unwrap())).unwrap();
    let server = bind("127.0.0.1:0").await.unwrap();
    assert_eq!(taken(), "");
    server.shutdown().await.unwrap();
    assert_eq!(taken(), "");
    let server = bind("0.0.0.0:0").await.unwrap();
    let text = taken();
    assert!(
        text.contains("WARN") && text.contains("neither encryption nor authentication"),
        "{text}"
    );
    drop(server);
    let text = taken();
    assert!(
        text.contains("WARN") && text.contains("without shutdown()"),
        "{text}"
    );
}

#[tokio::test]
async fn serve_runs_until_it_is_dropped() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let address = unix(&path);
    let serving = tokio::spawn(async move { server().await.serve(&address).await });
    let there = async {
        while !serves(&Address::Unix(path.clone())).await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), there)
        .await
        .unwrap();
    assert!(!serving.is_finished());
    serving.abort();
    gone(&path).await;
}

#[tokio::test]
async fn a_connection_that_is_reset_at_once_does_no_harm() {
    let server = bind("127.0.0.1:0").await.unwrap();
    let Address::Tcp { port, .. } = server.addresses()[0] else {
        panic!("not TCP");
    };
    for _ in 0..100 {
        let stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        // Closing with a linger of zero sends a reset.
        socket2::SockRef::from(&stream)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
    }
    assert!(serves(&server.addresses()[0]).await);
    server.shutdown().await.unwrap();
}

/// Tests of what belongs to a whole process run in a child: this program again, with one ignored test.
#[cfg(target_os = "linux")]
mod in_a_process_of_its_own {
    use super::*;
    use std::io::{BufRead, BufReader, Read};
    use std::net::TcpListener;
    use std::os::fd::OwnedFd;
    use std::process::{Child, Command, Stdio};

    /// Ends with its test, however that ends.
    struct Process(Child);

    impl Drop for Process {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// Runs `test` of this program, by a shell that runs `before` first.
    fn start(test: &str, before: &str, stdin: Stdio) -> Process {
        let script = format!("{before} exec \"$0\" --exact \"$1\" --ignored --nocapture");
        let mut command = Command::new("sh");
        command.args(["-c", &script]);
        command.arg(std::env::current_exe().unwrap());
        command.arg(format!("in_a_process_of_its_own::{test}"));
        command.stdin(stdin).stdout(Stdio::piped());
        Process(command.spawn().unwrap())
    }

    /// The rest of the first line that begins with `key`.
    fn say(process: &mut Process, key: &str) -> String {
        let mut lines = BufReader::new(process.0.stdout.as_mut().unwrap()).lines();
        let line = lines.find_map(|line| Some(line.ok()?.split_once(key)?.1.trim().to_owned()));
        line.expect("the child to say it")
    }

    #[test]
    #[ignore = "the child of sockets_that_a_service_manager_passes_are_served"]
    fn child_with_a_passed_socket() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let error = refusal("systemd:other").await;
            assert!(error.contains("[\"disk\", \"more\"]"), "{error}");
            let server = bind("systemd:disk").await.unwrap();
            // No child of this process sees the sockets, not even the one that nobody has taken.
            let look = "test ! -e /proc/self/fd/3 && test ! -e /proc/self/fd/4";
            assert!(
                Command::new("sh")
                    .args(["-c", look])
                    .status()
                    .unwrap()
                    .success()
            );
            assert!(bind("systemd:disk").await.is_err());
            println!("serving {}", server.uri("disk"));
            std::future::pending().await
        })
    }

    #[tokio::test]
    async fn sockets_that_a_service_manager_passes_are_served() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        let before = "exec 3<&0 4<&0; export LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=disk:more;";
        let stdin = Stdio::from(OwnedFd::from(socket));
        let mut child = start("child_with_a_passed_socket", before, stdin);
        let uri = say(&mut child, "serving ");
        assert_eq!(uri, format!("nbd://127.0.0.1:{port}/disk"));
        let uri: Uri = uri.parse().unwrap();
        assert!(serves(uri.address()).await);
    }

    #[test]
    #[ignore = "the child of a_server_without_descriptors_waits_for_some"]
    fn child_with_few_descriptors() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let server = bind("127.0.0.1:0").await.unwrap();
            println!("serving {}", server.uri("disk"));
            std::future::pending().await
        })
    }

    /// Ticks of processor time, of which there are 100 a second.
    fn ticks(process: &Process) -> u64 {
        let mut text = String::new();
        let path = format!("/proc/{}/stat", process.0.id());
        fs::File::open(path)
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        let fields: Vec<_> = text
            .rsplit(')')
            .next()
            .unwrap()
            .split_whitespace()
            .collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }

    #[tokio::test]
    async fn a_server_without_descriptors_waits_for_some() {
        let mut child = start("child_with_few_descriptors", "ulimit -n 40;", Stdio::null());
        let uri: Uri = say(&mut child, "serving ").parse().unwrap();
        let Address::Tcp { host, port } = uri.address() else {
            panic!("not TCP");
        };
        let mut clients = Vec::new();
        for _ in 0..64 {
            clients.push(TcpStream::connect((host.as_str(), *port)).await.unwrap());
        }
        // The first are served, the last wait.
        assert!(greets(&mut clients[0]).await);
        let mut last = clients.pop().unwrap();
        let before = ticks(&child);
        let waited = tokio::time::timeout(Duration::from_secs(1), greets(&mut last)).await;
        assert!(
            waited.is_err(),
            "40 descriptors are no limit for 64 clients"
        );
        // A second of spinning is 100 ticks.
        assert!(ticks(&child) - before < 30);
        drop(clients);
        assert!(greets(&mut last).await);
        last.write_all(&[0, 0, 0, 1]).await.unwrap();
    }
}
