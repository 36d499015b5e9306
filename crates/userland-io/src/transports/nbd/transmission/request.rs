//! A request that may be run: what a header becomes once everything that can be
//! said against it has been checked.
//!
//! The checks follow "Request types", "Size constraints" and "Error values" of the
//! specification. A [`Refusal`] is the error of the reply and the text that goes with it.

use std::fmt;

use super::super::session::{ReplyMode, Session};
use super::super::wire::{self, CommandFlags, TransmissionFlags, cmd, error, payload};
use crate::WriteFlags;

/// The client's name for a request, and the offset that extended replies repeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tag {
    pub(super) cookie: u64,
    pub(super) offset: u64,
}

impl From<&wire::Request> for Tag {
    fn from(header: &wire::Request) -> Self {
        Tag {
            cookie: header.cookie,
            offset: header.offset,
        }
    }
}

/// A request that may be run. Its range lies inside the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) tag: Tag,
    /// Where, in bytes. Differs from the tag's in the later pieces of a long read.
    pub(super) offset: u64,
    /// How much, in bytes.
    pub(super) length: u64,
    pub(super) command: Command,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// `split`: the answer may be more than one chunk.
    Read {
        split: bool,
    },
    Write(WriteFlags),
    Flush,
    /// `fua`: and a flush after it.
    Trim {
        fua: bool,
    },
    Cache,
    WriteZeroes(WriteFlags),
    /// `one`: one extent a context. `selected`: a payload says which contexts.
    Status {
        one: bool,
        selected: bool,
    },
}

