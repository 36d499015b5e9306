//! fio's NBD engine as a client: random writes with checksums, verified.
#![cfg(all(feature = "nbd", unix))]

use serde_json::Value;
use userland_io::engines::Memory;

#[path = "common/clients.rs"]
mod clients;
#[path = "common/need.rs"]
mod need;
use clients::{Served, succeed};

#[test]
fn fio_verifies_what_it_wrote_at_random() {
    fio(
        "randwrite",
        &["--bsrange=512-64k", "--blockalign=512", "--fsync=64"],
    );
}

#[test]
fn fio_verifies_reads_among_writes_of_large_blocks() {
    fio("rw", &["--bs=1M"]);
}

fn fio(rw: &str, more: &[&str]) {
    let Some(fio) = need::program("fio") else {
        return;
    };
    let engines = succeed(&fio, &["--enghelp"]);
    if !engines.lines().any(|line| line.trim() == "nbd") {
        return need::skip("needs a fio that was built with its nbd engine");
    }
    let served = Served::disk(Memory::new(32 << 20));
    for uri in served.uris("disk") {
        let (uri, rw) = (format!("--uri={uri}"), format!("--rw={rw}"));
        let directory = served.dir.path().to_str().unwrap();
        let mut args = vec![
            "--name=verify",
            "--ioengine=nbd",
            &uri,
            &rw,
            "--iodepth=32",
            "--size=32M",
        ];
        args.extend([
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
            "--randseed=7",
            "--output-format=json",
        ]);
        // Keeps the state that fio saves for a later verification out of the sources.
        args.extend(["--verify_state_save=0", "--aux-path", directory]);
        args.extend(more);
        let text = succeed(&fio, &args);
        let told: Value = serde_json::from_str(&text[text.find('{').unwrap()..]).unwrap();
        let job = &told["jobs"][0];
        assert_eq!(job["error"], 0, "{text}");
        let total = |what: &str| job[what]["io_bytes"].as_u64().unwrap();
        assert!(total("write") > 8 << 20, "{text}");
        assert!(
            total("read") >= total("write"),
            "nothing was verified: {text}"
        );
    }
}
