//! `ulio serve`: real clients, orderly ends, and what stands in the way of a start.
#![cfg(unix)]

mod common;
use common::{Server, Ulio, need, noise};

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::time::Duration;

/// Runs a client, which has to succeed, and gives its stdout.
#[track_caller]
fn client(ulio: &Ulio, program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(ulio.dir())
        .output()
        .unwrap();
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {out}{err}"
    );
    out.into_owned()
}

fn tools() -> bool {
    ["nbdinfo", "nbdcopy"]
        .iter()
        .all(|name| need::program(name).is_some())
}

#[test]
fn a_disk_goes_in_and_out_by_tcp_and_unix() {
    if !tools() {
        return;
    }
    let ulio = Ulio::new();
    let image = noise(5_000_001, 1);
    ulio.write("in.img", &image);
    let server = Server::start(
        &ulio,
        "serve memory:5000001 --listen nbd://127.0.0.1:0 --listen unix:s",
        2,
    );
    let [tcp, unix] = &server.uris[..] else {
        panic!("{:?}", server.uris)
    };
    assert!(tcp.starts_with("nbd://127.0.0.1:"), "{tcp}");
    assert!(unix.starts_with("nbd+unix:///?socket="), "{unix}");
    for (uri, out) in [(tcp, "a.img"), (unix, "b.img")] {
        assert_eq!(client(&ulio, "nbdinfo", &["--size", uri]), "5000001\n");
        client(&ulio, "nbdcopy", &["in.img", uri]);
        client(&ulio, "nbdcopy", &[uri, out]);
        assert!(ulio.read(out) == image, "{uri}");
    }
    let ended = server.stop();
    assert_eq!(ended.code, Some(0), "{ended:#?}");
    assert!(!ulio.path("s").exists(), "the socket's path is removed");
}

#[test]
fn a_file_has_its_data_after_the_server_was_ended_or_killed() {
    if !tools() {
        return;
    }
    let ulio = Ulio::new();
    let words = "serve file:disk.img,size=4M --listen unix:s";
    for (seed, signal) in [(1, "TERM"), (2, "KILL")] {
        let image = noise(4 << 20, seed);
        ulio.write("in.img", &image);
        let server = Server::start(&ulio, words, 1);
        client(&ulio, "nbdcopy", &["--flush", "in.img", &server.uris[0]]);
        server.signal(signal);
        let ended = server.wait();
        assert_eq!(ended.code.is_some(), signal == "TERM", "{ended:#?}");
        let server = Server::start(&ulio, words, 1);
        client(&ulio, "nbdcopy", &[&server.uris[0], "out.img"]);
        assert!(ulio.read("out.img") == image, "{signal}");
        server.stop().ok();
    }
    assert!(ulio.read("disk.img") == noise(4 << 20, 2));
}

#[cfg(target_os = "linux")]
#[test]
fn disks_are_closed_when_nobody_can_be_told_of_them() {
    let ulio = Ulio::new();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full");
    let output = ulio
        .command(["serve", "file:disk.img,size=1M", "--listen", "unix:s"])
        .stdout(full.unwrap())
        .output()
        .unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("writing to stdout"), "{err}");
    assert!(!err.contains("dropped without close"), "{err}");
    assert!(!ulio.path("s").exists(), "the socket's path is removed");
}

#[test]
fn what_to_type_is_on_stderr_and_uris_alone_on_stdout() {
    let ulio = Ulio::new();
    let server = Server::start(&ulio, "serve memory:1M --listen unix:s", 1);
    let uri = server.uris[0].clone();
    let ended = server.stop();
    assert_eq!(ended.out, "", "nothing after the URI");
    assert!(
        ended.err.contains("serving `memory:1M`, 1 MiB"),
        "{}",
        ended.err
    );
    // A program that is on no search path is called by its path.
    for program in [
        env!("CARGO_BIN_EXE_ulio"),
        "nbdinfo",
        "nbdcopy",
        "qemu-img info",
    ] {
        assert!(
            ended.err.contains(&format!("  {program} ")),
            "{}",
            ended.err
        );
    }
    assert!(ended.err.contains(&format!("'{uri}'")), "{}", ended.err);
    assert!(ended.err.contains("-unix"), "{}", ended.err);
}

#[test]
fn exports_have_names_and_json_tells_them() {
    if !tools() {
        return;
    }
    let ulio = Ulio::new();
    let arguments = [
        "serve",
        "memory:3M",
        "offset:1M",
        "--export",
        "a b=memory:4M readonly",
        "--listen",
        "unix:s",
        "--json",
    ];
    let server = Server::start_all(&ulio, arguments, usize::MAX);
    let told: serde_json::Value = serde_json::from_str(&server.uris.concat()).unwrap();
    let exports = told["exports"].as_array().unwrap();
    assert_eq!(
        (&exports[0]["name"], &exports[0]["size"]),
        (&"".into(), &(2 << 20).into())
    );
    assert_eq!(
        (&exports[1]["name"], &exports[1]["size"]),
        (&"a b".into(), &(4 << 20).into())
    );
    assert_eq!(
        (&exports[0]["read_only"], &exports[1]["read_only"]),
        (&false.into(), &true.into())
    );
    let uri = |n: usize| exports[n]["uris"][0].as_str().unwrap();
    assert_eq!(client(&ulio, "nbdinfo", &["--size", uri(0)]), "2097152\n");
    assert_eq!(client(&ulio, "nbdinfo", &["--size", uri(1)]), "4194304\n");
    let all = client(&ulio, "nbdinfo", &["--list", uri(0)]);
    assert!(
        all.contains("export=\"\"") && all.contains("export=\"a b\""),
        "{all}"
    );
    server.stop().ok();
}

