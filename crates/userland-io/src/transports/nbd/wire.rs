//! The NBD protocol in bytes: every constant and every fixed header layout.
//!
//! Both ends, server and client, take them from here and from nowhere else.
//! The sections named are those of the specification, `doc/proto.md` of the
//! NetworkBlockDevice project, and of its `extension-ext-header` branch
//! ("ext-header" below). All integers are big-endian.
//!
//! Decoding never fails but for a wrong magic number: what a field may hold is
//! for the reader of the field to judge.

use bitflags::bitflags;

/// The port that IANA gave NBD ("Newstyle negotiation").
pub const PORT: u16 = 10809;

/// First word of the greeting, `NBDMAGIC` ("Newstyle negotiation").
pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second word of the greeting, and first of each option: `IHAVEOPT`.
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// Second word of the oldstyle greeting, for telling it apart ("Oldstyle negotiation").
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// First word of each reply to an option ("Fixed newstyle negotiation").
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// First word of a compact request ("Request message").
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First word of an extended request (ext-header, "Request message").
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// First word of a simple reply ("Simple reply message").
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First word of a structured reply chunk ("Structured reply chunk message").
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// First word of an extended reply chunk (ext-header, "Extended reply chunk message").
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Bytes of the reserved zeroes that end the answer to `EXPORT_NAME` ("Newstyle negotiation").
pub const EXPORT_NAME_ZEROES: usize = 124;
/// The longest string, in bytes ("Conventions").
pub const MAX_STRING: usize = 4096;
/// The preferred block size where none was advertised ("Size constraints").
pub const DEFAULT_PREFERRED_BLOCK: u32 = 1 << 12;
/// The least preferred block size that may be advertised ("Size constraints").
pub const LEAST_PREFERRED_BLOCK: u32 = 1 << 9;
/// The largest minimum block size that may be advertised ("Size constraints").
pub const MAX_MINIMUM_BLOCK: u32 = 1 << 16;
/// The payload that every server is to take where none was advertised ("Size constraints").
pub const DEFAULT_MAX_PAYLOAD: u32 = 1 << 25;
/// The most extents in one chunk of block status ("Structured reply types").
pub const MAX_STATUS_EXTENTS: usize = 1 << 20;

/// The metadata context that tells data from holes ("The `base:` metadata namespace").
pub const BASE_ALLOCATION: &str = "base:allocation";
/// The namespace of the contexts that the specification defines ("Metadata querying").
pub const BASE_NAMESPACE: &str = "base:";

bitflags! {
    /// Sent by the server in its greeting ("Handshake flags").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct HandshakeFlags: u16 {
        /// Options get replies.
        const FIXED_NEWSTYLE = 1 << 0;
        /// The 124 zeroes after `EXPORT_NAME` can be left out.
        const NO_ZEROES = 1 << 1;
    }
}

bitflags! {
    /// The client's answer to the greeting ("Client flags").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ClientFlags: u32 {
        /// The client understands replies to options.
        const FIXED_NEWSTYLE = 1 << 0;
        /// Leave out the 124 zeroes.
        const NO_ZEROES = 1 << 1;
    }
}

bitflags! {
    /// What an export can do ("Transmission flags").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct TransmissionFlags: u16 {
        /// Always set.
        const HAS_FLAGS = 1 << 0;
        /// No mutation is accepted.
        const READ_ONLY = 1 << 1;
        /// `FLUSH` is supported.
        const SEND_FLUSH = 1 << 2;
        /// The `FUA` command flag is supported.
        const SEND_FUA = 1 << 3;
        /// Seeking costs.
        const ROTATIONAL = 1 << 4;
        /// `TRIM` is supported.
        const SEND_TRIM = 1 << 5;
        /// `WRITE_ZEROES` and the `NO_HOLE` command flag are supported.
        const SEND_WRITE_ZEROES = 1 << 6;
        /// The `DF` command flag is supported.
        const SEND_DF = 1 << 7;
        /// A flush on one connection covers all connections.
        const CAN_MULTI_CONN = 1 << 8;
        /// The experimental `RESIZE` extension.
        const SEND_RESIZE = 1 << 9;
        /// `CACHE` is supported.
        const SEND_CACHE = 1 << 10;
        /// The `FAST_ZERO` command flag is supported.
        const SEND_FAST_ZERO = 1 << 11;
        /// `BLOCK_STATUS` takes a payload that selects contexts (ext-header).
        const BLOCK_STATUS_PAYLOAD = 1 << 12;
    }
}

