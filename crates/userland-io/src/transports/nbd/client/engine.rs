//! The client as an engine: the library's operations in the protocol's commands.

use std::ops::Range;

use super::Client;
use super::op::{Answer, Data, Kind, Op};
use crate::transports::nbd::wire::{
    AllocationFlags, BASE_ALLOCATION, CommandFlags, TransmissionFlags,
};
use crate::{
    Engine, Error, ErrorKind, ExtentKind, Extents, Geometry, ReadBuf, Result, WriteBuf, WriteFlags,
    errno,
};

/// The longest range that a status is asked of: a compact request's length has 32 bits.
const MAX_STATUS: u64 = 1 << 31;
/// The most runs that one status request brings up.
const MAX_RUNS: usize = 1 << 16;
/// The most status requests that one call makes: a server may answer each with a single byte.
const MAX_ASKED: usize = 256;

impl Engine for Client {
    fn geometry(&self) -> Geometry {
        self.shared.export.geometry
    }

    async fn read(&self, buf: &mut ReadBuf<'_>, offset: u64) -> Result {
        let op = Op::new(Kind::Read, offset..offset + buf.len() as u64);
        match self.shared.ask(op).await? {
            Answer::Data(bytes) if bytes.len() == buf.len() => {
                buf.copy_from(&bytes);
                Ok(())
            }
            _ => Err(ErrorKind::Io.into()),
        }
    }

    async fn write(&self, buf: &WriteBuf<'_>, offset: u64, flags: WriteFlags) -> Result {
        let range = offset..offset + buf.len() as u64;
        let charge = self.shared.reserve(buf.len() as u64).await?;
        let bytes = match buf.as_slice() {
            Some(bytes) => bytes.to_vec(),
            None => {
                let mut bytes = vec![0; buf.len()];
                buf.copy_to(&mut bytes);
                bytes
            }
        };
        let data = Data::new(bytes, charge);
        self.shared
            .mutate(Kind::Write, range, command_flags(flags), data)
            .await
    }

    async fn flush(&self) -> Result {
        self.shared.flush().await
    }

    async fn discard(&self, range: Range<u64>) -> Result {
        let charge = self.shared.reserve(0).await?;
        let data = Data::new(Vec::new(), charge);
        self.shared
            .mutate(Kind::Discard, range, CommandFlags::empty(), data)
            .await
    }

    async fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Result {
        if flags.contains(WriteFlags::FAST_ONLY)
            && !self.shared.export.has(TransmissionFlags::SEND_FAST_ZERO)
        {
            return Err(ErrorKind::Unsupported.into());
        }
        let charge = self.shared.reserve(0).await?;
        let data = Data::new(Vec::new(), charge);
        let result = self
            .shared
            .mutate(Kind::WriteZeroes, range, command_flags(flags), data)
            .await;
        match result {
            // Too much at once for this server: the edge writes them instead.
            Err(error) if error.errno() == errno::EOVERFLOW => {
                Err(Error::new(ErrorKind::Unsupported, error))
            }
            result => result,
        }
    }

    async fn extents(&self, range: Range<u64>, out: &mut Extents) -> Result {
        self.status_of(BASE_ALLOCATION, range, out, |word| {
            let flags = AllocationFlags::from_bits_truncate(word as u32);
            // A hole that need not read as zeroes is data of which nothing is known.
            match flags.contains(AllocationFlags::ZERO) {
                true if flags.contains(AllocationFlags::HOLE) => ExtentKind::Hole,
                true => ExtentKind::Zero,
                false => ExtentKind::Data,
            }
        })
        .await
    }

    fn contexts(&self) -> Vec<String> {
        let all = self.shared.export.contexts.iter();
        all.filter(|name| *name != BASE_ALLOCATION)
            .cloned()
            .collect()
    }

    async fn status(&self, context: &str, range: Range<u64>, out: &mut Extents<u64>) -> Result {
        self.status_of(context, range, out, |word| word).await
    }

    async fn prefetch(&self, range: Range<u64>) -> Result {
        if self.shared.export.has(TransmissionFlags::SEND_CACHE) {
            let len = (range.end - range.start).min(MAX_STATUS);
            let op = Op::new(Kind::Cache, range.start..range.start + len);
            // A hint may fail, and nobody is the worse for it.
            let _ = self.shared.ask(op).await;
        }
        Ok(())
    }

    async fn close(&self) -> Result {
        let result = match self.shared.export.geometry.needs_flush() {
            true => self.shared.flush().await,
            false => match self.shared.flush().await {
                Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
                other => other,
            },
        };
        self.hang_up().await;
        result
    }
}

impl Client {
    async fn status_of<K: Copy + PartialEq>(
        &self,
        context: &str,
        range: Range<u64>,
        out: &mut Extents<K>,
        kind: impl Fn(u64) -> K,
    ) -> Result {
        let contexts = &self.shared.export.contexts;
        let Some(context) = contexts.iter().position(|name| name == context) else {
            return Err(ErrorKind::Unsupported.into());
        };
        let mut at = range.start;
        for _ in 0..MAX_ASKED {
            // The caller asks again for what is left.
            if at >= range.end || out.is_full() {
                break;
            }
            let room = out.room().clamp(1, MAX_RUNS);
            let end = range.end.min(at + MAX_STATUS);
            let mut op = Op::new(Kind::Status { context, room }, at..end);
            op.flags.set(CommandFlags::REQ_ONE, room == 1);
            let Answer::Status(runs) = self.shared.ask(op).await? else {
                return Err(ErrorKind::Io.into());
            };
            for (len, word) in runs {
                // The last run may reach beyond what was asked for.
                let len = len.min(range.end - at);
                out.push(len, kind(word));
                at += len;
            }
        }
        Ok(())
    }
}

fn command_flags(flags: WriteFlags) -> CommandFlags {
    let mut wire = CommandFlags::empty();
    wire.set(CommandFlags::FUA, flags.contains(WriteFlags::FUA));
    wire.set(CommandFlags::NO_HOLE, flags.contains(WriteFlags::NO_UNMAP));
    wire.set(
        CommandFlags::FAST_ZERO,
        flags.contains(WriteFlags::FAST_ONLY),
    );
    wire
}
