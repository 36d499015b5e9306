//! `ulio info`: the numbers, the map, and both forms.

mod common;
use common::Ulio;

#[cfg(unix)]
use std::{
    io::{BufRead, BufReader},
    ops::Range,
    process::Stdio,
    sync::mpsc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
#[cfg(unix)]
use userland_io::{
    Device, Engine, ExtentKind, Extents, Features, Geometry, ReadBuf, Result, transports::nbd,
};

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
    // The sums come last: they are known only then.
    let [runs @ .., empty, sums] = &rows[..] else {
        panic!("{ran:#?}")
    };
    assert_eq!(runs, [["0", "65536", "data"], ["65536", "983040", "hole"]]);
    assert!(empty.is_empty(), "{ran:#?}");
    assert_eq!(
        sums.join(" "),
        "allocation 64 KiB data, 0 bytes zero, 960 KiB hole, in 2 runs"
    );
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

#[test]
fn nothing_is_created_or_grown_by_looking() {
    let ulio = Ulio::new();
    ulio.run("info file:missing.img,size=1M")
        .fails(1, &["missing.img does not exist", "not to be created"]);
    ulio.run("info file:missing.img,size=1M readonly")
        .fails(1, &["missing.img does not exist"]);
    assert!(!ulio.path("missing.img").exists());
    ulio.write("empty.img", &[]);
    ulio.run("info file:empty.img,size=1M")
        .fails(1, &["empty.img has 0 bytes"]);
    assert!(ulio.read("empty.img").is_empty());
    ulio.write("disk.img", &[0; 1 << 20]);
    let ran = ulio.run("info file:disk.img,size=1M");
    assert!(
        ran.ok()
            .starts_with("file:disk.img,size=1M\n  size        1 MiB"),
        "{ran:#?}"
    );
    assert!(
        ran.out.contains("  access      read and write\n"),
        "{ran:#?}"
    );
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
        "  a crash     unknown: NBD does not tell\n",
        "1 byte logical, physical unknown\n",
        "  discard     yes; NBD does not tell what it reads as, nor its granules\n",
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
    assert_eq!(told["discard"], "none");
    let told = json_of(&ulio, &format!("info --json {default}"));
    assert_eq!(
        told["exports"][1],
        json!({ "name": "a", "description": "pattern:1M", "uri": a })
    );
    // Null is what NBD cannot tell; a limit that there is not would be 0.
    for key in [
        "crash",
        "discard",
        "discard_granularity",
        "physical_block_size",
        "atomic_write_unit",
    ] {
        assert_eq!(told[key], Value::Null, "{key}");
    }
    assert_eq!(told["logical_block_size"], 1);
    let other = a.replace("/a", "/b");
    let ran = ulio.run(&format!("info {other}"));
    ran.fails(1, &["the server has no export \"b\""]);
    // Once, and as it was written.
    assert_eq!(ran.err.matches("no export").count(), 1, "{ran:#?}");
    assert!(!ran.err.contains('\\'), "{ran:#?}");
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

/// Alternates between data and holes, and after [`Endless::TOLD`] bytes lets everybody wait.
#[cfg(unix)]
struct Endless;

#[cfg(unix)]
impl Endless {
    const RUN: u64 = 512;
    const TOLD: u64 = 100_000 * Self::RUN;
}

#[cfg(unix)]
impl Engine for Endless {
    fn geometry(&self) -> Geometry {
        let mut geometry = Geometry::read_only(1 << 60);
        geometry.features |= Features::EXTENTS;
        geometry
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, _: u64) -> Result {
        buf.fill(0);
        Ok(())
    }
    async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        if range.start >= Self::TOLD {
            std::future::pending::<()>().await;
        }
        let mut at = range.start;
        while at < range.end && !out.is_full() {
            let end = (at / Self::RUN + 1) * Self::RUN;
            let kind = match at / Self::RUN % 2 {
                0 => ExtentKind::Data,
                _ => ExtentKind::Hole,
            };
            out.push(end.min(range.end) - at, kind);
            at = end;
        }
        Ok(())
    }
}

/// However many runs a server tells, they are printed and not kept.
#[cfg(unix)]
#[test]
fn a_map_is_printed_as_it_comes() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let ulio = Ulio::new();
    let socket = format!("unix:{}", ulio.path("s").display());
    let server = runtime.block_on(async {
        let disk = Device::open(Endless).await.unwrap();
        let server = nbd::Server::new().export("", disk);
        server.bind([&socket]).await.unwrap()
    });
    let uri = server.uri("").to_string();
    for (arguments, row) in [
        (&["info", "--map", &uri][..], "                 512  hole"),
        (&["info", "--map", "--json", &uri], "\"kind\":\"hole\""),
    ] {
        let mut child = ulio
            .command(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let out = child.stdout.take().unwrap();
        let (told, rows) = mpsc::channel();
        let row = row.to_owned();
        std::thread::spawn(move || {
            let lines = BufReader::new(out)
                .lines()
                .map_while(std::result::Result::ok);
            for _ in lines.filter(|line| line.contains(&row)).take(10_000) {
                let _ = told.send(());
            }
        });
        let began = Instant::now();
        while rows.recv_timeout(Duration::from_secs(60)).is_ok() {}
        let waited = began.elapsed();
        let _ = child.kill();
        let output = child.wait_with_output().unwrap();
        assert!(
            waited < Duration::from_secs(60),
            "{arguments:?} keeps its runs: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    // Some still wait for the engine: nothing to be lost there.
    drop(server);
    runtime.shutdown_background();
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