bitflags! {
    /// How a request is to be done ("Command flags").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct CommandFlags: u16 {
        /// Durable when it answers.
        const FUA = 1 << 0;
        /// `WRITE_ZEROES`: keep the space allocated.
        const NO_HOLE = 1 << 1;
        /// `READ`: answer in one content chunk.
        const DF = 1 << 2;
        /// `BLOCK_STATUS`: one extent a context.
        const REQ_ONE = 1 << 3;
        /// `WRITE_ZEROES`: refuse rather than write zeroes out.
        const FAST_ZERO = 1 << 4;
        /// The length is that of a payload (ext-header).
        const PAYLOAD_LEN = 1 << 5;
    }
}

bitflags! {
    /// Flags of a reply chunk ("Structured reply flags").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ReplyFlags: u16 {
        /// The last chunk of this reply.
        const DONE = 1 << 0;
    }
}

bitflags! {
    /// Status of an extent in `base:allocation` ("`base:allocation` metadata context").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct AllocationFlags: u32 {
        /// No space is allocated.
        const HOLE = 1 << 0;
        /// Reads as zeroes.
        const ZERO = 1 << 1;
    }
}

/// Options of the handshake ("Option types").
#[allow(missing_docs)]
pub mod opt {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    /// Withdrawn from the specification.
    pub const PEEK_EXPORT: u32 = 4;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;

    /// The name of an option, for messages.
    pub fn name(option: u32) -> &'static str {
        match option {
            EXPORT_NAME => "EXPORT_NAME",
            ABORT => "ABORT",
            LIST => "LIST",
            PEEK_EXPORT => "PEEK_EXPORT",
            STARTTLS => "STARTTLS",
            INFO => "INFO",
            GO => "GO",
            STRUCTURED_REPLY => "STRUCTURED_REPLY",
            LIST_META_CONTEXT => "LIST_META_CONTEXT",
            SET_META_CONTEXT => "SET_META_CONTEXT",
            EXTENDED_HEADERS => "EXTENDED_HEADERS",
            _ => "unknown option",
        }
    }
}

/// Types of replies to options ("Option reply types").
#[allow(missing_docs)]
pub mod rep {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    /// Set in every error.
    pub const ERROR: u32 = 1 << 31;
    pub const ERR_UNSUP: u32 = ERROR | 1;
    pub const ERR_POLICY: u32 = ERROR | 2;
    pub const ERR_INVALID: u32 = ERROR | 3;
    pub const ERR_PLATFORM: u32 = ERROR | 4;
    pub const ERR_TLS_REQD: u32 = ERROR | 5;
    pub const ERR_UNKNOWN: u32 = ERROR | 6;
    pub const ERR_SHUTDOWN: u32 = ERROR | 7;
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR | 8;
    pub const ERR_TOO_BIG: u32 = ERROR | 9;
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR | 10;
}

/// Information types of `INFO` and `GO` ("Option reply types", `NBD_REP_INFO`).
#[allow(missing_docs)]
pub mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Commands ("Request types").
#[allow(missing_docs)]
pub mod cmd {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
    /// The experimental `RESIZE` extension.
    pub const RESIZE: u16 = 8;
}

/// Types of reply chunks ("Structured reply types").
#[allow(missing_docs)]
pub mod chunk {
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    /// ext-header.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// Set in every error chunk.
    pub const IS_ERROR: u16 = 1 << 15;
    pub const ERROR: u16 = IS_ERROR | 1;
    pub const ERROR_OFFSET: u16 = IS_ERROR | 2;
}

/// The errors that a reply may carry ("Error values").
#[allow(missing_docs)]
pub mod error {
    pub const EPERM: u32 = 1;
    pub const EIO: u32 = 5;
    pub const ENOMEM: u32 = 12;
    pub const EINVAL: u32 = 22;
    pub const ENOSPC: u32 = 28;
    pub const EOVERFLOW: u32 = 75;
    pub const ENOTSUP: u32 = 95;
    pub const ESHUTDOWN: u32 = 108;
}

