//! Exports of somebody's NBD server, attached by the kernel's NBD client itself or by ours.
#![cfg(all(feature = "attach", target_os = "linux"))]

#[path = "common/attach.rs"]
mod attach;
#[path = "common/kernel_nbd.rs"]
mod driver;
#[path = "common/need.rs"]
mod need;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command};

use attach::{Aligned, direct, sysfs, told, until};
use driver::{SIZE, devices, memory, turn};
use rustix::fs::{FallocateFlags, fallocate};
use userland_io::attach::{Builder, Listed, Via, list};

const MIB: u64 = 1 << 20;

/// A server of somebody else's, which ends with this.
struct Server {
    process: Child,
    uri: String,
    _directory: tempfile::TempDir,
}

impl Server {
    /// nbdkit, serving 16 MiB of memory through `filters` with `more` parameters.
    fn nbdkit(filters: &[&str], more: &[&str]) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let mut nbdkit = Command::new(need::program("nbdkit")?);
        nbdkit
            .args(["--foreground", "--exit-with-parent", "--unix"])
            .arg(&socket);
        nbdkit.args(filters).args(["memory", "16M"]).args(more);
        let mut process = nbdkit.spawn().unwrap();
        until("nbdkit listens", || {
            assert_eq!(process.try_wait().unwrap(), None, "nbdkit has ended");
            socket.exists()
        });
        Some(Server {
            process,
            uri: format!("nbd+unix:///?socket={}", socket.display()),
            _directory: directory,
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// What stands on record about the device.
fn on_record(path: &Path) -> Listed {
    let mut all = list().unwrap().into_iter();
    all.find(|listed| listed.path() == Some(path)).unwrap()
}

#[tokio::test]
async fn an_export_is_handed_to_the_kernel() {
    let Some(_turn) = turn().await else { return };
    let Some(server) = Server::nbdkit(&[], &[]) else {
        return;
    };
    let before = devices();
    let mut attached = Builder::export(&server.uri)
        .queues(2)
        .attach()
        .await
        .unwrap();
    let path = attached.path().to_owned();
    assert_eq!((attached.via(), attached.size()), (Via::Nbd, SIZE));
    assert!(attached.passed_over().is_empty());
    let queues = sysfs(&path).join("mq");
    assert_eq!(fs::read_dir(queues).unwrap().count(), 2, "connections");
    let listed = on_record(&path);
    assert_eq!(listed.server(), Some(server.uri.as_str()));
    assert_eq!(listed.label(), server.uri);
    assert_eq!(listed.counters(), None);
    let file = direct(&path);
    file.write_all_at(&Aligned::filled(65536, 4), MIB).unwrap();
    file.sync_all().unwrap();
    drop(file);
    attached.detach().await.unwrap();
    assert_eq!(devices(), before);
    // The server has gone on, and has what was written.
    let mut attached = Builder::export(&server.uri)
        .read_only(true)
        .attach()
        .await
        .unwrap();
    assert_eq!(told(attached.path(), "ro"), "1");
    let listed = on_record(attached.path());
    assert!(listed.is_read_only());
    let mut back = Aligned::new(65536);
    direct(attached.path())
        .read_exact_at(&mut back, MIB)
        .unwrap();
    assert!(back.iter().all(|byte| *byte == 4));
    attached.detach().await.unwrap();
}

#[tokio::test]
async fn an_export_has_ended_when_its_server_has() {
    let Some(_turn) = turn().await else { return };
    let Some(mut server) = Server::nbdkit(&[], &[]) else {
        return;
    };
    let before = devices();
    let attached = Builder::export(&server.uri).attach().await.unwrap();
    let file = direct(attached.path());
    server.process.kill().unwrap();
    let why = attached.ended().await.unwrap();
    assert!(why.contains("ended its connections"), "{why}");
    assert!(file.read_exact_at(&mut Aligned::new(4096), 0).is_err());
    drop(file);
    until("the device is gone", || devices() == before);
}

#[tokio::test]
async fn an_export_that_the_kernel_cannot_use_is_attached_by_our_client() {
    let Some(_turn) = turn().await else { return };
    let policy = [
        "blocksize-minimum=65536",
        "blocksize-preferred=65536",
        "blocksize-error-policy=error",
    ];
    let Some(server) = Server::nbdkit(&["--filter=blocksize-policy"], &policy) else {
        return;
    };
    let attaching = Builder::export(&server.uri).via(Via::Nbd);
    let mut attached = attaching.attach().await.unwrap();
    let passed = attached.passed_over();
    assert!(
        passed[0].reason.ends_with("longer than a page"),
        "{passed:?}"
    );
    let file = direct(attached.path());
    file.write_all_at(&Aligned::filled(4096, 6), 4096).unwrap();
    let mut back = Aligned::new(4096);
    file.read_exact_at(&mut back, 4096).unwrap();
    assert_eq!(back[0], 6);
    drop(file);
    let listed = on_record(attached.path());
    assert_eq!(listed.server(), None);
    assert!(listed.counters().is_some());
    attached.detach().await.unwrap();
}

#[tokio::test]
async fn an_export_that_cannot_zero_is_never_asked_to() {
    let Some(_turn) = turn().await else { return };
    let Some(server) = Server::nbdkit(&["--filter=nozero"], &[]) else {
        return;
    };
    let before = devices();
    // Leaves a device behind that could.
    let able = Builder::new(memory(SIZE).await).via(Via::Nbd);
    able.attach().await.unwrap().detach().await.unwrap();
    let mut attached = Builder::export(&server.uri).attach().await.unwrap();
    assert_eq!(told(attached.path(), "queue/write_zeroes_max_bytes"), "0");
    let file = direct(attached.path());
    file.write_all_at(&Aligned::filled(4096, 6), 0).unwrap();
    fallocate(&file, FallocateFlags::ZERO_RANGE, 0, MIB).unwrap();
    let mut back = Aligned::filled(4096, 1);
    file.read_exact_at(&mut back, 0).unwrap();
    assert_eq!(back[0], 0);
    drop(file);
    attached.detach().await.unwrap();
    until("the device is gone", || devices() == before);
}

#[tokio::test]
async fn a_server_that_is_not_there_is_said_to_be_so() {
    let Some(_turn) = turn().await else { return };
    let refused = Builder::export("nbd+unix:///?socket=/nowhere")
        .attach()
        .await;
    let error = refused.unwrap_err().to_string();
    assert!(error.contains("cannot connect to"), "{error}");
    assert!(
        list()
            .unwrap()
            .iter()
            .all(|listed| !listed.label().contains("nowhere"))
    );
}
