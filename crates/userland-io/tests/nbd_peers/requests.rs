//! Requests of a client, and a fake server's answers to them, in a line each.

use super::{Fake, FakeConn, within};
use std::sync::Arc;
use tokio::task::JoinHandle;
use userland_io::transports::nbd::session::ReplyMode;
use userland_io::transports::nbd::wire::{Request, cmd, error};
use userland_io::transports::nbd::{Client, ClientBuilder};
use userland_io::{Engine, ReadBuf, Result, WriteBuf, WriteFlags};

pub const NONE: WriteFlags = WriteFlags::empty();

pub async fn read(client: &Client, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0xee; len];
    within(client.read(&mut ReadBuf::new(&mut bytes), offset)).await?;
    Ok(bytes)
}

pub async fn write(client: &Client, offset: u64, bytes: &[u8], flags: WriteFlags) -> Result {
    within(client.write(&WriteBuf::new(bytes), offset, flags)).await
}

/// A fake server, a client of it built as `with` says, and the server's side of the connection.
pub async fn connected(
    with: impl FnOnce(ClientBuilder) -> ClientBuilder,
) -> (Fake, Arc<Client>, FakeConn) {
    let fake = Fake::new(ReplyMode::Structured).await;
    let builder = with(Client::builder(&fake.uri()));
    let (client, conn) = tokio::join!(builder.connect(), fake.accept());
    (fake, Arc::new(client.unwrap()), conn)
}

pub fn start_write(client: &Arc<Client>, offset: u64, byte: u8) -> JoinHandle<Result> {
    let client = client.clone();
    tokio::spawn(async move { write(&client, offset, &[byte; 512], NONE).await })
}

pub fn start_read(client: &Arc<Client>, offset: u64) -> JoinHandle<Result<Vec<u8>>> {
    let client = client.clone();
    tokio::spawn(async move { read(&client, offset, 512).await })
}

pub fn start_flush(client: &Arc<Client>) -> JoinHandle<Result> {
    let client = client.clone();
    tokio::spawn(async move { within(client.flush()).await })
}

/// A write that the server answers.
pub async fn written(client: &Arc<Client>, conn: &mut FakeConn, offset: u64, byte: u8) {
    let writing = start_write(client, offset, byte);
    let (request, _) = conn.request().await.unwrap();
    assert_eq!((request.command, request.offset), (cmd::WRITE, offset));
    conn.done(&request).await;
    within(writing).await.unwrap().unwrap();
}

/// The next request but for flushes, which are left without an answer.
pub async fn beside_flushes(conn: &mut FakeConn) -> Option<(Request, Vec<u8>)> {
    loop {
        let (request, payload) = conn.request().await?;
        if request.command != cmd::FLUSH {
            return Some((request, payload));
        }
    }
}

/// A write that the server fails.
pub async fn failed(client: &Arc<Client>, conn: &mut FakeConn, offset: u64, byte: u8) {
    let failing = start_write(client, offset, byte);
    let (request, _) = beside_flushes(conn).await.unwrap();
    assert_eq!((request.command, request.offset), (cmd::WRITE, offset));
    conn.fail(&request, error::EIO).await;
    within(failing).await.unwrap().unwrap_err();
}

/// A read that the server answers with these bytes.
pub async fn seen(client: &Arc<Client>, conn: &mut FakeConn, offset: u64, byte: u8) {
    let reading = start_read(client, offset);
    let (request, _) = beside_flushes(conn).await.unwrap();
    assert_eq!((request.command, request.offset), (cmd::READ, offset));
    conn.data(&request, &[byte; 512]).await;
    assert_eq!(within(reading).await.unwrap().unwrap(), [byte; 512]);
}

/// Nothing but flushes comes on the next connection, if there is one, and the client says that it has to be opened anew.
pub async fn ends_for_good(client: &Arc<Client>, fake: &Fake) {
    let reading = start_read(client, 0);
    let mut conn = fake.accept().await;
    let next = beside_flushes(&mut conn).await;
    assert!(
        next.is_none_or(|(request, _)| request.command == cmd::DISC),
        "it goes on"
    );
    let error = within(reading).await.unwrap().unwrap_err().to_string();
    assert!(
        error.contains("opened anew") && error.contains("failed") && error.contains("0..512"),
        "{error}"
    );
}
