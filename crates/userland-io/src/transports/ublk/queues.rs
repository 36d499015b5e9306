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
use super::serve::ServedQueue;
use super::target::{char_device, char_path};
use crate::queue::Queue;
use crate::transports::node;
use crate::uring::{Executor, Stop};
use crate::{Device, Engine};

/// How long the node of a new device may take to be ours to open.
const NODE: Duration = Duration::from_secs(5);
const STEP: Duration = Duration::from_millis(1);

/// The threads, and what stops them.
#[derive(Default)]
pub(super) struct Queues {
    threads: Vec<JoinHandle<()>>,
    stops: Vec<Stop>,
}

/// What a queue's thread is made of.
struct Setup<E: Engine> {
    device: Device<E>,
    file: Arc<File>,
    info: DeviceInfo,
    index: u16,
    cpus: Option<CpuSet>,
    runtime: Handle,
}

impl Queues {
    /// How many threads were started.
    pub(super) fn count(&self) -> usize {
        self.threads.len()
    }

    /// Starts a thread for each queue of the device, and answers when the driver has the commands of all tags. Each
    /// thread calls `ended` when it ends.
    pub(super) fn start<E: Engine>(
        &mut self,
        control: &mut ControlDevice,
        device: &Device<E>,
        info: &DeviceInfo,
        runtime: &Handle,
        ended: impl Fn() + Clone + Send + 'static,
    ) -> Result<(), Error> {
        let file = Arc::new(open_node(info.index)?);
        let (tell, told) = mpsc::channel();
        for index in 0..info.queues {
            let setup = Setup {
                device: device.clone(),
                file: file.clone(),
                info: *info,
                index,
                cpus: control
                    .affinity(info.index, index)
                    .ok()
                    .and_then(|bits| cpus(&bits)),
                runtime: runtime.clone(),
            };
            let (tell, ended) = (tell.clone(), ended.clone());
            let thread = thread::Builder::new()
                .name(format!("ublk{}-{index}", info.index))
                .spawn(move || {
                    let failed = tell.clone();
                    if let Err(error) = run(setup, tell) {
                        tracing::error!(queue = index, %error, "a queue of a block device has failed");
                        // Only heard if it had not started.
                        let _ = failed.send(Err(error));
                    }
                    ended();
                })
                .map_err(Error::io("a thread"))?;
            self.threads.push(thread);
        }
        drop(tell);
        for _ in 0..info.queues {
            let stop = told
                .recv()
                .unwrap_or_else(|_| Err(io::Error::other("the thread has panicked")))
                .map_err(Error::io("a queue of the block device"))?;
            self.stops.push(stop);
        }
        Ok(())
    }

    /// Waits for the threads, which end when the driver has stopped the device.
    pub(super) fn end(&mut self) {
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("the thread of a queue has panicked");
            }
        }
    }

    /// Ends the threads, whatever they do. To the driver it is as if the process had died.
    pub(super) fn break_off(&mut self) {
        self.stops.iter().for_each(Stop::stop);
        self.end();
    }
}

/// A queue's thread.
fn run<E: Engine>(setup: Setup<E>, tell: mpsc::Sender<io::Result<Stop>>) -> io::Result<()> {
    let Setup {
        device,
        file,
        info,
        index,
        cpus,
        runtime,
    } = setup;
    if let Some(cpus) = cpus
        && let Err(error) = sched_setaffinity(None, &cpus)
    {
        tracing::debug!(%error, "a queue's thread runs anywhere");
    }
    let executor = Executor::new(info.depth.into())?;
    let stop = executor.stopper();
    let max = info.max_transfer as usize;
    let served = ServedQueue::new(device, &file, index, info.depth, max, &executor)?;
    drop(file);
    let served = Rc::new(served);
    let tasks = (0..info.depth)
        .map(|tag| served.clone().serve(tag))
        .collect();
    let queue = Queue {
        index: index.into(),
        count: info.queues.into(),
    };
    let started = |running| {
        let all = running == usize::from(info.depth);
        let refused = || io::Error::other("the driver refused a command");
        // Not heard if another queue has failed before.
        let _ = tell.send(all.then_some(stop).ok_or_else(refused));
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
