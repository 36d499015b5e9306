//! Serving the requests of one queue: for each tag a task, from the first request to the device's end.

use std::io;
use std::rc::Rc;

use io_uring::{opcode, types};

use super::abi::{self, Description, Operation};
use super::memory::{Buffers, Descriptions};
use crate::uring::Ring;
use crate::{Device, Engine, Error, ErrorKind, ReadBuf, Result, WriteBuf, WriteFlags, errno};

/// One queue, on its thread.
pub(super) struct ServedQueue<E> {
    device: Device<E>,
    index: u16,
    descriptions: Descriptions,
    buffers: Buffers,
    ring: Rc<Ring>,
}

impl<E: Engine> ServedQueue<E> {
    /// Queue `index`, whose ring has the character device.
    pub(super) fn new(
        device: Device<E>,
        index: u16,
        descriptions: Descriptions,
        buffers: Buffers,
        ring: Rc<Ring>,
    ) -> Self {
        ServedQueue {
            device,
            index,
            descriptions,
            buffers,
            ring,
        }
    }

    /// Makes memory for the requests to come, if there is time before they are there.
    pub(super) fn populate(&self) {
        self.buffers.populate();
    }

    /// Serves `tag` until the device stops. To be called once for each tag: a second task of it would use the same buffer.
    pub(super) async fn serve(self: Rc<Self>, tag: u16) {
        let (mut command, mut answer) = (abi::FETCH, 0);
        loop {
            let status = self.command(tag, command, answer).await;
            if status != abi::RES_OK {
                if status != abi::RES_ABORT {
                    let error = io::Error::from_raw_os_error(-status);
                    tracing::error!(queue = self.index, tag, %error, "ublk refused a command");
                }
                return;
            }
            let request = self.descriptions.get(tag);
            answer = match self.request(tag, &request).await {
                Ok(done) => done,
                Err(error) => refusal(&request, &error),
            };
            command = abi::COMMIT_AND_FETCH;
        }
    }

    /// Answers the request before, and resolves when there is another.
    async fn command(&self, tag: u16, command: u32, answer: i32) -> i32 {
        let memory = self.buffers.address(tag).expose_provenance() as u64;
        let body = abi::io_command(self.index, tag, answer, memory);
        let entry = opcode::UringCmd16::new(types::Fixed(0), command)
            .cmd(body)
            .build();
        // SAFETY: the descriptor is the ring's own copy, and the memory is the tag's buffer, which is not unmapped
        // while the ring has operations. Nobody else uses the buffer: the task that does waits right here.
        unsafe { self.ring.operate(tag.into(), entry) }.await
    }

    /// Does what is asked, and answers as the driver wants it: the number of bytes that were read or written.
    async fn request(&self, tag: u16, request: &Description) -> Result<i32> {
        let Some(operation) = request.operation() else {
            return Err(ErrorKind::Unsupported.into());
        };
        let (offset, len) = (request.offset(), request.len());
        let range = offset..offset.saturating_add(len);
        let mut flags = WriteFlags::empty();
        flags.set(WriteFlags::FUA, request.fua());
        match operation {
            Operation::Read | Operation::Write => {
                // SAFETY: the tag's command has ended and the next is given when this returns. No other slice of the buffer
                // is made meanwhile: that is done here alone, and each tag has one task (`queues::run`).
                let memory = unsafe { self.buffers.slice(tag, len as usize) };
                let memory = memory.ok_or(ErrorKind::Invalid)?;
                match operation {
                    Operation::Read => self.device.read(&mut ReadBuf::new(memory), offset).await?,
                    _ => {
                        self.device
                            .write(&WriteBuf::new(memory), offset, flags)
                            .await?
                    }
                }
                return Ok(len as i32);
            }
            Operation::Flush => self.device.flush().await?,
            Operation::Discard => self.device.discard(range).await?,
            Operation::WriteZeroes => {
                flags.set(WriteFlags::NO_UNMAP, request.no_unmap());
                self.device.write_zeroes(range, flags).await?
            }
        }
        Ok(0)
    }
}

/// The answer to a request that failed. The block layer takes some errnos for more than a failure (to try again, say):
/// so only those go through that mean there what they mean here.
fn refusal(request: &Description, error: &Error) -> i32 {
    let ranges = [Operation::Discard, Operation::WriteZeroes];
    -match error.errno() {
        errno @ (errno::ENOSPC | errno::EILSEQ) => errno,
        errno::EOPNOTSUPP if request.operation().is_some_and(|op| ranges.contains(&op)) => {
            errno::EOPNOTSUPP
        }
        _ => errno::EIO,
    }
}
