//! `ulio attach`, `list` and `detach`: a device from its making to its end, whoever ends it.
#![cfg(target_os = "linux")]

#[path = "common/attach.rs"]
mod attach;
mod common;
use attach::{
    Attached, Mounted, can_attach, claim, detached, has, listed, remains, run, until, via,
};
use common::{Ran, Ulio, need};

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// For tests that leave devices stale, or take all away that are: one at a time.
fn with_stale_devices() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the README promises of its second example.
#[test]
fn a_disk_is_mounted_trimmed_and_leaves_nothing() {
    if !has(&["mkfs.ext4", "e2fsck", "fstrim", "mount", "diff"]) || !can_attach() {
        return;
    }
    let ulio = Ulio::new();
    // Without a way of its own it takes the best; the host of a developer may have a better one.
    let disk = Attached::new(&ulio, "memory:1G");
    let device = disk.path.to_str().unwrap().to_owned();
    run("mkfs.ext4", ["-q", &device]);
    let mounted = Mounted::new(&disk.path, ulio.path("mnt"));
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../crates");
    let copy = mounted.path("copy");
    run("cp", ["-r", source, copy.to_str().unwrap()]);
    mounted.unmount();
    run("e2fsck", ["-f", "-n", &device]);

    let data = || listed(&ulio, &disk.path).unwrap()["data"].as_u64().unwrap();
    let mounted = Mounted::new(&disk.path, ulio.path("mnt"));
    run(
        "diff",
        ["-r", source, mounted.path("copy").to_str().unwrap()],
    );
    let (full, held) = (data(), memory(&disk));
    fs::remove_dir_all(mounted.path("copy")).unwrap();
    run("sync", ["-f", mounted.path("").to_str().unwrap()]);
    run("fstrim", [mounted.path("").to_str().unwrap()]);
    let (trimmed, kept) = (data(), memory(&disk));
    let copied = run("du", ["-s", "--block-size=1", "--apparent-size", source]);
    let copied: u64 = copied.split_whitespace().next().unwrap().parse().unwrap();
    assert!(full > copied, "{full} bytes for {copied}");
    assert!(trimmed + copied / 2 < full, "{full} bytes, then {trimmed}");
    assert!(
        kept + copied / 2 < held,
        "{held} bytes of memory, then {kept}"
    );
    mounted.unmount();
    run("e2fsck", ["-f", "-n", &device]);

    let (pid, path) = (disk.server.pid(), disk.path);
    disk.server.signal("INT");
    let ran = disk.server.wait();
    assert_eq!(ran.ok(), "", "the path alone is on stdout");
    assert_eq!(remains(pid, &path), Vec::<String>::new());
    assert!(ran.err.contains(&format!("by {}", via())), "{ran:#?}");
}

/// How much memory its process has, in bytes.
fn memory(disk: &Attached) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", disk.server.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.unwrap() << 10
}

#[test]
fn a_signal_waits_for_the_users_and_names_them() {
    if !has(&["mkfs.ext4", "mount"]) || !can_attach() {
        return;
    }
    let ulio = Ulio::new();
    let disk = Attached::new(&ulio, "memory:64M");
    run("mkfs.ext4", ["-q", disk.path.to_str().unwrap()]);
    let mounted = Mounted::new(&disk.path, ulio.path("mnt"));
    disk.server.signal("TERM");
    let at = ulio.path("mnt");
    disk.server.wait_for(&format!(
        "waiting: {} is in use: mounted on {}",
        disk.path.display(),
        at.display()
    ));
    // It serves on.
    fs::write(mounted.path("file"), common::noise(1 << 20, 1)).unwrap();
    run("sync", ["-f", at.to_str().unwrap()]);
    mounted.unmount();
    let (pid, path) = (disk.server.pid(), disk.path);
    disk.server.wait().ok();
    assert_eq!(remains(pid, &path), Vec::<String>::new());
}

