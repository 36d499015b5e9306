//! What the NBD server lets a client take: bytes and requests in flight, long
//! requests, and what it does with those that are too long.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Semaphore;
use userland_io::engines::Memory;
use userland_io::transports::nbd::Limits;
use userland_io::transports::nbd::limits::Environment;
use userland_io::transports::nbd::session::ReplyMode;
use userland_io::transports::nbd::socket::Socket;
use userland_io::transports::nbd::transmission;
use userland_io::transports::nbd::wire::{CommandFlags, chunk, cmd, error};
use userland_io::{Device, Engine, ErrorKind, Geometry, ReadBuf, WriteBuf, WriteFlags};

#[path = "common/nbd_peer.rs"]
mod nbd_peer;
use nbd_peer::{MIB, MODES, Peer, Rig, environment, session};

const NONE: CommandFlags = CommandFlags::empty();

async fn rig(size: u64) -> (Rig, Device<Rig>) {
    let rig = Rig::new(size);
    let device = Device::open(rig.clone()).await.unwrap();
    rig.taken();
    (rig, device)
}

fn limits(change: impl FnOnce(&mut Limits)) -> (tokio::sync::watch::Sender<bool>, Environment) {
    let mut limits = Limits::default();
    change(&mut limits);
    environment(limits)
}

/// Lets the server do what it can.
async fn settle() {
    // In paused time this ends when nothing else can run.
    tokio::time::sleep(Duration::from_millis(1)).await;
}

#[tokio::test]
async fn a_read_longer_than_the_longest_request_comes_in_pieces() {
    const SIZE: u64 = 40 << 20;
    for mode in MODES {
        let (rig, device) = rig(SIZE).await;
        let (shutdown, environment) = limits(|limits| limits.max_request = 8 << 20);
        let mut peer = Peer::with(&device, session(mode, SIZE), shutdown, environment);
        for offset in (0..SIZE).step_by(3 << 20) {
            peer.write(offset, &[1; 1000]).await;
        }
        rig.taken();
        let answer = peer.read(4096, (SIZE - 4096) as usize).await;
        if mode == ReplyMode::Simple {
            assert_eq!(answer.error, error::EOVERFLOW);
            assert_eq!(rig.taken().concat(), "");
        } else {
            assert_eq!((answer.error, answer.data.len() as u64), (0, SIZE - 4096));
            for at in (3 << 20..SIZE).step_by(3 << 20) {
                let at = (at - 4096) as usize;
                assert!(answer.data[at..at + 1000].iter().all(|&b| b == 1));
            }
            let ones = answer.data.iter().filter(|&&b| b == 1).count();
            assert_eq!(ones, 13 * 1000);
            assert!(answer.chunks.len() > 9, "{} chunks", answer.chunks.len());
            let df = CommandFlags::DF;
            let answer = peer.call(cmd::READ, df, 0, SIZE, &[]).await;
            assert_eq!(answer.error, error::EOVERFLOW);
            assert!(answer.text.contains("8388608"), "{}", answer.text);
        }
        assert_eq!(peer.read(0, 512).await.error, 0);
        peer.leave().await;
    }
}

#[tokio::test]
async fn a_long_read_that_fails_says_where_and_ends() {
    const SIZE: u64 = 40 << 20;
    let (rig, device) = rig(SIZE).await;
    let (shutdown, environment) = limits(|limits| limits.max_request = 8 << 20);
    let mut peer = Peer::with(&device, session(MODES[1], SIZE), shutdown, environment);
    *rig.bad.lock().unwrap() = Some((17 << 20..18 << 20, || ErrorKind::Io.into()));
    rig.geometry.lock().unwrap().features = userland_io::Features::empty();
    let answer = peer.read(0, SIZE as usize).await;
    assert_eq!((answer.error, answer.at), (error::EIO, Some(16 << 20)));
    assert_eq!(answer.data.len(), 16 << 20);
    *rig.bad.lock().unwrap() = None;
    assert_eq!(peer.read(0, 512).await.error, 0);
    peer.leave().await;
}

#[tokio::test(start_paused = true)]
async fn short_requests_pass_long_reads() {
    const SIZE: u64 = 400 << 20;
    let (rig, device) = rig(SIZE).await;
    let (shutdown, environment) = limits(|limits| limits.max_request = 8 << 20);
    let mut peer = Peer::with(&device, session(MODES[1], SIZE), shutdown, environment);
    *rig.delay.lock().unwrap() = Duration::from_millis(100);
    let long = peer.send(cmd::READ, NONE, 0, SIZE, &[]).await;
    let short = peer.send(cmd::READ, NONE, 4096, 4096, &[]).await;
    assert_eq!(peer.receive().await.0, short);
    assert_eq!(peer.receive().await.0, long);
    peer.leave().await;
}

