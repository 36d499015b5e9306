//! What an NBD server has of its process: sockets that a service manager passes, and a number of descriptors.
//!
//! The server runs in a child: this program again, with one ignored test.

#![cfg(all(feature = "nbd", target_os = "linux"))]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use userland_io::transports::nbd::{Address, Uri};
#[path = "common/endpoints.rs"]
mod endpoints;
use endpoints::{bind, greets, refusal, serves};

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
    command.arg(test);
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
