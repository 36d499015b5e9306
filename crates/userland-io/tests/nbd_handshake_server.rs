//! Handshakes with a server that runs: clients that dawdle, never read, or make no sense.

#![cfg(feature = "nbd")]

use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use userland_io::transports::nbd::wire::{self, BlockSizes, Greeting, OptionReply, info, opt, rep};
use userland_io::transports::nbd::{Address, Limits, Server, ServerHandle};
use userland_io::{Device, Engine, Geometry, ReadBuf, Result};
#[path = "common/handshake.rs"]
mod handshake;
use handshake::{ALL_INFOS, Client, everything, meta, mutate, parse_replies, request};

struct Zeroes;

impl Engine for Zeroes {
    fn geometry(&self) -> Geometry {
        Geometry::read_only(1 << 20)
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, _: u64) -> Result {
        buf.fill(0);
        Ok(())
    }
}

async fn serve(limits: Limits) -> (ServerHandle, u16) {
    let disk = Device::open(Zeroes).await.unwrap();
    let server = Server::new().export("only", disk).limits(limits);
    let server = server.bind(["127.0.0.1:0"]).await.unwrap();
    let Address::Tcp { port, .. } = server.addresses()[0] else {
        panic!("not TCP")
    };
    (server, port)
}

async fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// Reads until the other side closes, however it does.
async fn read_all(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes).await;
    bytes
}

#[tokio::test]
async fn a_single_export_also_answers_to_the_empty_name() {
    let (server, port) = serve(Limits::default()).await;
    let mut stream = connect(port).await;
    let client = Client::new().option(opt::INFO, &request("", &[info::NAME]));
    stream
        .write_all(&client.option(opt::ABORT, b"").0)
        .await
        .unwrap();
    let (replies, _) = parse_replies(&read_all(&mut stream).await);
    assert!(replies.iter().any(|reply| reply.data == b"\0\x01only"));
    server.shutdown().await.unwrap();
}

#[tokio::test]
async fn the_largest_request_is_never_less_than_every_client_may_send() {
    for (wish, told) in [(1, 32 << 20), (100 << 20, 100 << 20)] {
        let mut limits = Limits::default();
        limits.max_request = wish;
        let (server, port) = serve(limits).await;
        let mut stream = connect(port).await;
        let client = Client::new().option(opt::INFO, &request("only", &[info::BLOCK_SIZE]));
        stream
            .write_all(&client.option(opt::ABORT, b"").0)
            .await
            .unwrap();
        let (replies, _) = parse_replies(&read_all(&mut stream).await);
        let sizes = replies
            .iter()
            .find(|reply| reply.data.starts_with(&[0, 3]))
            .unwrap();
        let sizes = BlockSizes::decode(sizes.data[2..].try_into().unwrap());
        assert_eq!(sizes.maximum, told);
        server.shutdown().await.unwrap();
    }
}

#[tokio::test]
async fn a_handshake_may_come_byte_by_byte() {
    let (server, port) = serve(Limits::default()).await;
    let client = Client::new()
        .structured()
        .option(opt::SET_META_CONTEXT, &meta("only", &["base:allocation"]))
        .option(opt::INFO, &request("only", &ALL_INFOS))
        .option(opt::LIST, b"")
        .option(opt::ABORT, b"");
    let mut whole = connect(port).await;
    whole.write_all(&client.0).await.unwrap();
    let expected = read_all(&mut whole).await;
    let mut stream = connect(port).await;
    for byte in &client.0 {
        stream.write_all(std::slice::from_ref(byte)).await.unwrap();
        tokio::task::yield_now().await;
    }
    assert_eq!(read_all(&mut stream).await, expected);
    assert!(parse_replies(&expected).0.len() > 7);
    server.shutdown().await.unwrap();
}