#[test]
fn a_second_signal_leaves_at_once_and_what_it_left_is_removed() {
    if !can_attach() {
        return;
    }
    let _alone = with_stale_devices();
    let ulio = Ulio::new();
    let disk = Attached::new(&ulio, "memory:64M");
    let claimed = claim(&disk.path);
    disk.server.signal("TERM");
    let user = format!("in use: open in process {} ", std::process::id());
    disk.server.wait_for(&user);
    disk.server.signal("INT");
    let (pid, path) = (disk.server.pid(), disk.path);
    let ran = disk.server.wait();
    assert_eq!(ran.code, Some(1), "{ran:#?}");
    let left = format!(
        "{} fails from now on: `ulio detach --stale`",
        path.display()
    );
    assert!(ran.err.contains(&left), "{ran:#?}");

    let left = listed(&ulio, &path).unwrap();
    assert_eq!(
        (&left["state"], &left["pid"]),
        (&"stale".into(), &pid.into())
    );
    let table = ulio.run("list --stale");
    assert!(table.ok().contains(path.to_str().unwrap()), "{table:#?}");
    // The driver of ublk ends a device without a process, whoever has it open.
    if via() != "ublk" {
        let ran = ulio.run("detach --stale");
        assert_eq!(ran.code, Some(1), "{ran:#?}");
        let refused = format!("{} is {user}", path.display());
        assert!(ran.err.contains(&refused), "{ran:#?}");
        assert!(listed(&ulio, &path).is_some());
    }
    drop(claimed);
    let ran = detached(&ulio, "detach --stale");
    assert!(ran.ok().contains(path.to_str().unwrap()), "{ran:#?}");
    assert_eq!(remains(pid, &path), Vec::<String>::new());
}

#[test]
fn in_the_background_it_returns_when_it_is_ready_and_keeps_nothing() {
    if !can_attach() {
        return;
    }
    let ulio = Ulio::new();
    // This waits until nobody has the other end of its pipes any more.
    let attach = format!("attach --background --via {} memory:64M", via());
    let mut command = ulio.command(attach.split(' '));
    // As one that such a process has started has it.
    command.env("ULIO_IN_BACKGROUND", "1");
    let ran = Ran::from(command.output().unwrap());
    let path = Path::new(ran.ok().trim_end());
    assert_eq!(ran.out.lines().count(), 1, "{ran:#?}");
    let told = listed(&ulio, path).unwrap();
    assert_eq!(told["state"], "running");
    let pid = told["pid"].as_u64().unwrap();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let session = fields.split_whitespace().nth(3).unwrap();
    assert_eq!(session, pid.to_string(), "a session of its own");
    let ran = ulio.run(&format!("detach {}", path.display()));
    assert_eq!(ran.ok(), format!("{}\n", path.display()));
    until("its process ends", || {
        remains(pid.try_into().unwrap(), path).is_empty()
    });
}

#[test]
fn errors_from_the_background_arrive_with_their_exit_codes() {
    if !can_attach() {
        return;
    }
    let ulio = Ulio::new();
    let attach = format!("attach --background --via {}", via());
    ulio.run(&format!("{attach} file:disk.img"))
        .fails(1, &["disk.img does not exist"]);
    ulio.run(&format!("{attach} memory:1M --recoverable"))
        .fails(1, &["does not claim SURVIVES_KILL"]);
    ulio.run(&format!("{attach} memory:1M --log x=y=z"))
        .fails(2, &["--log `x=y=z`"]);
    ulio.run(&format!("{attach} memory:100"))
        .fails(1, &["has not one whole block"]);
    // An end that nobody can be told of.
    let full = fs::OpenOptions::new().write(true).open("/dev/full");
    let mut command = ulio.command(format!("{attach} file:disk.img,size=1M").split(' '));
    let ran = Ran::from(command.stdout(full.unwrap()).output().unwrap());
    assert_eq!(ran.code, Some(1), "{ran:#?}");
    assert!(ran.err.contains("writing to stdout"), "{ran:#?}");
    let told = ulio.run("list");
    let image = ulio.path("disk.img").display().to_string();
    assert!(!told.out.contains(&image), "{told:#?}");
}

