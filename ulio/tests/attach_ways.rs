//! `ulio attach`: by which way, with what the kernel is asked for, and who else in the machine has the device.
#![cfg(target_os = "linux")]

#[path = "common/attach.rs"]
mod attach;
mod common;
use attach::{Attached, can_attach, has, listed, run, until, via};
use common::{Ran, Server, Ulio};

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// What runs `script` in a mount namespace of its own, with `own` as its arguments.
fn apart(ulio: &Ulio, script: &str, own: &Command) -> Command {
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c", script, "sh"])
        .arg(own.get_program())
        .args(own.get_args())
        .current_dir(ulio.dir());
    command
}

/// The better ways are named with their reasons; what is better than the best is nobody's business.
#[test]
fn it_says_why_better_ways_were_not_taken() {
    if !can_attach() {
        return;
    }
    let ulio = Ulio::new();
    let disk = Attached::spawn(ulio.command(["attach", "memory:1M"]));
    let ran = disk.stop();
    let (told, rest) = ran.err.split_once('\n').unwrap();
    let better = match told {
        told if told.contains("1 MiB, by ublk;") => 0,
        told if told.contains("1 MiB, by nbd;") => 1,
        told if told.contains("1 MiB, by fuse;") => 2,
        told => panic!("{told}"),
    };
    let reasons: Vec<_> = rest
        .lines()
        .filter(|line| line.starts_with("  not by "))
        .collect();
    assert_eq!(reasons.len(), better, "{ran:#?}");
    for (reason, name) in reasons.iter().zip(["ublk", "nbd"]) {
        assert!(
            reason.starts_with(&format!("  not by {name}: ")),
            "{reason}"
        );
    }
}

/// Where there is no ublk, the kernel's NBD client is the best.
#[test]
fn without_ublk_it_takes_nbd_and_says_why() {
    // Told by that way's own run.
    if via() != "nbd" || !has(&["unshare", "mount"]) || !can_attach() {
        return;
    }
    let ulio = Ulio::new();
    // What obeys no command of the driver's, in a mount namespace of the test's own.
    let script = "mount --bind /dev/null /dev/ublk-control && exec \"$@\"";
    let own = ulio.command(["attach", "memory:1M"]);
    let command = apart(&ulio, script, &own);
    let disk = Attached::spawn(command);
    assert_eq!(listed(&ulio, &disk.path).unwrap()["via"], "nbd");
    let ran = disk.stop();
    assert!(ran.err.contains("1 MiB, by nbd;"), "{ran:#?}");
    let why = "  not by ublk: the ublk driver of this kernel is too old";
    assert!(
        ran.err.lines().any(|line| line.starts_with(why)),
        "{ran:#?}"
    );
    assert!(!ran.err.contains("not by fuse"), "{ran:#?}");
}

#[test]
fn the_kernel_has_the_queues_and_the_depth_that_were_asked_for() {
    // A loop device's are the kernel's own.
    if via() == "fuse" || !can_attach() {
        return;
    }
    let ulio = Ulio::new();
    for (queues, depth) in [(1, 16), (2, 32)] {
        let disk = Attached::new(
            &ulio,
            &format!("--queues {queues} --depth {depth} memory:1M"),
        );
        let name = disk.path.file_name().unwrap();
        let contexts = Path::new("/sys/block").join(name).join("mq");
        let tags = fs::read_dir(contexts).unwrap().map(|entry| {
            let text = fs::read_to_string(entry.unwrap().path().join("nr_tags"));
            text.unwrap().trim_end().parse::<usize>().unwrap()
        });
        // The driver of NBD sends as many as it likes; those that are too many wait here.
        let has = if via() == "nbd" { 128 } else { depth };
        assert_eq!(tags.collect::<Vec<_>>(), vec![has; queues]);
        disk.stop();
    }
}

/// By the kernel's client it talks to the server itself, and the process counts nothing.
#[test]
fn an_export_of_a_server_is_attached_by_its_uri() {
    if !can_attach() {
        return;
    }
    let ulio = Ulio::new();
    let server = Server::start(&ulio, "serve memory:8M --listen unix:s", 1);
    let disk = Attached::new(&ulio, &server.uris[0]);
    let told = listed(&ulio, &disk.path).unwrap();
    assert_eq!(told["stack"], server.uris[0]);
    assert_eq!(told["counters"].is_null(), via() == "nbd", "{told}");
    let block = [7; 4096];
    {
        let device = fs::File::options().write(true).open(&disk.path).unwrap();
        device.write_all_at(&block, 1 << 20).unwrap();
        device.sync_all().unwrap();
    }
    disk.stop();
    ulio.run(&format!("copy {} file:out.img", server.uris[0]))
        .ok();
    assert_eq!(ulio.read("out.img")[1 << 20..][..4096], block);
    server.stop().ok();
    ulio.run(&format!("attach --via {} nbd+unix:///?socket=gone", via()))
        .fails(1, &["gone"]);
}

/// What was synced there would not be on the disk.
#[test]
fn a_loop_device_that_leaves_flushes_out_is_not_taken() {
    if !has(&["unshare", "mount", "losetup"]) || !can_attach() {
        return;
    }
    let ulio = Ulio::new();
    // There is a free one, then, and each that there is looks so, and cannot be changed, in a mount namespace of the test's own.
    run("losetup", ["--find"]);
    ulio.write("cache", b"write through\n");
    let script = "for at in /sys/block/loop*/queue/write_cache; do
        mount --bind cache $at && mount -o remount,bind,ro $at || exit 9
    done
    exec \"$@\"";
    let own = ulio.command(["attach", "--via", "fuse", "file:disk.img,size=1M"]);
    let ran = Ran::from(apart(&ulio, script, &own).output().unwrap());
    assert_eq!(ran.code, Some(1), "{ran:#?}");
    assert!(
        ran.err.contains("write_cache cannot be `write back`"),
        "{ran:#?}"
    );
}

#[test]
fn a_mount_in_another_namespace_is_named() {
    if !has(&["unshare", "mkfs.ext4", "mount"]) || !can_attach() {
        return;
    }
    let ulio = Ulio::new();
    let disk = Attached::new(&ulio, "memory:16M");
    let device = disk.path.to_str().unwrap();
    run("mkfs.ext4", ["-q", device]);
    let at = ulio.path("mnt");
    fs::create_dir(&at).unwrap();
    let script = "mount \"$0\" mnt && echo mounted && read -r end";
    let mut elsewhere = Command::new("unshare")
        .args(["--mount", "sh", "-c", script, device])
        .current_dir(ulio.dir())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let out = elsewhere.stdout.take().unwrap();
    BufReader::new(out).read_line(&mut said).unwrap();
    assert_eq!(said, "mounted\n");
    let user = format!(
        "{device} is in use: mounted on {} in the mount namespace of process {}",
        at.display(),
        elsewhere.id()
    );
    let detach = format!("detach {device}");
    ulio.run(&detach).fails(1, &[&user]);
    drop(elsewhere.stdin.take());
    elsewhere.wait().unwrap();
    until("it is unmounted with its namespace", || {
        ulio.run(&detach).code == Some(0)
    });
    disk.server.wait().ok();
}
