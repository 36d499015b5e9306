//! A process that serves a file is killed at any moment: what it had answered is there.
//!
//! The bytes are in the page cache then, not lost with the process: this shows that nothing answered was still in the
//! process's own memory, that no killed write lands later, and that the lock goes with its owner. It shows nothing about a
//! machine that stops; that is for the simulated disk.
#![cfg(unix)]

#[path = "common/runtime.rs"]
mod runtime;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use runtime::block_on;
use userland_io::engines::File;
use userland_io::transports::nbd::{Client, Server};
use userland_io::{Checked, Device, Engine, ReadBuf, WriteBuf, WriteFlags};
use userland_io_testing::check::{History, Request, Shape};

const IMAGE: &str = "ULIO_KILL_IMAGE";
const SOCKET: &str = "ULIO_KILL_SOCKET";
const BLOCK: usize = 4096;
const BLOCKS: usize = 24;
const CLIENTS: usize = 4;

/// Not a test by itself: what is killed.
#[test]
#[ignore = "the child process of the tests beside it"]
fn child_serves_an_image() {
    let (Ok(image), Ok(socket)) = (std::env::var(IMAGE), std::env::var(SOCKET)) else {
        return;
    };
    block_on(async {
        let file = File::open(&image).size((BLOCK * BLOCKS) as u64).await;
        let device = Device::open(file.unwrap()).await.unwrap();
        let address = format!("unix:{socket}");
        let server = Server::new().export("", device).bind([address]).await;
        let _server = server.unwrap();
        println!("serving");
        std::future::pending::<()>().await;
    });
}

fn serve(image: &str, socket: &str) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([
        "--exact",
        "child_serves_an_image",
        "--ignored",
        "--nocapture",
    ]);
    command.env(IMAGE, image).env(SOCKET, socket);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    let ready = out
        .lines()
        .map_while(Result::ok)
        .any(|line| line.contains("serving"));
    assert!(ready, "the child ended before it served");
    child
}

/// Writes at random until the server is gone, each write noted before it is asked and after it was answered.
async fn load(uri: &str, history: &Mutex<History>, number: usize, gone: &AtomicBool) {
    let client = Client::builder(uri).reconnect(Duration::ZERO).connect();
    let Ok(client) = client.await else { return };
    let disk = Checked::new(client).unwrap();
    while !gone.load(Ordering::Acquire) {
        let at = fastrand::usize(..BLOCKS);
        let cells = at..(at + fastrand::usize(1..5)).min(BLOCKS);
        let (id, content) = {
            let mut history = history.lock().unwrap();
            let id = history.start(number, Request::Write(cells, WriteFlags::empty()));
            (id, history.content(id))
        };
        let buf = WriteBuf::new(&content);
        let write = disk.write(&buf, (at * BLOCK) as u64, WriteFlags::empty());
        let write = tokio::time::timeout(Duration::from_secs(60), write);
        match write.await {
            Ok(Ok(())) => history.lock().unwrap().end(id, &Ok(())),
            // The server was killed: the write may have acted, or not.
            _ => return,
        }
    }
}

fn kill(times: u32) {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img").display().to_string();
    let socket = dir.path().join("s").display().to_string();
    let uri = format!("nbd+unix:///?socket={socket}");
    let shape = Shape {
        cell: BLOCK,
        len: BLOCK * BLOCKS,
        // The file has blocks of a byte: writes that overlap in flight may mix.
        whole: false,
        atomic_reads: false,
        atomic_cells: 0,
    };
    let run = fastrand::u64(..);
    let (mut next, mut answered) = (1, 0);
    let mut before = vec![0; shape.len];
    for round in 0..times {
        let mut child = serve(&image, &socket);
        let history = Arc::new(Mutex::new(History::new(run, next, shape, before)));
        let gone = Arc::new(AtomicBool::new(false));
        let after = Duration::from_micros(fastrand::u64(2_000..120_000));
        block_on(async {
            let mut clients = tokio::task::JoinSet::new();
            for number in 0..CLIENTS {
                let (uri, history, gone) = (uri.clone(), history.clone(), gone.clone());
                clients.spawn(async move { load(&uri, &history, number, &gone).await });
            }
            tokio::time::sleep(after).await;
            child.kill().unwrap();
            gone.store(true, Ordering::Release);
            clients.join_all().await;
        });
        child.wait().unwrap();
        let mut history = Arc::into_inner(history).unwrap().into_inner().unwrap();
        history.killed();
        // Opened at once: the lock went with the process.
        let image = block_on(async {
            let file = Checked::new(File::open(&image).await.unwrap()).unwrap();
            let mut bytes = vec![0; shape.len];
            file.read(&mut ReadBuf::new(&mut bytes), 0).await.unwrap();
            file.close().await.unwrap();
            bytes
        });
        let id = history.start(0, Request::Read(0..BLOCKS));
        history.end_read(id, &Ok(image.clone()));
        if let Err(verdict) = history.check_live() {
            panic!("kill {round}, after {after:?}: {verdict}");
        }
        answered += history.next_op() - next;
        next = history.next_op();
        before = image;
    }
    println!("{times} kills, {answered} writes");
    assert!(
        answered > times * 4,
        "only {answered} writes: that is no load"
    );
}

#[test]
fn what_was_answered_survives_20_kills() {
    kill(20);
}

#[test]
#[ignore = "long"]
fn what_was_answered_survives_200_kills() {
    kill(200);
}
