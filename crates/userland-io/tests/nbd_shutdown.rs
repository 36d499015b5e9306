//! How an NBD server ends: what is in flight, flushes, sockets, dropped handles.

#![cfg(all(feature = "nbd", unix))]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use userland_io::transports::nbd::wire::{
    CommandFlags, OptionHeader, OptionReply, Request, SimpleReply, cmd, opt, rep,
};
use userland_io::transports::nbd::{Address, Limits, Server};
use userland_io::{Device, Engine, Geometry, ReadBuf, Result, WriteBuf, WriteFlags};
#[path = "common/endpoints.rs"]
mod endpoints;
use endpoints::{Counting, bind, gone, greets, server, serves, unix, until_closed};

/// A disk whose reads begin, and end when they are let through.
#[derive(Clone)]
struct Gated {
    counts: Counting,
    begun: Arc<Semaphore>,
    gate: Arc<Semaphore>,
}

impl Gated {
    fn new() -> Self {
        Gated {
            counts: Counting::default(),
            begun: Arc::new(Semaphore::new(0)),
            gate: Arc::new(Semaphore::new(0)),
        }
    }
}

impl Engine for Gated {
    fn geometry(&self) -> Geometry {
        self.counts.geometry()
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, _: u64) -> Result {
        self.begun.add_permits(1);
        self.gate.acquire().await.unwrap().forget();
        buf.fill(7);
        Ok(())
    }
    async fn write(&self, _: &WriteBuf<'_>, _: u64, _: WriteFlags) -> Result {
        Ok(())
    }
    async fn flush(&self) -> Result {
        self.counts.flush().await
    }
}

#[tokio::test]
async fn shutdown_flushes_and_gives_the_device_back_open() {
    let engine = Counting::default();
    let disk = Device::open(engine.clone()).await.unwrap();
    let opened = engine.flushes();
    let server = Server::new()
        .export("disk", disk.clone())
        .bind(["127.0.0.1:0"])
        .await
        .unwrap();
    server.shutdown().await.unwrap();
    assert_eq!((engine.flushes(), engine.closes()), (opened + 1, 0));
    disk.flush().await.unwrap();
    disk.close().await.unwrap();
    assert_eq!(engine.closes(), 1);
}

#[tokio::test]
async fn shutdown_closes_an_engine_of_which_the_server_had_the_last_handle() {
    let engine = Counting::default();
    let disk = Device::open(engine.clone()).await.unwrap();
    let server = Server::new()
        .export("disk", disk)
        .bind(["127.0.0.1:0"])
        .await
        .unwrap();
    server.shutdown().await.unwrap();
    assert_eq!(engine.closes(), 1);
}

#[tokio::test]
async fn a_dropped_handle_ends_the_server_and_cuts_its_connections() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let server = bind(&unix(&path)).await.unwrap();
    let mut stream = UnixStream::connect(&path).await.unwrap();
    assert!(greets(&mut stream).await);
    drop(server);
    until_closed(&mut stream).await;
    gone(&path).await;
}

/// A client in the transmission phase that has sent a read of 512 bytes, which has begun.
async fn reader(path: &Path, disk: &Gated) -> UnixStream {
    let mut stream = UnixStream::connect(path).await.unwrap();
    assert!(greets(&mut stream).await);
    stream.write_all(&[0, 0, 0, 3]).await.unwrap();
    let (option, length) = (opt::GO, 6);
    stream
        .write_all(&OptionHeader { option, length }.encode())
        .await
        .unwrap();
    stream.write_all(&[0; 6]).await.unwrap();
    loop {
        let mut head = [0; OptionReply::LEN];
        stream.read_exact(&mut head).await.unwrap();
        let head = OptionReply::decode(&head).unwrap();
        stream
            .read_exact(&mut vec![0; head.length as usize])
            .await
            .unwrap();
        if head.kind == rep::ACK {
            break;
        }
    }
    let request = Request {
        flags: CommandFlags::empty(),
        command: cmd::READ,
        cookie: 5,
        offset: 0,
        length: 512,
    };
    stream.write_all(&request.encode_compact()).await.unwrap();
    disk.begun.acquire().await.unwrap().forget();
    stream
}

#[tokio::test]
async fn shutdown_closes_the_door_then_waits_for_what_is_in_flight_then_flushes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let engine = Gated::new();
    let disk = Device::open(engine.clone()).await.unwrap();
    let flushes = engine.counts.flushes();
    let server = Server::new()
        .export("disk", disk.clone())
        .bind([unix(&path)])
        .await
        .unwrap();
    let mut client = reader(&path, &engine).await;
    let stopping = tokio::spawn(server.shutdown());
    // The door is closed while the request still runs.
    gone(&path).await;
    assert!(!stopping.is_finished());
    assert_eq!(engine.counts.flushes(), flushes);
    engine.gate.add_permits(1);
    let mut reply = [0; SimpleReply::LEN + 512];
    client.read_exact(&mut reply).await.unwrap();
    let head = SimpleReply::decode(reply.first_chunk().unwrap()).unwrap();
    assert_eq!((head.error, head.cookie), (0, 5));
    assert_eq!(reply[SimpleReply::LEN..], [7; 512]);
    let stopped = tokio::time::timeout(Duration::from_secs(5), stopping).await;
    stopped.unwrap().unwrap().unwrap();
    assert_eq!(engine.counts.flushes(), flushes + 1);
    until_closed(&mut client).await;
}

#[tokio::test]
async fn requests_that_outlast_the_grace_period_are_cut_off() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let engine = Gated::new();
    let disk = Device::open(engine.clone()).await.unwrap();
    let mut limits = Limits::default();
    limits.shutdown_grace = Duration::from_millis(200);
    let server = Server::new().export("disk", disk).limits(limits);
    let server = server.bind([unix(&path)]).await.unwrap();
    let mut client = reader(&path, &engine).await;
    let stopped = tokio::time::timeout(Duration::from_secs(10), server.shutdown()).await;
    stopped.unwrap().unwrap();
    until_closed(&mut client).await;
}

#[tokio::test]
async fn a_dropped_handle_does_not_wait_for_what_is_in_flight() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let engine = Gated::new();
    let disk = Device::open(engine.clone()).await.unwrap();
    let mut limits = Limits::default();
    limits.shutdown_grace = Duration::from_secs(3600);
    let server = Server::new().export("disk", disk).limits(limits);
    let server = server.bind([unix(&path)]).await.unwrap();
    let mut client = reader(&path, &engine).await;
    drop(server);
    until_closed(&mut client).await;
}

#[tokio::test]
async fn serve_runs_until_it_is_dropped() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let address = unix(&path);
    let serving = tokio::spawn(async move { server().await.serve(&address).await });
    let there = async {
        while !serves(&Address::Unix(path.clone())).await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), there)
        .await
        .unwrap();
    assert!(!serving.is_finished());
    serving.abort();
    gone(&path).await;
}
