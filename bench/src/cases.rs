//! Small pieces of a request's way, run in this process: for counting instructions, and for the clock.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf as IoBuf};
use userland_io::engines::{Memory, Null};
use userland_io::layers::{Delay, Fault, Offset, Operation, ReadOnly, Stats};
use userland_io::transports::nbd::limits::{Budget, Chairs, Environment, Shutdown};
use userland_io::transports::nbd::session::{ReplyMode, Session};
use userland_io::transports::nbd::socket::Socket;
use userland_io::transports::nbd::wire::{
    BlockSizes, CommandFlags, Request, TransmissionFlags, cmd,
};
use userland_io::transports::nbd::{Limits, transmission};
use userland_io::{
    AnyEngine, Checked, Device, Engine, EngineExt, ReadBuf, Slots, WriteBuf, WriteFlags,
};

type Running = Pin<Box<dyn Future<Output = ()>>>;

/// Something that is done over and over.
#[derive(Debug)]
pub struct Case {
    /// What it is called.
    pub name: &'static str,
    /// Does it so many times.
    pub run: fn(u64) -> Running,
}

const SIZE: u64 = 16 << 20;
/// Short, so that what is counted is the way and not the copying: some copies count an instruction for each byte.
const BLOCK: usize = 512;
/// Requests that a client sends together.
const TOGETHER: usize = 64;

/// All cases. Reads and writes are of 512 bytes.
pub static CASES: &[Case] = &[
    Case {
        name: "read: null engine",
        run: |n| Box::pin(reads(Null::new(SIZE), n)),
    },
    Case {
        name: "read: null behind an edge",
        run: |n| Box::pin(reads(edge(Null::new(SIZE)), n)),
    },
    Case {
        name: "read: null behind an edge, erased",
        run: |n| Box::pin(reads(edge(AnyEngine::new(Null::new(SIZE))), n)),
    },
    Case {
        name: "read: device of null",
        run: |n| Box::pin(async move { device_reads(&open(Null::new(SIZE)).await, n).await }),
    },
    Case {
        name: "read: device of memory",
        run: |n| Box::pin(async move { device_reads(&open(filled().await).await, n).await }),
    },
    Case {
        name: "write: device of memory",
        run: |n| Box::pin(async move { device_writes(&open(filled().await).await, n).await }),
    },
    Case {
        name: "read: layer readonly over null",
        run: |n| Box::pin(layered(ReadOnly, n)),
    },
    Case {
        name: "read: layer offset over null",
        run: |n| Box::pin(layered(Offset::new(0), n)),
    },
    Case {
        name: "read: layer stats over null",
        run: |n| Box::pin(layered(Stats::new(), n)),
    },
    Case {
        name: "read: layer delay over null, no delay",
        run: |n| Box::pin(layered(Delay::new(), n)),
    },
    Case {
        name: "read: layer fault over null, no fault",
        run: |n| Box::pin(layered(Fault::new(5).on(Operation::Flush), n)),
    },
    Case {
        name: "read: five erased layers over null",
        run: |n| {
            Box::pin(async move {
                let mut engine = AnyEngine::new(Null::new(SIZE));
                for _ in 0..5 {
                    engine = AnyEngine::new(layer(Offset::new(0), engine));
                }
                device_reads(&open(engine).await, n).await;
            })
        },
    },
    Case {
        name: "slot: ready at once",
        run: |n| Box::pin(async move { ready_slots(n) }),
    },
    Case {
        name: "slot: waits once",
        run: |n| Box::pin(waiting_slots(n)),
    },
    Case {
        name: "NBD read of null, 64 in flight",
        run: |n| Box::pin(async move { serve(open(Null::new(SIZE)).await, cmd::READ, n).await }),
    },
    Case {
        name: "NBD read of memory, 64 in flight",
        run: |n| Box::pin(async move { serve(open(filled().await).await, cmd::READ, n).await }),
    },
    Case {
        name: "NBD write of memory, 64 in flight",
        run: |n| Box::pin(async move { serve(open(filled().await).await, cmd::WRITE, n).await }),
    },
];

fn edge<E: Engine>(engine: E) -> Checked<E> {
    Checked::new(engine).expect("a geometry of ours")
}

fn layer<E: Engine, L: userland_io::Layer<E>>(layer: L, engine: E) -> L::Engine {
    engine.layer(layer).expect("a layer that fits")
}

async fn open<E: Engine>(engine: E) -> Device<E> {
    Device::open(engine).await.expect("an engine of ours")
}

