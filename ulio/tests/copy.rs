//! `ulio copy`: sparse, exact, and honest about what it did.
#![cfg(unix)]

mod common;
use common::{Ran, Server, Ulio, noise, send};

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// 8 MiB, of which 3 pieces hold data.
fn sparse(ulio: &Ulio, name: &str) -> Vec<u8> {
    let mut content = vec![0; 8 << 20];
    let mut file = File::create(ulio.path(name)).unwrap();
    file.set_len(content.len() as u64).unwrap();
    for (n, at) in [0, 3 << 20, (8 << 20) - 10_000].into_iter().enumerate() {
        let bytes = noise(10_000, n as u64 + 1);
        content[at..at + bytes.len()].copy_from_slice(&bytes);
        file.seek(SeekFrom::Start(at as u64)).unwrap();
        file.write_all(&bytes).unwrap();
    }
    file.sync_all().unwrap();
    content
}

/// Bytes that the file takes on its disk.
fn allocated(ulio: &Ulio, name: &str) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let file = File::open(ulio.path(name)).unwrap();
    file.sync_all().unwrap();
    file.metadata().unwrap().blocks() * 512
}

#[test]
fn a_sparse_image_stays_sparse_in_a_file_made_for_it() {
    let ulio = Ulio::new();
    let content = sparse(&ulio, "a.img");
    let ran = ulio.run("copy file:a.img file:b.img --verify");
    ran.ok();
    assert!(ulio.read("b.img") == content);
    let (from, to) = (allocated(&ulio, "a.img"), allocated(&ulio, "b.img"));
    assert!(
        to < 200_000,
        "{to} bytes are allocated, and {from} in the source"
    );
    for part in [
        "created b.img with the source's size, 8 MiB",
        "copied 8 MiB",
        "verified",
    ] {
        assert!(ran.err.contains(part), "{part}: {ran:#?}");
    }
    assert_eq!(ran.out, "");
}

#[test]
fn a_target_with_old_content_gets_zeroes() {
    let ulio = Ulio::new();
    let content = sparse(&ulio, "a.img");
    ulio.write("b.img", &noise(8 << 20, 9));
    ulio.run("copy file:a.img file:b.img").ok();
    assert!(ulio.read("b.img") == content);
}

#[test]
fn a_longer_target_keeps_its_tail_and_says_so() {
    let ulio = Ulio::new();
    let content = sparse(&ulio, "a.img");
    let tail = noise(1 << 20, 4);
    ulio.write("b.img", &[noise(8 << 20, 9), tail.clone()].concat());
    let ran = ulio.run("copy file:a.img file:b.img");
    ran.ok();
    assert!(
        ran.err
            .contains("the target is longer: its last 1 MiB were left"),
        "{ran:#?}"
    );
    assert!(ulio.read("b.img") == [content, tail].concat());
}

#[test]
fn a_shorter_target_is_refused_untouched() {
    let ulio = Ulio::new();
    sparse(&ulio, "a.img");
    let old = noise((8 << 20) - 1, 9);
    ulio.write("b.img", &old);
    ulio.run("copy file:a.img file:b.img").fails(
        1,
        &[
            "8388607 bytes, 1 fewer than the source's 8388608",
            "nothing was written",
            "(8 MiB)",
        ],
    );
    assert!(ulio.read("b.img") == old);
}

#[test]
fn a_read_only_target_is_refused() {
    let ulio = Ulio::new();
    ulio.run("copy pattern:1M null:1M,readonly")
        .fails(1, &["`null:1M,readonly` is read-only: nothing was written"]);
}

