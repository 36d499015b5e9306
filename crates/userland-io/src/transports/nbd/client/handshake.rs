//! The client's half of the handshake: option haggling until an export is chosen.
//!
//! Asks for extended headers, else structured replies, else makes do with simple
//! ones; selects metadata contexts; then `GO`, or `EXPORT_NAME` where a server
//! has no `GO`. Nothing that a server says makes it allocate more than
//! [`MAX_REPLY`] at a time, or keep more than [`MAX_LIST`] entries and
//! [`MAX_TEXT`] in all. The caller sets the time limit, and counts on nothing
//! having been read beyond the handshake.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::ConnectError;
use crate::transports::nbd::session::ReplyMode;
use crate::transports::nbd::wire::{
    BASE_ALLOCATION, BlockSizes, ClientFlags, EXPORT_NAME_ZEROES, ExportInfo, Greeting,
    HandshakeFlags, MAX_STRING, OLDSTYLE_MAGIC, OptionHeader, OptionReply, info, opt, rep,
};

/// The longest reply to an option that is read.
const MAX_REPLY: u32 = 1 << 16;
/// The most entries of a list that are taken.
const MAX_LIST: usize = 10_000;
/// The most bytes of names and descriptions that are kept of all lists together.
const MAX_TEXT: usize = 16 << 20;
/// The most metadata contexts that are selected.
const MAX_CONTEXTS: usize = 64;

/// An export that a server lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedExport {
    /// Its name; what the path of a URI holds.
    pub name: String,
    /// What the server tells about it; often empty.
    pub description: String,
}

/// What is to be had.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    pub(super) export: &'a str,
    pub(super) all_contexts: bool,
    /// Simple replies, even if more is to be had.
    pub(super) simple: bool,
}

/// What was agreed on.
#[derive(Clone, Debug)]
pub(super) struct Negotiated {
    pub(super) info: ExportInfo,
    pub(super) blocks: Option<BlockSizes>,
    pub(super) mode: ReplyMode,
    /// Names and this connection's ids, in no particular order.
    pub(super) contexts: Vec<(String, u32)>,
}

/// Haggles until the transmission phase begins.
pub(super) async fn negotiate<S>(
    stream: &mut S,
    wanted: Wanted<'_>,
) -> Result<Negotiated, ConnectError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut haggler = Haggler::greet(stream).await?;
    if !haggler.fixed {
        return haggler.export_name(wanted.export).await;
    }
    let mode = if wanted.simple {
        ReplyMode::Simple
    } else if haggler.ask(opt::EXTENDED_HEADERS).await? {
        ReplyMode::Extended
    } else if haggler.ask(opt::STRUCTURED_REPLY).await? {
        ReplyMode::Structured
    } else {
        ReplyMode::Simple
    };
    let contexts = match mode {
        ReplyMode::Simple => Vec::new(),
        _ => haggler.contexts(wanted).await?,
    };
    match haggler.go(wanted.export).await? {
        Some((info, blocks)) => Ok(Negotiated {
            info,
            blocks,
            mode,
            contexts,
        }),
        None if mode == ReplyMode::Extended => Err(ConnectError::Protocol(
            "it grants EXTENDED_HEADERS but has no GO, without which they cannot be used".into(),
        )),
        None => {
            let negotiated = haggler.export_name(wanted.export).await?;
            Ok(Negotiated {
                mode,
                contexts,
                ..negotiated
            })
        }
    }
}

/// The exports that the server lists; the connection is done with then.
pub(super) async fn list<S>(stream: &mut S) -> Result<Vec<ListedExport>, ConnectError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut haggler = Haggler::greet(stream).await?;
    if !haggler.fixed {
        return Err(ConnectError::NotNbd(
            "it speaks newstyle without options, and cannot list its exports".into(),
        ));
    }
    haggler.send(opt::LIST, &[]).await?;
    let mut exports = Vec::new();
    loop {
        let reply = haggler.reply(opt::LIST).await?;
        match reply.kind {
            rep::ACK => break,
            rep::SERVER if exports.len() < MAX_LIST => {
                let export = listed(&reply.data)?;
                haggler.keep(opt::LIST, &export.name)?;
                haggler.keep(opt::LIST, &export.description)?;
                exports.push(export);
            }
            rep::SERVER => {
                return Err(ConnectError::Protocol(format!(
                    "it lists more than {MAX_LIST} exports"
                )));
            }
            _ => return Err(refusal(opt::LIST, &reply, "")),
        }
    }
    // The server may answer, or hang up; both end this connection well.
    let _ = haggler.send(opt::ABORT, &[]).await;
    Ok(exports)
}

