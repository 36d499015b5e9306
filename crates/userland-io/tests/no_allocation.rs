//! A request through a device and its slots allocates nothing in a static stack,
//! and one small box at an erased boundary.

use std::future::poll_fn;

use userland_io::engines::Memory;
use userland_io::{Device, Engine, EngineExt, ReadBuf, Slots, WriteBuf, WriteFlags};

#[path = "common/counting.rs"]
mod counting;

/// How many allocations 1,000 rounds of a write and a read in each of 8 slots take.
async fn allocations<E: Engine>(engine: E) -> u64 {
    let device = Device::open(engine).await.unwrap();
    let mut slots = Slots::new(8);
    let mut before = 0;
    for round in 0..1001_u64 {
        // The first round makes the slots and the engine's memory.
        if round == 1 {
            before = counting::allocations();
        }
        for n in 0..8 {
            let device = &device;
            let started = slots.start(async move {
                let mut bytes = [round as u8; 4096];
                // Waits once, so that each slot is really taken.
                tokio::task::yield_now().await;
                device
                    .write(&WriteBuf::new(&bytes), n * 4096, WriteFlags::empty())
                    .await?;
                device.read(&mut ReadBuf::new(&mut bytes), n * 4096).await
            });
            assert!(started.is_pending());
        }
        while let Some(result) = poll_fn(|cx| slots.poll(cx)).await {
            result.unwrap();
        }
    }
    counting::allocations() - before
}

#[test]
fn a_static_stack_allocates_nothing_and_an_erased_one_a_box_per_request() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(async {
        assert_eq!(allocations(Memory::new(1 << 20)).await, 0);
        let erased = allocations(Memory::new(1 << 20).erase()).await;
        assert_eq!(erased, 1000 * 8 * 2);
        let device = Device::open(Memory::new(1 << 20).erase()).await.unwrap();
        let page = WriteBuf::new(&[1; 4096]);
        let both = || {
            let written = device.write_nowait(&page, 0, WriteFlags::empty());
            written.unwrap().unwrap();
            assert!(device.lend(0..4096, &mut |_| ()));
            let lent = device.lend_mut(0..4096, WriteFlags::empty(), &mut |_| ());
            lent.unwrap().unwrap();
        };
        both();
        let before = counting::allocations();
        both();
        assert_eq!(counting::allocations(), before, "what does not wait");
    });
}
