//! What a handshake has agreed on: all that the transmission phase needs to
//! know of it.

use super::wire::{BlockSizes, TransmissionFlags};

/// The outcome of a handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// The name of the export chosen, for messages. (A client may have asked for it by the empty name.)
    pub export: String,
    /// The size that the client was told, in bytes.
    pub size: u64,
    /// The flags that the client was told: the requests that it may send.
    pub flags: TransmissionFlags,
    /// How requests and replies look.
    pub replies: ReplyMode,
    /// The metadata contexts that `BLOCK_STATUS` answers, in the order of their ids; none: the command is refused.
    pub contexts: Vec<MetaContext>,
    /// What requests have to keep to. The minimum is 1 unless the client asked for block sizes;
    /// then it has promised to keep to it.
    pub blocks: BlockSizes,
}

/// How requests and replies look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyMode {
    /// Compact requests, simple replies.
    Simple,
    /// Compact requests, structured replies.
    Structured,
    /// Extended requests, extended replies.
    Extended,
}

/// A metadata context that was negotiated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaContext {
    /// Its number in this session.
    pub id: u32,
    /// What it tells.
    pub kind: ContextKind,
}

/// What a metadata context tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ContextKind {
    /// `base:allocation`: [`Device::extents`](crate::Device::extents).
    Allocation,
    /// One of [`Device::contexts`](crate::Device::contexts), asked by its name of
    /// [`Device::status`](crate::Device::status).
    Engine(String),
}
