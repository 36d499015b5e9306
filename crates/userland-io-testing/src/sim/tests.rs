//! The simulated disk loses what it may, keeps what it must, and watches its caller.

use std::future::Future;
use std::task::Waker;

use userland_io::{Engine, ErrorKind, ReadBuf, WriteBuf, WriteFlags};

use super::{DiskConfig, Keep, SimDisk, World};

fn disk(seed: u64) -> (World, SimDisk) {
    let world = World::new(seed);
    let disk = SimDisk::new(&world, DiskConfig::new(4 * 32, 32));
    (world, disk)
}

fn write(world: &World, disk: &SimDisk, block: u64, byte: u8, flags: WriteFlags) {
    let bytes = [byte; 32];
    let done = world.run(disk.write(&WriteBuf::new(&bytes), block * 32, flags));
    done.unwrap().unwrap();
}

/// The first byte of each block.
fn image(world: &World, disk: &SimDisk) -> [u8; 4] {
    let mut bytes = [0; 4 * 32];
    let mut buf = ReadBuf::new(&mut bytes);
    world.run(disk.read(&mut buf, 0)).unwrap().unwrap();
    std::array::from_fn(|block| bytes[block * 32])
}

#[test]
fn a_crash_may_keep_any_versions_and_a_flush_leaves_no_choice() {
    let (world, disk) = disk(1);
    let none = WriteFlags::empty();
    write(&world, &disk, 0, 1, none);
    write(&world, &disk, 0, 2, none);
    write(&world, &disk, 1, 3, none);
    write(&world, &disk, 2, 4, WriteFlags::FUA);
    assert_eq!(disk.images(), 6);
    let mut images: Vec<[u8; 4]> = (0..6)
        .map(|number| image(&world, &disk.crash(Keep::Image(number))))
        .collect();
    images.sort_unstable();
    let all = [
        [0, 0, 4, 0],
        [0, 3, 4, 0],
        [1, 0, 4, 0],
        [1, 3, 4, 0],
        [2, 0, 4, 0],
        [2, 3, 4, 0],
    ];
    assert_eq!(images, all);
    for _ in 0..50 {
        let kept = image(&world, &disk.crash(Keep::Prefix));
        let prefixes = [all[0], all[2], all[4], all[5]];
        assert!(prefixes.contains(&kept), "{kept:?}");
    }
    assert_eq!(image(&world, &disk.kill()), [2, 3, 4, 0]);
    world.run(disk.flush()).unwrap().unwrap();
    assert_eq!(disk.images(), 1);
    assert_eq!(image(&world, &disk.crash(Keep::Nothing)), [2, 3, 4, 0]);
}

#[test]
fn a_dropped_write_acts_until_the_next_flush_or_never() {
    let mut acted = [0; 2];
    for seed in 0..100 {
        let (world, disk) = disk(seed);
        {
            let bytes = [9; 32];
            let buf = WriteBuf::new(&bytes);
            let mut write = std::pin::pin!(disk.write(&buf, 0, WriteFlags::empty()));
            let mut cx = std::task::Context::from_waker(Waker::noop());
            world.stop_after(Some(0));
            assert!(write.as_mut().poll(&mut cx).is_pending());
        }
        world.stop_after(None);
        world.run(disk.flush()).unwrap().unwrap();
        let after = image(&world, &disk);
        for _ in 0..10 {
            assert_eq!(image(&world, &disk), after);
        }
        acted[usize::from(after[0] == 9)] += 1;
    }
    assert!(acted[0] > 10 && acted[1] > 10, "{acted:?}");
}

#[test]
fn lent_memory_holds_what_is_there_and_is_written_as_a_whole() {
    let (world, disk) = disk(1);
    let none = WriteFlags::empty();
    write(&world, &disk, 1, 1, none);
    let mut was = Vec::new();
    let mut lend = || {
        was.clear();
        disk.lend_mut(0..96, none, &mut |memory| {
            was.push(memory[0]);
            memory[0] = 7;
        })
    };
    // Now and then there is something to wait for.
    let mut tries = std::iter::repeat_with(&mut lend).take(100);
    let lent = tries.find_map(|lent| lent);
    lent.unwrap().unwrap();
    assert_eq!(was, [0, 1, 0]);
    assert_eq!(image(&world, &disk), [7, 7, 7, 0]);
    let mut rest = [0; 32];
    world
        .run(disk.read(&mut ReadBuf::new(&mut rest), 32))
        .unwrap()
        .unwrap();
    assert_eq!(rest[1..], [1; 31]);
}

#[test]
fn it_notes_what_no_caller_may_ask() {
    let (world, disk) = disk(1);
    let bytes = [0; 32];
    let buf = WriteBuf::new(&bytes);
    let off_grid = world.run(disk.write(&buf, 16, WriteFlags::empty()));
    assert_eq!(off_grid.unwrap().unwrap_err().kind(), ErrorKind::Invalid);
    world.run(disk.close()).unwrap().unwrap();
    let late = world.run(disk.write(&buf, 0, WriteFlags::empty()));
    assert!(late.unwrap().is_err());
    let breaches = world.take_breaches();
    assert!(
        breaches[0].contains("write 16..48: off the block grid"),
        "{breaches:?}"
    );
    assert!(breaches[1].contains("after close"), "{breaches:?}");
    assert_eq!(breaches.len(), 2);
}
