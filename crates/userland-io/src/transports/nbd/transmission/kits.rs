//! Working memory, which connections to one export lend each other: only who works holds any.
//!
//! A connection takes a [`Kit`] when it is woken and gives it back before it sleeps with nothing left to do. So memory
//! goes by how many work at a time, not by how many are connected, and what is taken next was used last and
//! is still in the cache. Buffers hold what is left over from other requests, which is why
//! exports have kits of their own: who may read one disk learns nothing of another's, whatever its engine does.

use std::sync::{Arc, Mutex, PoisonError};

use super::input::Memory;
use super::output::Output;
use super::pool::Pool;

/// The most kits that wait for somebody.
const MOST: usize = 16;
/// The most bytes of requests' buffers that all of them hold.
const MOST_BYTES: usize = 8 << 20;

/// What a connection works with.
#[derive(Debug)]
pub(super) struct Kit {
    /// Where requests are received.
    pub(super) input: Memory,
    /// Buffers of requests.
    pub(super) pool: Pool,
    /// Where replies are gathered.
    pub(super) output: Output,
}

impl Kit {
    /// A new one. Memory is not touched before it is needed.
    fn new() -> Self {
        Kit {
            input: Memory::new(),
            pool: Pool::new(),
            output: Output::new(),
        }
    }
}

/// The kits that nobody uses now.
#[derive(Clone, Debug, Default)]
pub(crate) struct Kits(Arc<Mutex<Idle>>);

#[derive(Debug, Default)]
struct Idle {
    kits: Vec<Kit>,
    /// In their pools.
    bytes: usize,
}

impl Kits {
    fn lock(&self) -> std::sync::MutexGuard<'_, Idle> {
        // Nothing panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The kit that was used last, or a new one.
    pub(super) fn take(&self) -> Kit {
        let mut idle = self.lock();
        match idle.kits.pop() {
            Some(kit) => {
                idle.bytes -= kit.pool.idle_bytes();
                kit
            }
            None => {
                drop(idle);
                Kit::new()
            }
        }
    }

    /// Takes a kit back, or frees it if enough wait.
    pub(super) fn give(&self, mut kit: Kit) {
        kit.output.trim();
        let mut idle = self.lock();
        if idle.kits.len() == MOST {
            drop(idle);
            return;
        }
        if idle.bytes + kit.pool.idle_bytes() > MOST_BYTES {
            kit.pool.trim();
        }
        idle.bytes += kit.pool.idle_bytes();
        idle.kits.push(kit);
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::super::super::limits::{Environment, Limits, Shutdown};
    use super::super::super::session::{ReplyMode, Session};
    use super::super::super::wire::{BlockSizes, CommandFlags, Request, TransmissionFlags, cmd};
    use super::super::{Budget, Chairs, run};
    use super::*;
    use crate::{Device, engines::Null};

    #[test]
    fn what_was_used_last_is_used_next() {
        let kits = Kits::default();
        let (mut first, second) = (kits.take(), kits.take());
        let marked = first.pool.take(1);
        first.pool.give(marked);
        kits.give(second);
        kits.give(first);
        assert_eq!(kits.take().pool.idle_bytes(), 4096);
        assert_eq!(kits.take().pool.idle_bytes(), 0);
        assert_eq!(kits.lock().kits.len(), 0);
    }

    #[test]
    fn what_waits_is_bounded() {
        let kits = Kits::default();
        let many: Vec<Kit> = (0..2 * MOST).map(|_| kits.take()).collect();
        for mut kit in many {
            let buffers: Vec<_> = (0..4).map(|_| kit.pool.take(1 << 20)).collect();
            buffers.into_iter().for_each(|buffer| kit.pool.give(buffer));
            kit.output.bytes(&vec![0; 4 << 20]);
            kit.output.clear(|_| ());
            kits.give(kit);
        }
        let idle = kits.lock();
        assert_eq!(idle.kits.len(), MOST);
        let bytes: usize = idle.kits.iter().map(|kit| kit.pool.idle_bytes()).sum();
        assert_eq!(bytes, idle.bytes);
        assert!(bytes <= MOST_BYTES && bytes > MOST_BYTES / 2);
        assert!(idle.kits.iter().all(|kit| kit.output.is_trimmed()));
    }

    #[tokio::test]
    async fn connections_at_rest_share_what_they_worked_with() {
        const SIZE: u64 = 1 << 20;
        let session = Session {
            export: String::new(),
            size: SIZE,
            flags: TransmissionFlags::HAS_FLAGS,
            replies: ReplyMode::Simple,
            contexts: Vec::new(),
            blocks: BlockSizes {
                minimum: 1,
                preferred: 4096,
                maximum: 32 << 20,
            },
        };
        let device = Device::open(Null::new(SIZE)).await.unwrap();
        let (_running, shutdown) = Shutdown::channel();
        let environment = Environment {
            limits: Limits::default().into(),
            budget: Budget::new(1 << 30),
            chairs: Chairs::default(),
            shutdown,
        };
        let kits = environment.budget.kits().clone();
        let mut clients = Vec::new();
        for _ in 0..10 {
            let (mut client, server) = duplex(1 << 20);
            let (session, device) = (session.clone(), device.clone());
            tokio::spawn(run(
                server,
                Vec::new(),
                session,
                device,
                environment.clone(),
            ));
            for _ in 0..3 {
                let request = Request {
                    flags: CommandFlags::empty(),
                    command: cmd::READ,
                    cookie: 7,
                    offset: 0,
                    length: 100_000,
                };
                client.write_all(&request.encode_compact()).await.unwrap();
                client.read_exact(&mut vec![0; 16 + 100_000]).await.unwrap();
            }
            clients.push(client);
            // The connection sends, and goes to rest, in one turn.
            while kits.lock().kits.is_empty() {
                tokio::task::yield_now().await;
            }
            let idle = kits.lock();
            assert_eq!((idle.kits.len(), idle.bytes), (1, 128 << 10));
        }
    }
}
