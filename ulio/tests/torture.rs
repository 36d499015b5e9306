//! `ulio torture`: what it finds, how it tells, and what it asks before it destroys anything.

mod common;

use common::{Server, Ulio};

#[test]
fn a_stack_in_order_passes_in_the_simulated_world() {
    let ulio = Ulio::new();
    let ran = ulio.run("torture memory:64M --seeds 500");
    assert!(ran.ok().contains("no promise was broken"), "{ran:?}");
    assert!(
        ran.out.contains("500 runs") && ran.out.contains("crashes"),
        "{ran:?}"
    );
    assert!(ran.err.contains("played by a simulated disk"), "{ran:?}");
}

#[test]
fn a_file_that_is_simulated_is_neither_made_nor_touched() {
    let ulio = Ulio::new();
    ulio.run("torture file:new.img,size=1M offset:4K --seeds 100")
        .ok();
    assert!(!ulio.path("new.img").exists());
    ulio.write("old.img", &[7; 65536]);
    ulio.run("torture file:old.img stats --seeds 100").ok();
    assert_eq!(ulio.read("old.img"), [7; 65536]);
}

#[test]
fn a_broken_claim_is_reported_with_a_script_that_fails_again() {
    let ulio = Ulio::new();
    let ran = ulio.run("torture --claim sync memory:64K offset:8K");
    assert_eq!(ran.code, Some(1), "{ran:?}");
    for part in [
        "broken: C3",
        "> ",
        "#[test]",
        "simulate(",
        "ulio torture --claim sync --script '",
    ] {
        assert!(ran.out.contains(part), "`{part}` is missing: {ran:?}");
    }
    assert!(
        ran.err
            .ends_with("error: memory:64K offset:8K broke a promise\n"),
        "{ran:?}"
    );

    let command = ran
        .out
        .lines()
        .find(|line| line.contains("ulio torture --claim"))
        .unwrap();
    let script = command.split('\'').nth(1).unwrap();
    let replay = [
        "torture",
        "--claim",
        "sync",
        "--script",
        script,
        "memory:64K",
        "offset:8K",
    ];
    let again = ulio.run_all(replay);
    assert_eq!(again.code, Some(1), "{again:?}");
    assert!(again.out.contains("broken: C3"), "{again:?}");
    // The weaker claim is kept by the same run.
    let replay = [
        "torture",
        "--claim",
        "flush",
        "--script",
        script,
        "memory:64K",
        "offset:8K",
    ];
    ulio.run_all(replay).ok();
}

#[test]
fn one_seed_is_run_alone() {
    let ran = Ulio::new().run("torture memory:64K --seed 7 --jobs 1");
    assert!(ran.ok().contains("1 runs"), "{ran:?}");
}

#[test]
fn crashes_are_judged_through_a_socket_too() {
    let ulio = Ulio::new();
    let line = "torture --through nbd --clients 2 --connections 2 --seeds 40 file:x,size=64K";
    assert!(ulio.run(line).ok().contains("crashes"));
    let line = "torture --gentle --through nbd --claim sync --seeds 2000 memory:64K";
    let ran = ulio.run(line);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(
        ran.out.contains("broken: C3") && ran.out.contains("subject_over"),
        "{ran:?}"
    );
}

#[test]
fn what_needs_real_time_is_checked_for_real_and_says_so() {
    let ulio = Ulio::new();
    let ran = ulio.run("torture memory:64K delay:10us --seeds 10");
    ran.ok();
    assert!(
        ran.err.contains("no crashes") && ran.err.contains("`delay` needs real time"),
        "{ran:?}"
    );
    let ran = ulio.run("torture memory:64K fault:EIO,probability=5% --seeds 10");
    ran.ok();
}

#[test]
fn a_disk_that_forgets_is_found() {
    let ran = Ulio::new().run("torture null:64K");
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.out.contains("broken:"), "{ran:?}");
}

#[test]
fn nothing_that_is_there_is_overwritten_unasked() {
    let ulio = Ulio::new();
    ulio.write("old.img", &[7; 65536]);
    let refused = ["destroys what", "say --overwrite"];
    ulio.run("torture --real file:old.img").fails(2, &refused);
    ulio.run("torture file:old.img delay:1us")
        .fails(2, &refused);
    ulio.run("torture --uri nbd://127.0.0.1:1")
        .fails(2, &refused);
    ulio.run("torture nbd://127.0.0.1:1").fails(2, &refused);
    assert_eq!(ulio.read("old.img"), [7; 65536]);
    ulio.run("torture --real --overwrite --seeds 5 file:old.img")
        .ok();
    assert_ne!(ulio.read("old.img"), [7; 65536]);
}

#[test]
fn a_running_server_is_tortured_by_its_uri() {
    let ulio = Ulio::new();
    let listen = "nbd+unix:///?socket=s";
    let server = Server::start(&ulio, &format!("serve memory:200K --listen {listen}"), 1);
    let line = format!(
        "torture --overwrite --seeds 10 --clients 4 --uri {}",
        server.uris[0]
    );
    let ran = ulio.run(&line);
    assert!(ran.ok().contains("no promise was broken"), "{ran:?}");
    server.stop();

    let server = Server::start(&ulio, &format!("serve null:200K --listen {listen}"), 1);
    let ran = ulio.run(&line);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.out.contains("broken:"), "{ran:?}");
    server.stop();
}

#[test]
fn what_contradicts_itself_is_a_usage_error() {
    let ulio = Ulio::new();
    ulio.run("torture memory:64K delay:1us --claim sync")
        .fails(2, &["only a simulated disk crashes"]);
    ulio.run("torture memory:64K --connections 4")
        .fails(2, &["say --through nbd, or --uri"]);
    assert_eq!(ulio.run("torture").code, Some(2));
    assert_eq!(ulio.run("torture memory:1K --seeds 5..5").code, Some(2));
    assert_eq!(
        ulio.run("torture memory:1K --script nonsense").code,
        Some(2)
    );
}
