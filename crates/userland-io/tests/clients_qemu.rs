//! QEMU's programs as clients, over Unix sockets and TCP.
#![cfg(all(feature = "nbd", unix))]

use serde_json::Value;
use userland_io::engines::Memory;

#[path = "common/clients.rs"]
mod clients;
#[path = "common/need.rs"]
mod need;
use clients::{Served, assert_same, image, run, succeed};

// qemu-img rounds images to sectors.
const SIZE: u64 = (20 << 20) + 512;

#[test]
fn qemu_img_info_sees_the_size() {
    let Some(qemu_img) = need::program("qemu-img") else {
        return;
    };
    let served = Served::disk(Memory::new(SIZE));
    for uri in served.uris("disk") {
        let info: Value =
            serde_json::from_str(&succeed(&qemu_img, &["info", "--output=json", &uri])).unwrap();
        assert_eq!(info["virtual-size"], SIZE);
        assert_eq!(info["format"], "raw");
    }
}

#[test]
fn qemu_img_converts_in_compares_and_converts_out() {
    let Some(qemu_img) = need::program("qemu-img") else {
        return;
    };
    for transport in 0..2 {
        let served = Served::disk(Memory::new(SIZE));
        let uri = &served.uris("disk")[transport];
        let bytes = image(SIZE as usize, 10 + transport as u64);
        let paths = ["in.img", "middle.qcow2", "out.img"].map(|name| served.path(name));
        let [source, middle, target] = paths.each_ref().map(|path| path.to_str().unwrap());
        std::fs::write(source, &bytes).unwrap();
        succeed(
            &qemu_img,
            &[
                "convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "8", source, uri,
            ],
        );
        succeed(
            &qemu_img,
            &["compare", "-f", "raw", "-F", "raw", source, uri],
        );
        succeed(
            &qemu_img,
            &["convert", "-f", "raw", "-O", "qcow2", uri, middle],
        );
        succeed(
            &qemu_img,
            &["compare", "-f", "qcow2", "-F", "raw", middle, uri],
        );
        succeed(
            &qemu_img,
            &["convert", "-f", "raw", "-O", "raw", uri, target],
        );
        assert_same(&bytes, &std::fs::read(target).unwrap(), uri);

        // The comparison can fail.
        let mut changed = bytes;
        changed[12_345_678] ^= 1;
        std::fs::write(source, &changed).unwrap();
        assert!(
            !run(
                &qemu_img,
                &["compare", "-f", "raw", "-F", "raw", source, uri]
            )
            .ok
        );
    }
}

#[test]
fn qemu_img_map_finds_the_data() {
    let Some(qemu_img) = need::program("qemu-img") else {
        return;
    };
    let served = Served::sparse();
    for uri in served.uris("disk") {
        let map: Value =
            serde_json::from_str(&succeed(&qemu_img, &["map", "--output=json", &uri])).unwrap();
        let runs = map.as_array().unwrap().iter();
        let runs: Vec<_> = runs
            .map(|run| {
                (
                    run["start"].as_u64(),
                    run["length"].as_u64(),
                    run["zero"].as_bool(),
                )
            })
            .collect();
        let run =
            |start: u64, length: u64, zero| (Some(start << 20), Some(length << 20), Some(zero));
        assert_eq!(runs, [run(0, 4, true), run(4, 1, false), run(5, 11, true)]);
    }
}

#[test]
fn qemu_io_reads_back_the_patterns_that_it_wrote() {
    let Some(qemu_io) = need::program("qemu-io") else {
        return;
    };
    let served = Served::disk(Memory::new(SIZE));
    for uri in served.uris("disk") {
        let script = [
            // Plain, odd, durable, vectored, overlapping.
            "write -P 0xab 0 64k",
            "read -P 0xab 0 64k",
            "write -P 0x11 1M 3M",
            "write -f -P 0x22 1536k 1023",
            "read -P 0x22 1536k 1023",
            "read -P 0x11 1M 512k",
            "writev -P 0x33 8M 4k 8k 512",
            "readv -P 0x33 8M 12k 512",
            // Zeroes with and without space, and a trim.
            "write -z 1M 64k",
            "read -P 0 1M 64k",
            "write -z -u 1088k 64k",
            "read -P 0 1088k 64k",
            "read -P 0x11 1152k 64k",
            "discard 8M 64k",
            "read -P 0 8M 4k",
            "flush",
            // Many at once.
            "aio_write -P 0x44 10M 1M",
            "aio_write -P 0x55 11M 1M",
            "aio_write -P 0x66 12M 4k",
            "aio_write -z 13M 1M",
            "aio_flush",
            "aio_read -P 0x44 10M 1M",
            "aio_read -P 0x55 11M 1M",
            "aio_flush",
            "read -P 0x66 12M 4k",
            "read -P 0 13M 1M",
            // To the last byte.
            "write -P 0x77 20M 512",
            "read -P 0x77 20M 512",
        ];
        let mut args = vec!["-f", "raw"];
        script.iter().for_each(|line| args.extend(["-c", line]));
        args.push(&uri);
        let told = succeed(&qemu_io, &args);
        assert!(!told.contains("failed"), "{told}");

        // The verification can fail, and so does what lies outside.
        let wrong = run(&qemu_io, &["-f", "raw", "-c", "read -P 0xac 0 64k", &uri]);
        assert!(wrong.stdout.contains("verification failed"), "{wrong:?}");
        let outside = run(&qemu_io, &["-f", "raw", "-c", "write 20M 1024", &uri]);
        assert!(!outside.ok, "{outside:?}");
    }
}

#[test]
fn qemu_io_cannot_write_to_a_read_only_export() {
    let Some(qemu_io) = need::program("qemu-io") else {
        return;
    };
    let served = Served::also_read_only(SIZE);
    for uri in served.uris("read-only") {
        succeed(
            &qemu_io,
            &["-r", "-f", "raw", "-c", "read -P 0 0 64k", &uri],
        );
        let ran = run(&qemu_io, &["-f", "raw", "-c", "write 0 64k", &uri]);
        assert!(!ran.ok, "{ran:?}");
    }
}