/// A header began with something else than its magic number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("wrong magic number {0:#x}")]
pub struct BadMagic(pub u64);

/// The server's first words ("Newstyle negotiation").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// What the server offers.
    pub flags: HandshakeFlags,
}

impl Greeting {
    /// Its length on the wire.
    pub const LEN: usize = 18;

    /// Its bytes.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut w = Writer::new();
        w.u64(NBDMAGIC).u64(IHAVEOPT).u16(self.flags.bits());
        w.done()
    }
    /// Reads it, unknown flags included. An oldstyle server is a [`BadMagic`] of [`OLDSTYLE_MAGIC`].
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, BadMagic> {
        let mut r = Reader(bytes);
        r.magic(NBDMAGIC)?;
        r.magic(IHAVEOPT)?;
        Ok(Greeting {
            flags: HandshakeFlags::from_bits_retain(r.u16()),
        })
    }
}

/// The head of an option ("Newstyle negotiation"). Its data follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// One of [`opt`].
    pub option: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

impl OptionHeader {
    /// Its length on the wire.
    pub const LEN: usize = 16;

    /// Its bytes.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut w = Writer::new();
        w.u64(IHAVEOPT).u32(self.option).u32(self.length);
        w.done()
    }
    /// Reads it.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, BadMagic> {
        let mut r = Reader(bytes);
        r.magic(IHAVEOPT)?;
        Ok(OptionHeader {
            option: r.u32(),
            length: r.u32(),
        })
    }
}

/// The head of a reply to an option ("Fixed newstyle negotiation"). Its data follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReply {
    /// The option replied to.
    pub option: u32,
    /// One of [`rep`].
    pub kind: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

impl OptionReply {
    /// Its length on the wire.
    pub const LEN: usize = 20;

    /// Its bytes.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut w = Writer::new();
        w.u64(OPTION_REPLY_MAGIC);
        w.u32(self.option).u32(self.kind).u32(self.length);
        w.done()
    }
    /// Reads it.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, BadMagic> {
        let mut r = Reader(bytes);
        r.magic(OPTION_REPLY_MAGIC)?;
        Ok(OptionReply {
            option: r.u32(),
            kind: r.u32(),
            length: r.u32(),
        })
    }
}

/// Size and flags of an export: the answer to `EXPORT_NAME` ("Newstyle negotiation"), and
/// what follows the type in `NBD_INFO_EXPORT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Bytes.
    pub size: u64,
    /// What it can do.
    pub flags: TransmissionFlags,
}

impl ExportInfo {
    /// Its length on the wire.
    pub const LEN: usize = 10;

    /// Its bytes.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut w = Writer::new();
        w.u64(self.size).u16(self.flags.bits());
        w.done()
    }
    /// Reads it, unknown flags included.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Self {
        let mut r = Reader(bytes);
        ExportInfo {
            size: r.u64(),
            flags: TransmissionFlags::from_bits_retain(r.u16()),
        }
    }
}

/// What follows the type in `NBD_INFO_BLOCK_SIZE` ("Option reply types").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of it.
    pub minimum: u32,
    /// Requests of its multiples are efficient.
    pub preferred: u32,
    /// The longest payload.
    pub maximum: u32,
}

impl BlockSizes {
    /// Its length on the wire.
    pub const LEN: usize = 12;

    /// Its bytes.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut w = Writer::new();
        w.u32(self.minimum).u32(self.preferred).u32(self.maximum);
        w.done()
    }
    /// Reads it.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Self {
        let mut r = Reader(bytes);
        BlockSizes {
            minimum: r.u32(),
            preferred: r.u32(),
            maximum: r.u32(),
        }
    }
}

/// The head of a request, compact or extended ("Request message"). A payload may follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// How; may hold bits that are not defined.
    pub flags: CommandFlags,
    /// One of [`cmd`].
    pub command: u16,
    /// The client's name for this request.
    pub cookie: u64,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes. A compact request holds no more than 32 bits.
    pub length: u64,
}