fn listed(data: &[u8]) -> Result<ListedExport, ConnectError> {
    let bad = || ConnectError::Protocol("an entry of LIST is shorter than the name in it".into());
    let (length, rest) = data.split_first_chunk().ok_or_else(bad)?;
    let length = u32::from_be_bytes(*length) as usize;
    let (name, description) = rest.split_at_checked(length).ok_or_else(bad)?;
    Ok(ListedExport {
        name: String::from_utf8_lossy(name).into_owned(),
        description: String::from_utf8_lossy(description).into_owned(),
    })
}

struct Reply {
    kind: u32,
    data: Vec<u8>,
}

struct Haggler<'a, S> {
    stream: &'a mut S,
    /// Options get replies.
    fixed: bool,
    /// The zeroes after `EXPORT_NAME` are left out.
    no_zeroes: bool,
    /// Of [`MAX_TEXT`].
    kept: usize,
}

impl<'a, S: AsyncRead + AsyncWrite + Unpin> Haggler<'a, S> {
    async fn greet(stream: &'a mut S) -> Result<Self, ConnectError> {
        let mut bytes = [0; Greeting::LEN];
        // What is no greeting may be shorter than one, so its first word is judged first.
        let (first, rest) = bytes.split_at_mut(8);
        receive(stream, first, "the greeting").await?;
        if first != b"NBDMAGIC" {
            return Err(ConnectError::NotNbd(format!(
                "it begins with {:?} instead of \"NBDMAGIC\"",
                String::from_utf8_lossy(first)
            )));
        }
        receive(stream, rest, "the greeting").await?;
        let greeting = Greeting::decode(&bytes).map_err(|error| {
            ConnectError::NotNbd(match error.0 {
                OLDSTYLE_MAGIC => "it speaks oldstyle NBD, which ended in 2011".into(),
                found => format!("after NBDMAGIC comes {found:#018x} instead of IHAVEOPT"),
            })
        })?;
        let fixed = greeting.flags.contains(HandshakeFlags::FIXED_NEWSTYLE);
        let no_zeroes = greeting.flags.contains(HandshakeFlags::NO_ZEROES);
        let mut flags = ClientFlags::empty();
        flags.set(ClientFlags::FIXED_NEWSTYLE, fixed);
        flags.set(ClientFlags::NO_ZEROES, no_zeroes);
        send(stream, &flags.bits().to_be_bytes()).await?;
        Ok(Haggler {
            stream,
            fixed,
            no_zeroes,
            kept: 0,
        })
    }

    /// Counts `text`, of a list that `option` brought, among what is kept.
    fn keep(&mut self, option: u32, text: &str) -> Result<(), ConnectError> {
        let option = opt::name(option);
        self.kept += text.len();
        match text.len() {
            0..=MAX_STRING if self.kept <= MAX_TEXT => Ok(()),
            0..=MAX_STRING => Err(ConnectError::Protocol(format!(
                "the names that {option} brings have more than {MAX_TEXT} bytes in all"
            ))),
            length => Err(ConnectError::Protocol(format!(
                "{option} brings a text of {length} bytes, and no text may have more than {MAX_STRING}"
            ))),
        }
    }

    async fn send(&mut self, option: u32, data: &[u8]) -> Result<(), ConnectError> {
        let header = OptionHeader {
            option,
            length: data.len() as u32,
        };
        let mut bytes = header.encode().to_vec();
        bytes.extend_from_slice(data);
        send(self.stream, &bytes).await
    }

