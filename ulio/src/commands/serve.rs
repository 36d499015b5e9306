//! `ulio serve`: disks for NBD clients, and as files, until a signal ends it.
//!
//! All words are read before anything is opened, and all disks opened before
//! anybody can connect. In the end: the server finishes what is in flight and
//! flushes, then each disk is closed; a failure there is the command's failure.

use serde::Serialize;
use userland_io::stack::{Plan, Registry};
use userland_io::transports::nbd::{Address, Limits, Server, ServerHandle, Uri};
use userland_io::{Device, Result as IoResult};

use crate::cli::Serve;
use crate::errors::Failure;
use crate::files::{self, Files};
use crate::output::{Results, note, size};
use crate::signals::Signals;
use crate::stacks;

/// Both loopback addresses, on NBD's own port.
const DEFAULT_ADDRESS: &str = "nbd://";
/// What a service manager has opened.
const ACTIVATED: &str = "systemd:";

pub(crate) async fn run(arguments: Serve, registry: &Registry) -> Result<(), Failure> {
    let plans = plans(&arguments, registry)?;
    // Before an image is created: from here on a signal ends it in order.
    let mut signals = Signals::listen()?;
    let (served, disks) = tokio::select! {
        started = start(&arguments, &plans) => started?,
        () = signals.next() => return Err(Failure::Failed("interrupted before it served".to_owned())),
    };
    if let Err(failure) = announce(&arguments, &served, &disks) {
        // Nobody was told where to find it. What comes of ending it matters less than why.
        let _ = served.end().await;
        let _ = close(disks).await;
        return Err(failure);
    }

    tokio::select! {
        () = signals.next() => {}
        () = served.ended() => note("the file was unmounted"),
    }
    note("stopping: finishing requests and flushing; once more leaves at once");
    signals.leave_on_next("without waiting for the disks");
    let ended = served.end().await;
    let closed = close(disks).await;
    ended?;
    closed
}

/// What disks are reached by.
struct Served {
    /// `None` if there are files alone.
    server: Option<ServerHandle>,
    files: Files,
}

impl Served {
    /// Resolves when nothing is left by which a disk could be reached.
    async fn ended(&self) {
        match self.server {
            Some(_) => std::future::pending().await,
            None => self.files.ended().await,
        }
    }

    /// Finishes what is in flight, and flushes.
    async fn end(self) -> Result<(), Failure> {
        let unmounted = self.files.unmount().await;
        let ended = match self.server {
            Some(server) => server.shutdown().await,
            None => Ok(()),
        };
        ended.map_err(|error| Failure::of("flushing the disks", error))?;
        unmounted
    }
}

/// An export.
struct Disk {
    name: String,
    stack: String,
    device: Device,
}

impl Disk {
    /// The disk as it is served.
    fn shown(&self, arguments: &Serve) -> Device {
        match arguments.read_only {
            true => self.device.read_only(),
            false => self.device.clone(),
        }
    }

    fn read_only(&self, arguments: &Serve) -> bool {
        arguments.read_only || self.device.geometry().is_read_only()
    }
}

/// Opens all disks, then the addresses.
async fn start(
    arguments: &Serve,
    plans: &[(String, Plan)],
) -> Result<(Served, Vec<Disk>), Failure> {
    let mut disks = Vec::new();
    for (name, plan) in plans {
        match stacks::open(plan).await {
            Ok(device) => disks.push(Disk {
                name: name.clone(),
                stack: plan.to_string(),
                device,
            }),
            Err(failure) => return Err(close(disks).await.err().unwrap_or(failure)),
        }
    }
    match bind(arguments, &disks).await {
        Ok(served) => Ok((served, disks)),
        Err(failure) => {
            close(disks).await?;
            Err(failure)
        }
    }
}

