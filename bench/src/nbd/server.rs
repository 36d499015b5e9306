//! Starts a server under test, and measures what it does.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use super::client::{self, Client, Load, Tally};
use super::endpoint::Endpoint;
use super::kinds::Kind;
use crate::figures::Figure;
use crate::process::Process;

/// How long a server may take to listen.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where a server puts things.
#[derive(Clone, Debug)]
pub struct Place {
    /// Where it listens.
    pub endpoint: Endpoint,
    /// Its disk, if that is to be a file.
    pub image: PathBuf,
    /// The size of the disk in bytes.
    pub size: u64,
    /// For a file of settings.
    pub settings: PathBuf,
}

impl Place {
    /// For the number of a process in the background.
    pub fn process_file(&self) -> PathBuf {
        self.settings.with_extension("process")
    }
}

/// A server that answers.
#[derive(Debug)]
pub struct Server {
    /// Which.
    pub kind: &'static Kind,
    /// Where it listens.
    pub endpoint: Endpoint,
    /// Its process.
    pub process: Process,
    image: PathBuf,
}

impl Server {
    /// Starts `kind` with a disk of `size` bytes, its files below `directory`, and waits until it listens.
    ///
    /// # Errors
    /// If it does not.
    pub fn start(
        kind: &'static Kind,
        endpoint: Endpoint,
        directory: &std::path::Path,
        size: u64,
    ) -> io::Result<Self> {
        let word = kind.name.replace(' ', "-");
        let place = Place {
            image: directory.join(format!("{word}.image")),
            settings: directory.join(format!("{word}.settings")),
            endpoint,
            size,
        };
        if let Endpoint::Unix(path) = &place.endpoint
            && path.exists()
        {
            fs::remove_file(path)?;
        }
        if kind.is_file() {
            fs::File::create(&place.image)?.set_len(size)?;
        }
        let mut command = Command::new(kind.program()?);
        command.args((kind.arguments)(&place)?);
        let mut process = match kind.is_daemon() {
            true => {
                // One that is left from before would be taken for the new one's.
                let _ = fs::remove_file(place.process_file());
                Process::start_daemon(kind.name, &mut command, &place.process_file())?
            }
            false => Process::start(kind.name, &mut command)?,
        };
        let start = Instant::now();
        while Client::connect(&place.endpoint, kind.export).is_err() {
            process.check()?;
            if start.elapsed() > PATIENCE {
                let why = format!("{}: does not answer at {}", kind.name, place.endpoint);
                return Err(io::Error::other(why));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Server {
            kind,
            endpoint: place.endpoint,
            process,
            image: place.image,
        })
    }

    /// One more connection.
    ///
    /// # Errors
    /// If it cannot be had.
    pub fn connect(&self) -> io::Result<Client> {
        Client::connect(&self.endpoint, self.kind.export)
            .map_err(|error| io::Error::other(format!("{}: {error}", self.kind.name)))
    }

    /// Connections for `load`.
    ///
    /// # Errors
    /// If they cannot be had.
    pub fn clients(&self, load: Load) -> io::Result<Vec<Client>> {
        (0..load.connections).map(|_| self.connect()).collect()
    }

    /// Runs `load` for `time`.
    ///
    /// # Errors
    /// If the server fails.
    pub fn measure(&self, load: Load, time: Duration) -> io::Result<(Figure, Tally)> {
        let mut clients = self.clients(load)?;
        let before = self.process.cpu()?;
        let tally = client::run(&mut clients, load, time)
            .map_err(|error| io::Error::other(format!("{}: {error}", self.kind.name)))?;
        // Before the clients leave: with them some servers end the processes that served them.
        let cpu = self.process.cpu()?.saturating_sub(before);
        let total = tally.total() as f64;
        let figure = Figure {
            rate: total / tally.took.as_secs_f64(),
            cpu: cpu.as_secs_f64() * 1e6 / total,
        };
        Ok((figure, tally))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Not there for every kind.
        let _ = fs::remove_file(&self.image);
    }
}
