//! What runs on a real executor say of disks that never answer, and of those that refuse.

#[path = "common/runtime.rs"]
mod runtime;

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use runtime::block_on;
use userland_io::engines::Memory;
use userland_io::{
    AnyEngine, Checked, Engine, Error, ErrorKind, Filter, Result, WriteBuf, WriteFlags,
};
use userland_io_testing::check::Clause;
use userland_io_testing::live::{Live, Tokio};
use userland_io_testing::{Script, Subject};

const SIZE: u64 = 1 << 20;

/// How a disk goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    /// The second half of it never answers a write.
    Write,
    /// Nor that of this one, which several may have open.
    SharedWrite,
    /// No flush is answered.
    Flush,
    /// It never closes.
    Close,
    /// The second half of it refuses writes as a full disk does.
    Full,
}

/// A disk that is open once at a time, unless shared.
struct Disk {
    memory: Checked<Memory>,
    wrong: Wrong,
    is_open: Arc<AtomicBool>,
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.is_open.store(false, Ordering::SeqCst);
    }
}

impl Filter for Disk {
    type Lower = Memory;
    fn lower(&self) -> &Checked<Memory> {
        &self.memory
    }
    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        match self.wrong {
            Wrong::Write | Wrong::SharedWrite if offset >= SIZE / 2 => pending().await,
            Wrong::Full if offset >= SIZE / 2 => Err(ErrorKind::NoSpace.into()),
            _ => self.memory.write(buf, offset, flags).await,
        }
    }
    async fn flush(&self) -> Result {
        match self.wrong {
            Wrong::Flush => pending().await,
            _ => self.memory.flush().await,
        }
    }
    async fn close(&self) -> Result {
        match self.wrong {
            Wrong::Close => pending().await,
            _ => self.memory.close().await,
        }
    }
}

fn disk(wrong: Wrong) -> Subject {
    let is_open = Arc::new(AtomicBool::new(false));
    Subject::over(format!("{wrong:?}"), Vec::new(), move |_| {
        let is_open = is_open.clone();
        async move {
            if is_open.swap(true, Ordering::SeqCst) && wrong != Wrong::SharedWrite {
                return Err(Error::new(ErrorKind::Io, "in use"));
            }
            let memory = Checked::new(Memory::new(SIZE))?;
            let disk = Disk {
                memory,
                wrong,
                is_open,
            };
            Ok(vec![AnyEngine::new(disk)])
        }
    })
}

#[test]
fn a_write_that_never_answers_is_told_as_it_was_found() {
    block_on(async {
        for wrong in [Wrong::Write, Wrong::SharedWrite] {
            let subject = disk(wrong);
            let live = Live::new(&subject, &Tokio).patience(Duration::from_millis(300));
            let failure = live.run(0..100, |_| true).await.unwrap_err();
            // What it asked for is still under way, beside or in the way of what would come.
            assert_eq!(failure.verdict.clause, Clause::Answer, "{failure}");
            assert!(failure.verdict.what.contains("write "), "{failure}");
            assert_eq!(failure.script, failure.found);
        }
    });
}

#[test]
fn no_wait_of_a_run_is_without_end() {
    block_on(async {
        for (wrong, what) in [(Wrong::Flush, "the last flush"), (Wrong::Close, "close")] {
            let subject = disk(wrong);
            let live = Live::new(&subject, &Tokio).patience(Duration::from_millis(100));
            let script: Script = "seed=1 0:w0+1".parse().unwrap();
            let replay = tokio::time::timeout(Duration::from_secs(30), live.replay(&script, 2));
            let failure = replay.await.expect("a verdict").unwrap_err();
            assert_eq!(failure.verdict.clause, Clause::Answer, "{failure}");
            assert!(failure.verdict.what.starts_with(what), "{failure}");
        }
    });
}

/// A write beyond the end is refused by the same number over NBD.
#[test]
fn a_full_disk_is_a_failure_unless_errors_are_allowed() {
    block_on(async {
        let subject = disk(Wrong::Full);
        let live = || Live::new(&subject, &Tokio);
        let failure = live().run(0..100, |_| true).await.unwrap_err();
        assert_eq!(failure.verdict.clause, Clause::Operation, "{failure}");
        assert!(failure.verdict.what.contains("space"), "{failure}");
        let report = live().errors_allowed().run(0..100, |_| true).await;
        assert_eq!(report.unwrap().runs, 100);
    });
}
