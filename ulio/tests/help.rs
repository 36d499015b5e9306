//! Help, completions, manual pages, the log, and words that make no sense.

mod common;
use common::Ulio;

const COMMANDS: &[&str] = &[
    "serve",
    "info",
    "copy",
    #[cfg(target_os = "linux")]
    "attach",
    #[cfg(target_os = "linux")]
    "list",
    #[cfg(target_os = "linux")]
    "detach",
    "torture",
    "engines",
    "completions",
    "man",
];

#[test]
fn help_of_each_command_ends_with_examples() {
    let ulio = Ulio::new();
    for command in COMMANDS {
        let ran = ulio.run(&format!("{command} --help"));
        let (_, examples) = ran.ok().split_once("\nExamples:\n").expect(command);
        assert!(
            examples.contains(&format!("  ulio {command}")),
            "{examples}"
        );
    }
    assert!(ulio.run("--help").ok().contains("Examples:"));
    assert!(ulio.run("--version").ok().starts_with("ulio "));
}

#[test]
fn serve_says_every_way_to_write_an_address() {
    let ran = Ulio::new().run("serve --help");
    for form in [
        "nbd://HOST[:PORT]",
        "HOST:PORT",
        "unix:PATH",
        "nbd+unix:///?socket=PATH",
        "systemd:",
    ] {
        assert!(ran.ok().contains(form), "{form}: {ran:#?}");
    }
}

#[test]
fn completions_know_the_commands_and_options() {
    let ulio = Ulio::new();
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let ran = ulio.run(&format!("completions {shell}"));
        let out = ran.ok();
        assert!(
            out.contains("handshake-timeout") && out.contains("engines"),
            "{shell}"
        );
    }
    ulio.run("completions tcsh")
        .fails_at_length(2, &["'tcsh'", "bash"]);
}

#[test]
fn man_writes_a_page_for_each_command() {
    let ulio = Ulio::new();
    assert_eq!(ulio.run("man pages/man1").ok(), "pages/man1\n");
    let pages = COMMANDS.iter().map(|command| format!("ulio-{command}"));
    for page in pages.chain(["ulio".to_owned()]) {
        let text = ulio.read(&format!("pages/man1/{page}.1"));
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains(".SH SYNOPSIS"), "{page}");
        assert!(text.contains("Examples:"), "{page}");
    }
    assert_eq!(
        std::fs::read_dir(ulio.path("pages/man1")).unwrap().count(),
        COMMANDS.len() + 1
    );
    assert!(ulio.run("man").ok().contains(".TH ulio 1"));
}

#[test]
fn man_says_where_it_cannot_write() {
    let ulio = Ulio::new();
    ulio.write("file", b"");
    ulio.run("man file/pages")
        .fails(1, &["writing the pages to file/pages: Not a directory"]);
    ulio.run("man file").fails(
        2,
        &["`file` is a file: name the directory that the pages are to be written to"],
    );
}

#[test]
fn wrong_arguments_are_usage_errors() {
    let ulio = Ulio::new();
    for (line, part) in [
        ("", "Usage: ulio"),
        ("attack", "unrecognized subcommand 'attack'"),
        ("info", "<STACK|URI>"),
        ("copy null:1M", "<TARGET>"),
        ("copy null:1M memory:1M --jobs 0", "a number from 1 to 1024"),
        (
            "copy null:1M memory:1M --request-size 1G",
            "a size from 4K to 64M",
        ),
        ("copy null:1M memory:1M --request-size 1Q", "`Q` is no unit"),
        ("serve", "<STACK>..."),
        ("serve null:1M --socket-mode 0999", "three octal digits"),
        ("serve null:1M --handshake-timeout 5", "no duration"),
        ("serve null:1M --handshake-timeout 0", "longer than nothing"),
        ("serve null:1M --max-connections 0", "a number from 1"),
        (
            "serve null:1M --listen http://x",
            "the scheme \"http\" is not known",
        ),
        ("serve null:1M --listen nbd://localhost/a", "the export `a`"),
        ("serve --export null:1M", "NAME=STACK"),
        ("serve --export a=", "the export `a` has no stack"),
    ] {
        let ran = ulio.run(line);
        assert_eq!(ran.code, Some(2), "{line}: {ran:#?}");
        assert!(ran.err.contains(part), "{line}: {ran:#?}");
        assert_eq!(ran.out, "");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn wrong_arguments_of_attach_are_usage_errors() {
    let ulio = Ulio::new();
    for (line, part) in [
        ("attach", "<STACK>..."),
        ("attach memory:1M --via smoke", "ublk, nbd, fuse"),
        ("attach memory:1M --queues 0", "0 is not in 1.."),
        ("attach memory:1M --depth deep", "invalid digit"),
        ("attach memory:1M,colour=red", "no key `colour`"),
        ("attach mamory:1M --background", "did you mean `memory`?"),
        ("detach", "<DEVICE>..."),
        ("detach /dev/loop0 --stale", "cannot be used with"),
        ("list /dev/loop0", "unexpected argument"),
    ] {
        let ran = ulio.run(line);
        assert_eq!(ran.code, Some(2), "{line}: {ran:#?}");
        assert!(ran.err.contains(part), "{line}: {ran:#?}");
        assert_eq!(ran.out, "");
    }
}

#[test]
fn wrong_words_are_pointed_at() {
    let ulio = Ulio::new();
    ulio.run("info memory:1G,sizzle=2").fails_at_length(
        2,
        &[
            "`memory` has no key `sizzle`",
            "  | memory:1G,sizzle=2\n  |           ^^^^^^",
            "size",
        ],
    );
    ulio.run("copy null:1M mamory:1M").fails_at_length(
        2,
        &["no engine is called `mamory`", "did you mean `memory`?"],
    );
    ulio.run("info disk.img")
        .fails_at_length(2, &["file:disk.img"]);
    ulio.run("serve null:1M --export a=null:1M --export a=null:2M")
        .fails(2, &["the export `a` is given twice"]);
    ulio.run("serve null:1M --export =null:1M")
        .fails(2, &["the default export is given twice"]);
}

#[test]
fn the_log_goes_to_stderr_as_the_filter_says() {
    let ulio = Ulio::new();
    let quiet = ulio.run("info memory:1M");
    let loud = ulio.run("info memory:1M --log trace");
    assert_eq!((quiet.err.as_str(), quiet.ok()), ("", loud.ok()));
    let variable = ulio
        .command(["info", "memory:1M"])
        .env("ULIO_LOG", "nonsense=loud")
        .output();
    common::Ran::from(variable.unwrap()).fails(2, &["ULIO_LOG `nonsense=loud`", "debug"]);
    ulio.run("engines --log x=y=z").fails(2, &["--log `x=y=z`"]);
}