async fn filled() -> Memory {
    let memory = Memory::new(SIZE);
    let piece = vec![0x5a; 1 << 20];
    for at in (0..SIZE).step_by(piece.len()) {
        let piece = WriteBuf::new(&piece);
        let written = memory.write(&piece, at, WriteFlags::empty());
        written.await.expect("inside the disk");
    }
    memory
}

/// The offset of the `n`th request: near and far in turn, and always the same.
fn offset(n: u64) -> u64 {
    n.wrapping_mul(7919) % (SIZE / BLOCK as u64) * BLOCK as u64
}

async fn reads<E: Engine>(engine: E, repeats: u64) {
    let mut page = vec![0; BLOCK];
    for n in 0..repeats {
        let mut page = ReadBuf::new(&mut page);
        let read = engine.read(&mut page, offset(n));
        read.await.expect("inside the disk");
    }
}

async fn layered<L: userland_io::Layer<Null>>(of: L, repeats: u64) {
    reads(edge(layer(of, Null::new(SIZE))), repeats).await;
}

async fn device_reads<E: Engine>(device: &Device<E>, repeats: u64) {
    let mut page = vec![0; BLOCK];
    for n in 0..repeats {
        let mut page = ReadBuf::new(&mut page);
        let read = device.read(&mut page, offset(n));
        read.await.expect("inside the disk");
    }
}

async fn device_writes<E: Engine>(device: &Device<E>, repeats: u64) {
    let page = vec![0xa5; BLOCK];
    for n in 0..repeats {
        let page = WriteBuf::new(&page);
        let write = device.write(&page, offset(n), WriteFlags::empty());
        write.await.expect("inside the disk");
    }
}

fn ready_slots(repeats: u64) {
    let mut slots = Slots::new(TOGETHER);
    for n in 0..repeats {
        let started = slots.start(std::future::ready(n));
        assert!(started.is_ready());
    }
}

/// Ends when it is polled for the second time, and sees to that.
struct Twice(bool);

impl Future for Twice {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.0, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

async fn waiting_slots(repeats: u64) {
    let mut slots = Slots::new(TOGETHER);
    for _ in 0..repeats / TOGETHER as u64 {
        while !slots.is_full() {
            let _ = slots.start(Twice(false));
        }
        while let Some(()) = std::future::poll_fn(|cx| slots.poll(cx)).await {}
    }
}

async fn serve<E: Engine>(device: Device<E>, command: u16, repeats: u64) {
    let session = Session {
        export: String::new(),
        size: SIZE,
        flags: TransmissionFlags::HAS_FLAGS,
        replies: ReplyMode::Simple,
        contexts: Vec::new(),
        blocks: BlockSizes {
            minimum: 1,
            preferred: BLOCK as u32,
            maximum: 32 << 20,
        },
    };
    let limits = Limits::default();
    // Held to the end: a server that is gone counts as one that shuts down.
    let (_running, shutdown) = Shutdown::channel();
    let environment = Environment {
        budget: Budget::new(limits.max_server_bytes),
        limits: Arc::new(limits),
        chairs: Chairs::default(),
        shutdown,
    };
    let stream = Script::new(command, repeats);
    let served = transmission::run(stream, Vec::new(), session, device, environment);
    served.await.expect("requests that make sense");
}

/// A client that always has the next requests at hand, and looks at no reply.
struct Script {
    /// Requests that are sent together, over and over.
    batch: Vec<u8>,
    at: usize,
    batches: u64,
}

impl Script {
    fn new(command: u16, requests: u64) -> Self {
        let mut batch = Vec::new();
        for n in 0..TOGETHER as u64 {
            let request = Request {
                flags: CommandFlags::empty(),
                command,
                cookie: n,
                offset: offset(n),
                length: BLOCK as u64,
            };
            batch.extend_from_slice(&request.encode_compact());
            if command == cmd::WRITE {
                batch.resize(batch.len() + BLOCK, 0xa5);
            }
        }
        Script {
            batch,
            at: 0,
            batches: requests / TOGETHER as u64,
        }
    }
}

impl AsyncRead for Script {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        to: &mut IoBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.batches > 0 {
            let rest = &self.batch[self.at..];
            let part = &rest[..rest.len().min(to.remaining())];
            to.put_slice(part);
            self.at += part.len();
            if self.at == self.batch.len() {
                self.at = 0;
                self.batches -= 1;
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Script {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        from: &[u8],
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(from.len()))
    }
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        from: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(from.iter().map(|slice| slice.len()).sum()))
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl Socket for Script {}
