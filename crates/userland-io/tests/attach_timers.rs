//! Engines that wait for timers and for the network are served at full depth: as many requests wait side by side as there
//! are, and none is noticed late.
#![cfg(all(feature = "attach", target_os = "linux"))]

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsRawFd;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use serde_json::Value;
use tokio::time::timeout;
use userland_io::attach::DetachError;
use userland_io::engines::Memory;
use userland_io::layers::Delay;
use userland_io::transports::nbd::{Client, Server, Uri};
use userland_io::{Checked, Device, Engine, EngineExt, Filter, ReadBuf, Result};

#[path = "common/attach.rs"]
mod attach;
#[path = "common/clients.rs"]
mod clients;
#[path = "common/need.rs"]
mod need;
use attach::{PATIENCE, attached_as, detach, is_free, opened};
use clients::succeed;

/// How long each request takes: long, so that what a busy machine adds is little beside it.
const TIME: Duration = Duration::from_millis(100);
/// How many requests the device has under way at most.
const DEPTH: u16 = 64;
/// linux/fs.h
const BLKRRPART: u32 = 0x125f;
/// A second in which something takes so long is a stall, not a machine that is busy with other things.
const STALL: Duration = Duration::from_millis(950);
/// How many seconds are measured at most. A machine that is busy with other things gets another.
const ROUNDS: u32 = 4;

/// A disk whose every request waits for a timer.
fn slow() -> impl Engine {
    Memory::new(16 << 20).layer(Delay::all(TIME)).unwrap()
}

/// A layer that counts the reads under way.
struct Counted<E> {
    lower: Checked<E>,
    now: AtomicU32,
    most: AtomicU32,
}

impl<E: Engine> Counted<E> {
    fn new(engine: E) -> Self {
        Counted {
            lower: Checked::new(engine).unwrap(),
            now: AtomicU32::new(0),
            most: AtomicU32::new(0),
        }
    }
}

impl<E: Engine> Filter for Counted<E> {
    type Lower = E;
    fn lower(&self) -> &Checked<E> {
        &self.lower
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        let result = self.lower.read(buf, offset).await;
        self.now.fetch_sub(1, Ordering::SeqCst);
        result
    }
}

/// What looks for partitions has the device's lock while it reads, and whoever opens the device waits for it.
#[tokio::test]
async fn a_device_that_is_read_for_partitions_does_not_hang_when_it_is_detached() {
    let slow = Memory::new(16 << 20).layer(Delay::all(TIME / 10)).unwrap();
    let Some(mut disk) = attached_as(&opened(slow).await, |builder| builder).await else {
        return;
    };
    let path = disk.path().to_owned();
    let (tell, told) = mpsc::channel();
    let reader = thread::spawn(move || {
        // Once it is gone the number may be another's.
        while !is_free(&path) {
            let Ok(file) = File::open(&path) else { return };
            // SAFETY: this call takes no argument. It fails while somebody has claimed the device.
            if unsafe { libc::ioctl(file.as_raw_fd(), BLKRRPART as _) } == 0 {
                let _ = tell.send(());
            }
        }
    });
    // The next look is under way at once.
    told.recv_timeout(PATIENCE).unwrap();
    let detaching = async {
        while let Err(error) = disk.detach().await {
            assert!(matches!(error, DetachError::InUse { .. }), "{error}");
        }
    };
    timeout(PATIENCE, detaching).await.expect("it hangs");
    reader.join().unwrap();
    detach(disk).await;
}

#[tokio::test]
async fn an_engine_that_sleeps_is_served_at_full_depth() {
    measure(slow()).await;
}

// The tasks of a client are of the runtime it was opened on, which so needs a thread that the test does not block.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_of_a_server_elsewhere_is_served_at_full_depth() {
    let server = ServerElsewhere::start();
    measure(Client::builder(&server.uri).connect().await.unwrap()).await;
}

/// Reads at random with [`DEPTH`] requests under way, and asserts that they waited side by side and that none was forgotten.
async fn measure(engine: impl Engine) {
    let Some(fio) = need::program("fio") else {
        return;
    };
    let device = opened(Counted::new(engine)).await;
    let Some(disk) = attached_as(&device, |builder| builder.queues(1).depth(DEPTH)).await else {
        return;
    };
    let counted = device.get_ref();
    let [name, depth] = [
        format!("--filename={}", disk.path().display()),
        format!("--iodepth={DEPTH}"),
    ];
    let directory = tempfile::tempdir().unwrap();
    let aux = format!("--aux-path={}", directory.path().display());
    let mut args = vec![
        "--name=read",
        "--ioengine=libaio",
        "--rw=randread",
        "--bs=4k",
    ];
    args.extend([
        "--direct=1",
        "--time_based",
        "--runtime=1",
        "--output-format=json",
    ]);
    args.extend([&name[..], &depth, &aux]);
    let ideal = f64::from(DEPTH) / TIME.as_secs_f64();
    let mut best = 0.0;
    for _ in 0..ROUNDS {
        let text = succeed(&fio, &args);
        let said: Value = serde_json::from_str(&text[text.find('{').unwrap()..]).unwrap();
        let read = &said["jobs"][0]["read"];
        let rate = read["iops"].as_f64().unwrap();
        let longest = Duration::from_nanos(read["lat_ns"]["max"].as_u64().unwrap());
        println!("{rate:.0} reads a second of {ideal:.0}, {longest:?} at most");
        // A wake that only a time-out, or some other event, makes somebody notice would be in each round.
        if longest < STALL {
            best = rate.max(best);
        }
        if best >= 0.8 * ideal {
            break;
        }
    }
    detach(disk).await;
    assert_eq!(counted.most.load(Ordering::SeqCst), u32::from(DEPTH));
    assert!(
        best >= 0.25 * ideal,
        "{best:.0} reads a second of {ideal:.0}: late, or not side by side"
    );
}

/// A server of [`slow`] in a process of its own.
struct ServerElsewhere {
    child: Child,
    /// Kept open: libtest says more than we want to know.
    _output: BufReader<ChildStdout>,
    uri: String,
}

impl ServerElsewhere {
    fn start() -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "child_that_serves", "--ignored", "--nocapture"]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let uri = output
            .by_ref()
            .lines()
            .map(|line| line.unwrap())
            .find_map(|line| Some(line[line.find("nbd://")?..].to_owned()));
        ServerElsewhere {
            child,
            _output: output,
            uri: uri.expect("the server's address"),
        }
    }
}

impl Drop for ServerElsewhere {
    fn drop(&mut self) {
        // The end of its input is what it waits for.
        drop(self.child.stdin.take());
        let ended = self.child.wait().unwrap();
        assert!(ended.success() || std::thread::panicking(), "{ended}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "another test's server"]
async fn child_that_serves() {
    let disk = Device::open(slow()).await.unwrap();
    let server = Server::new()
        .export("", disk)
        .bind(["127.0.0.1:0"])
        .await
        .unwrap();
    println!("{}", Uri::new(server.addresses()[0].clone(), ""));
    let wait = || std::io::stdin().read_to_end(&mut Vec::new());
    tokio::task::spawn_blocking(wait).await.unwrap().unwrap();
    server.shutdown().await.unwrap();
}