/// The exports' names and stacks, the default one first. Nothing is opened yet.
fn plans(arguments: &Serve, registry: &Registry) -> Result<Vec<(String, Plan)>, Failure> {
    let mut plans: Vec<(String, Plan)> = Vec::new();
    if !arguments.stack.is_empty() {
        plans.push((String::new(), stacks::parse(&arguments.stack, registry)?));
    }
    for export in &arguments.export {
        if plans.iter().any(|(name, _)| *name == export.name) {
            return Err(Failure::Usage(match export.name.as_str() {
                "" => {
                    "the default export is given twice: as words, and as --export =...".to_owned()
                }
                name => format!("the export `{name}` is given twice: choose another name"),
            }));
        }
        plans.push((export.name.clone(), registry.parse(&export.stack)?));
    }
    let wants_file = arguments
        .listen
        .iter()
        .any(|address| files::path(address).is_some());
    if wants_file && plans.len() > 1 {
        return Err(Failure::Usage(format!(
            "a file is one disk, and this would serve {}: leave --listen fuse:... or all exports but one out",
            plans.len()
        )));
    }
    Ok(plans)
}

async fn bind(arguments: &Serve, disks: &[Disk]) -> Result<Served, Failure> {
    let files = mount(arguments, disks).await?;
    let addresses: Vec<&String> = arguments
        .listen
        .iter()
        .filter(|address| files::path(address).is_none())
        .collect();
    if addresses.is_empty() && !arguments.listen.is_empty() {
        return Ok(Served {
            server: None,
            files,
        });
    }
    match bind_server(arguments, &addresses, disks).await {
        Ok(server) => Ok(Served {
            server: Some(server),
            files,
        }),
        Err(error) => {
            files.unmount().await?;
            Err(Failure::Failed(error.to_string()))
        }
    }
}

/// Mounts the files that were asked for.
async fn mount(arguments: &Serve, disks: &[Disk]) -> Result<Files, Failure> {
    let paths: Vec<_> = arguments
        .listen
        .iter()
        .filter_map(|address| files::path(address))
        .collect();
    match disks {
        [disk] if !paths.is_empty() => Files::mount(&disk.shown(arguments), &paths).await,
        _ => Ok(Files::default()),
    }
}

async fn bind_server(
    arguments: &Serve,
    addresses: &[&String],
    disks: &[Disk],
) -> IoResult<ServerHandle> {
    let mut limits = Limits::default();
    limits.handshake_timeout = arguments.handshake_timeout;
    limits.max_connections = arguments.max_connections;
    let mut server = Server::new()
        .limits(limits)
        .socket_mode(arguments.socket_mode);
    for disk in disks {
        server = server
            .export(&disk.name, disk.shown(arguments))
            .description(description(&disk.stack));
    }
    match (addresses, is_activated()) {
        ([], true) => server.bind([ACTIVATED]).await,
        ([], false) => server.bind([DEFAULT_ADDRESS]).await,
        (addresses, _) => server.bind(addresses).await,
    }
}

/// `stack` as clients are told it, who take no more than 4096 bytes.
fn description(stack: &str) -> String {
    const MOST: usize = 4096;
    const DOTS: &str = "...";
    if stack.len() <= MOST {
        return stack.to_owned();
    }
    let mut end = MOST - DOTS.len();
    while !stack.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{DOTS}", &stack[..end])
}

/// True if a service manager has handed sockets to this very process (sd_listen_fds(3)).
fn is_activated() -> bool {
    let variable = |name| std::env::var(name).ok();
    let own = std::process::id().to_string();
    variable("LISTEN_FDS").is_some() && variable("LISTEN_PID") == Some(own)
}

/// Closes all of them, and tells of the first failure.
async fn close(disks: Vec<Disk>) -> Result<(), Failure> {
    let mut first = Ok(());
    for disk in disks {
        let closed = stacks::close(disk.device, &disk.stack).await;
        first = first.and(closed);
    }
    first
}

/// Tells programs where the exports are, and people what to type.
fn announce(arguments: &Serve, served: &Served, disks: &[Disk]) -> Result<(), Failure> {
    let exports: Vec<_> = disks
        .iter()
        .map(|disk| About::new(disk, served, arguments))
        .collect();
    let mut results = Results::begin();
    let told = match arguments.json {
        true => results.json(&serde_json::json!({ "exports": exports })),
        false => exports
            .iter()
            .flat_map(|export| export.uris.iter().chain(&export.files))
            .try_for_each(|place| results.line(place)),
    };
    match told.and_then(|()| results.end()) {
        // It serves all the same.
        Err(Failure::OutputGone) => {}
        other => other?,
    }
    let Some(first) = disks.first() else {
        return Ok(());
    };
    let what = match disks {
        [disk] => format!("`{}`, {}", disk.stack, size(disk.device.geometry().size)),
        disks => format!("{} exports", disks.len()),
    };
    note(&format!(
        "serving {what}; Ctrl-C flushes and stops. To try in another terminal:"
    ));
    let read_only = first.read_only(arguments);
    let mut commands = Vec::new();
    if let Some(server) = &served.server {
        commands = to_try(&server.uri(&first.name), read_only);
    }
    if let Some(file) = served.files.paths().next() {
        commands.extend(to_try_with(&quoted(&file.display().to_string()), read_only));
    }
    for command in commands {
        note(&format!("  {command}"));
    }
    Ok(())
}

