//! A failing seed becomes a script that a person can read, as a test and as a command.

use userland_io::{Checked, Engine, Filter, Result};
use userland_io_testing::sim::{DiskConfig, SimDisk};
use userland_io_testing::torture::{Scope, exhaustive, replay};
use userland_io_testing::{Subject, Torture};

/// Its flush does nothing.
struct NoFlush(Checked<SimDisk>);

impl Filter for NoFlush {
    type Lower = SimDisk;
    fn lower(&self) -> &Checked<SimDisk> {
        &self.0
    }
    async fn flush(&self) -> Result {
        Ok(())
    }
}

fn no_flush() -> Subject {
    Subject::new("no flush", DiskConfig::new(10 * 64, 64), async |disk| {
        Ok(NoFlush(Checked::new(disk)?))
    })
}

/// It claims that nothing needs a flush, and keeps a write to itself for ever if it has two.
struct Stuck(Checked<SimDisk>, tokio::sync::Semaphore);

impl Filter for Stuck {
    type Lower = SimDisk;
    fn lower(&self) -> &Checked<SimDisk> {
        &self.0
    }
    async fn flush(&self) -> Result {
        if let Ok(permit) = self.1.acquire().await {
            permit.forget();
        }
        self.0.flush().await
    }
}

#[test]
fn a_flush_that_does_nothing_is_shown_by_a_write_and_a_flush() {
    let failure = Torture::new(&no_flush()).run().unwrap_err();
    let script = &failure.script;
    assert_eq!(script.rounds.len(), 1, "{failure}");
    assert!(script.rounds[0].actions.len() <= 2, "{failure}");
    // It says itself how to see it again.
    let text = failure.to_string();
    let line = format!("replay(&no_flush(), \"{script}\").unwrap();");
    assert!(text.contains(&line), "{text}");
    assert!(text.contains(&format!("--script '{script}'")), "{text}");
    let again = replay(&no_flush(), &script.to_string()).unwrap_err();
    assert_eq!(again.verdict, failure.verdict);
    // The timeline names both, and what the block holds.
    assert!(text.contains("after the crash the block holds"), "{text}");
    assert!(text.contains("flush: ok"), "{text}");
}

#[test]
fn all_crash_points_of_one_script_find_it_too() {
    let failure = exhaustive(&no_flush(), &Scope::default()).unwrap_err();
    // The script names the event and the image.
    let again = replay(&no_flush(), &failure.script.to_string()).unwrap_err();
    assert_eq!(again.verdict.clause, failure.verdict.clause);
}

#[test]
fn what_never_answers_is_named() {
    let subject = Subject::new("stuck", DiskConfig::new(10 * 64, 64), async |disk| {
        Ok(Stuck(Checked::new(disk)?, tokio::sync::Semaphore::new(1)))
    });
    let failure = Torture::new(&subject).run().unwrap_err();
    let text = failure.verdict.to_string();
    assert!(text.contains("never answer"), "{text}");
    assert!(text.contains("(flush)") || text.contains("close"), "{text}");
}

/// Asks the disk below for what it does not do.
struct Rude(SimDisk);

impl Engine for Rude {
    fn geometry(&self) -> userland_io::Geometry {
        let mut geometry = self.0.geometry();
        geometry.logical_block_size /= 2;
        geometry
    }
    async fn read(&self, buf: &mut userland_io::ReadBuf<'_>, offset: u64) -> Result {
        self.0.read(buf, offset).await
    }
    async fn write(
        &self,
        buf: &userland_io::WriteBuf<'_>,
        offset: u64,
        flags: userland_io::WriteFlags,
    ) -> Result {
        self.0.write(buf, offset, flags).await
    }
    async fn flush(&self) -> Result {
        self.0.flush().await
    }
}

#[test]
fn a_layer_that_goes_round_the_edge_is_caught() {
    let subject = Subject::new("rude", DiskConfig::new(10 * 64, 64), async |disk| {
        Ok(Rude(disk))
    });
    let failure = Torture::new(&subject).run().unwrap_err();
    let text = failure.verdict.to_string();
    assert!(text.contains("the simulated disk was asked to"), "{text}");
    assert!(text.contains("off the block grid"), "{text}");
}