#[test]
fn a_refused_copy_removes_the_target_that_it_created() {
    let ulio = Ulio::new();
    let there = |name: &str| ulio.path(name).exists();
    sparse(&ulio, "a.img");
    ulio.run("copy file:a.img file:short.img,size=1M")
        .fails(1, &["7340032 fewer", "nothing was written"]);
    assert!(!there("short.img"));
    ulio.run_all(["copy", "file:a.img", "file:ro.img,size=8M readonly"])
        .fails(1, &["read-only: nothing was written"]);
    assert!(!there("ro.img"));
    // The file is in order, what stands over it is not.
    ulio.run_all(["copy", "file:a.img", "file:part.img partition:1"])
        .fails(1, &["part"]);
    assert!(!there("part.img"));
    // What was there before stays, also an empty file.
    ulio.write("empty.img", &[]);
    ulio.run("copy file:a.img file:empty.img,size=1M")
        .fails(1, &["nothing was written"]);
    assert!(there("empty.img"));
    // A copy that began leaves what it has.
    let ran = ulio.run_all(["copy", "file:a.img fault:EIO,on=read", "file:begun.img"]);
    assert!(ran.err.contains("the target is incomplete"), "{ran:#?}");
    assert!(there("begun.img"));
}

#[test]
fn a_file_is_not_copied_onto_itself() {
    let ulio = Ulio::new();
    let content = sparse(&ulio, "a.img");
    std::fs::hard_link(ulio.path("a.img"), ulio.path("hard.img")).unwrap();
    std::os::unix::fs::symlink("a.img", ulio.path("soft.img")).unwrap();
    for target in [
        "file:a.img",
        "file:./a.img",
        "file:hard.img",
        "file:soft.img offset:1M",
    ] {
        ulio.run_all(["copy", "file:a.img", target])
            .fails(1, &["source and target are the same file, a.img"]);
    }
    assert!(ulio.read("a.img") == content);
}

#[test]
fn odd_sizes_are_copied_to_the_last_byte() {
    let ulio = Ulio::new();
    let content = noise(1_000_003, 2);
    ulio.write("a.img", &content);
    ulio.run("copy file:a.img file:b.img --request-size 4K --jobs 3 --verify")
        .ok();
    assert!(ulio.read("b.img") == content);
}

#[test]
fn both_stacks_may_have_layers() {
    let ulio = Ulio::new();
    let content = noise(1 << 20, 2);
    ulio.write("a.img", &content);
    ulio.write("b.img", &[5; 1 << 20]);
    ulio.run_all([
        "copy",
        "file:a.img offset:4K,size=8K",
        "file:b.img offset:64K",
    ])
    .ok();
    let now = ulio.read("b.img");
    assert!(now[65_536..65_536 + 8192] == content[4096..4096 + 8192]);
    assert!(
        now[..65_536]
            .iter()
            .chain(&now[65_536 + 8192..])
            .all(|&b| b == 5)
    );
}

/// The source is opened read-only, so that one who may only read it can copy it.
#[test]
fn a_source_may_be_shared_with_readers() {
    let ulio = Ulio::new();
    ulio.write("a.img", &noise(1 << 20, 2));
    let server = Server::start(&ulio, "serve file:a.img,readonly --listen unix:s", 1);
    ulio.run("copy file:a.img memory:1M").ok();
    server.stop().ok();
}

#[test]
fn an_image_in_use_is_refused() {
    let ulio = Ulio::new();
    ulio.write("a.img", &noise(1 << 20, 2));
    let server = Server::start(&ulio, "serve file:a.img --listen unix:s", 1);
    ulio.run("copy file:a.img memory:1M")
        .fails(1, &["a.img", "in use"]);
    ulio.run("copy pattern:1M file:a.img")
        .fails(1, &["a.img", "in use"]);
    ulio.run("serve file:a.img --listen unix:t")
        .fails(1, &["a.img", "in use"]);
    server.stop().ok();
}

#[test]
fn what_cannot_be_opened_leaves_nothing_behind() {
    let ulio = Ulio::new();
    ulio.run("copy file:a.img file:b.img").fails(1, &["a.img"]);
    ulio.run("copy pattern:1M file:no/such/b.img")
        .fails(1, &["no/such/b.img"]);
    // A slip in the target is found before the source is opened.
    ulio.run("copy file:c.img,size=1M mamory:1M")
        .fails_at_length(2, &["mamory"]);
    assert_eq!(std::fs::read_dir(ulio.dir()).unwrap().count(), 0);
}