#[test]
fn another_process_detaches_it_unless_it_is_in_use() {
    if !can_attach() {
        return;
    }
    let ulio = Ulio::new();
    let disk = Attached::new(&ulio, "file:disk.img,size=8M");
    let detach = format!("detach {}", disk.path.display());
    let claimed = claim(&disk.path);
    let user = format!("open in process {} ", std::process::id());
    ulio.run(&detach)
        .fails(1, &[&format!("{} is in use: {user}", disk.path.display())]);
    drop(claimed);
    detached(&ulio, &detach).ok();
    // The image is closed and free when it says so.
    ulio.run("info file:disk.img").ok();
    // The path may be another test's device by now.
    ulio.run("detach /dev/null")
        .fails(1, &["was not attached by ulio: `ulio list` shows what was"]);
    let (pid, path) = (disk.server.pid(), disk.path);
    let ran = disk.server.wait();
    ran.ok();
    assert!(ran.err.contains("was detached"), "{ran:#?}");
    assert_eq!(remains(pid, &path), Vec::<String>::new());
}

/// Its number there is another process's, or none.
#[test]
fn a_device_of_another_pid_namespace_is_not_stale() {
    if !has(&["unshare"]) || !can_attach() {
        return;
    }
    if !Path::new("/proc/self/ns/pid").exists() {
        return need::impossible("this kernel has no namespaces of processes");
    }
    let ulio = Ulio::new();
    let disk = Attached::new(&ulio, "memory:1M");
    let elsewhere = |line: &str| {
        let own = ulio.command(line.split(' '));
        let mut command = Command::new("unshare");
        command
            .args(["--pid", "--fork", "--mount-proc", "--"])
            .arg(own.get_program())
            .args(own.get_args());
        Ran::from(command.output().unwrap())
    };
    let path = disk.path.to_str().unwrap();
    assert!(!elsewhere("list --stale").ok().contains(path));
    assert!(elsewhere("list").ok().contains(path));
    assert_eq!(listed(&ulio, &disk.path).unwrap()["state"], "running");
    disk.stop();
}

/// Aborted under a mount it has ended, and cannot be taken away. What is left of it is not forgotten.
#[test]
fn what_an_aborted_device_leaves_is_on_record_until_it_is_removed() {
    if via() != "fuse" || !has(&["mkfs.ext4", "mount", "losetup"]) || !can_attach() {
        return;
    }
    let _alone = with_stale_devices();
    let ulio = Ulio::new();
    let disk = Attached::new(&ulio, "memory:16M");
    let device = disk.path.to_str().unwrap();
    run("mkfs.ext4", ["-q", device]);
    let mounted = Mounted::new(&disk.path, ulio.path("mnt"));
    let number = run("losetup", ["--noheadings", "--output=BACK-MAJ:MIN", device]);
    let (_, minor) = number.trim().split_once(':').unwrap();
    let control = Mounted::with(&["-t", "fusectl", "none"], ulio.path("fuse"));
    let connection = control.path(minor);
    fs::write(connection.join("abort"), "1").unwrap();
    let (pid, path) = (disk.server.pid(), disk.path);
    let ran = disk.server.wait();
    assert_eq!(ran.code, Some(1), "{ran:#?}");
    assert!(ran.err.contains("could not be removed"), "{ran:#?}");
    assert_eq!(listed(&ulio, &path).unwrap()["state"], "stale");
    let refused = ulio.run("detach --stale");
    assert!(
        refused.err.contains("is in use: mounted on"),
        "{refused:#?}"
    );
    drop(mounted);
    until("it can be removed", || {
        ulio.run("detach --stale")
            .out
            .contains(path.to_str().unwrap())
    });
    assert_eq!(remains(pid, &path), Vec::<String>::new());
}