#[test]
fn read_only_refuses_writes_of_a_writable_stack() {
    if !tools() {
        return;
    }
    let ulio = Ulio::new();
    let server = Server::start(&ulio, "serve memory:1M --read-only --listen unix:s", 1);
    let info = client(&ulio, "nbdinfo", &[&server.uris[0]]);
    assert!(info.contains("is_read_only: true"), "{info}");
    ulio.write("in.img", &[1; 4096]);
    let copy = Command::new("nbdcopy")
        .args(["in.img", &server.uris[0]])
        .current_dir(ulio.dir())
        .output()
        .unwrap();
    assert!(!copy.status.success());
    server.stop().ok();
}

#[test]
fn either_signal_ends_it_well() {
    let ulio = Ulio::new();
    for signal in ["INT", "TERM"] {
        let server = Server::start(&ulio, "serve memory:1M --listen unix:s", 1);
        server.signal(signal);
        let ended = server.wait();
        assert_eq!(ended.code, Some(0), "{ended:#?}");
        assert!(ended.err.contains("stopping: "), "{ended:#?}");
    }
}

#[test]
fn what_a_stats_layer_counts_is_told_at_the_end() {
    let ulio = Ulio::new();
    let server = Server::start(&ulio, "serve memory:1M stats:top stats --listen unix:s", 1);
    let ended = server.stop();
    for name in ["top", "stats"] {
        let line = format!("userland_io::stats: {name}: ");
        assert!(ended.err.contains(&line), "{ended:#?}");
    }
    // Nor do other commands keep it to themselves.
    let ran = ulio.run("info memory:1M stats:below");
    assert!(ran.err.contains("below: "), "{ran:#?}");
}

/// A connected client that says nothing does not keep it from ending.
#[test]
fn an_idle_client_does_not_hold_it() {
    let ulio = Ulio::new();
    let server = Server::start(&ulio, "serve memory:1M --listen unix:s", 1);
    let mut idle = UnixStream::connect(ulio.path("s")).unwrap();
    let mut greeting = [0; 18];
    idle.read_exact(&mut greeting).unwrap();
    let ended = server.stop();
    assert_eq!(ended.code, Some(0), "{ended:#?}");
}

#[test]
fn a_failed_flush_at_the_end_is_its_failure() {
    // The first flush of a file is the one of opening. Memory has none to do, and still shows what a flush answers.
    for stack in [
        "file:disk.img fault:ENOSPC,on=flush,after=1",
        "memory:1M fault:ENOSPC,on=flush",
    ] {
        let ulio = Ulio::new();
        ulio.write("disk.img", &[0; 1 << 20]);
        let server = Server::start(&ulio, &format!("serve {stack} --listen unix:s"), 1);
        let ended = server.stop();
        assert_eq!(ended.code, Some(1), "{stack}: {ended:#?}");
        assert!(ended.err.contains("error: "), "{stack}: {ended:#?}");
        assert!(ended.err.contains("No space left"), "{stack}: {ended:#?}");
    }
}

