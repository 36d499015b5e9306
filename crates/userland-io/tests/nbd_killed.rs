//! The NBD client and servers that are killed or restarted under load: what was answered is there.
#![cfg(feature = "nbd")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use userland_io::engines::Memory;
use userland_io::transports::nbd::{Client, Server};
use userland_io::{Device, ReadBuf, WriteBuf, WriteFlags};
mod nbd_peers;
use nbd_peers::requests::NONE;
use nbd_peers::{Peer, within};

/// What was answered is in the image, however often the server was killed.
async fn loses_nothing_when_killed(peer: Peer, connections: usize) {
    let (uri, image) = (peer.uri(), peer.image());
    let mut peer = Some(peer);
    let model = under_load(&uri, connections, async || {
        if let Some(mut killed) = peer.take() {
            let restart = tokio::task::spawn_blocking(move || {
                killed.kill();
                killed.restart();
                killed
            });
            peer = Some(restart.await.unwrap());
        }
    })
    .await;
    let image = std::fs::read(image).unwrap();
    assert!(image[..model.len()] == model, "the image differs");
}

/// Restarts a server five times under six writers, each on a part of its own; gives what it has to hold then.
async fn under_load(uri: &str, connections: usize, mut restart: impl AsyncFnMut()) -> Vec<u8> {
    const PART: u64 = 1 << 20;
    let client = Client::builder(uri)
        .connections(connections)
        .connect()
        .await
        .unwrap();
    assert_eq!(client.connections(), connections);
    let device = Device::open(client).await.unwrap();
    let done = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let tasks: Vec<_> = (0..6u64)
        .map(|part| {
            let (device, done, stop) = (device.clone(), done.clone(), stop.clone());
            tokio::spawn(async move {
                let mut random = fastrand::Rng::with_seed(part);
                let mut model = vec![0u8; PART as usize];
                while !stop.load(Ordering::Relaxed) {
                    let start = random.u64(0..PART - 1);
                    let end = (start + random.u64(1..30_000)).min(PART);
                    let mine = start as usize..end as usize;
                    let at = part * PART + start;
                    match random.u8(0..10) {
                        0..=3 => {
                            let mut bytes = vec![1; mine.len()];
                            device
                                .read(&mut ReadBuf::new(&mut bytes), at)
                                .await
                                .unwrap();
                            assert!(bytes == model[mine], "{at}+{} differs", end - start);
                        }
                        4..=7 => {
                            let bytes: Vec<u8> = mine.clone().map(|_| random.u8(..)).collect();
                            let flags = match random.u8(0..6) {
                                0 => WriteFlags::FUA,
                                _ => NONE,
                            };
                            device
                                .write(&WriteBuf::new(&bytes), at, flags)
                                .await
                                .unwrap();
                            model[mine].copy_from_slice(&bytes);
                        }
                        8 => {
                            device
                                .write_zeroes(at..at + end - start, NONE)
                                .await
                                .unwrap();
                            model[mine].fill(0);
                        }
                        _ => device.flush().await.unwrap(),
                    }
                    done.fetch_add(1, Ordering::Relaxed);
                }
                let mut bytes = vec![1; PART as usize];
                device
                    .read(&mut ReadBuf::new(&mut bytes), part * PART)
                    .await
                    .unwrap();
                assert!(bytes == model, "part {part} differs at the end");
                model
            })
        })
        .collect();
    for kill in 1..=5u64 {
        within(async {
            while done.load(Ordering::Relaxed) < kill * 150 {
                assert!(tasks.iter().all(|task| !task.is_finished()));
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        restart().await;
    }
    stop.store(true, Ordering::Relaxed);
    let mut models = Vec::new();
    for task in tasks {
        models.extend(within(task).await.unwrap());
    }
    within(device.close()).await.unwrap();
    models
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_when_nbdkit_is_killed_under_load() {
    if let Some(peer) = Peer::nbdkit(&["file", "{dir}/disk"]) {
        loses_nothing_when_killed(peer, 1).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_when_qemu_nbd_is_killed_under_load() {
    if let Some(peer) = Peer::qemu_nbd(&["-f", "raw", "{dir}/disk"]) {
        loses_nothing_when_killed(peer, 1).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_on_several_connections() {
    if let Some(peer) = Peer::nbdkit(&["file", "{dir}/disk"]) {
        loses_nothing_when_killed(peer, 4).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_when_our_own_server_is_restarted_under_load() {
    let disk = Device::open(Memory::new(8 << 20)).await.unwrap();
    let serve = async |address: &str| {
        Server::new()
            .export("disk", disk.clone())
            .bind([address])
            .await
            .unwrap()
    };
    let first = serve("nbd://127.0.0.1:0").await;
    let address = format!("nbd://{}", first.addresses()[0]);
    let uri = first.uri("disk").to_string();
    let mut server = Some(first);
    let model = under_load(&uri, 3, async || {
        if let Some(old) = server.take() {
            within(old.shutdown()).await.unwrap();
        }
        server = Some(serve(&address).await);
    })
    .await;
    let mut bytes = vec![1; model.len()];
    disk.read(&mut ReadBuf::new(&mut bytes), 0).await.unwrap();
    assert!(bytes == model, "the disk differs");
}