#[test]
fn a_failed_request_or_flush_is_the_copys_failure() {
    let ulio = Ulio::new();
    ulio.run_all([
        "copy",
        "pattern:1M fault:EIO,on=read,range=64K..65K",
        "memory:1M",
        "--request-size",
        "4K",
    ])
    .fails(
        1,
        &[
            "reading 4096 bytes of the source at offset 65536",
            "the target is incomplete",
        ],
    );
    ulio.run_all([
        "copy",
        "pattern:1M",
        "memory:1M fault:ENOSPC,on=write,after=3",
        "--request-size",
        "64K",
    ])
    .fails(
        1,
        &["writing", "of the target", "No space left", "incomplete"],
    );
    ulio.write("b.img", &[0; 1 << 20]);
    // The first flush is the one of opening.
    ulio.run_all([
        "copy",
        "pattern:1M",
        "file:b.img fault:EIO,on=flush,after=1",
    ])
    .fails(1, &["flushing the target", "may not survive a crash"]);
}

/// While the flush is held up, all is written: then a byte of the target is changed behind it.
#[test]
fn verify_finds_a_target_that_changed() {
    let ulio = Ulio::new();
    let content = noise(1 << 20, 2);
    ulio.write("a.img", &content);
    ulio.write("b.img", &[0; 1 << 20]);
    let mut child = ulio
        .command([
            "copy",
            "--verify",
            "file:a.img",
            "file:b.img delay:flush=3s",
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let began = Instant::now();
    while ulio.read("b.img") != content {
        assert!(began.elapsed() < Duration::from_secs(120));
        assert!(child.try_wait().unwrap().is_none(), "it ended early");
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut file = File::options()
        .write(true)
        .open(ulio.path("b.img"))
        .unwrap();
    file.seek(SeekFrom::Start(777_777)).unwrap();
    file.write_all(&[!content[777_777]]).unwrap();
    let ran = Ran::from(child.wait_with_output().unwrap());
    ran.fails(
        1,
        &[
            "the target differs from the source at offset 777777",
            "faulty",
        ],
    );
}

#[test]
fn a_signal_interrupts_it_and_says_so() {
    let ulio = Ulio::new();
    let mut child = ulio
        .command([
            "copy",
            "--progress",
            "pattern:1G delay:read=100ms",
            "null:1G",
            "--jobs",
            "1",
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It copies, so signals are listened to.
    let mut err = BufReader::new(child.stderr.take().unwrap());
    let mut text = String::new();
    err.read_line(&mut text).unwrap();
    assert!(text.starts_with("copying: "), "{text}");
    send(&child, "INT");
    err.read_to_string(&mut text).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(
        text.contains("error: interrupted: the target is incomplete"),
        "{text}"
    );
}

#[test]
fn progress_is_told_where_asked_for() {
    let ulio = Ulio::new();
    let quiet = ulio.run("copy pattern:4M memory:4M");
    assert_eq!(quiet.ok(), "");
    assert_eq!(quiet.err.lines().count(), 1, "{quiet:#?}");
    let loud = ulio.run("copy pattern:4M memory:4M --progress --verify");
    loud.ok();
    for part in [
        "copying: 100%, 4 MiB of 4 MiB",
        "/s, 0 s left",
        "verifying: 100%",
    ] {
        assert!(loud.err.contains(part), "{part}: {loud:#?}");
    }
}

#[test]
fn servers_are_sources_and_targets() {
    let ulio = Ulio::new();
    let content = sparse(&ulio, "a.img");
    let server = Server::start(&ulio, "serve file:disk.img,size=8M --listen unix:s", 1);
    let uri = &server.uris[0];
    let ran = ulio.run_all([
        "copy",
        "--verify",
        "file:a.img",
        &format!("'{uri}',connections=4"),
    ]);
    ran.ok();
    // The server tells its holes, so none of them is sent.
    assert!(ran.err.contains("0 bytes made zero"), "{ran:#?}");
    ulio.run_all(["copy", uri, "file:b.img"]).ok();
    let ended = server.stop();
    assert_eq!(ended.code, Some(0), "{ended:#?}");
    assert!(ulio.read("disk.img") == content);
    assert!(ulio.read("b.img") == content);
    for name in ["disk.img", "b.img"] {
        let bytes = allocated(&ulio, name);
        assert!(bytes < 200_000, "{name}: {bytes}");
    }
}
