//! C2: what survives a crash is a prefix of the history.
//!
//! Every mutation is a record at the end of a log. A record names the one before it by that one's checksum, so
//! a reader that starts at the beginning stops at the first that was torn or lost, and never runs into
//! leftovers of an earlier life. What it has read by then is a prefix.
//!
//! There are two logs, one in use. When it is full, one record with the whole disk is written to the other, and then
//! a superblock that names it: what is found after a crash is the one or the other, with the same content.
//!
//! The state in memory is taken out while something is being written and put back when that has succeeded. If it
//! fails, or the future is dropped, the state is gone, and the next request reads it from below again, after
//! a flush: then what was in doubt either is in the log or is not. One rule for crashes, errors and cancellation.

use std::ops::Range;

use tokio::sync::{Mutex, MutexGuard};
use userland_io::{
    Checked, CrashLevel, Discard, Engine, Error, ErrorKind, ExtentKind, Extents, Features,
    Geometry, ReadBuf, Result, WriteBuf, WriteFlags,
};

use super::{checksum, too_small};

/// A disk that is a log.
#[derive(Debug)]
pub struct LogDisk<E> {
    lower: Checked<E>,
    block: usize,
    /// Blocks of the disk.
    blocks: usize,
    /// Blocks of each log.
    log_len: usize,
    state: Mutex<Option<State>>,
}

#[derive(Debug)]
struct State {
    /// Counts the logs; the superblock with the higher number rules. The log's place is its parity.
    epoch: u64,
    /// The next record's place in the log, in blocks.
    end: usize,
    /// The checksum of the record before.
    last: u64,
    /// For each block its place in the disk below plus 1, or 0 for zeroes.
    index: Vec<u32>,
}

/// What a record's first block says.
struct Header {
    start: u32,
    count: u32,
    zeroes: bool,
}

impl<E: Engine> LogDisk<E> {
    /// Opens the disk that `lower` holds; one that is all zeroes is a new disk.
    ///
    /// # Errors
    /// If `lower` is too small, or fails.
    pub async fn open(lower: E) -> Result<Self> {
        let lower = Checked::new(lower)?;
        let geometry = lower.geometry();
        let block = (geometry.logical_block_size as usize).max(64);
        let total = (geometry.size / block as u64) as usize;
        let log_len = total.saturating_sub(2) / 2;
        let blocks = log_len / 3;
        if blocks == 0 {
            return Err(too_small("a log"));
        }
        let disk = LogDisk {
            lower,
            block,
            blocks,
            log_len,
            state: Mutex::new(None),
        };
        drop(disk.state().await?);
        Ok(disk)
    }

    /// The state, read from below if it is in doubt.
    async fn state(&self) -> Result<MutexGuard<'_, Option<State>>> {
        let mut state = self.state.lock().await;
        if state.is_none() {
            // What was dropped half-way acts now or never.
            self.lower.flush().await?;
            *state = Some(self.recover().await?);
        }
        Ok(state)
    }

    async fn recover(&self) -> Result<State> {
        let mut epoch = 0;
        for place in 0..2 {
            let bytes = self.get(place).await?;
            let (head, sum) = bytes[..16].split_at(8);
            if sum == checksum(&[head]).to_le_bytes() {
                epoch = epoch.max(word(head));
            }
        }
        let mut state = State {
            epoch,
            end: 0,
            last: epoch,
            index: vec![0; self.blocks],
        };
        while let Some((header, sum)) = self.record(&state).await? {
            self.note(&mut state, &header, sum);
        }
        Ok(state)
    }

    /// The record at the end of what is known, if there is one.
    async fn record(&self, state: &State) -> Result<Option<(Header, u64)>> {
        if state.end >= self.log_len {
            return Ok(None);
        }
        let place = self.place(state.epoch, state.end);
        let head = self.get(place).await?;
        let header = Header {
            start: word(&head[16..]) as u32,
            count: word(&head[24..]) as u32,
            zeroes: word(&head[32..]) != 0,
        };
        let end = header.start as usize + header.count as usize;
        let fits = header.count > 0
            && end <= self.blocks
            && state.end + header.len() <= self.log_len
            && word(&head[8..]) == state.last;
        if !fits {
            return Ok(None);
        }
        let mut payload = vec![0; (header.len() - 1) * self.block];
        if !payload.is_empty() {
            let mut buf = ReadBuf::new(&mut payload);
            let place = ((place + 1) * self.block) as u64;
            self.lower.read(&mut buf, place).await?;
        }
        let sum = checksum(&[&head[8..], &payload]);
        Ok((word(&head) == sum).then_some((header, sum)))
    }

    /// Takes a record that is in the log into the state.
    fn note(&self, state: &mut State, header: &Header, sum: u64) {
        let first = self.place(state.epoch, state.end) + 1;
        for n in 0..header.count as usize {
            state.index[header.start as usize + n] = match header.zeroes {
                true => 0,
                false => (first + n) as u32 + 1,
            };
        }
        state.end += header.len();
        state.last = sum;
    }

    /// Where a block of a log is, in blocks of the disk below.
    fn place(&self, epoch: u64, at: usize) -> usize {
        2 + (epoch % 2) as usize * self.log_len + at
    }

    async fn get(&self, place: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.block];
        let offset = (place * self.block) as u64;
        self.lower
            .read(&mut ReadBuf::new(&mut bytes), offset)
            .await?;
        Ok(bytes)
    }

    /// Writes a record at the end of the log, and then knows it.
    async fn write_record(
        &self,
        state: &mut State,
        header: Header,
        payload: &[u8],
        flags: WriteFlags,
    ) -> Result {
        let mut bytes = vec![0; self.block];
        bytes[8..16].copy_from_slice(&state.last.to_le_bytes());
        bytes[16..24].copy_from_slice(&u64::from(header.start).to_le_bytes());
        bytes[24..32].copy_from_slice(&u64::from(header.count).to_le_bytes());
        bytes[32] = u8::from(header.zeroes);
        let sum = checksum(&[&bytes[8..], payload]);
        bytes[..8].copy_from_slice(&sum.to_le_bytes());
        bytes.extend(payload);
        let place = (self.place(state.epoch, state.end) * self.block) as u64;
        let none = WriteFlags::empty();
        self.lower
            .write(&WriteBuf::new(&bytes), place, none)
            .await?;
        // Not FUA below: the records before this one must be durable, too.
        if flags.contains(WriteFlags::FUA) {
            self.lower.flush().await?;
        }
        self.note(state, &header, sum);
        Ok(())
    }

    async fn append(&self, header: Header, payload: &[u8], flags: WriteFlags) -> Result {
        let mut guard = self.state().await?;
        let Some(mut state) = guard.take() else {
            return Err(ErrorKind::Io.into());
        };
        if state.end + header.len() > self.log_len {
            state = self.switch(state).await?;
        }
        self.write_record(&mut state, header, payload, flags)
            .await?;
        *guard = Some(state);
        Ok(())
    }

    /// Writes the whole disk into the other log, and then uses that.
    async fn switch(&self, old: State) -> Result<State> {
        let mut payload = Vec::with_capacity(self.blocks * self.block);
        for &place in &old.index {
            match place.checked_sub(1) {
                Some(place) => payload.extend(self.get(place as usize).await?),
                None => payload.resize(payload.len() + self.block, 0),
            }
        }
        let epoch = old.epoch + 1;
        let mut new = State {
            epoch,
            end: 0,
            last: epoch,
            index: old.index,
        };
        let header = Header {
            start: 0,
            count: self.blocks as u32,
            zeroes: false,
        };
        let none = WriteFlags::empty();
        self.write_record(&mut new, header, &payload, none).await?;
        self.lower.flush().await?;
        let mut bytes = vec![0; self.block];
        bytes[..8].copy_from_slice(&epoch.to_le_bytes());
        let sum = checksum(&[&bytes[..8]]);
        bytes[8..16].copy_from_slice(&sum.to_le_bytes());
        let place = (epoch % 2) * self.block as u64;
        self.lower
            .write(&WriteBuf::new(&bytes), place, none)
            .await?;
        // From here on the old log may be overwritten, by the next switch.
        self.lower.flush().await?;
        Ok(new)
    }

    fn header(&self, range: &Range<u64>, zeroes: bool) -> Header {
        let block = self.block as u64;
        Header {
            start: (range.start / block) as u32,
            count: ((range.end - range.start) / block) as u32,
            zeroes,
        }
    }
}

