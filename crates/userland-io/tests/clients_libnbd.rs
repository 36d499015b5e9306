//! libnbd's programs and its Python module as clients, over Unix sockets and TCP.
#![cfg(all(feature = "nbd", unix))]

use std::path::Path;

use serde_json::Value;
use userland_io::engines::Memory;
use userland_io::{Device, ReadBuf, WriteBuf, WriteFlags};

#[path = "common/clients.rs"]
mod clients;
#[path = "common/need.rs"]
mod need;
use clients::{Served, assert_same, image, succeed};

const SIZE: u64 = (24 << 20) + 512;

#[test]
fn nbdinfo_sees_size_flags_and_contexts() {
    let Some(nbdinfo) = need::program("nbdinfo") else {
        return;
    };
    let served = Served::disk(Memory::new(SIZE));
    for uri in served.uris("disk") {
        let text = succeed(&nbdinfo, &["--json", &uri]);
        let info: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(info["protocol"], "newstyle-fixed");
        assert_eq!(info["structured"], true);
        let export = &info["exports"][0];
        assert_eq!(export["export-name"], "disk");
        assert_eq!(export["export-size"], SIZE);
        assert_eq!(export["contexts"][0], "base:allocation");
        assert_eq!(export["is_read_only"], false);
        assert_eq!(export["is_rotational"], false);
        let can = [
            "can_cache",
            "can_df",
            "can_fast_zero",
            "can_flush",
            "can_fua",
            "can_multi_conn",
            "can_trim",
            "can_zero",
        ];
        for flag in can {
            assert_eq!(export[flag], true, "{flag}");
        }
        assert_eq!(export["block_size_minimum"], 1);
        assert!(export["block_size_maximum"].as_u64().unwrap() >= 64 << 20);
    }
}

#[test]
fn a_read_only_export_says_so_and_offers_no_mutation() {
    let Some(nbdinfo) = need::program("nbdinfo") else {
        return;
    };
    let served = Served::also_read_only(SIZE);
    for uri in served.uris("read-only") {
        let text = succeed(&nbdinfo, &["--json", &uri]);
        let info: Value = serde_json::from_str(&text).unwrap();
        let export = &info["exports"][0];
        assert_eq!(export["is_read_only"], true);
        for flag in ["can_fast_zero", "can_trim", "can_zero"] {
            assert_eq!(export[flag], false, "{flag}");
        }
    }
}

#[test]
fn nbdinfo_lists_every_export() {
    let Some(nbdinfo) = need::program("nbdinfo") else {
        return;
    };
    let served = Served::new(async |server| {
        let small = Device::open(Memory::new(512)).await.unwrap();
        let large = Device::open(Memory::new(1 << 50)).await.unwrap();
        server
            .export("small", small)
            .export("sp\u{e4}te gro\u{df}e / 50%", large)
    });
    for uri in served.uris("small") {
        let info: Value =
            serde_json::from_str(&succeed(&nbdinfo, &["--list", "--json", &uri])).unwrap();
        let exports = info["exports"].as_array().unwrap();
        let told = |name: &str| {
            exports
                .iter()
                .find(|export| export["export-name"] == name)
                .unwrap()["export-size"]
                .clone()
        };
        assert_eq!(exports.len(), 2);
        assert_eq!(told("small"), 512);
        assert_eq!(told("sp\u{e4}te gro\u{df}e / 50%"), 1u64 << 50);
    }
    for uri in served.uris("sp\u{e4}te gro\u{df}e / 50%") {
        let size = succeed(&nbdinfo, &["--size", &uri]);
        assert_eq!(size.trim(), (1u64 << 50).to_string());
    }
}

#[test]
fn nbdinfo_maps_data_and_holes() {
    let Some(nbdinfo) = need::program("nbdinfo") else {
        return;
    };
    let served = Served::sparse();
    for uri in served.uris("disk") {
        let map: Value =
            serde_json::from_str(&succeed(&nbdinfo, &["--map", "--json", &uri])).unwrap();
        let number = |run: &Value, key: &str| run[key].as_u64().unwrap();
        let runs = map.as_array().unwrap().iter();
        let runs: Vec<_> = runs
            .map(|run| ["offset", "length", "type"].map(|key| number(run, key)))
            .collect();
        let (hole, data) = (3, 0);
        assert_eq!(
            runs,
            [
                [0, 4 << 20, hole],
                [4 << 20, 1 << 20, data],
                [5 << 20, 11 << 20, hole]
            ]
        );
    }
}

#[test]
fn nbdcopy_brings_an_image_in_and_out_again_at_four_connections() {
    let Some(nbdcopy) = need::program("nbdcopy") else {
        return;
    };
    for transport in 0..2 {
        let served = Served::disk(Memory::new(SIZE));
        let uri = &served.uris("disk")[transport];
        let bytes = image(SIZE as usize, 1 + transport as u64);
        let (source, target) = (served.path("in.img"), served.path("out.img"));
        std::fs::write(&source, &bytes).unwrap();
        let copy = |from: &str, to: &str| {
            succeed(
                &nbdcopy,
                &[
                    "--connections=4",
                    "--requests=16",
                    "--request-size=262144",
                    "--flush",
                    from,
                    to,
                ],
            );
        };
        copy(source.to_str().unwrap(), uri);
        copy(uri, target.to_str().unwrap());
        assert_same(&bytes, &std::fs::read(&target).unwrap(), uri);
    }
}

#[test]
fn nbdcopy_between_two_exports_keeps_every_byte() {
    let Some(nbdcopy) = need::program("nbdcopy") else {
        return;
    };
    let bytes = image(SIZE as usize, 3);
    let mut target = None;
    let served = Served::new(async |server| {
        let from = Device::open(Memory::new(SIZE)).await.unwrap();
        from.write(&WriteBuf::new(&bytes), 0, WriteFlags::empty())
            .await
            .unwrap();
        let to = Device::open(Memory::new(SIZE)).await.unwrap();
        target = Some(to.clone());
        server.export("from", from).export("to", to)
    });
    let (from, to) = (served.uris("from"), served.uris("to"));
    succeed(&nbdcopy, &["--connections=4", "--flush", &from[0], &to[1]]);
    let mut copied = vec![0xee; SIZE as usize];
    served
        .block_on(target.unwrap().read(&mut ReadBuf::new(&mut copied), 0))
        .unwrap();
    assert_same(&bytes, &copied, "the copy");
}

#[test]
fn python_sends_every_command() {
    python("commands.py");
}

#[test]
fn python_sends_bad_requests_and_the_connection_goes_on() {
    python("bad_requests.py");
}

#[test]
fn python_walks_through_the_options() {
    python("options.py");
}

/// Runs a script with the URIs of a writable and of a read-only export, over each transport.
fn python(script: &str) {
    let Some(python) = need::python("nbd") else {
        return;
    };
    let script = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/python")
        .join(script);
    for transport in 0..2 {
        let served = Served::also_read_only(SIZE);
        let uris = ["disk", "read-only"].map(|name| served.uris(name)[transport].clone());
        succeed(&python, &[script.to_str().unwrap(), &uris[0], &uris[1]]);
    }
}
