//! Replies in bytes: simple, structured or extended, as the session has agreed.

use super::super::session::ReplyMode;
use super::super::wire::{self, ReplyChunk, ReplyFlags, SimpleReply, chunk, payload};
use super::command::{Failure, Run};
use super::output::{Output, Parts};
use super::pool::Buffer;
use super::request::{Command, Request, Tag};
use super::status::Status;
use crate::{Error, ErrorKind, errno};

/// The longest text of an error, in bytes.
const MOST_TEXT: usize = 512;

/// Writes replies of one mode.
#[derive(Clone, Copy, Debug)]
pub(super) struct Replies {
    mode: ReplyMode,
}

impl Replies {
    /// Replies as `mode` says.
    pub(super) fn new(mode: ReplyMode) -> Self {
        Replies { mode }
    }

    /// That a request without data is done.
    pub(super) fn success(self, out: &mut Output, tag: Tag) {
        match self.mode {
            ReplyMode::Simple => simple(out, tag, 0),
            _ => self.chunk(out, tag, chunk::NONE, true, 0),
        }
    }

    /// What was read: all of `buffer`, from `offset`. `last`: nothing more follows for this request.
    /// The buffer comes back at once if it has been copied.
    pub(super) fn data(
        self,
        out: &mut Output,
        tag: Tag,
        offset: u64,
        buffer: Buffer,
        last: bool,
    ) -> Option<Buffer> {
        match self.mode {
            ReplyMode::Simple => simple(out, tag, 0),
            _ => self.data_head(out, tag, offset, buffer.len(), last),
        }
        out.payload(buffer)
    }

    /// As [`data`](Self::data), of bytes that are copied.
    pub(super) fn bytes(self, out: &mut Output, tag: Tag, offset: u64, bytes: &[u8]) {
        self.head(out, tag, offset, bytes.len());
        out.bytes(bytes);
    }

    /// That a read went well, and all of its `len` bytes follow.
    pub(super) fn head(self, out: &mut Output, tag: Tag, offset: u64, len: usize) {
        match self.mode {
            ReplyMode::Simple => simple(out, tag, 0),
            _ => self.data_head(out, tag, offset, len, true),
        }
    }

    /// As [`data`](Self::data), where `runs` says which parts of the buffer were holes. Not for simple replies.
    pub(super) fn sparse(
        self,
        out: &mut Output,
        tag: Tag,
        offset: u64,
        buffer: Buffer,
        runs: &[Run],
        last: bool,
    ) -> Option<Buffer> {
        let parts = Parts::new(buffer);
        let mut at = 0;
        for (index, run) in runs.iter().enumerate() {
            let last = last && index + 1 == runs.len();
            let offset = offset + at as u64;
            if run.is_hole {
                self.hole(out, tag, offset, run.len, last);
            } else {
                self.data_head(out, tag, offset, run.len, last);
                out.part(&parts, at..at + run.len);
            }
            at += run.len;
        }
        parts.finish()
    }

    /// What the contexts say.
    pub(super) fn status(self, out: &mut Output, tag: Tag, all: &[Status]) {
        // A session that has contexts always has chunks.
        let extended = self.mode == ReplyMode::Extended;
        for (index, status) in all.iter().enumerate() {
            let (kind, head, each) = match extended {
                true => (
                    chunk::BLOCK_STATUS_EXT,
                    payload::STATUS_EXT_HEAD,
                    payload::STATUS_EXT_EXTENT,
                ),
                false => (
                    chunk::BLOCK_STATUS,
                    payload::STATUS_HEAD,
                    payload::STATUS_EXTENT,
                ),
            };
            let count = status.extents.len();
            let last = index + 1 == all.len();
            self.chunk(out, tag, kind, last, head + count * each);
            out.bytes(&status.id.to_be_bytes());
            if extended {
                out.bytes(&u32::try_from(count).unwrap_or(u32::MAX).to_be_bytes());
            }
            for extent in &status.extents {
                if extended {
                    out.bytes(&extent.len.to_be_bytes());
                    out.bytes(&extent.kind.to_be_bytes());
                } else {
                    // Compact requests are below 4 GiB, and so are their extents; a wider status
                    // is not negotiated with them.
                    let narrow = |wide: u64| u32::try_from(wide).unwrap_or(u32::MAX);
                    out.bytes(&narrow(extent.len).to_be_bytes());
                    out.bytes(&narrow(extent.kind).to_be_bytes());
                }
            }
        }
    }

    /// That a request failed, and at which offset of its range if that is known.
    pub(super) fn error(
        self,
        out: &mut Output,
        tag: Tag,
        error: u32,
        at: Option<u64>,
        text: &dyn std::fmt::Display,
    ) {
        if self.mode == ReplyMode::Simple {
            return simple(out, tag, error);
        }
        let mut text = text.to_string();
        let mut end = text.len().min(MOST_TEXT);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        let (kind, tail) = match at {
            Some(_) => (chunk::ERROR_OFFSET, payload::ERROR_OFFSET_TAIL),
            None => (chunk::ERROR, 0),
        };
        self.chunk(
            out,
            tag,
            kind,
            true,
            payload::ERROR_HEAD + text.len() + tail,
        );
        out.bytes(&error.to_be_bytes());
        // Fits: MOST_TEXT is far below 64 KiB.
        out.bytes(&(text.len() as u16).to_be_bytes());
        out.bytes(text.as_bytes());
        if let Some(at) = at {
            out.bytes(&at.to_be_bytes());
        }
    }

