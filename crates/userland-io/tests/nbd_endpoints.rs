//! Where an NBD server listens, and whom it lets in.

#![cfg(all(feature = "nbd", unix))]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpStream;
use userland_io::Device;
use userland_io::transports::nbd::{Address, Limits, Server, Uri};
#[path = "common/endpoints.rs"]
mod endpoints;
use endpoints::{Counting, bind, gone, greets, refusal, server, serves, unix};

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
    let guard = tracing::subscriber::set_default(subscriber.finish());
    // Or what another thread, which has no subscriber, came by first stays silent at times.
    tracing::callsite::rebuild_interest_cache();
    (bytes, guard)
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