#[derive(Serialize)]
struct About<'a> {
    name: &'a str,
    size: u64,
    read_only: bool,
    uris: Vec<String>,
    files: Vec<String>,
}

impl<'a> About<'a> {
    fn new(disk: &'a Disk, served: &Served, arguments: &Serve) -> Self {
        let addresses = served.server.iter().flat_map(ServerHandle::addresses);
        About {
            name: &disk.name,
            size: disk.device.geometry().size,
            read_only: disk.read_only(arguments),
            uris: addresses
                .map(|address| Uri::new(address.clone(), &disk.name).to_string())
                .collect(),
            files: served
                .files
                .paths()
                .map(|path| path.display().to_string())
                .collect(),
        }
    }
}

/// Commands for clients that people have.
fn to_try(uri: &Uri, read_only: bool) -> Vec<String> {
    let address = quoted(&uri.to_string());
    let mut list = vec![
        format!("{} info {address}", program()),
        format!("nbdinfo {address}"),
        format!("nbdcopy -p {address} copy.img"),
    ];
    if !read_only {
        list.push(format!("nbdcopy -p image.img {address}"));
    }
    list.push(format!("qemu-img info {address}"));
    let name = match uri.export() {
        "" => String::new(),
        name => format!(" -N {}", quoted(name)),
    };
    match uri.address() {
        Address::Tcp { host, port } => {
            list.push(format!("sudo nbd-client {host} {port} /dev/nbd0{name}"))
        }
        Address::Unix(path) => list.push(format!(
            "sudo nbd-client -unix {} /dev/nbd0{name}",
            quoted(&path.display().to_string())
        )),
        _ => {}
    }
    list
}

/// Commands for a file.
fn to_try_with(file: &str, read_only: bool) -> Vec<String> {
    let mut list = vec![format!("qemu-img info -f raw {file}")];
    if !read_only {
        list.push(format!("mkfs.ext4 {file}"));
    }
    list.push(format!("sudo losetup --direct-io=on --find --show {file}"));
    list
}

/// This program as it was called, so that what is printed works where it is on no search path.
fn program() -> String {
    let called = std::env::args().next();
    match called.filter(|path| path.contains('/')) {
        Some(path) => quoted(&path),
        None => "ulio".to_owned(),
    }
}

/// For a shell.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:+@%,".contains(c);
    match !text.is_empty() && text.chars().all(plain) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_stack_is_cut_where_a_character_ends() {
        let whole = "\u{e9}".repeat(2048);
        assert_eq!(description(&whole), whole);
        let cut = description(&format!("{whole}x"));
        assert_eq!(cut, format!("{}...", "\u{e9}".repeat(2046)));
    }

    #[test]
    fn what_to_type_survives_a_shell() {
        let uri: Uri = "nbd+unix:///it's?socket=/tmp/a%20b".parse().unwrap();
        let list = to_try(&uri, true);
        assert!(list[1].starts_with("nbdinfo 'nbd+unix:///"), "{list:?}");
        assert_eq!(
            list.last().unwrap(),
            r"sudo nbd-client -unix '/tmp/a b' /dev/nbd0 -N 'it'\''s'"
        );
        assert!(!list.iter().any(|command| command.contains("image.img")));
        let uri: Uri = "nbd://[::1]:10810".parse().unwrap();
        let list = to_try(&uri, false);
        assert!(list.contains(&"sudo nbd-client ::1 10810 /dev/nbd0".to_owned()));
        assert!(list.iter().any(|command| command.contains("image.img")));
    }
}