    async fn reply(&mut self, option: u32) -> Result<Reply, ConnectError> {
        let mut bytes = [0; OptionReply::LEN];
        receive(self.stream, &mut bytes, opt::name(option)).await?;
        let header = OptionReply::decode(&bytes)
            .map_err(|error| ConnectError::Protocol(format!("an option's reply: {error}")))?;
        if header.option != option {
            return Err(ConnectError::Protocol(format!(
                "it answers option {} when asked {}",
                header.option,
                opt::name(option)
            )));
        }
        if header.length > MAX_REPLY {
            return Err(ConnectError::Protocol(format!(
                "a reply to {} of {} bytes, more than the {MAX_REPLY} that are taken",
                opt::name(option),
                header.length
            )));
        }
        let mut data = vec![0; header.length as usize];
        receive(self.stream, &mut data, opt::name(option)).await?;
        Ok(Reply {
            kind: header.kind,
            data,
        })
    }

    /// Asks for an option without data: true if granted, false if the server lacks or refuses it.
    async fn ask(&mut self, option: u32) -> Result<bool, ConnectError> {
        self.send(option, &[]).await?;
        let reply = self.reply(option).await?;
        match reply.kind {
            rep::ACK => Ok(true),
            rep::ERR_TLS_REQD | rep::ERR_SHUTDOWN => Err(refusal(option, &reply, "")),
            kind if kind & rep::ERROR != 0 => Ok(false),
            _ => Err(refusal(option, &reply, "")),
        }
    }

    /// Selects contexts. A server that has none, or no such option, is as good.
    async fn contexts(&mut self, wanted: Wanted<'_>) -> Result<Vec<(String, u32)>, ConnectError> {
        let mut names = vec![BASE_ALLOCATION.to_owned()];
        if wanted.all_contexts {
            let listed = self
                .meta_context(opt::LIST_META_CONTEXT, wanted.export, &[])
                .await?;
            for (name, _) in listed {
                if !names.contains(&name) && names.len() < MAX_CONTEXTS {
                    names.push(name);
                }
            }
        }
        let mut selected = self
            .meta_context(opt::SET_META_CONTEXT, wanted.export, &names)
            .await?;
        selected.retain(|(name, _)| names.contains(name));
        Ok(selected)
    }

    async fn meta_context(
        &mut self,
        option: u32,
        export: &str,
        queries: &[String],
    ) -> Result<Vec<(String, u32)>, ConnectError> {
        let mut data = string(export);
        data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
        for query in queries {
            data.extend_from_slice(&string(query));
        }
        self.send(option, &data).await?;
        let (most, which) = match option {
            opt::SET_META_CONTEXT => (queries.len(), "that were asked for"),
            _ => (MAX_LIST, "that are taken"),
        };
        let mut found: Vec<(String, u32)> = Vec::new();
        loop {
            let reply = self.reply(option).await?;
            match reply.kind {
                rep::ACK => return Ok(found),
                rep::META_CONTEXT => {
                    let Some((id, name)) = reply.data.split_first_chunk() else {
                        return Err(ConnectError::Protocol(
                            "a metadata context without an id".into(),
                        ));
                    };
                    if found.len() >= most {
                        return Err(ConnectError::Protocol(format!(
                            "it tells more metadata contexts than the {most} {which}"
                        )));
                    }
                    // A name that is no string cannot be asked for either.
                    if let Ok(name) = std::str::from_utf8(name) {
                        self.keep(option, name)?;
                        found.push((name.to_owned(), u32::from_be_bytes(*id)));
                    }
                }
                rep::ERR_TLS_REQD | rep::ERR_SHUTDOWN => {
                    return Err(refusal(option, &reply, export));
                }
                kind if kind & rep::ERROR != 0 => return Ok(Vec::new()),
                _ => return Err(refusal(option, &reply, export)),
            }
        }
    }

