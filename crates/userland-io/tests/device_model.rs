//! Random histories through a `Device`, many requests at once, held against an array of bytes.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinSet;
use userland_io::engines::Memory;
use userland_io::{
    CrashLevel, Device, Engine, ExtentKind, Extents, Geometry, ReadBuf, Result, WriteBuf,
    WriteFlags,
};

#[path = "common/model.rs"]
mod model;
use model::{Answer, Model, Op};

const SIZE: u64 = (1 << 20) + 1234;

/// The least that a writable engine can be, on blocks of 4 KiB and at most 8 KiB a request: everything
/// else is the edge's work.
struct Blocks(Mutex<Vec<u8>>);

impl Engine for Blocks {
    fn geometry(&self) -> Geometry {
        let mut geometry = Geometry::writable(SIZE, CrashLevel::None);
        geometry.logical_block_size = 4096;
        geometry.max_transfer = 8192;
        geometry
    }
    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        // Elsewhere is where races are.
        tokio::task::yield_now().await;
        buf.copy_from(&self.0.lock().unwrap()[self.range(offset, buf.len())]);
        Ok(())
    }
    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, _: WriteFlags) -> Result {
        tokio::task::yield_now().await;
        let range = self.range(offset, buf.len());
        buf.copy_to(&mut self.0.lock().unwrap()[range]);
        Ok(())
    }
}

impl Blocks {
    fn range(&self, offset: u64, len: usize) -> Range<usize> {
        let end = offset + len as u64;
        assert!(
            len > 0 && len <= 8192,
            "a request of {len} bytes got through"
        );
        assert!(
            offset.is_multiple_of(4096) && (end.is_multiple_of(4096) || end == SIZE),
            "{offset}..{end} got through"
        );
        offset as usize..end as usize
    }
}

async fn perform<E: Engine>(disk: Arc<Device<E>>, op: Op) -> Answer {
    let flags = |fua, no_unmap| {
        let mut flags = WriteFlags::empty();
        flags.set(WriteFlags::FUA, fua);
        flags.set(WriteFlags::NO_UNMAP, no_unmap);
        flags
    };
    let result = match op.clone() {
        Op::Read(range) => {
            let mut bytes = vec![0xaa; (range.end - range.start) as usize];
            disk.read(&mut ReadBuf::new(&mut bytes), range.start)
                .await
                .unwrap();
            return Answer::Bytes(bytes);
        }
        Op::Extents(range) => {
            let mut extents = Extents::new(1000);
            disk.extents(range, &mut extents).await.unwrap();
            let zero = |kind| kind != ExtentKind::Data;
            return Answer::Runs(
                extents
                    .iter()
                    .map(|run| (run.len, zero(run.kind)))
                    .collect(),
            );
        }
        Op::Write { range, seed, fua } => {
            let bytes = model::pattern(seed, &range);
            disk.write(&WriteBuf::new(&bytes), range.start, flags(fua, false))
                .await
        }
        Op::Zeroes {
            range,
            no_unmap,
            fua,
        } => disk.write_zeroes(range, flags(fua, no_unmap)).await,
        Op::Discard(range) => disk.discard(range).await,
        Op::Flush => disk.flush().await,
    };
    result.unwrap_or_else(|error| panic!("{op:?}: {error}"));
    Answer::Done
}

async fn hold_against_the_model<E: Engine>(engine: E, history: Vec<Vec<Op>>) {
    let disk = Arc::new(Device::open(engine).await.unwrap());
    let mut model = Model::new(&disk.geometry());
    for batch in history {
        let batch = model.certain(&batch);
        let mut tasks = JoinSet::new();
        for op in batch.iter().cloned() {
            let disk = disk.clone();
            tasks.spawn(async move { (op.clone(), perform(disk, op).await) });
        }
        for (op, answer) in tasks.join_all().await {
            model.apply(&op, &answer);
            if let Op::Discard(range) = &op
                && let Answer::Bytes(read) = perform(disk.clone(), Op::Read(range.clone())).await
            {
                model.settle(range, &read);
            }
        }
    }
    let Answer::Bytes(whole) = perform(disk.clone(), Op::Read(0..SIZE)).await else {
        unreachable!()
    };
    model.check_all(&whole);
    Arc::into_inner(disk).unwrap().close().await.unwrap();
}

fn runtime() -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(3)
        .enable_all()
        .build()
        .unwrap()
}

proptest! {
    #![proptest_config(model::config(64))]

    #[test]
    fn memory_behaves_as_an_array(history in model::histories(SIZE, 12, 16)) {
        runtime().block_on(hold_against_the_model(Memory::new(SIZE), history));
    }

    #[test]
    fn an_engine_of_two_methods_and_large_blocks_behaves_as_an_array(history in model::histories(SIZE, 12, 16)) {
        let engine = Blocks(Mutex::new(vec![0; SIZE as usize]));
        runtime().block_on(hold_against_the_model(engine, history));
    }
}