impl Request {
    /// The length of a compact request's head on the wire.
    pub const COMPACT_LEN: usize = 28;
    /// The length of an extended request's head on the wire.
    pub const EXTENDED_LEN: usize = 32;

    /// The bytes of a compact head. A length beyond 32 bits is cut: the caller has checked it.
    pub fn encode_compact(&self) -> [u8; Self::COMPACT_LEN] {
        debug_assert!(self.length <= u64::from(u32::MAX));
        let mut w = Writer::new();
        w.u32(REQUEST_MAGIC);
        w.u16(self.flags.bits()).u16(self.command);
        w.u64(self.cookie).u64(self.offset).u32(self.length as u32);
        w.done()
    }
    /// The bytes of an extended head.
    pub fn encode_extended(&self) -> [u8; Self::EXTENDED_LEN] {
        let mut w = Writer::new();
        w.u32(EXTENDED_REQUEST_MAGIC);
        w.u16(self.flags.bits()).u16(self.command);
        w.u64(self.cookie).u64(self.offset).u64(self.length);
        w.done()
    }
    /// Reads a compact head.
    pub fn decode_compact(bytes: &[u8; Self::COMPACT_LEN]) -> Result<Self, BadMagic> {
        let mut r = Reader(bytes);
        r.magic32(REQUEST_MAGIC)?;
        Ok(Request {
            flags: CommandFlags::from_bits_retain(r.u16()),
            command: r.u16(),
            cookie: r.u64(),
            offset: r.u64(),
            length: u64::from(r.u32()),
        })
    }
    /// Reads an extended head.
    pub fn decode_extended(bytes: &[u8; Self::EXTENDED_LEN]) -> Result<Self, BadMagic> {
        let mut r = Reader(bytes);
        r.magic32(EXTENDED_REQUEST_MAGIC)?;
        Ok(Request {
            flags: CommandFlags::from_bits_retain(r.u16()),
            command: r.u16(),
            cookie: r.u64(),
            offset: r.u64(),
            length: r.u64(),
        })
    }
}

/// A simple reply ("Simple reply message"). What was read follows if there was no error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimpleReply {
    /// 0, or one of [`error`].
    pub error: u32,
    /// The request's.
    pub cookie: u64,
}

impl SimpleReply {
    /// Its length on the wire.
    pub const LEN: usize = 16;

    /// Its bytes.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut w = Writer::new();
        w.u32(SIMPLE_REPLY_MAGIC).u32(self.error).u64(self.cookie);
        w.done()
    }
    /// Reads it.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, BadMagic> {
        let mut r = Reader(bytes);
        r.magic32(SIMPLE_REPLY_MAGIC)?;
        Ok(SimpleReply {
            error: r.u32(),
            cookie: r.u64(),
        })
    }
}

/// The head of a reply chunk, structured or extended ("Structured reply chunk message",
/// ext-header "Extended reply chunk message"). Its payload follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyChunk {
    /// May hold bits that are not defined.
    pub flags: ReplyFlags,
    /// One of [`chunk`].
    pub kind: u16,
    /// The request's.
    pub cookie: u64,
    /// The request's, in extended chunks only; else 0.
    pub offset: u64,
    /// Bytes of payload that follow. A structured chunk holds no more than 32 bits.
    pub length: u64,
}

impl ReplyChunk {
    /// The length of a structured chunk's head on the wire.
    pub const STRUCTURED_LEN: usize = 20;
    /// The length of an extended chunk's head on the wire.
    pub const EXTENDED_LEN: usize = 32;