/// A device on record that is another's by now is none of ours, in use or not.
#[test]
fn what_another_has_made_in_its_place_is_not_in_the_way() {
    if via() != "fuse" || !has(&["losetup"]) || !can_attach() {
        return;
    }
    let _alone = with_stale_devices();
    let ulio = Ulio::new();
    let disk = Attached::new(&ulio, "memory:1M");
    let (pid, path) = (disk.server.pid(), disk.path.clone());
    disk.kill();
    // As if its device had been removed by hand, and the number given to another since.
    run("losetup", ["--detach", path.to_str().unwrap()]);
    ulio.write("image", &[0; 1 << 20]);
    let image = ulio.path("image");
    let other = run("losetup", ["--find", "--show", image.to_str().unwrap()]);
    let other = Path::new(other.trim_end());
    let record = format!("/run/ulio/{pid}-0.device");
    let text = fs::read_to_string(&record).unwrap();
    let moved = text.replace(
        &format!("device {}\n", path.display()),
        &format!("device {}\n", other.display()),
    );
    fs::write(&record, moved).unwrap();
    let claimed = claim(other);
    let ran = ulio.run(&format!("detach {}", other.display()));
    drop(claimed);
    run("losetup", ["--detach", other.to_str().unwrap()]);
    assert_eq!(ran.ok(), format!("{}\n", other.display()));
    assert!(!Path::new(&record).exists());
}

#[test]
fn a_failed_last_flush_is_told_to_whoever_ends_it() {
    if !can_attach() {
        return;
    }
    let ulio = Ulio::new();
    let reason = |ran: &Ran| {
        let parts = ["could not be flushed or closed: ", "No space left"];
        parts.iter().all(|part| ran.err.contains(part))
    };
    let stack = "memory:1M fault:ENOSPC,on=flush";
    let disk = Attached::new(&ulio, stack);
    let ran = disk.server.stop();
    assert_eq!(ran.code, Some(1), "{ran:#?}");
    assert!(reason(&ran), "{ran:#?}");

    let disk = Attached::new(&ulio, stack);
    let ran = ulio.run(&format!("detach {}", disk.path.display()));
    ran.fails(1, &[]);
    assert!(reason(&ran), "{ran:#?}");
    assert_eq!(disk.server.wait().code, Some(1));
}

/// Silence is no answer: the last flush was never done.
#[test]
fn a_daemon_that_dies_while_it_flushes_has_not_detached_in_order() {
    if !can_attach() {
        return;
    }
    let _alone = with_stale_devices();
    let ulio = Ulio::new();
    let disk = Attached::new(&ulio, "memory:1M delay:flush=5s");
    let detach = format!("detach {}", disk.path.display());
    let detaching = ulio
        .command(detach.split(' '))
        .stderr(Stdio::piped())
        .spawn();
    // Once the device is gone, the disk is flushed.
    until("the last flush is waited for", || {
        listed(&ulio, &disk.path).is_none()
    });
    disk.kill();
    let ran = Ran::from(detaching.unwrap().wait_with_output().unwrap());
    assert_eq!(ran.code, Some(1), "{ran:#?}");
    assert!(ran.err.contains("before the disk was flushed"), "{ran:#?}");
}

#[test]
fn the_list_counts_what_was_done() {
    if !can_attach() {
        return;
    }
    let ulio = Ulio::new();
    let disk = Attached::new(&ulio, "memory:8M delay:read=1us --read-only");
    // Whatever probes a new device has done.
    let before = listed(&ulio, &disk.path).unwrap();
    assert_eq!(before["read_only"], true, "{before}");
    assert_eq!(before["stack"], "memory:8M delay:read=1us");
    assert_eq!(
        (&before["via"], &before["size"]),
        (&via().into(), &(8 << 20).into())
    );
    disk.stop();

    let disk = Attached::new(&ulio, "memory:8M");
    let counts = |op: &str| {
        let told = listed(&ulio, &disk.path).unwrap();
        let of = &told["counters"][op];
        (of["ops"].as_u64().unwrap(), of["bytes"].as_u64().unwrap())
    };
    let (ops, bytes) = counts("write");
    run(
        "dd",
        [
            "if=/dev/zero",
            &format!("of={}", disk.path.display()),
            "bs=64K",
            "count=16",
            "oflag=direct",
            "status=none",
        ],
    );
    let (more_ops, more_bytes) = counts("write");
    assert_eq!(more_bytes - bytes, 1 << 20);
    assert!(more_ops >= ops + 8, "{ops}, then {more_ops}");
    let table = ulio.run("list");
    let line = table
        .ok()
        .lines()
        .find(|line| line.starts_with(disk.path.to_str().unwrap()));
    assert!(line.unwrap().contains("1 MiB"), "{table:#?}");
    disk.stop();
}