#[test]
fn a_second_signal_leaves_at_once() {
    let ulio = Ulio::new();
    ulio.write("disk.img", &[0; 1 << 20]);
    // Opening flushes once, too: long enough to be told from "at once", short enough to wait for.
    let server = Server::start(
        &ulio,
        "serve file:disk.img delay:flush=8s --listen unix:s",
        1,
    );
    server.signal("TERM");
    server.wait_for("stopping: ");
    let began = std::time::Instant::now();
    server.signal("TERM");
    let ended = server.wait();
    assert!(
        began.elapsed() < Duration::from_secs(6),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(ended.code, Some(1), "{ended:#?}");
    assert!(
        ended.err.contains("error: a second signal: left at once"),
        "{ended:#?}"
    );
}

/// Opening flushes once, which takes long here.
#[test]
fn a_signal_while_it_starts_ends_it_at_once() {
    let ulio = Ulio::new();
    let words = "serve file:disk.img,size=1M delay:flush=60s --listen unix:s";
    let server = Server::start(&ulio, words, 0);
    let began = std::time::Instant::now();
    while !ulio.path("disk.img").exists() {
        assert!(began.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(5));
    }
    let ended = server.stop();
    assert!(began.elapsed() < Duration::from_secs(40));
    ended.fails(1, &["interrupted before it served"]);
}

#[test]
fn a_port_or_socket_in_use_is_told_and_left_alone() {
    let ulio = Ulio::new();
    let server = Server::start(
        &ulio,
        "serve memory:1M --listen nbd://127.0.0.1:0 --listen unix:s",
        2,
    );
    let port = server.port();
    ulio.run(&format!("serve memory:1M --listen nbd://127.0.0.1:{port}"))
        .fails(
            1,
            &[&format!("127.0.0.1:{port}"), "another program uses it"],
        );
    ulio.run("serve memory:1M --listen unix:s")
        .fails(1, &["unix:s", "in use"]);
    assert!(UnixStream::connect(ulio.path("s")).is_ok());
    server.stop().ok();
}

#[test]
fn a_dead_servers_socket_is_replaced() {
    let ulio = Ulio::new();
    drop(UnixListener::bind(ulio.path("s")).unwrap());
    assert!(ulio.path("s").exists());
    let server = Server::start(&ulio, "serve memory:1M --listen unix:s", 1);
    assert!(UnixStream::connect(ulio.path("s")).is_ok());
    server.stop().ok();
}

#[test]
fn addresses_that_cannot_be_say_what_would_be_right() {
    let ulio = Ulio::new();
    ulio.run(&format!(
        "serve memory:1M --listen unix:{}",
        "x".repeat(120)
    ))
    .fails(1, &["120 bytes long", "shorter"]);
    ulio.run("serve memory:1M --listen unix:no/such/s")
        .fails(1, &["unix:no/such/s", "directory does not exist"]);
    ulio.write("file", b"");
    ulio.run("serve memory:1M --listen unix:file")
        .fails(1, &["unix:file", "no socket"]);
    assert!(ulio.path("file").exists());
    ulio.run("serve memory:1M --listen systemd:disk")
        .fails(1, &["LISTEN_FDS", "name an address"]);
}

#[test]
fn a_sockets_permissions_are_as_asked() {
    let ulio = Ulio::new();
    for (arguments, expected) in [("", 0o600), (" --socket-mode 0660", 0o660)] {
        let line = format!("serve memory:1M --listen unix:s{arguments}");
        let server = Server::start(&ulio, &line, 1);
        let mode = ulio.path("s").metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, expected);
        server.stop().ok();
    }
}

#[test]
fn a_silent_handshake_is_cut_when_its_time_is_up() {
    let ulio = Ulio::new();
    let server = Server::start(
        &ulio,
        "serve memory:1M --listen nbd://127.0.0.1:0 --handshake-timeout 200ms",
        1,
    );
    let mut silent = TcpStream::connect(("127.0.0.1", server.port())).unwrap();
    let limit = Some(Duration::from_secs(30));
    silent.set_read_timeout(limit).unwrap();
    let mut all = Vec::new();
    let began = std::time::Instant::now();
    silent.read_to_end(&mut all).unwrap();
    // The default would be 10 s.
    assert!(began.elapsed() < Duration::from_secs(8));
    assert_eq!(&all[..8], b"NBDMAGIC");
    server.stop().ok();
}

#[test]
fn connections_beyond_the_limit_are_closed() {
    let ulio = Ulio::new();
    let server = Server::start(
        &ulio,
        "serve memory:1M --listen unix:s --max-connections 1",
        1,
    );
    let mut first = UnixStream::connect(ulio.path("s")).unwrap();
    let mut greeting = [0; 18];
    first.read_exact(&mut greeting).unwrap();
    let mut second = UnixStream::connect(ulio.path("s")).unwrap();
    let mut rest = Vec::new();
    second.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"");
    server.stop().ok();
}

/// As a service manager does it: the listening socket is descriptor 3, and the environment says so.
#[test]
fn sockets_of_a_service_manager_are_used() {
    let ulio = Ulio::new();
    let listener = UnixListener::bind(ulio.path("handed")).unwrap();
    let script = "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" serve memory:2M";
    let mut command = Command::new("sh");
    command
        .args(["-c", script, env!("CARGO_BIN_EXE_ulio")])
        .current_dir(ulio.dir())
        .stdin(std::os::fd::OwnedFd::from(listener));
    let server = Server::spawn(command, 1);
    assert!(server.uris[0].contains("handed"), "{:?}", server.uris);
    let mut stream = UnixStream::connect(ulio.path("handed")).unwrap();
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    stream.write_all(&[0; 4]).unwrap();
    drop(stream);
    server.stop().ok();
    assert!(ulio.path("handed").exists(), "the path is the manager's");
}

#[cfg(target_os = "linux")]
#[test]
fn the_limit_of_open_files_is_raised() {
    let ulio = Ulio::new();
    let mut command = Command::new("sh");
    command
        .args([
            "-c",
            "ulimit -Sn 64; exec \"$0\" serve memory:1M --listen unix:s",
        ])
        .arg(env!("CARGO_BIN_EXE_ulio"))
        .current_dir(ulio.dir());
    let server = Server::spawn(command, 1);
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", server.pid())).unwrap();
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .unwrap();
    let numbers: Vec<&str> = line.split_whitespace().skip(3).collect();
    assert_eq!(numbers[0], numbers[1], "{line}");
    assert_ne!(numbers[0], "64");
    server.stop().ok();
}
