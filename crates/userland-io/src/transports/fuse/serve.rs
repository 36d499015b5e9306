//! One request: from what the kernel asks to what the disk is asked, and back.

use std::ops::Range;

use fuser::{Errno, ReplyData, ReplyEmpty, ReplyLseek, ReplyWrite};

use crate::{
    Device, Engine, Error, ErrorKind, ExtentKind, Extents, Features, ReadBuf, Result, WriteBuf,
    WriteFlags, errno,
};

/// What the kernel wants, and where the answer goes. Ranges lie inside the disk, as far as it had not shrunk since.
pub(super) enum Request {
    Read {
        offset: u64,
        len: usize,
        reply: ReplyData,
    },
    /// The bytes are in the memory that comes with it.
    Write {
        offset: u64,
        len: usize,
        flags: WriteFlags,
        reply: ReplyWrite,
    },
    Flush {
        reply: ReplyEmpty,
    },
    Zeroes {
        range: Range<u64>,
        flags: WriteFlags,
        reply: ReplyEmpty,
    },
    /// The first byte in `range` that is data, or that is none.
    Seek {
        range: Range<u64>,
        data: bool,
        reply: ReplyLseek,
    },
}

/// Serves `request` from or to the first bytes of `memory`, which has that many.
pub(super) async fn serve<E: Engine>(device: &Device<E>, request: Request, memory: &mut [u8]) {
    match request {
        Request::Read { offset, len, reply } => {
            let memory = &mut memory[..len];
            match device.read(&mut ReadBuf::new(memory), offset).await {
                Ok(()) => reply.data(memory),
                Err(error) => reply.error(number(&error)),
            }
        }
        Request::Write {
            offset,
            len,
            flags,
            reply,
        } => {
            let memory = WriteBuf::new(&memory[..len]);
            match device.write(&memory, offset, flags).await {
                Ok(()) => reply.written(len as u32),
                Err(error) => reply.error(number(&error)),
            }
        }
        Request::Flush { reply } => empty(reply, device.flush().await),
        Request::Zeroes {
            range,
            flags,
            reply,
        } => empty(reply, device.write_zeroes(range, flags).await),
        Request::Seek { range, data, reply } => match seek(device, range, data).await {
            Ok(Some(at)) => reply.offset(i64::try_from(at).unwrap_or(i64::MAX)),
            Ok(None) => reply.error(Errno::ENXIO),
            Err(error) => reply.error(number(&error)),
        },
    }
}

fn empty(reply: ReplyEmpty, result: Result) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(number(&error)),
    }
}

/// An error as the kernel is told it.
///
/// The kernel takes ENOSYS for "this file system has no such operation" and never asks again (a flush would
/// succeed from then on), and drops answers with a number of its own range, of which the request would hang.
pub(super) fn number(error: &Error) -> Errno {
    match error.errno() {
        errno::ENOSYS => Errno::EIO,
        number @ 1..512 => Errno::from_i32(number),
        _ => Errno::EIO,
    }
}

/// Where in `range` the first data begins (`data`), or the first that is none: at the disk's end there is none.
async fn seek<E: Engine>(device: &Device<E>, range: Range<u64>, data: bool) -> Result<Option<u64>> {
    let (mut at, end) = (range.start, range.end);
    let beyond = (!data).then_some(end);
    if !device.geometry().features.contains(Features::EXTENTS) {
        return Ok(if data { Some(at) } else { beyond });
    }
    while at < end {
        let mut extents = Extents::new(RUNS);
        device.extents(at..end, &mut extents).await?;
        if extents.covered() == 0 {
            return Err(Error::new(ErrorKind::Io, "the engine told of no extent"));
        }
        for run in &extents {
            if (run.kind == ExtentKind::Data) == data {
                return Ok(Some(at));
            }
            at += run.len;
        }
    }
    Ok(beyond)
}

/// How many runs are asked for at once: what is looked for is nearly always in the second at the latest.
const RUNS: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_error_makes_the_kernel_give_up_or_wait_for_ever() {
        let told = |errno| number(&Error::from_errno(errno)).code();
        assert_eq!(told(errno::ENOSPC), errno::ENOSPC);
        assert_eq!(told(errno::EOPNOTSUPP), errno::EOPNOTSUPP);
        for errno in [0, -5, errno::ENOSYS, 512, 1000, i32::MAX, i32::MIN] {
            assert_eq!(told(errno), errno::EIO, "{errno}");
        }
    }
}