    /// That a request that was to be run failed.
    pub(super) fn failure(self, out: &mut Output, request: &Request, failure: &Failure) {
        match failure {
            Failure::Refused(refusal) => {
                self.error(out, request.tag, refusal.error, refusal.at, refusal);
            }
            Failure::Device(error) => {
                let number = number(error, request.command);
                // Of a read nothing from here on has arrived; what else has failed is unknown in detail.
                let at = matches!(request.command, Command::Read { .. }).then_some(request.offset);
                self.error(out, request.tag, number, at, error);
            }
        }
    }

    fn data_head(self, out: &mut Output, tag: Tag, offset: u64, len: usize, last: bool) {
        let payload = payload::OFFSET_DATA_HEAD + len;
        self.chunk(out, tag, chunk::OFFSET_DATA, last, payload);
        out.bytes(&offset.to_be_bytes());
    }

    fn hole(self, out: &mut Output, tag: Tag, offset: u64, len: usize, last: bool) {
        self.chunk(out, tag, chunk::OFFSET_HOLE, last, payload::OFFSET_HOLE);
        out.bytes(&offset.to_be_bytes());
        // Fits: no buffer is longer than the longest request, which is 32 bits.
        out.bytes(&u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
    }

    fn chunk(self, out: &mut Output, tag: Tag, kind: u16, last: bool, length: usize) {
        let head = ReplyChunk {
            flags: match last {
                true => ReplyFlags::DONE,
                false => ReplyFlags::empty(),
            },
            kind,
            cookie: tag.cookie,
            offset: tag.offset,
            length: length as u64,
        };
        match self.mode {
            ReplyMode::Extended => out.bytes(&head.encode_extended()),
            _ => out.bytes(&head.encode_structured()),
        }
    }
}

fn simple(out: &mut Output, tag: Tag, error: u32) {
    let cookie = tag.cookie;
    out.bytes(&SimpleReply { error, cookie }.encode());
}

/// The number that stands for `error` on the wire ("Error values").
fn number(error: &Error, command: Command) -> u32 {
    use wire::error::*;
    let errno = match error.kind() {
        // The disk has shrunk since the client was told its size.
        ErrorKind::OutOfRange => {
            return match command {
                Command::Write(_) | Command::WriteZeroes(_) => ENOSPC,
                _ => EINVAL,
            };
        }
        _ => error.errno(),
    };
    match errno {
        errno::EPERM | errno::EACCES | errno::EROFS => EPERM,
        errno::ENOMEM => ENOMEM,
        errno::EINVAL => EINVAL,
        errno::ENOSPC | errno::EDQUOT | errno::EFBIG => ENOSPC,
        errno::EOVERFLOW => EOVERFLOW,
        errno::EOPNOTSUPP | errno::ENOSYS => match command {
            // Clients take this for "not quickly" and would ask again, slowly.
            Command::WriteZeroes(flags) if !flags.contains(crate::WriteFlags::FAST_ONLY) => EINVAL,
            _ => ENOTSUP,
        },
        errno::ESHUTDOWN => ESHUTDOWN,
        _ => EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::WriteFlags;
    use wire::error::*;

    #[test]
    fn every_error_becomes_one_of_the_list() {
        let list = [
            EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN,
        ];
        for errno in 0..200 {
            assert!(list.contains(&number(&Error::from_errno(errno), Command::Flush)));
        }
        for (errno, expected) in [
            (errno::EROFS, EPERM),
            (errno::EACCES, EPERM),
            (errno::EDQUOT, ENOSPC),
            (errno::EFBIG, ENOSPC),
            (errno::EOPNOTSUPP, ENOTSUP),
            (errno::EILSEQ, EIO),
            (errno::ESHUTDOWN, ESHUTDOWN),
        ] {
            assert_eq!(number(&Error::from_errno(errno), Command::Flush), expected);
        }
    }

    #[test]
    fn a_disk_that_shrank_answers_by_the_command() {
        let error = ErrorKind::OutOfRange.into();
        let write = Command::Write(WriteFlags::empty());
        assert_eq!(number(&error, write), ENOSPC);
        assert_eq!(number(&error, Command::Read { split: false }), EINVAL);
        assert_eq!(number(&error, Command::Trim { fua: false }), EINVAL);
    }

    #[test]
    fn not_supported_is_for_fast_zeroes_alone_among_zeroes() {
        let error = ErrorKind::Unsupported.into();
        let zeroes = Command::WriteZeroes;
        assert_eq!(number(&error, zeroes(WriteFlags::FAST_ONLY)), ENOTSUP);
        assert_eq!(number(&error, zeroes(WriteFlags::FUA)), EINVAL);
    }
}
