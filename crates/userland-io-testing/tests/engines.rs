//! The library's engines pass the suite.

use userland_io::engines::{Aio, File, Memory, Null, Pattern};
use userland_io::layers::{Offset, OffsetEngine, ReadOnly, Stats, StatsEngine};
use userland_io::{EngineExt, Filter, Result};
use userland_io_testing::conformance::{
    all, block_on, close_keeps_what_was_written, resizing_is_noticed,
};

userland_io_testing::conformance!(pattern, async || Ok(Pattern::new(1_000_003)));

userland_io_testing::conformance!(read_only_memory, async || Memory::new(1 << 20)
    .layer(ReadOnly));

userland_io_testing::conformance!(window_of_a_memory, async || Memory::new(1 << 20)
    .layer(Offset::new(4097).size(333_333)));

#[test]
fn null_does_what_it_says() {
    // It forgets what is written, which is what it is for: the rest of the suite is not for it.
    let open = async || -> Result<Null> { Ok(Null::new(1 << 20)) };
    block_on(userland_io_testing::conformance::geometry_is_truthful(open)).unwrap();
}

#[test]
fn a_memory_that_is_resized_is_noticed_below_and_above_layers() {
    block_on(async {
        let bare = async || Ok(Memory::new(20_000));
        resizing_is_noticed(bare, async |disk: &Memory, size| {
            disk.resize(size);
            Ok(())
        })
        .await?;
        let layered = async || {
            let layered = Memory::new(30_000).layer(Stats::new())?;
            layered.layer(Offset::new(4097))
        };
        resizing_is_noticed(
            layered,
            async |window: &OffsetEngine<StatsEngine<Memory>>, size| {
                let memory = window.lower().get_ref().lower().get_ref();
                memory.resize(4097 + size);
                Ok(())
            },
        )
        .await
    })
    .unwrap_or_else(|verdict| panic!("{verdict}"));
}

#[test]
fn a_file_passes_buffered_and_direct() {
    for (size, direct, aio) in [
        (5 << 20, false, Aio::Auto),
        (123_457, false, Aio::Threads),
        (5 << 20, true, Aio::Threads),
        (5 << 20, true, Aio::Auto),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        let open = async || -> Result<File> {
            let open = File::open(path.clone()).size(size);
            open.direct(direct).aio(aio).await
        };
        let checked = block_on(async {
            all(&open).await?;
            close_keeps_what_was_written(&open).await
        });
        if let Err(verdict) = checked {
            panic!("{size} bytes, direct: {direct}, {aio:?}: {verdict}");
        }
    }
}