#[tokio::test]
async fn silent_and_dawdling_clients_are_cut_off() {
    let mut limits = Limits::default();
    limits.handshake_timeout = Duration::from_millis(300);
    let (server, port) = serve(limits).await;
    let start = Instant::now();
    let mut silent = connect(port).await;
    let mut half = connect(port).await;
    half.write_all(&Client::new().announce(opt::GO, 100).0)
        .await
        .unwrap();
    let mut dawdling = connect(port).await;
    let dawdle = async {
        dawdling.write_all(&Client::new().0).await.unwrap();
        // Always busy, never done.
        while dawdling
            .write_all(&Client(vec![]).option(99, b"").0)
            .await
            .is_ok()
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let all = async {
        tokio::join!(read_all(&mut silent), read_all(&mut half), dawdle);
    };
    tokio::time::timeout(Duration::from_secs(10), all)
        .await
        .unwrap();
    assert!(start.elapsed() >= Duration::from_millis(300));
    server.shutdown().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_silent_handshake_has_ten_seconds_by_default() {
    let (server, port) = serve(Limits::default()).await;
    let start = tokio::time::Instant::now();
    let greeting = read_all(&mut connect(port).await).await;
    assert_eq!(greeting.len(), Greeting::LEN);
    let took = start.elapsed().as_secs();
    assert!((10..20).contains(&took), "{took} s");
    server.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_client_that_never_reads_is_cut_off() {
    let mut limits = Limits::default();
    limits.handshake_timeout = Duration::from_millis(500);
    limits.max_options = usize::MAX;
    let (server, port) = serve(limits).await;
    let mut stream = connect(port).await;
    stream.write_all(&Client::new().0).await.unwrap();
    // Each asks for a reply several times its own length.
    let flood = Client(vec![]).option(opt::LIST, b"").0.repeat(1_000);
    let flooding = async { while stream.write_all(&flood).await.is_ok() {} };
    tokio::time::timeout(Duration::from_secs(10), flooding)
        .await
        .unwrap();
    server.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_handshake_under_way_ends_when_the_server_shuts_down() {
    let (server, port) = serve(Limits::default()).await;
    let mut stream = connect(port).await;
    let client = Client::new().option(opt::LIST, b"");
    stream.write_all(&client.0).await.unwrap();
    let mut greeting = [0; Greeting::LEN];
    stream.read_exact(&mut greeting).await.unwrap();
    let shutdown = tokio::time::timeout(Duration::from_secs(5), server.shutdown());
    shutdown
        .await
        .expect("no waiting for the handshake")
        .unwrap();
    let rest = tokio::time::timeout(Duration::from_secs(5), read_all(&mut stream)).await;
    assert!(rest.is_ok());
    assert!(TcpStream::connect(("127.0.0.1", port)).await.is_err());
}

#[tokio::test]
async fn mutated_handshakes_end_at_once_and_disturb_nobody() {
    let (server, port) = serve(Limits::default()).await;
    let info = Client(vec![]).option(opt::INFO, &request("only", &[])).0;
    let mut bystander = connect(port).await;
    bystander.write_all(&Client::new().0).await.unwrap();
    let mut greeting = [0; Greeting::LEN];
    bystander.read_exact(&mut greeting).await.unwrap();

    let mut random = fastrand::Rng::with_seed(300);
    for round in 0..300 {
        let mut bytes = everything().0;
        mutate(&mut random, &mut bytes);
        let mut stream = connect(port).await;
        // The server may have closed already.
        let _ = stream.write_all(&bytes).await;
        let _ = stream.shutdown().await;
        let ended = tokio::time::timeout(Duration::from_secs(1), read_all(&mut stream)).await;
        assert!(ended.is_ok(), "round {round}: {bytes:?}");

        if round % 10 == 0 {
            bystander.write_all(&info).await.unwrap();
            let mut kinds = Vec::new();
            while kinds.last() != Some(&rep::ACK) {
                let mut head = [0; OptionReply::LEN];
                bystander.read_exact(&mut head).await.unwrap();
                let head = OptionReply::decode(&head).unwrap();
                let mut data = vec![0; head.length as usize];
                bystander.read_exact(&mut data).await.unwrap();
                kinds.push(head.kind);
            }
            assert_eq!(kinds, [rep::INFO, rep::INFO, rep::ACK]);
        }
    }
    server.shutdown().await.unwrap();
}

#[test]
fn the_port_is_the_registered_one() {
    assert_eq!(wire::PORT, 10809);
}
