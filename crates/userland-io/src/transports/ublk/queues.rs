//! The threads of a device's queues.

use std::fs::{File, OpenOptions};
use std::io;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::fs::FileType;
use rustix::thread::{CpuSet, sched_setaffinity};
use tokio::runtime::Handle;

use super::abi::DeviceInfo;
use super::control::ControlDevice;
use super::error::Error;
use super::memory::{Buffers, Descriptions};
use super::places::{char_device, char_path};
use super::serve::ServedQueue;
use crate::queue::Queue;
use crate::transports::node;
use crate::uring::{Executor, Stop};
use crate::{Device, Engine};

/// How long the node of a new device may take to be ours to open.
const NODE: Duration = Duration::from_secs(5);
const STEP: Duration = Duration::from_millis(1);

/// The threads.
#[derive(Default)]
pub(super) struct Queues {
    threads: Vec<Thread>,
    /// Given up for the character device's, so that there is one for it.
    spare: Option<File>,
}

/// The thread of a queue.
struct Thread {
    handle: JoinHandle<()>,
    /// Ends it, whatever it does. It has one as soon as it is ready.
    stop: Option<Stop>,
    /// Takes the character device, once; closed without, the thread ends.
    go: Option<mpsc::Sender<Arc<File>>>,
    /// Tells that it is ready, and then that it serves.
    told: mpsc::Receiver<io::Result<Stop>>,
}

/// What a queue's thread is made of.
struct Setup<E: Engine> {
    device: Device<E>,
    info: DeviceInfo,
    index: u16,
    cpus: Option<CpuSet>,
    runtime: Handle,
    file: mpsc::Receiver<Arc<File>>,
}

impl Queues {
    /// How many threads were started.
    pub(super) fn count(&self) -> usize {
        self.threads.len()
    }

    /// Makes a thread for each queue of the device, and all that it needs but the character device. Each
    /// thread calls `ended` when it ends.
    ///
    /// What can fail for want of memory or descriptors is here, before the driver knows of anything.
    pub(super) fn ready<E: Engine>(
        &mut self,
        control: &mut ControlDevice,
        device: &Device<E>,
        info: &DeviceInfo,
        runtime: &Handle,
        ended: impl Fn() + Clone + Send + 'static,
    ) -> Result<(), Error> {
        let spawned = (0..info.queues).try_for_each(|index| {
            let (tell, told) = mpsc::channel();
            let (go, file) = mpsc::channel();
            let setup = Setup {
                device: device.clone(),
                info: *info,
                index,
                cpus: control
                    .affinity(info.index, index)
                    .ok()
                    .and_then(|bits| cpus(&bits)),
                runtime: runtime.clone(),
                file,
            };
            let ended = ended.clone();
            let handle = thread::Builder::new()
                .name(format!("ublk{}-{index}", info.index))
                .spawn(move || {
                    if let Err(error) = run(setup, &tell) {
                        tracing::error!(queue = index, %error, "a queue of a block device has failed");
                        // Only heard if it had not started.
                        let _ = tell.send(Err(error));
                    }
                    ended();
                })
                .map_err(Error::io("a thread"))?;
            self.threads.push(Thread {
                handle,
                stop: None,
                go: Some(go),
                told,
            });
            Ok(())
        });
        let heard = self.hear();
        spawned.and(heard)?;
        self.spare = Some(File::open("/dev/null").map_err(Error::io("a descriptor"))?);
        Ok(())
    }

    /// Gives the character device of that index to the threads, which are ready, and answers when the driver has the commands
    /// of all tags.
    pub(super) fn start(&mut self, index: u32) -> Result<(), Error> {
        self.spare = None;
        let file = Arc::new(open_node(index)?);
        for go in self
            .threads
            .iter_mut()
            .filter_map(|thread| thread.go.take())
        {
            // One that has ended meanwhile is heard of below.
            let _ = go.send(file.clone());
        }
        drop(file);
        self.hear()
    }