    /// `None` if the server has no `GO`.
    async fn go(
        &mut self,
        export: &str,
    ) -> Result<Option<(ExportInfo, Option<BlockSizes>)>, ConnectError> {
        let mut data = string(export);
        data.extend_from_slice(&1u16.to_be_bytes());
        data.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
        self.send(opt::GO, &data).await?;
        let (mut export_info, mut blocks) = (None, None);
        loop {
            let reply = self.reply(opt::GO).await?;
            match reply.kind {
                rep::ACK => break,
                rep::ERR_UNSUP => return Ok(None),
                rep::INFO => {
                    let Some((kind, rest)) = reply.data.split_first_chunk() else {
                        return Err(ConnectError::Protocol(
                            "an information without a type".into(),
                        ));
                    };
                    let bad = |what| {
                        ConnectError::Protocol(format!(
                            "{what} information of {} bytes",
                            reply.data.len()
                        ))
                    };
                    match u16::from_be_bytes(*kind) {
                        info::EXPORT => {
                            let bytes = rest.try_into().map_err(|_| bad("EXPORT"))?;
                            export_info = Some(ExportInfo::decode(bytes));
                        }
                        info::BLOCK_SIZE => {
                            let bytes = rest.try_into().map_err(|_| bad("BLOCK_SIZE"))?;
                            blocks = Some(BlockSizes::decode(bytes));
                        }
                        _ => {}
                    }
                }
                _ => return Err(refusal(opt::GO, &reply, export)),
            }
        }
        match export_info {
            Some(export_info) => Ok(Some((export_info, blocks))),
            None => Err(ConnectError::Protocol(
                "it accepts GO without telling the export's size".into(),
            )),
        }
    }

    async fn export_name(mut self, export: &str) -> Result<Negotiated, ConnectError> {
        self.send(opt::EXPORT_NAME, export.as_bytes()).await?;
        let mut bytes = [0; ExportInfo::LEN];
        match receive(self.stream, &mut bytes, "EXPORT_NAME").await {
            // The only refusal that this option knows.
            Err(ConnectError::Lost { source, .. })
                if source.kind() == io::ErrorKind::UnexpectedEof =>
            {
                return Err(ConnectError::UnknownExport {
                    name: export.to_owned(),
                    said: ": it hung up when asked for it".into(),
                });
            }
            other => other?,
        }
        if !self.no_zeroes {
            receive(self.stream, &mut [0; EXPORT_NAME_ZEROES], "EXPORT_NAME").await?;
        }
        Ok(Negotiated {
            info: ExportInfo::decode(&bytes),
            blocks: None,
            mode: ReplyMode::Simple,
            contexts: Vec::new(),
        })
    }
}

fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u32).to_be_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

/// `text` with what is no character to look at escaped; quotes stay as they are.
fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '"' | '\'' => plain.push(c),
            c => plain.extend(c.escape_debug()),
        }
    }
    plain
}

/// What a reply that is neither expected nor `ACK` means.
fn refusal(option: u32, reply: &Reply, export: &str) -> ConnectError {
    let text = &reply.data[..reply.data.len().min(MAX_STRING)];
    let text = String::from_utf8_lossy(text);
    let said = match text.trim() {
        "" => String::new(),
        text => format!(": {}", plain(text)),
    };
    let why = match reply.kind {
        rep::ERR_TLS_REQD => return ConnectError::TlsRequired,
        rep::ERR_UNKNOWN => {
            return ConnectError::UnknownExport {
                name: export.to_owned(),
                said,
            };
        }
        rep::ERR_UNSUP => "it does not support that",
        rep::ERR_POLICY => "its policy forbids that",
        rep::ERR_INVALID => "it calls the request invalid",
        rep::ERR_PLATFORM => "its platform cannot do that",
        rep::ERR_SHUTDOWN => "it is shutting down",
        rep::ERR_BLOCK_SIZE_REQD => "it wants block sizes to be asked for",
        rep::ERR_TOO_BIG => "it calls the request too big",
        rep::ERR_EXT_HEADER_REQD => "it wants extended headers",
        kind if kind & rep::ERROR != 0 => "an error of a kind that is not known",
        kind => {
            return ConnectError::Protocol(format!(
                "a reply of type {kind} to {}",
                opt::name(option)
            ));
        }
    };
    ConnectError::Refused {
        option: opt::name(option),
        why: format!("{why}{said}"),
    }
}

async fn send<S: AsyncWrite + Unpin>(stream: &mut S, bytes: &[u8]) -> Result<(), ConnectError> {
    stream
        .write_all(bytes)
        .await
        .map_err(|source| ConnectError::Lost {
            during: "sending",
            source,
        })
}

async fn receive<S: AsyncRead + Unpin>(
    stream: &mut S,
    bytes: &mut [u8],
    during: &'static str,
) -> Result<(), ConnectError> {
    match stream.read_exact(bytes).await {
        Ok(_) => Ok(()),
        Err(source) => Err(ConnectError::Lost { during, source }),
    }
}
