//! Once a connection runs, requests to a static engine allocate nothing.

use std::ops::Range;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use userland_io::engines::Memory;
use userland_io::transports::nbd::session::ReplyMode;
use userland_io::transports::nbd::wire::{CommandFlags, Request, SimpleReply, cmd};
use userland_io::{Device, Engine, Geometry, ReadBuf, Result, WriteBuf, WriteFlags};

#[path = "common/counting.rs"]
mod counting;
#[path = "common/nbd_peer.rs"]
mod nbd_peer;
use nbd_peer::{Peer, session};

/// A memory disk.
struct Disk {
    memory: Memory,
    way: Way,
}

/// How its requests are done.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    ByPlainCalls,
    AtOnce,
    WaitingOnce,
}

impl Engine for Disk {
    fn geometry(&self) -> Geometry {
        self.memory.geometry()
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        if self.way == Way::WaitingOnce {
            tokio::task::yield_now().await;
        }
        self.memory.read(buf, offset).await
    }
    fn lend(&self, range: Range<u64>, to: &mut dyn FnMut(&[u8])) {
        if self.way == Way::ByPlainCalls {
            self.memory.lend(range, to);
        }
    }
    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        if self.way == Way::WaitingOnce {
            tokio::task::yield_now().await;
        }
        self.memory.write(buf, offset, flags).await
    }
    fn write_nowait(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Option<Result> {
        match self.way {
            Way::ByPlainCalls => self.memory.write_nowait(buf, offset, flags),
            _ => None,
        }
    }
    async fn flush(&self) -> Result {
        self.memory.flush().await
    }
}

#[tokio::test]
async fn reads_and_writes_of_4_kib_allocate_nothing() {
    const DEPTH: usize = 32;
    for way in [Way::ByPlainCalls, Way::AtOnce, Way::WaitingOnce] {
        let memory = Memory::new(1 << 20);
        let device = Device::open(Disk { memory, way }).await.unwrap();
        let mut peer = Peer::new(&device, session(ReplyMode::Simple, 1 << 20));
        for command in [cmd::WRITE, cmd::READ] {
            let is_write = command == cmd::WRITE;
            let mut packet = Vec::new();
            for i in 0..DEPTH as u64 {
                let request = Request {
                    flags: CommandFlags::empty(),
                    command,
                    cookie: i,
                    offset: i * 4096,
                    length: 4096,
                };
                packet.extend(request.encode_compact());
                packet.extend(std::iter::repeat_n(1, 4096).filter(|_| is_write));
            }
            let each = SimpleReply::LEN + if is_write { 0 } else { 4096 };
            let mut replies = vec![0; DEPTH * each];
            let mut before = 0;
            for round in 0..110 {
                // The first rounds fill the pool, the slots and the gathering memory.
                if round == 10 {
                    before = counting::allocations();
                }
                peer.writer.write_all(&packet).await.unwrap();
                peer.reader.read_exact(&mut replies).await.unwrap();
                assert!(replies.chunks(each).all(|reply| reply[4..8] == [0; 4]));
            }
            let allocated = counting::allocations() - before;
            assert_eq!(allocated, 0, "command {command}, {way:?}");
        }
        peer.leave().await;
    }
}
