//! `ulio info`: the numbers, the map, and both forms.

mod common;
use common::Ulio;

use serde_json::{Value, json};

fn json_of(ulio: &Ulio, line: &str) -> Value {
    serde_json::from_str(ulio.run(line).ok()).unwrap()
}

#[test]
fn text_tells_size_blocks_claims_and_allocation() {
    let ran = Ulio::new().run("info memory:1000001");
    let out = ran.ok();
    for part in [
        "memory:1000001\n",
        "  size        976.56 KiB (1000001 bytes)\n",
        "  access      read and write\n",
        "  a crash     leaves nothing\n",
        "fua",
        "976.56 KiB hole, in 1 run\n",
    ] {
        assert!(out.contains(part), "{part}: {out}");
    }
    assert_eq!(ran.err, "");
}

#[test]
fn a_read_only_stack_says_so() {
    let ulio = Ulio::new();
    let ran = ulio.run("info memory:1M readonly");
    assert!(ran.ok().contains("  access      read-only\n"), "{ran:#?}");
    let told = json_of(&ulio, "info --json memory:1M readonly");
    assert_eq!(told["read_only"], true);
    assert_eq!(told["stack"], "memory:1M readonly");
}

#[test]
fn json_has_every_number_in_bytes() {
    let told = json_of(&Ulio::new(), "info --json null:3G");
    assert_eq!(told["size"], json!(3_u64 << 30));
    assert_eq!(told["crash"], "none");
    assert_eq!(told["logical_block_size"], 1);
    assert_eq!(
        told["extents"],
        json!({ "data": 0, "zero": 0, "hole": 3_u64 << 30, "runs": 1 })
    );
    assert_eq!(told["map"], Value::Null);
    let features = told["features"].as_array().unwrap();
    assert!(features.contains(&json!("write_zeroes")), "{features:?}");
}

#[test]
fn what_tells_no_extents_counts_as_data() {
    let ulio = Ulio::new();
    let told = json_of(&ulio, "info --json --map pattern:1M");
    assert_eq!(
        (&told["extents"], &told["map"]),
        (&Value::Null, &Value::Null)
    );
    let ran = ulio.run("info --map pattern:1M");
    assert!(ran.ok().contains("all counts as data"), "{ran:#?}");
    assert!(
        ran.ok()
            .ends_with("                   0              1048576  data\n"),
        "{ran:#?}"
    );
}

#[test]
fn the_map_of_a_sparse_file_lists_its_runs() {
    let ulio = Ulio::new();
    ulio.write("disk.img", &vec![7; 64 << 10]);
    let file = std::fs::File::options()
        .write(true)
        .open(ulio.path("disk.img"))
        .unwrap();
    file.set_len(1 << 20).unwrap();
    drop(file);
    let ran = ulio.run("info --map file:disk.img");
    let rows: Vec<Vec<&str>> = ran
        .ok()
        .lines()
        .skip_while(|line| !line.ends_with("kind"))
        .skip(1)
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(rows, [["0", "65536", "data"], ["65536", "983040", "hole"]]);
    let told = json_of(&ulio, "info --json --map file:disk.img");
    assert_eq!(told["extents"]["hole"], 983_040);
    assert_eq!(
        told["map"][1],
        json!({ "offset": 65536, "length": 983_040, "kind": "hole" })
    );
    assert_eq!(told["crash"], "flush");
    assert!(
        told["features"]
            .as_array()
            .unwrap()
            .contains(&json!("survives_kill"))
    );
}

#[test]
fn what_is_not_there_is_one_line_that_says_what_to_do() {
    let ulio = Ulio::new();
    ulio.run("info file:missing.img")
        .fails(1, &["missing.img does not exist", "size"]);
    ulio.run("info file:.").fails(1, &["directory"]);
    ulio.write("disk.img", &[0; 4096]);
    ulio.run("info file:disk.img,size=1M")
        .fails(1, &["disk.img", "4096", "1048576"]);
    assert!(!ulio.path("missing.img").exists());
}

/// A geometry that cannot be is told, not shown.
#[test]
fn a_fault_while_asking_is_an_error() {
    Ulio::new()
        .run("info memory:1M fault:EIO,on=extents")
        .fails(
            1,
            &[
                "asking `memory:1M fault:EIO,on=extents` for its extents",
                "Input/output error",
            ],
        );
}

#[cfg(unix)]
#[test]
fn a_servers_uri_shows_its_default_export_and_lists_all() {
    let ulio = Ulio::new();
    let arguments = "serve memory:3M --export a=pattern:1M --listen unix:s";
    let server = common::Server::start(&ulio, arguments, 2);
    let [default, a] = &server.uris[..] else {
        panic!("{:?}", server.uris)
    };
    let ran = ulio.run(&format!("info {default}"));
    let out = ran.ok();
    for part in [
        "  size        3 MiB (3145728 bytes)\n",
        "  a crash     keeps what a flush covered\n",
        "3 MiB hole",
        &format!("  export      {default}\n"),
        &format!("  export      {a}\n"),
        "pattern:1M",
    ] {
        assert!(out.contains(part), "{part}: {out}");
    }
    let told = json_of(&ulio, &format!("info --json {a}"));
    assert_eq!(
        (&told["size"], &told["read_only"]),
        (&json!(1 << 20), &json!(true))
    );
    assert_eq!(told["exports"], Value::Null);
    let told = json_of(&ulio, &format!("info --json {default}"));
    assert_eq!(
        told["exports"][1],
        json!({ "name": "a", "description": "pattern:1M", "uri": a })
    );
    let other = a.replace("/a", "/b");
    ulio.run(&format!("info {other}"))
        .fails(1, &["the server has no export \"b\""]);
    server.stop().ok();
}

#[cfg(unix)]
#[test]
fn a_server_without_a_default_export_lists_what_it_has() {
    let ulio = Ulio::new();
    let arguments = "serve --export a=memory:1M --export b=memory:2M --listen unix:s";
    let server = common::Server::start(&ulio, arguments, 2);
    let address = server.uris[0].replace("/a", "/");
    let ran = ulio.run(&format!("info {address}"));
    let out = ran.ok();
    assert!(
        out.contains("no default export") && !out.contains("size"),
        "{out}"
    );
    assert!(server.uris.iter().all(|uri| out.contains(uri)), "{out}");
    let told = json_of(&ulio, &format!("info --json {address}"));
    assert_eq!(told["exports"][1]["uri"], json!(server.uris[1]));
    server.stop().ok();
}

#[test]
fn a_server_that_is_not_there_is_asked_after() {
    let ulio = Ulio::new();
    // Bound and not listening: nobody else can answer there.
    let held = tokio::net::TcpSocket::new_v4().unwrap();
    held.bind(([127, 0, 0, 1], 0).into()).unwrap();
    let port = held.local_addr().unwrap().port();
    ulio.run(&format!("info nbd://127.0.0.1:{port}")).fails(
        1,
        &[
            &format!("127.0.0.1:{port}"),
            "Connection refused",
            "is the server running?",
        ],
    );
    ulio.run("info nbds://127.0.0.1")
        .fails_at_length(2, &["TLS is not supported"]);
}