/// Why a request is not run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    /// One of [`error`].
    pub(super) error: u32,
    /// Where the trouble begins, if that lies inside the request.
    pub(super) at: Option<u64>,
    reason: Reason,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Reason {
    UnknownCommand(u16),
    NotOffered(u16),
    Flags(u16, u16),
    FlagNotOffered(&'static str),
    ReadOnly,
    Range { offset: u64, length: u64, size: u64 },
    Unaligned { minimum: u32 },
    TooLong { length: u64, maximum: u32 },
    FlushRange,
    NoContexts,
    EmptyStatus,
    StatusPayload(u64),
    UnknownContext(u32),
    RepeatedContext(u32),
}

impl Reason {
    fn refuse(self, error: u32) -> Refusal {
        Refusal {
            error,
            at: None,
            reason: self,
        }
    }
}

/// How many bytes follow the header.
pub(super) fn payload_length(header: &wire::Request, mode: ReplyMode) -> u64 {
    let extended = mode == ReplyMode::Extended;
    let flagged = extended && header.flags.contains(CommandFlags::PAYLOAD_LEN);
    // An extended WRITE has to carry the flag, but QEMU's (10.0) does not, and has its payload all the same.
    let carries = header.command == cmd::WRITE || flagged;
    if carries { header.length } else { 0 }
}

/// Checks a header. A `BLOCK_STATUS` with a payload is checked as far as the header goes, and
/// the rest by [`select`].
pub(super) fn check(
    header: &wire::Request,
    session: &Session,
    maximum: u32,
) -> Result<Request, Refusal> {
    let flags = header.flags;
    let offered = |flag| session.flags.contains(flag);
    let command = header.command;
    let (allowed, needs) = match command {
        cmd::READ => (CommandFlags::DF, TransmissionFlags::empty()),
        cmd::WRITE => (CommandFlags::empty(), TransmissionFlags::empty()),
        cmd::FLUSH => (CommandFlags::empty(), TransmissionFlags::SEND_FLUSH),
        cmd::TRIM => (CommandFlags::empty(), TransmissionFlags::SEND_TRIM),
        cmd::CACHE => (CommandFlags::empty(), TransmissionFlags::SEND_CACHE),
        cmd::WRITE_ZEROES => (
            CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO,
            TransmissionFlags::SEND_WRITE_ZEROES,
        ),
        cmd::BLOCK_STATUS => (CommandFlags::REQ_ONE, TransmissionFlags::empty()),
        _ => return Err(Reason::UnknownCommand(command).refuse(error::EINVAL)),
    };
    let mutates = matches!(command, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES);
    if mutates && offered(TransmissionFlags::READ_ONLY) {
        return Err(Reason::ReadOnly.refuse(error::EPERM));
    }
    if !offered(needs) {
        return Err(Reason::NotOffered(command).refuse(error::EINVAL));
    }
    check_flags(header, session, allowed)?;
    let fua = flags.contains(CommandFlags::FUA);
    let mut request = Request {
        tag: header.into(),
        offset: header.offset,
        length: header.length,
        command: match command {
            cmd::READ => Command::Read {
                split: session.replies != ReplyMode::Simple && !flags.contains(CommandFlags::DF),
            },
            cmd::WRITE => Command::Write(write_flags(flags)),
            cmd::FLUSH => Command::Flush,
            cmd::TRIM => Command::Trim { fua },
            cmd::CACHE => Command::Cache,
            cmd::WRITE_ZEROES => Command::WriteZeroes(write_flags(flags)),
            _ => Command::Status {
                one: flags.contains(CommandFlags::REQ_ONE),
                selected: flags.contains(CommandFlags::PAYLOAD_LEN),
            },
        },
    };
    match request.command {
        Command::Flush if (header.offset, header.length) != (0, 0) => {
            return Err(Reason::FlushRange.refuse(error::EINVAL));
        }
        Command::Flush => return Ok(request),
        Command::Status { selected, .. } => {
            if session.contexts.is_empty() {
                return Err(Reason::NoContexts.refuse(error::EINVAL));
            }
            if selected {
                check_selection(header.length, session)?;
                request.length = 0;
                return Ok(request);
            }
        }
        _ => {}
    }
    check_range(&request, session)?;
    // These carry their length as a payload, one way or the other.
    let is_payload = matches!(
        request.command,
        Command::Write(_) | Command::Read { split: false }
    );
    if is_payload && request.length > u64::from(maximum) {
        let error = match request.command {
            Command::Read { .. } => error::EOVERFLOW,
            _ => error::EINVAL,
        };
        let length = request.length;
        return Err(Reason::TooLong { length, maximum }.refuse(error));
    }
    Ok(request)
}

/// Completes a `BLOCK_STATUS` by its payload: the range's length, then the ids of contexts,
/// which are put into `ids`.
pub(super) fn select(
    request: &mut Request,
    payload: &[u8],
    session: &Session,
    ids: &mut Vec<u32>,
) -> Result<(), Refusal> {
    let short = || Reason::StatusPayload(payload.len() as u64).refuse(error::EINVAL);
    let (length, rest) = payload.split_first_chunk().ok_or_else(short)?;
    request.length = u64::from_be_bytes(*length);
    for id in rest.chunks_exact(payload::STATUS_REQUEST_CONTEXT) {
        let id = u32::from_be_bytes(id.try_into().map_err(|_| short())?);
        if !session.contexts.iter().any(|context| context.id == id) {
            return Err(Reason::UnknownContext(id).refuse(error::EINVAL));
        }
        if ids.contains(&id) {
            return Err(Reason::RepeatedContext(id).refuse(error::EINVAL));
        }
        ids.push(id);
    }
    // An offset there is one of the payload's range, of which the header says nothing.
    check_range(request, session).map_err(|refusal| Refusal {
        at: None,
        ..refusal
    })
}

fn check_flags(
    header: &wire::Request,
    session: &Session,
    allowed: CommandFlags,
) -> Result<(), Refusal> {
    let flags = header.flags;
    let extended = session.replies == ReplyMode::Extended;
    let payload = CommandFlags::PAYLOAD_LEN;
    // FUA is good for every command where it was offered, even if it means nothing there.
    let mut allowed = allowed | CommandFlags::FUA;
    if extended && matches!(header.command, cmd::WRITE | cmd::BLOCK_STATUS) {
        allowed |= payload;
    }
    if !allowed.contains(flags) {
        let wrong = flags.bits() & !allowed.bits();
        return Err(Reason::Flags(wrong, header.command).refuse(error::EINVAL));
    }
    for (flag, needs, name) in [
        (CommandFlags::FUA, TransmissionFlags::SEND_FUA, "FUA"),
        (CommandFlags::DF, TransmissionFlags::SEND_DF, "DF"),
        (
            CommandFlags::FAST_ZERO,
            TransmissionFlags::SEND_FAST_ZERO,
            "FAST_ZERO",
        ),
    ] {
        if flags.contains(flag) && !session.flags.contains(needs) {
            return Err(Reason::FlagNotOffered(name).refuse(error::EINVAL));
        }
    }
    if header.command == cmd::BLOCK_STATUS
        && flags.contains(payload)
        && !session
            .flags
            .contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD)
    {
        return Err(Reason::FlagNotOffered("PAYLOAD_LEN").refuse(error::EINVAL));
    }
    Ok(())
}