    /// The bytes of a structured head. A length beyond 32 bits is cut: the caller has checked it.
    pub fn encode_structured(&self) -> [u8; Self::STRUCTURED_LEN] {
        debug_assert!(self.length <= u64::from(u32::MAX));
        let mut w = Writer::new();
        w.u32(STRUCTURED_REPLY_MAGIC);
        w.u16(self.flags.bits()).u16(self.kind);
        w.u64(self.cookie).u32(self.length as u32);
        w.done()
    }
    /// The bytes of an extended head.
    pub fn encode_extended(&self) -> [u8; Self::EXTENDED_LEN] {
        let mut w = Writer::new();
        w.u32(EXTENDED_REPLY_MAGIC);
        w.u16(self.flags.bits()).u16(self.kind);
        w.u64(self.cookie).u64(self.offset).u64(self.length);
        w.done()
    }
    /// Reads a structured head.
    pub fn decode_structured(bytes: &[u8; Self::STRUCTURED_LEN]) -> Result<Self, BadMagic> {
        let mut r = Reader(bytes);
        r.magic32(STRUCTURED_REPLY_MAGIC)?;
        Ok(ReplyChunk {
            flags: ReplyFlags::from_bits_retain(r.u16()),
            kind: r.u16(),
            cookie: r.u64(),
            offset: 0,
            length: u64::from(r.u32()),
        })
    }
    /// Reads an extended head.
    pub fn decode_extended(bytes: &[u8; Self::EXTENDED_LEN]) -> Result<Self, BadMagic> {
        let mut r = Reader(bytes);
        r.magic32(EXTENDED_REPLY_MAGIC)?;
        Ok(ReplyChunk {
            flags: ReplyFlags::from_bits_retain(r.u16()),
            kind: r.u16(),
            cookie: r.u64(),
            offset: r.u64(),
            length: r.u64(),
        })
    }
}

/// The fixed parts of what chunks carry ("Structured reply types"), in bytes.
#[allow(missing_docs)]
pub mod payload {
    /// `OFFSET_DATA`: u64 offset; then the data.
    pub const OFFSET_DATA_HEAD: usize = 8;
    /// `OFFSET_HOLE`: u64 offset, u32 length.
    pub const OFFSET_HOLE: usize = 12;
    /// `ERROR`: u32 error, u16 length of the message; then the message.
    pub const ERROR_HEAD: usize = 6;
    /// `ERROR_OFFSET`: as `ERROR`, and after the message a u64 offset.
    pub const ERROR_OFFSET_TAIL: usize = 8;
    /// `BLOCK_STATUS`: u32 context; then extents.
    pub const STATUS_HEAD: usize = 4;
    /// An extent of `BLOCK_STATUS`: u32 length, u32 status.
    pub const STATUS_EXTENT: usize = 8;
    /// `BLOCK_STATUS_EXT`: u32 context, u32 number of extents; then they (ext-header).
    pub const STATUS_EXT_HEAD: usize = 8;
    /// An extent of `BLOCK_STATUS_EXT`: u64 length, u64 status (ext-header).
    pub const STATUS_EXT_EXTENT: usize = 16;
    /// The payload of a `BLOCK_STATUS` request with `PAYLOAD_LEN`: u64 length; then u32 contexts (ext-header).
    pub const STATUS_REQUEST_HEAD: usize = 8;
    /// A context in that payload.
    pub const STATUS_REQUEST_CONTEXT: usize = 4;
}

/// Fills an array whose length the caller's type gives.
struct Writer<const N: usize> {
    bytes: [u8; N],
    at: usize,
}

impl<const N: usize> Writer<N> {
    fn new() -> Self {
        Writer {
            bytes: [0; N],
            at: 0,
        }
    }
    fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
        self
    }
    fn u16(&mut self, value: u16) -> &mut Self {
        self.put(&value.to_be_bytes())
    }
    fn u32(&mut self, value: u32) -> &mut Self {
        self.put(&value.to_be_bytes())
    }
    fn u64(&mut self, value: u64) -> &mut Self {
        self.put(&value.to_be_bytes())
    }
    fn done(self) -> [u8; N] {
        debug_assert_eq!(self.at, N);
        self.bytes
    }
}

