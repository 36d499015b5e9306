//! What is put to the test: how to make a stack over simulated disks.

use std::fmt;
use std::future::Future;
use std::pin::Pin;

use userland_io::{AnyEngine, Checked, Engine, Result};

use crate::sim::{DiskConfig, SimDisk, World};

type Opening = Pin<Box<dyn Future<Output = Result<Vec<Checked<AnyEngine>>>>>>;

/// A stack under test: the disks below it, and how it is opened over them.
///
/// It is opened on blank disks first and again after every crash, so opening must create what is
/// not there and recover what is.
pub struct Subject {
    pub(crate) name: String,
    pub(crate) disks: Vec<DiskConfig>,
    pub(crate) open: Box<dyn Fn(Vec<SimDisk>) -> Opening + Send + Sync>,
    pub(crate) cell: Option<usize>,
    pub(crate) ends_on_errors: bool,
}

impl Subject {
    /// An engine over one disk.
    pub fn new<E: Engine, F>(
        name: impl Into<String>,
        disk: DiskConfig,
        open: impl Fn(SimDisk) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Result<E>> + 'static,
    {
        Self::over(name, vec![disk], move |mut disks| {
            let engine = open(disks.remove(0));
            async move { Ok(vec![AnyEngine::new(engine.await?)]) }
        })
    }

    /// Any number of disks below, and any number of ways to the same stack above (connections, queues): the clients
    /// of a script take turns among them.
    pub fn over<F>(
        name: impl Into<String>,
        disks: Vec<DiskConfig>,
        open: impl Fn(Vec<SimDisk>) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Result<Vec<AnyEngine>>> + 'static,
    {
        Subject {
            name: name.into(),
            disks,
            open: Box::new(move |disks| {
                let engines = open(disks);
                Box::pin(async move {
                    let checked = |engine| Ok(Checked::new(engine)?);
                    engines.await?.into_iter().map(checked).collect()
                })
            }),
            cell: None,
            ends_on_errors: false,
        }
    }

    /// After an error from below its engines may refuse everything, reads too, until they are opened anew. That is then done, as after
    /// the end of their process. Only the [`live`](crate::live) checks know such engines.
    #[must_use]
    pub fn ends_on_errors(mut self) -> Self {
        self.ends_on_errors = true;
        self
    }

    /// Works in blocks of `bytes` instead of the logical block size. Smaller: the edge must read, modify and write.
    #[must_use]
    pub fn cell(mut self, bytes: usize) -> Self {
        self.cell = Some(bytes.max(1));
        self
    }

    /// Changes what its disks are like.
    pub fn each_disk(&mut self, change: impl FnMut(&mut DiskConfig)) {
        self.disks.iter_mut().for_each(change);
    }

    /// Opens it where it stands on no simulated disk, for what is not a run.
    ///
    /// # Errors
    /// What opening answers.
    pub async fn open_real(&self) -> Result<Vec<Checked<AnyEngine>>> {
        (self.open)(Vec::new()).await
    }

    /// Opens it once over blank simulated disks, for what is not a run.
    ///
    /// # Errors
    /// What opening answers.
    pub fn open_blank(&self) -> Result<()> {
        let world = World::new(0);
        let disks = self.disks.iter();
        let disks = disks.map(|config| SimDisk::new(&world, config.clone()));
        match world.run((self.open)(disks.collect())) {
            Some(Err(error)) => Err(error),
            // What never ends is for a run to tell.
            Some(Ok(_)) | None => Ok(()),
        }
    }

    /// True if it stands on no simulated disk.
    pub fn is_real(&self) -> bool {
        self.disks.is_empty()
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Debug for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subject")
            .field("name", &self.name)
            .field("disks", &self.disks)
            .finish_non_exhaustive()
    }
}