/// Long reads count as requests; where they are as many as there may be, they go on all the same.
#[tokio::test(start_paused = true)]
async fn as_many_long_reads_as_there_may_be_requests_are_answered() {
    const SIZE: u64 = 40 << 20;
    for mode in [MODES[1], MODES[2]] {
        let (_, device) = rig(SIZE).await;
        let (shutdown, environment) = limits(|limits| {
            limits.max_request = 8 << 20;
            limits.max_in_flight = 2;
        });
        let mut peer = Peer::with(&device, session(mode, SIZE), shutdown, environment);
        let mut sent = Vec::new();
        for length in [SIZE, SIZE, SIZE, 512] {
            sent.push(peer.send(cmd::READ, NONE, 0, length, &[]).await);
        }
        let mut answered = Vec::new();
        for _ in &sent {
            let answer = tokio::time::timeout(Duration::from_secs(60), peer.receive());
            let (cookie, answer) = answer.await.expect("an answer");
            assert_eq!(answer.error, 0);
            answered.push(cookie);
        }
        answered.sort_unstable();
        assert_eq!(answered, sent);
        peer.leave().await;
    }
}

#[tokio::test]
async fn a_write_that_is_too_long_is_drained_and_refused() {
    for mode in MODES {
        let (_, device) = rig(80 << 20).await;
        let (shutdown, environment) = limits(|limits| limits.max_request = 8 << 20);
        let mut peer = Peer::with(&device, session(mode, 80 << 20), shutdown, environment);
        let answer = peer.write(0, &vec![1; (8 << 20) + 1]).await;
        assert_eq!((answer.error, answer.data.len()), (error::EINVAL, 0));
        assert_eq!(peer.write(0, &vec![1; 8 << 20]).await.error, 0);
        assert_eq!(peer.read(0, 512).await.data, [1; 512]);
        peer.leave().await;
    }
}

#[tokio::test(start_paused = true)]
async fn beyond_the_drain_the_error_is_sent_and_the_connection_closed() {
    for mode in MODES {
        let (_, device) = rig(1 << 40).await;
        let (shutdown, environment) = limits(|limits| limits.max_payload_drain = 1 << 20);
        let mut peer = Peer::with(&device, session(mode, 1 << 40), shutdown, environment);
        let (cookie, head) = peer.head(cmd::WRITE, NONE, 0, u32::MAX.into());
        peer.writer.write_all(&head).await.unwrap();
        // What is in the pipe behind it does not keep the reply from the client.
        peer.writer.write_all(&[0; 100_000]).await.unwrap();
        let start = tokio::time::Instant::now();
        let reply = tokio::time::timeout(Duration::from_secs(1), peer.receive());
        let (answered, answer) = reply.await.expect("an answer at once");
        assert_eq!((answered, answer.error), (cookie, error::EINVAL));
        assert!(peer.try_receive().await.is_err());
        assert!(peer.server.await.unwrap().is_err());
        assert!(start.elapsed() < Duration::from_secs(1));
    }
}

/// As long as the client may need to look for the reply, however the connection went before.
#[tokio::test(start_paused = true)]
async fn a_farewell_lasts_its_time() {
    let (_, device) = rig(1 << 40).await;
    let (shutdown, environment) = limits(|limits| limits.max_payload_drain = 1 << 20);
    let mut peer = Peer::with(&device, session(MODES[0], 1 << 40), shutdown, environment);
    // More than the pipe holds, so that the connection looks at the clock; then nothing for a while.
    for _ in 0..100 {
        peer.send(cmd::READ, NONE, 0, 4096, &[]).await;
    }
    tokio::time::sleep(Duration::from_millis(1100)).await;
    for _ in 0..100 {
        assert_eq!(peer.receive().await.1.error, 0);
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    let (_, head) = peer.head(cmd::WRITE, NONE, 0, u32::MAX.into());
    peer.writer.write_all(&head).await.unwrap();
    assert_eq!(peer.receive().await.1.error, error::EINVAL);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!peer.server.is_finished());
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(peer.server.is_finished());
}

/// A client that has always sent more, and takes everything.
struct Endless;