    /// What each thread has to tell next, and the first error of theirs: all are heard, so that none is left that
    /// could not be stopped.
    fn hear(&mut self) -> Result<(), Error> {
        let mut heard = Ok(());
        for thread in &mut self.threads {
            let told = thread.told.recv();
            match told.unwrap_or_else(|_| Err(io::Error::other("the thread has panicked"))) {
                Ok(stop) => thread.stop = Some(stop),
                Err(error) => {
                    heard = heard.and(Err(Error::io("a queue of the block device")(error)));
                }
            }
        }
        heard
    }

    /// Waits for the threads, which end when the driver has stopped the device.
    pub(super) fn end(&mut self) {
        for Thread { handle, go, .. } in self.threads.drain(..) {
            drop(go);
            if handle.join().is_err() {
                tracing::error!("the thread of a queue has panicked");
            }
        }
    }

    /// Ends the threads, whatever they do. To the driver it is as if the process had died.
    pub(super) fn break_off(&mut self) {
        let stops = self
            .threads
            .iter()
            .filter_map(|thread| thread.stop.as_ref());
        stops.for_each(Stop::stop);
        self.end();
    }
}

/// A queue's thread.
fn run<E: Engine>(setup: Setup<E>, tell: &mpsc::Sender<io::Result<Stop>>) -> io::Result<()> {
    let Setup {
        device,
        info,
        index,
        cpus,
        runtime,
        file,
    } = setup;
    if let Some(cpus) = cpus
        && let Err(error) = sched_setaffinity(None, &cpus)
    {
        tracing::debug!(%error, "a queue's thread runs anywhere");
    }
    let executor = Executor::new(info.depth.into())?;
    let ring = executor.ring();
    ring.make_room()?;
    let max = info.max_transfer as usize;
    let buffers = Buffers::new(info.depth, max, ring.clone())?;
    let stop = executor.stopper();
    // Whoever does not hear it has closed the other channel as well.
    let _ = tell.send(Ok(stop.clone()));
    let Ok(file) = file.recv() else {
        return Ok(());
    };
    ring.register(&file)?;
    let descriptions = Descriptions::map(&file, index, info.depth)?;
    drop(file);
    let served = Rc::new(ServedQueue::new(device, index, descriptions, buffers, ring));
    // Each tag once: its task alone may use its buffer.
    let tasks = (0..info.depth).map(|tag| served.clone().serve(tag));
    let queue = Queue {
        index: index.into(),
        count: info.queues.into(),
    };
    let started = |running| {
        let all = running == usize::from(info.depth);
        let refused = || io::Error::other("the driver refused a command");
        let _ = tell.send(all.then_some(stop).ok_or_else(refused));
        // Nobody has to wait for it.
        served.populate();
    };
    executor.run_queue(queue, &runtime, tasks, started)
}

/// Opens the character device, which may take a moment: udev may be at it, or the process before hold it still.
fn open_node(index: u32) -> Result<File, Error> {
    let path = char_path(index);
    let until = Instant::now() + NODE;
    loop {
        node::ensure(&path, &char_device(index), FileType::CharacterDevice)
            .map_err(Error::io(path.display().to_string()))?;
        match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => return Ok(file),
            Err(error)
                if Instant::now() < until
                    && matches!(
                        error.kind(),
                        io::ErrorKind::PermissionDenied | io::ErrorKind::ResourceBusy
                    ) =>
            {
                thread::sleep(STEP);
            }
            Err(error) => return Err(Error::io(path.display().to_string())(error)),
        }
    }
}

/// The CPUs of a set in bits; `None` for an empty one.
fn cpus(bits: &[u8]) -> Option<CpuSet> {
    let mut cpus = CpuSet::new();
    let known = (bits.len() * 8).min(CpuSet::MAX_CPU);
    for cpu in (0..known).filter(|cpu| bits[cpu / 8] & (1 << (cpu % 8)) != 0) {
        cpus.set(cpu);
    }
    (cpus.count() > 0).then_some(cpus)
}