#[test]
fn without_root_a_line_says_what_to_do() {
    let ulio = Ulio::new();
    let as_nobody = |line: &str| {
        let own = ulio.command(line.split(' '));
        if !rustix::process::geteuid().is_root() {
            return own;
        }
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"])
            .arg(own.get_program())
            .args(own.get_args())
            .current_dir("/");
        command
    };
    if need::program("setpriv").is_none() {
        return;
    }
    let ran = |line: &str| Ran::from(as_nobody(line).output().unwrap());
    ran("attach file:/tmp/none.img,size=1M").fails(1, &["needs root: run it with sudo"]);
    ran("attach --background memory:1M").fails(1, &["needs root: run it with sudo"]);
    ran("detach --stale").fails(1, &["needs root: run it with sudo"]);
    assert!(!Path::new("/tmp/none.img").exists());
    ran("list").ok();
}

#[test]
fn a_service_manager_hears_of_the_start_and_the_end() {
    if !can_attach() {
        return;
    }
    let ulio = Ulio::new();
    let manager = UnixDatagram::bind(ulio.path("notify")).unwrap();
    manager.set_read_timeout(Some(attach::PATIENCE)).unwrap();
    let heard = || {
        let mut text = [0; 4096];
        let len = manager.recv(&mut text).unwrap();
        String::from_utf8(text[..len].to_vec()).unwrap()
    };
    let line = format!("attach --via {} memory:1M", via());
    let mut command = ulio.command(line.split(' '));
    command.env("NOTIFY_SOCKET", ulio.path("notify"));
    let disk = Attached::spawn(command);
    let path = disk.path.display().to_string();
    assert_eq!(heard(), format!("READY=1\nSTATUS={path}: memory:1M\n"));
    let claimed = claim(&disk.path);
    disk.server.signal("TERM");
    assert!(heard().starts_with("STOPPING=1\nSTATUS=detaching "));
    let waiting = heard();
    let expected = format!("STOPPING=1\nSTATUS=waiting: {path} is in use: open in process ");
    assert!(waiting.starts_with(&expected), "{waiting}");
    drop(claimed);
    disk.server.wait().ok();
}

#[test]
fn the_unit_for_systemd_says_nothing_strange() {
    if need::program("systemd-analyze").is_none() {
        return;
    }
    let ulio = Ulio::new();
    let unit = include_str!("../systemd/ulio-attach@.service");
    // It is to be where the program is.
    let unit = unit.replace("/usr/bin/ulio", env!("CARGO_BIN_EXE_ulio"));
    ulio.write("ulio-attach@disk.service", unit.as_bytes());
    let unit = ulio.path("ulio-attach@disk.service");
    let told = run(
        "systemd-analyze",
        ["verify", "--man=no", unit.to_str().unwrap()],
    );
    assert_eq!(told, "");
}

