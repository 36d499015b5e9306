//! `ulio serve --listen fuse:PATH`: the disk is a file, for root and for others, and gone in the end.
#![cfg(target_os = "linux")]

mod common;
use common::{Server, Ulio, need, noise, send};

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Whether there is FUSE, told if not.
fn fuse() -> bool {
    let there = Path::new("/dev/fuse").exists() && rustix::process::geteuid().is_root();
    if !there {
        need::impossible("no FUSE, or not root");
    }
    there
}

#[test]
fn a_disk_is_a_file_until_a_signal_ends_it() {
    if !fuse() {
        return;
    }
    let ulio = Ulio::new();
    let image = noise(1_000_001, 3);
    ulio.write("disk.img", &image);
    let server = Server::start(&ulio, "serve file:disk.img --listen fuse:disk", 1);
    let file = PathBuf::from(&server.uris[0]);
    assert_eq!(file, ulio.path("disk").canonicalize().unwrap());
    assert!(fs::read(&file).unwrap() == image);
    let other = noise(1_000_001, 4);
    // As `cp` does it, which opens for truncation.
    fs::write(&file, &other).unwrap();
    assert!(ulio.read("disk.img") == other);
    let ran = server.stop();
    ran.ok();
    assert!(ran.err.contains("losetup"), "{}", ran.err);
    assert!(!ulio.path("disk").exists());
}

#[test]
fn a_file_and_a_server_have_the_same_disk() {
    if !fuse() {
        return;
    }
    let ulio = Ulio::new();
    let listen = "serve memory:1M --read-only --listen fuse:disk --listen unix:s";
    let server = Server::start(&ulio, listen, 2);
    assert!(
        server.uris[0].starts_with("nbd+unix:"),
        "{}",
        server.uris[0]
    );
    assert!(server.uris[1].ends_with("/disk"), "{}", server.uris[1]);
    let about = fs::metadata(ulio.path("disk")).unwrap();
    assert_eq!(
        (about.len(), about.permissions().mode() & 0o777),
        (1 << 20, 0o400)
    );
    ulio.run("info nbd+unix:///?socket=s").ok();
    server.stop().ok();
}

#[test]
fn who_unmounts_it_ends_it() {
    if !fuse() {
        return;
    }
    let ulio = Ulio::new();
    let server = Server::start(&ulio, "serve memory:1M --listen fuse:disk", 1);
    let unmounted = Command::new("umount").arg(&server.uris[0]).status();
    assert!(unmounted.unwrap().success());
    server.wait().ok();
}

#[test]
fn what_a_killed_one_left_mounted_is_no_hindrance() {
    if !fuse() {
        return;
    }
    let ulio = Ulio::new();
    let mut server = ulio.command(["serve", "memory:1M", "--listen", "fuse:disk"]);
    let mut child = server.stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut out, &mut line).unwrap();
    send(&child, "KILL");
    child.wait().unwrap();
    let dead = fs::metadata(ulio.path("disk")).unwrap_err();
    assert_eq!(dead.raw_os_error(), Some(107), "ENOTCONN");
    let server = Server::start(&ulio, "serve memory:2M --listen fuse:disk", 1);
    assert_eq!(fs::metadata(ulio.path("disk")).unwrap().len(), 2 << 20);
    server.stop().ok();
}

/// As a user who is not root, in mounts of its own, where `/dev/fuse` is for everybody, as on most machines.
#[test]
fn another_user_has_it_by_fusermount() {
    let programs = ["fusermount3", "unshare", "setpriv"];
    if !fuse() || !programs.iter().all(|name| need::program(name).is_some()) {
        return;
    }
    const NOBODY: u32 = 65534;
    let ulio = Ulio::new();
    std::os::unix::fs::chown(ulio.dir(), Some(NOBODY), Some(NOBODY)).unwrap();
    // Where that user may run it.
    fs::copy(env!("CARGO_BIN_EXE_ulio"), ulio.path("ulio")).unwrap();
    let user = "
        mkfifo out
        ./ulio serve memory:1M --listen fuse:disk >out &
        read path <out
        wc -c <$path
        kill -INT $!
        wait $!
        echo ended $?
        ls";
    let root = "
        mknod fuse c 10 229 && chmod 666 fuse && mount --bind fuse /dev/fuse || exit
        exec setpriv --reuid=65534 --regid=65534 --clear-groups sh -c \"$0\"";
    let mut unshare = Command::new("unshare");
    unshare.args(["--mount", "sh", "-c", root, user]);
    let output = unshare.current_dir(ulio.dir()).output().unwrap();
    let out = String::from_utf8_lossy(&output.stdout);
    assert_eq!(out, "1048576\nended 0\nfuse\nout\nulio\n", "{output:?}");
}

#[test]
fn what_cannot_be_is_told_in_a_line() {
    let ulio = Ulio::new();
    ulio.run("serve memory:1M --listen fuse:")
        .fails_at_length(2, &["path of the file"]);
    ulio.run_all(["serve", "memory:1M", "-e", "a=memory:1M", "-l", "fuse:disk"])
        .fails(2, &["a file is one disk"]);
    if !fuse() {
        return;
    }
    ulio.run("serve memory:1M --listen fuse:.")
        .fails(1, &["is a directory"]);
    ulio.write("full", b"mine");
    ulio.run("serve memory:1M --listen fuse:full")
        .fails(1, &["full", "would hide"]);
    assert_eq!(ulio.read("full"), b"mine");
}