impl AsyncRead for Endless {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        to: &mut tokio::io::ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let len = to.remaining();
        to.initialize_unfilled().fill(0);
        to.advance(len);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Endless {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl Socket for Endless {}

#[test]
fn who_never_stops_sending_what_is_thrown_away_is_left() {
    let (ended, is_ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_time().build().unwrap();
        runtime.block_on(async {
            let (_, device) = rig(1 << 40).await;
            let session = || session(MODES[0], 1 << 40);
            let (_, head) = Peer::new(&device, session()).head(cmd::WRITE, NONE, 0, 1 << 31);
            let (_shutdown, environment) = limits(|limits| limits.max_payload_drain = 1 << 20);
            let run = transmission::run(Endless, head, session(), device, environment);
            ended.send(run.await).unwrap();
        });
    });
    let ended = is_ended.recv_timeout(Duration::from_secs(30));
    ended.expect("an end").unwrap_err();
}

#[tokio::test(start_paused = true)]
async fn no_more_requests_run_than_the_limit() {
    let (rig, device) = rig(MIB as u64).await;
    let (shutdown, environment) = limits(|limits| limits.max_in_flight = 5);
    let mut peer = Peer::with(
        &device,
        session(MODES[0], MIB as u64),
        shutdown,
        environment,
    );
    *rig.delay.lock().unwrap() = Duration::from_millis(5);
    for i in 0..50 {
        peer.send(cmd::READ, NONE, i * 512, 512, &[]).await;
    }
    for _ in 0..50 {
        assert_eq!(peer.receive().await.1.error, 0);
    }
    assert_eq!(rig.most_in_flight.load(SeqCst), 5);
    peer.leave().await;
}

#[tokio::test(start_paused = true)]
async fn bytes_in_flight_are_bounded_for_a_connection() {
    let (rig, device) = rig(64 << 20).await;
    let (shutdown, environment) = limits(|limits| limits.max_connection_bytes = 32 << 20);
    let mut peer = Peer::with(&device, session(MODES[0], 64 << 20), shutdown, environment);
    *rig.delay.lock().unwrap() = Duration::from_millis(5);
    for i in 0..64 {
        peer.send(cmd::READ, NONE, i << 20, 1 << 20, &[]).await;
    }
    for _ in 0..64 {
        assert_eq!(peer.receive().await.1.error, 0);
    }
    assert_eq!(rig.most_in_flight.load(SeqCst), 32);
    peer.leave().await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_read_is_not_read_from() {
    for mode in MODES {
        let (rig, device) = rig(64 << 20).await;
        let mut peer = Peer::new(&device, session(mode, 64 << 20));
        // Reads of 4 KiB and flushes for ever, until the pipe is full: none of the replies is taken.
        let mut sent = 0;
        loop {
            let (_, mut packet) = peer.head(cmd::READ, NONE, (sent % 64) << 20, 4096);
            packet.extend(peer.head(cmd::FLUSH, NONE, 0, 0).1);
            let full = Duration::from_millis(100);
            match tokio::time::timeout(full, peer.writer.write_all(&packet)).await {
                Ok(written) => written.unwrap(),
                Err(_) => break,
            }
            sent += 1;
        }
        // Bounded: what fits the pipe, the input and 256 KiB of replies.
        let ran = rig.finished.load(SeqCst);
        assert!(ran < 1000, "{ran} requests ran, {sent} were sent");
        settle().await;
        assert_eq!(rig.finished.load(SeqCst), ran);
        let server = peer.server;
        drop((peer.reader, peer.writer));
        let start = tokio::time::Instant::now();
        let _ = server.await.unwrap();
        assert!(start.elapsed() < Duration::from_secs(1));
    }
}

#[tokio::test(start_paused = true)]
async fn half_closed_and_never_reading_ends_within_a_second() {
    let (_, device) = rig(64 << 20).await;
    let mut peer = Peer::new(&device, session(MODES[1], 64 << 20));
    for i in 0..8 {
        peer.send(cmd::READ, CommandFlags::DF, i << 20, 1 << 20, &[])
            .await;
    }
    peer.writer.shutdown().await.unwrap();
    let start = tokio::time::Instant::now();
    assert!(peer.server.await.unwrap().is_err());
    assert!(start.elapsed() < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn half_closed_and_slow_still_gets_every_reply() {
    let (_, device) = rig(64 << 20).await;
    let mut peer = Peer::new(&device, session(MODES[1], 64 << 20));
    for i in 0..64 {
        peer.send(cmd::READ, CommandFlags::DF, i << 20, 1 << 20, &[])
            .await;
    }
    peer.writer.shutdown().await.unwrap();
    for _ in 0..64 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(peer.receive().await.1.data.len(), MIB);
    }
    peer.server.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn those_who_hoard_leave_the_others_their_allowance() {
    let (rig, device) = rig(64 << 20).await;
    let (shutdown, environment) = limits(|limits| {
        limits.max_server_bytes = 64 << 20;
        limits.max_connection_bytes = 128 << 20;
    });
    let mut greedy = Peer::with(
        &device,
        session(MODES[0], 64 << 20),
        shutdown.clone(),
        environment.clone(),
    );
    // It asks for everything and reads nothing.
    *rig.delay.lock().unwrap() = Duration::from_millis(1);
    for i in 0..128 {
        greedy
            .send(cmd::READ, NONE, (i % 64) << 20, 1 << 20, &[])
            .await;
    }
    settle().await;
    let mut modest = Peer::with(
        &device,
        session(MODES[1], 64 << 20),
        shutdown.clone(),
        environment,
    );
    let start = tokio::time::Instant::now();
    for i in 0..100 {
        assert_eq!(modest.write(i << 19, &[1; 1 << 19]).await.error, 0);
        let data = modest.read(i << 19, 1 << 19).await.data;
        assert_eq!(data, [1; 1 << 19]);
    }
    assert!(start.elapsed() < Duration::from_secs(1), "it had to wait");
    // Who wants more waits, until the one that does not move is closed.
    let start = tokio::time::Instant::now();
    assert_eq!(modest.write(0, &vec![2; 32 << 20]).await.error, 0);
    assert!(
        start.elapsed() < Duration::from_secs(20),
        "{:?}",
        start.elapsed()
    );
    let ended = greedy.server.await.unwrap().unwrap_err();
    assert_eq!(ended.kind(), std::io::ErrorKind::TimedOut);
    modest.leave().await;
}

#[tokio::test(start_paused = true)]
async fn who_takes_no_replies_leaves_the_line_for_memory() {
    let (rig, device) = rig(64 << 20).await;
    let (shutdown, environment) = limits(|limits| limits.max_server_bytes = 4 << 20);
    let peer = || {
        Peer::with(
            &device,
            session(MODES[0], 64 << 20),
            shutdown.clone(),
            environment.clone(),
        )
    };
    // All there is to borrow is one client's, for a payload of which it has sent the first piece.
    let mut first = peer();
    let (_, head) = first.head(cmd::WRITE, NONE, 0, 5 << 20);
    let piece = vec![1; 64 << 10];
    first.writer.write_all(&head).await.unwrap();
    first.writer.write_all(&piece).await.unwrap();
    settle().await;
    // The next in line has replies coming, and reads none of them.
    let mut second = peer();
    *rig.delay.lock().unwrap() = Duration::from_millis(10);
    for i in 0..3 {
        second.send(cmd::READ, NONE, i << 20, 1 << 18, &[]).await;
    }
    second.send(cmd::READ, NONE, 0, 2 << 20, &[]).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let rest = vec![1; (5 << 20) - piece.len()];
    first.writer.write_all(&rest).await.unwrap();
    assert_eq!(first.receive().await.1.error, 0);
    // What comes free is not kept for it.
    let mut third = peer();
    let reading = third.read(0, 4 << 20);
    let answer = tokio::time::timeout(Duration::from_secs(1), reading).await;
    assert_eq!(answer.expect("it waits for ever").error, 0);
    for _ in 0..4 {
        assert_eq!(second.receive().await.1.error, 0);
    }
    for peer in [first, second, third] {
        peer.leave().await;
    }
}

/// Writes without waiting, or not.
struct Moody {
    memory: Memory,
    waits: AtomicBool,
}

impl Engine for Moody {
    fn geometry(&self) -> Geometry {
        self.memory.geometry()
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> userland_io::Result {
        self.memory.read(buf, offset).await
    }
    async fn write(
        &self,
        buf: &WriteBuf<'_>,
        offset: u64,
        flags: WriteFlags,
    ) -> userland_io::Result {
        self.memory.write(buf, offset, flags).await
    }
    fn write_nowait(
        &self,
        buf: &WriteBuf<'_>,
        offset: u64,
        flags: WriteFlags,
    ) -> Option<userland_io::Result> {
        match self.waits.load(SeqCst) {
            true => None,
            false => self.memory.write_nowait(buf, offset, flags),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_done_without_memory_after_all_leaves_the_line_for_it() {
    let device = Device::open(Moody {
        memory: Memory::new(64 << 20),
        waits: AtomicBool::new(true),
    });
    let device = device.await.unwrap();
    let (shutdown, environment) = limits(|limits| limits.max_server_bytes = 4 << 20);
    let peer = || {
        let session = session(MODES[0], 64 << 20);
        Peer::with(&device, session, shutdown.clone(), environment.clone())
    };
    // One client holds all there is to borrow, and another waits for some of it.
    let (mut first, mut second) = (peer(), peer());
    let piece = vec![1; 64 << 10];
    for (peer, len) in [(&mut first, 5 << 20), (&mut second, 2 << 20)] {
        let (_, head) = peer.head(cmd::WRITE, NONE, 0, len);
        peer.writer.write_all(&head).await.unwrap();
        peer.writer.write_all(&piece).await.unwrap();
        settle().await;
    }
    // When there is some, it needs none any more.
    device.get_ref().waits.store(false, SeqCst);
    for (peer, len) in [(&mut first, 5 << 20), (&mut second, 2 << 20)] {
        let rest = vec![1; len - piece.len()];
        peer.writer.write_all(&rest).await.unwrap();
        assert_eq!(peer.receive().await.1.error, 0);
    }
    let mut third = peer();
    let answer = tokio::time::timeout(Duration::from_secs(1), third.read(1, 5 << 20)).await;
    let data = answer.expect("it waits for ever").data;
    assert!(data[..(5 << 20) - 1].iter().all(|byte| *byte == 1));
    for peer in [first, second, third] {
        peer.leave().await;
    }
}

#[tokio::test(start_paused = true)]
async fn writes_in_flight_at_the_limit_do_not_stop_the_connection() {
    let (rig, device) = rig(64 << 20).await;
    let (shutdown, environment) = limits(|limits| {
        limits.max_server_bytes = 64 << 20;
        limits.max_connection_bytes = 64 << 20;
    });
    let gate = Arc::new(Semaphore::new(0));
    *rig.gate.lock().unwrap() = Some(gate.clone());
    let mut peer = Peer::with(&device, session(MODES[2], 64 << 20), shutdown, environment);
    let (mut reader, mut writer) = (peer.reader, peer.writer);
    let mut packet = Vec::new();
    for i in 0..100_u64 {
        let request = userland_io::transports::nbd::wire::Request {
            flags: CommandFlags::PAYLOAD_LEN,
            command: cmd::WRITE,
            cookie: i,
            offset: (i % 32) << 20,
            length: 1 << 20,
        };
        packet.extend(request.encode_extended());
        packet.extend(vec![1; MIB]);
    }
    let sender = tokio::spawn(async move {
        writer.write_all(&packet).await.unwrap();
        writer
    });
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(!sender.is_finished(), "it all went in");
    assert_eq!(rig.in_flight.load(SeqCst), 64);
    gate.add_permits(100);
    let mut replies = vec![0; 100 * 32];
    reader.read_exact(&mut replies).await.unwrap();
    for reply in replies.chunks(32) {
        assert_eq!(reply[6..8], chunk::NONE.to_be_bytes());
    }
    peer.writer = sender.await.unwrap();
    peer.reader = reader;
    peer.leave().await;
}

#[tokio::test(start_paused = true)]
async fn who_drips_bytes_while_others_wait_does_not_hold_their_memory() {
    let (_, device) = rig(64 << 20).await;
    let (shutdown, environment) = limits(|limits| limits.max_server_bytes = 64 << 20);
    let mut greedy = Peer::with(
        &device,
        session(MODES[0], 64 << 20),
        shutdown.clone(),
        environment.clone(),
    );
    let (_, head) = greedy.head(cmd::WRITE, NONE, 0, 64 << 20);
    greedy.writer.write_all(&head).await.unwrap();
    settle().await;
    let mut modest = Peer::with(
        &device,
        session(MODES[0], 64 << 20),
        shutdown.clone(),
        environment,
    );
    let big = vec![2; 32 << 20];
    let drip = async {
        loop {
            greedy.writer.write_all(&[0]).await.unwrap();
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::select! {
        a = modest.write(0, &big) => assert_eq!(a.error, 0),
        () = drip => {}
        () = tokio::time::sleep(Duration::from_secs(600)) => panic!("starved for ten minutes"),
    }
}