/// Of all threads: those of the runtime, of the way, of the engine.
#[test]
fn its_threads_write_back_for_others_and_its_memory_is_locked() {
    if !can_attach() {
        return;
    }
    const PF_MEMALLOC_NOIO: u64 = 0x0008_0000;
    let ulio = Ulio::new();
    let disk = Attached::new(&ulio, "file:disk.img,size=8M");
    run(
        "dd",
        [
            "if=/dev/zero",
            &format!("of={}", disk.path.display()),
            "bs=1M",
            "count=8",
            "oflag=direct",
            "status=none",
        ],
    );
    let process = format!("/proc/{}", disk.server.pid());
    let status = fs::read_to_string(format!("{process}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().to_owned()
    };
    let capabilities = u64::from_str_radix(&field("CapEff:"), 16).unwrap();
    let can = |capability: u32| capabilities >> capability & 1 == 1;
    let (ipc_lock, sys_resource) = (14, 24);
    if can(ipc_lock) || can(sys_resource) {
        assert_ne!(field("VmLck:"), "0 kB");
    }
    if can(sys_resource) {
        for thread in fs::read_dir(format!("{process}/task")).unwrap() {
            let stat = fs::read_to_string(thread.unwrap().path().join("stat")).unwrap();
            let (name, fields) = stat.rsplit_once(')').unwrap();
            let flags: u64 = fields.split_whitespace().nth(6).unwrap().parse().unwrap();
            assert_ne!(flags & PF_MEMALLOC_NOIO, 0, "{name})");
        }
        let score = fs::read_to_string(format!("{process}/oom_score_adj")).unwrap();
        assert_eq!(score, "-900\n");
    }
    disk.stop();
}

/// Where the root is no mount, no copy can be made to follow: it would keep every mount in use.
#[test]
fn it_stays_in_a_mount_namespace_that_it_cannot_follow() {
    if !has(&["unshare", "chroot", "mount"]) || !can_attach() {
        return;
    }
    let ulio = Ulio::new();
    // Up to the unshare it is the machine's own; what is mounted goes with the shell.
    let script = r#"readlink /proc/$$/ns/mnt > own && mkdir -p root/all && mount --rbind / root/all && cd root \
        && for name in bin dev etc lib lib64 proc run sbin sys usr; do ln -s all/$name $name; done \
        && exec chroot . "/all$0" attach --via "$1" memory:1M"#;
    let own = ulio.command([""]);
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c", script])
        .arg(own.get_program())
        .arg(via())
        .current_dir(ulio.dir());
    let disk = Attached::spawn(command);
    disk.server.wait_for("the copy cannot be made to follow");
    let own = fs::read_to_string(ulio.path("own")).unwrap();
    let now = fs::read_link(format!("/proc/{}/ns/mnt", disk.server.pid()));
    assert_eq!(now.unwrap(), Path::new(own.trim_end()));
    disk.stop();
}

/// The kernel would unmount there first, and wait for ever for a device whose process is on its way out.
#[test]
fn it_does_not_hang_in_a_mount_namespace_that_ends_with_it() {
    if std::env::var_os("ULIO_GUEST").is_none() {
        return need::guest("a kernel that may hang");
    }
    if !has(&["unshare", "mkfs.ext4", "mount"]) || !can_attach() {
        return;
    }
    let _alone = with_stale_devices();
    let ulio = Ulio::new();
    let script = r#"device=$("$0" attach --background --timeout 3s --via "$1" memory:64M) && mkfs.ext4 -q $device \
        && mkdir mnt && mount $device mnt && dd if=/dev/zero of=mnt/a bs=64K count=64 status=none \
        && pid=$("$0" list | awk -v device=$device '$1 == device && $3 != "ending" { print $8 }') \
        && echo $device $pid && kill -9 $pid $$"#;
    let own = ulio.command([""]);
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c", script])
        .arg(own.get_program())
        .arg(via())
        .current_dir(ulio.dir());
    let output = command.output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    let (path, pid) = told
        .trim_end()
        .split_once(' ')
        .unwrap_or_else(|| panic!("{output:?}"));
    let ended = |state: &str| state.starts_with(['Z', 'X']);
    until("its threads end", || {
        let threads = fs::read_dir(format!("/proc/{pid}/task"));
        threads.into_iter().flatten().flatten().all(|thread| {
            let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            stat.rsplit_once(") ")
                .is_none_or(|(_, fields)| ended(fields))
        })
    });
    until("it is stale", || {
        listed(&ulio, Path::new(path)).is_some_and(|device| device["state"] == "stale")
    });
    until("what it left can be removed", || {
        let ran = ulio.run("detach --stale");
        ran.code == Some(0) && listed(&ulio, Path::new(path)).is_none()
    });
}
