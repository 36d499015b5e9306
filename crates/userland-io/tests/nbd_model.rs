//! Random histories through sockets, on 1, 4 and 16 connections at once, held against an array of bytes.
#![cfg(all(feature = "nbd", unix))]

use std::ops::Range;

use proptest::prelude::*;
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Builder;
use tokio::task::JoinSet;
use userland_io::Device;
use userland_io::engines::Memory;
use userland_io::transports::nbd::session::ReplyMode;
use userland_io::transports::nbd::wire::{AllocationFlags, CommandFlags, cmd};
use userland_io::transports::nbd::{Address, Server, ServerHandle};

#[path = "common/model.rs"]
mod model;
#[path = "common/plain.rs"]
mod plain;
use model::{Answer, Model, Op};
use plain::{Ask, Plain, Reply};

const SIZE: u64 = (1 << 20) + 1234;

fn ask(op: &Op, mode: ReplyMode) -> Option<Ask> {
    let flags = |fua, no_hole| {
        let mut flags = CommandFlags::empty();
        flags.set(CommandFlags::FUA, fua);
        flags.set(CommandFlags::NO_HOLE, no_hole);
        flags
    };
    let none = CommandFlags::empty();
    Some(match op.clone() {
        Op::Read(range) => Ask::new(cmd::READ, none, range),
        Op::Write { range, seed, fua } => {
            let payload = model::pattern(seed, &range);
            Ask {
                payload,
                ..Ask::new(cmd::WRITE, flags(fua, false), range)
            }
        }
        Op::Zeroes {
            range,
            no_unmap,
            fua,
        } => Ask::new(cmd::WRITE_ZEROES, flags(fua, no_unmap), range),
        Op::Discard(range) => Ask::new(cmd::TRIM, none, range),
        Op::Extents(_) if mode == ReplyMode::Simple => return None,
        Op::Extents(range) => Ask::new(cmd::BLOCK_STATUS, none, range),
        Op::Flush => Ask::new(cmd::FLUSH, none, 0..0),
    })
}

fn answer(op: &Op, reply: Reply) -> Answer {
    assert_eq!(reply.error, 0, "{op:?}");
    let zero = u64::from(AllocationFlags::ZERO.bits());
    match op {
        Op::Read(_) => Answer::Bytes(reply.data),
        Op::Extents(_) => Answer::Runs(
            reply
                .status
                .iter()
                .map(|&(len, flags)| (len, flags & zero != 0))
                .collect(),
        ),
        _ => Answer::Done,
    }
}

/// Connects to the server's addresses in turn.
async fn connect(server: &ServerHandle, index: usize, mode: ReplyMode) -> Plain {
    let addresses = server.addresses();
    match &addresses[index % addresses.len()] {
        Address::Tcp { host, port } => {
            let stream = TcpStream::connect((&host[..], *port)).await.unwrap();
            Plain::connect(stream, "disk", mode).await
        }
        Address::Unix(path) => {
            let stream = UnixStream::connect(path).await.unwrap();
            Plain::connect(stream, "disk", mode).await
        }
        other => panic!("{other:?} was not asked for"),
    }
}

/// Runs a history over `count` connections, which share each batch.
async fn hold_against_the_model(history: Vec<Vec<Op>>, count: usize, mode: ReplyMode) {
    let device = Device::open(Memory::new(SIZE)).await.unwrap();
    let mut model = Model::new(&device.geometry());
    let dir = tempfile::tempdir().unwrap();
    let socket = format!("unix:{}", dir.path().join("sock").display());
    let server = Server::new().export("disk", device);
    let server = server.bind([&socket[..], "127.0.0.1:0"]).await.unwrap();
    let mut connections = Vec::new();
    for index in 0..count {
        connections.push(connect(&server, index, mode).await);
    }
    assert_eq!(connections[0].info.size, SIZE);

    for batch in history {
        let mut batch = model.certain(&batch);
        batch.retain(|op| ask(op, mode).is_some());
        let mut tasks = JoinSet::new();
        for (index, mut connection) in connections.drain(..).enumerate() {
            let mine: Vec<Op> = batch.iter().skip(index).step_by(count).cloned().collect();
            tasks.spawn(async move {
                let asks: Vec<Ask> = mine.iter().filter_map(|op| ask(op, mode)).collect();
                let replies = connection.ask(&asks).await;
                let answers = replies
                    .into_iter()
                    .zip(&mine)
                    .map(|(reply, op)| answer(op, reply));
                let answers: Vec<Answer> = answers.collect();
                (connection, mine, answers)
            });
        }
        // In whatever order they are done, so that connections change places.
        for (mut connection, ops, answers) in tasks.join_all().await {
            for (op, answer) in ops.iter().zip(&answers) {
                model.apply(op, answer);
                if let Op::Discard(range) = op {
                    let reply = read(&mut connection, range.clone()).await;
                    model.settle(range, &reply);
                }
            }
            connections.push(connection);
        }
    }
    for mut connection in connections {
        model.check_all(&read(&mut connection, 0..SIZE).await);
        connection.disconnect().await;
    }
    server.shutdown().await.unwrap();
}

async fn read(connection: &mut Plain, range: Range<u64>) -> Vec<u8> {
    let ask = Ask::new(cmd::READ, CommandFlags::empty(), range);
    let reply = connection.ask(&[ask]).await.remove(0);
    assert_eq!(reply.error, 0);
    reply.data
}

fn run(history: Vec<Vec<Op>>, count: usize, mode: ReplyMode) {
    let runtime = Builder::new_multi_thread()
        .worker_threads(3)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(hold_against_the_model(history, count, mode));
}

proptest! {
    #![proptest_config(model::config(24))]

    #[test]
    fn one_connection_behaves_as_an_array(history in model::histories(SIZE, 12, 16)) {
        run(history, 1, ReplyMode::Structured);
    }

    #[test]
    fn one_connection_with_simple_replies_behaves_as_an_array(history in model::histories(SIZE, 12, 16)) {
        run(history, 1, ReplyMode::Simple);
    }

    #[test]
    fn four_connections_with_extended_replies_are_one_array(history in model::histories(SIZE, 12, 16)) {
        run(history, 4, ReplyMode::Extended);
    }

    #[test]
    fn four_connections_are_one_array(history in model::histories(SIZE, 12, 32)) {
        run(history, 4, ReplyMode::Structured);
    }

    #[test]
    fn sixteen_connections_are_one_array(history in model::histories(SIZE, 8, 64)) {
        run(history, 16, ReplyMode::Structured);
    }
}