/// Takes integers from an array of the right length, so that none is ever missing.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, rest) = self
            .0
            .split_first_chunk()
            .expect("a header of fixed length");
        self.0 = rest;
        *head
    }
    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take())
    }
    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take())
    }
    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take())
    }
    fn magic(&mut self, expected: u64) -> Result<(), BadMagic> {
        match self.u64() {
            found if found == expected => Ok(()),
            found => Err(BadMagic(found)),
        }
    }
    fn magic32(&mut self, expected: u32) -> Result<(), BadMagic> {
        match self.u32() {
            found if found == expected => Ok(()),
            found => Err(BadMagic(found.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: Request = Request {
        flags: CommandFlags::FUA,
        command: cmd::WRITE,
        cookie: 0x0102_0304_0506_0708,
        offset: 0x1112_1314_1516_1718,
        length: 0x2122_2324,
    };

    #[test]
    fn the_greeting_is_ascii() {
        let bytes = Greeting {
            flags: HandshakeFlags::all(),
        }
        .encode();
        assert_eq!(&bytes, b"NBDMAGICIHAVEOPT\x00\x03");
    }

    #[test]
    fn heads_are_laid_out_as_the_specification_says() {
        assert_eq!(
            REQUEST.encode_compact(),
            *b"\x25\x60\x95\x13\x00\x01\x00\x01\x01\x02\x03\x04\x05\x06\x07\x08\
               \x11\x12\x13\x14\x15\x16\x17\x18\x21\x22\x23\x24"
        );
        assert_eq!(
            REQUEST.encode_extended(),
            *b"\x21\xe4\x1c\x71\x00\x01\x00\x01\x01\x02\x03\x04\x05\x06\x07\x08\
               \x11\x12\x13\x14\x15\x16\x17\x18\x00\x00\x00\x00\x21\x22\x23\x24"
        );
        let chunk = ReplyChunk {
            flags: ReplyFlags::DONE,
            kind: chunk::ERROR_OFFSET,
            cookie: 7,
            offset: 9,
            length: 3,
        };
        assert_eq!(
            chunk.encode_structured(),
            *b"\x66\x8e\x33\xef\x00\x01\x80\x02\0\0\0\0\0\0\0\x07\0\0\0\x03"
        );
        assert_eq!(
            chunk.encode_extended(),
            *b"\x6e\x8a\x27\x8c\x00\x01\x80\x02\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\0\x09\0\0\0\0\0\0\0\x03"
        );
        let reply = OptionReply {
            option: opt::GO,
            kind: rep::ERR_UNKNOWN,
            length: 2,
        };
        assert_eq!(
            reply.encode(),
            *b"\x00\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\x80\0\0\x06\0\0\0\x02"
        );
        let simple = SimpleReply {
            error: error::EIO,
            cookie: 1,
        };
        assert_eq!(
            simple.encode(),
            *b"\x67\x44\x66\x98\0\0\0\x05\0\0\0\0\0\0\0\x01"
        );
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        assert_eq!(
            Request::decode_compact(&REQUEST.encode_compact()),
            Ok(REQUEST)
        );
        assert_eq!(
            Request::decode_extended(&REQUEST.encode_extended()),
            Ok(REQUEST)
        );
        let chunk = ReplyChunk {
            flags: ReplyFlags::empty(),
            kind: chunk::OFFSET_DATA,
            cookie: u64::MAX,
            offset: 0,
            length: 4096,
        };
        assert_eq!(
            ReplyChunk::decode_structured(&chunk.encode_structured()),
            Ok(chunk)
        );
        let chunk = ReplyChunk { offset: 5, ..chunk };
        assert_eq!(
            ReplyChunk::decode_extended(&chunk.encode_extended()),
            Ok(chunk)
        );
        let sizes = BlockSizes {
            minimum: 1,
            preferred: 4096,
            maximum: u32::MAX,
        };
        assert_eq!(BlockSizes::decode(&sizes.encode()), sizes);
        let info = ExportInfo {
            size: u64::MAX,
            flags: TransmissionFlags::all(),
        };
        assert_eq!(ExportInfo::decode(&info.encode()), info);
        let simple = SimpleReply {
            error: 5,
            cookie: 6,
        };
        assert_eq!(SimpleReply::decode(&simple.encode()), Ok(simple));
        let option = OptionHeader {
            option: opt::LIST,
            length: 12,
        };
        assert_eq!(OptionHeader::decode(&option.encode()), Ok(option));
    }

    #[test]
    fn another_magic_number_is_refused_and_told() {
        let mut bytes = REQUEST.encode_compact();
        bytes[3] ^= 1;
        assert_eq!(Request::decode_compact(&bytes), Err(BadMagic(0x2560_9512)));
        assert!(Request::decode_extended(&REQUEST.encode_extended().map(|b| b ^ 1)).is_err());
    }
}