impl Header {
    /// Its record's length in blocks.
    fn len(&self) -> usize {
        match self.zeroes {
            true => 1,
            false => 1 + self.count as usize,
        }
    }
}

fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[..8]);
    u64::from_le_bytes(word)
}

impl<E: Engine> Engine for LogDisk<E> {
    fn geometry(&self) -> Geometry {
        let size = (self.blocks * self.block) as u64;
        let below = self.lower.geometry().features & Features::SURVIVES_KILL;
        let mut geometry = Geometry::writable(size, CrashLevel::Prefix);
        geometry.logical_block_size = self.block as u32;
        // A record must fit behind the one that holds the whole disk.
        geometry.max_transfer = ((self.log_len - self.blocks - 2) * self.block) as u32;
        geometry.discard = Discard::Zeroes;
        geometry.features |= Features::FUA | Features::WRITE_ZEROES | Features::EXTENTS | below;
        geometry
    }

    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        let guard = self.state().await?;
        let Some(state) = &*guard else {
            return Err(ErrorKind::Io.into());
        };
        let header = self.header(&(offset..offset + buf.len() as u64), false);
        for n in 0..header.count as usize {
            let mut part = buf.slice(n * self.block..(n + 1) * self.block);
            match state.index[header.start as usize + n].checked_sub(1) {
                Some(place) => {
                    let offset = u64::from(place) * self.block as u64;
                    self.lower.read(&mut part, offset).await?;
                }
                None => part.fill(0),
            }
        }
        Ok(())
    }

    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        let mut payload = vec![0; buf.len()];
        buf.copy_to(&mut payload);
        let range = offset..offset + buf.len() as u64;
        self.append(self.header(&range, false), &payload, flags)
            .await
    }

    async fn flush(&self) -> Result {
        // Held to the end: nothing is appended meanwhile.
        let _state = self.state().await?;
        self.lower.flush().await
    }

    async fn discard(&self, range: Range<u64>) -> Result {
        let header = self.header(&range, true);
        self.append(header, &[], WriteFlags::empty()).await
    }

    async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        let fua = flags & WriteFlags::FUA;
        if !flags.contains(WriteFlags::NO_UNMAP) {
            return self.append(self.header(&range, true), &[], fua).await;
        }
        // In a log, space that stays allocated is space that is written. The edge does that.
        Err(Error::from(ErrorKind::Unsupported))
    }

    async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        let guard = self.state().await?;
        let Some(state) = &*guard else {
            return Err(ErrorKind::Io.into());
        };
        let header = self.header(&range, false);
        for n in 0..header.count as usize {
            let kind = match state.index[header.start as usize + n] {
                0 => ExtentKind::Hole,
                _ => ExtentKind::Data,
            };
            out.push(self.block as u64, kind);
        }
        Ok(())
    }

    async fn close(&self) -> Result {
        self.flush().await?;
        self.lower.close().await
    }
}