fn check_selection(length: u64, session: &Session) -> Result<(), Refusal> {
    let (head, each) = (
        payload::STATUS_REQUEST_HEAD as u64,
        payload::STATUS_REQUEST_CONTEXT as u64,
    );
    let ids = length.checked_sub(head).filter(|rest| rest % each == 0);
    match ids.map(|rest| rest / each) {
        // A longer list repeats an id, or names one that was not negotiated.
        Some(count) if count >= 1 && count <= session.contexts.len() as u64 => Ok(()),
        _ => Err(Reason::StatusPayload(length).refuse(error::EINVAL)),
    }
}

fn check_range(request: &Request, session: &Session) -> Result<(), Refusal> {
    let (offset, length, size) = (request.offset, request.length, session.size);
    let end = match offset.checked_add(length) {
        Some(end) if end <= size => end,
        _ => {
            let error = match request.command {
                Command::Write(_) | Command::WriteZeroes(_) => error::ENOSPC,
                _ => error::EINVAL,
            };
            let mut refusal = Reason::Range {
                offset,
                length,
                size,
            }
            .refuse(error);
            // The first byte that is not there, if the request began inside.
            refusal.at = (offset < size).then_some(size);
            return Err(refusal);
        }
    };
    if length == 0 && matches!(request.command, Command::Status { .. }) {
        return Err(Reason::EmptyStatus.refuse(error::EINVAL));
    }
    let minimum = session.blocks.minimum;
    let whole = |at: u64| at == size || at.is_multiple_of(u64::from(minimum.max(1)));
    if !whole(offset) || !whole(end) {
        return Err(Reason::Unaligned { minimum }.refuse(error::EINVAL));
    }
    Ok(())
}

fn write_flags(flags: CommandFlags) -> WriteFlags {
    let mut to = WriteFlags::empty();
    to.set(WriteFlags::FUA, flags.contains(CommandFlags::FUA));
    to.set(WriteFlags::NO_UNMAP, flags.contains(CommandFlags::NO_HOLE));
    to.set(
        WriteFlags::FAST_ONLY,
        flags.contains(CommandFlags::FAST_ZERO),
    );
    to
}

fn name(command: u16) -> &'static str {
    match command {
        cmd::READ => "READ",
        cmd::WRITE => "WRITE",
        cmd::FLUSH => "FLUSH",
        cmd::TRIM => "TRIM",
        cmd::CACHE => "CACHE",
        cmd::WRITE_ZEROES => "WRITE_ZEROES",
        cmd::BLOCK_STATUS => "BLOCK_STATUS",
        _ => "this command",
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.reason {
            Reason::UnknownCommand(command) => write!(f, "command {command} is not known"),
            Reason::NotOffered(command) => {
                write!(f, "{} was not offered for this export", name(*command))
            }
            Reason::Flags(flags, command) => {
                write!(f, "flags {flags:#x} do not go with {}", name(*command))
            }
            Reason::FlagNotOffered(flag) => write!(f, "flag {flag} was not offered"),
            Reason::ReadOnly => write!(f, "the export is read-only"),
            Reason::Range {
                offset,
                length,
                size,
            } => write!(
                f,
                "{length} bytes at {offset} do not lie inside the export of {size} bytes"
            ),
            Reason::Unaligned { minimum } => {
                write!(f, "offset and length must be multiples of {minimum}")
            }
            Reason::TooLong { length, maximum } => {
                write!(f, "{length} bytes at once are more than {maximum}")
            }
            Reason::FlushRange => write!(f, "FLUSH takes offset 0 and length 0"),
            Reason::NoContexts => write!(f, "no metadata context was negotiated"),
            Reason::EmptyStatus => write!(f, "the status of no bytes cannot be told"),
            Reason::StatusPayload(length) => write!(
                f,
                "a payload of {length} bytes is no length and list of negotiated contexts"
            ),
            Reason::UnknownContext(id) => write!(f, "context {id} was not negotiated"),
            Reason::RepeatedContext(id) => write!(f, "context {id} is named twice"),
        }
    }
}
