//! What each option of the handshake means ("Option types"). No I/O: an
//! option's data come in, the bytes of its replies go out.

use super::fields::{self, InfoRequest, MetaRequest};
use crate::Geometry;
use crate::transports::nbd::export::{Export, Exports, block_sizes, transmission_flags};
use crate::transports::nbd::limits::Limits;
use crate::transports::nbd::session::{ContextKind, MetaContext, ReplyMode, Session};
use crate::transports::nbd::wire::{
    self, BlockSizes, ClientFlags, ExportInfo, OptionReply, info, opt, rep,
};

/// What has been agreed on so far.
pub(super) struct Negotiation<'a> {
    exports: &'a Exports,
    limits: &'a Limits,
    no_zeroes: bool,
    replies: ReplyMode,
    /// The last successful `SET_META_CONTEXT`, and the export it was for.
    contexts: Option<(usize, Vec<MetaContext>)>,
}

/// What to do once the replies are sent.
pub(super) enum Next {
    /// Wait for the next option.
    Continue,
    /// Begin the transmission phase.
    Start { export: usize, session: Session },
    /// Close the connection.
    Close(String),
}

/// An export, and what the client was told of it.
struct Chosen<'a> {
    index: usize,
    export: &'a Export,
    geometry: Geometry,
    blocks: BlockSizes,
}

/// An error reply: its type, and a text for whoever sits before the client.
type Refusal = (u32, String);

impl<'a> Negotiation<'a> {
    pub(super) fn new(exports: &'a Exports, limits: &'a Limits, flags: ClientFlags) -> Self {
        Negotiation {
            exports,
            limits,
            no_zeroes: flags.contains(ClientFlags::NO_ZEROES),
            replies: ReplyMode::Simple,
            contexts: None,
        }
    }

    /// Answers one option.
    pub(super) fn option(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Next {
        let answered = match option {
            opt::EXPORT_NAME => return self.export_name(data, out),
            opt::ABORT => {
                reply(out, option, rep::ACK, &[]);
                return Next::Close("the client said goodbye".into());
            }
            opt::GO => match self.info(option, data, out) {
                Ok(chosen) => {
                    reply(out, option, rep::ACK, &[]);
                    return self.start(chosen);
                }
                Err(refusal) => Err(refusal),
            },
            opt::INFO => self.info(option, data, out).map(drop),
            opt::LIST => no_data(data).map(|()| self.list(out)),
            opt::STRUCTURED_REPLY => no_data(data).and_then(|()| match self.replies {
                ReplyMode::Extended => Err((
                    rep::ERR_EXT_HEADER_REQD,
                    "extended headers are in use already, and there is no way back".into(),
                )),
                _ => {
                    self.replies = ReplyMode::Structured;
                    Ok(())
                }
            }),
            opt::EXTENDED_HEADERS => no_data(data).map(|()| self.replies = ReplyMode::Extended),
            opt::LIST_META_CONTEXT => self.list_contexts(data, out),
            opt::SET_META_CONTEXT => self.set_contexts(data, out),
            opt::STARTTLS => no_data(data)
                .and_then(|()| Err((rep::ERR_UNSUP, "this server does not speak TLS".into()))),
            _ => Err((rep::ERR_UNSUP, format!("option {option} is not known here"))),
        };
        match answered {
            Ok(()) => reply(out, option, rep::ACK, &[]),
            Err((kind, text)) => reply(out, option, kind, &[text.as_bytes()]),
        }
        Next::Continue
    }

    /// Answers an option whose data were too long to be looked at.
    pub(super) fn too_big(&mut self, option: u32, length: usize, out: &mut Vec<u8>) -> Next {
        if option == opt::SET_META_CONTEXT {
            self.contexts = None;
        }
        match option {
            // Their data do not matter.
            opt::ABORT => return self.option(option, &[], out),
            opt::EXPORT_NAME => {
                return Next::Close(format!("an export name of {length} bytes"));
            }
            _ => {}
        }
        let known = (opt::EXPORT_NAME..=opt::EXTENDED_HEADERS).contains(&option);
        match known && option != opt::PEEK_EXPORT {
            true => {
                let most = self.limits.max_option_data;
                let text = format!("{length} bytes of data, where at most {most} are taken");
                reply(out, option, rep::ERR_TOO_BIG, &[text.as_bytes()]);
            }
            false => reply(out, option, rep::ERR_UNSUP, &[]),
        }
        Next::Continue
    }

    /// Answers an option that came while the server shuts down ("Termination of the session").
    pub(super) fn shutting_down(&mut self, option: u32, out: &mut Vec<u8>) -> Next {
        match option {
            opt::ABORT => return self.option(option, &[], out),
            // It has no errors.
            opt::EXPORT_NAME => {}
            _ => reply(
                out,
                option,
                rep::ERR_SHUTDOWN,
                &[b"the server is shutting down"],
            ),
        }
        Next::Close("the server shuts down".into())
    }

    /// It can only succeed or close the connection.
    fn export_name(&mut self, data: &[u8], out: &mut Vec<u8>) -> Next {
        if self.replies == ReplyMode::Extended {
            return Next::Close("EXPORT_NAME after EXTENDED_HEADERS, which wants GO".into());
        }
        let name = match fields::string(data) {
            Ok(name) => name,
            Err(why) => return Next::Close(format!("EXPORT_NAME: {why}")),
        };
        let found = self.exports.find(name);
        let Some((index, export)) = found.and_then(|at| Some((at, self.exports.get(at)?))) else {
            return Next::Close(format!("there is no export {}", shown(name)));
        };
        let geometry = export.geometry();
        let blocks = block_sizes(&geometry, self.limits.max_request, false);
        let next = self.start(Chosen {
            index,
            export,
            geometry,
            blocks,
        });
        if let Next::Start { session, .. } = &next {
            let info = ExportInfo {
                size: session.size,
                flags: session.flags,
            };
            out.extend_from_slice(&info.encode());
            if !self.no_zeroes {
                out.extend_from_slice(&[0; wire::EXPORT_NAME_ZEROES]);
            }
        }
        next
    }

    /// The session is made of the geometry that the client was told of: the size may change meanwhile.
    fn start(&mut self, chosen: Chosen<'_>) -> Next {
        let contexts = match self.contexts.take() {
            // "The final time it was sent, it referred to the same export name."
            Some((of, contexts)) if of == chosen.index => contexts,
            _ => Vec::new(),
        };
        Next::Start {
            export: chosen.index,
            session: Session {
                export: chosen.export.name.clone(),
                size: chosen.geometry.size,
                flags: transmission_flags(&chosen.geometry, self.replies, !contexts.is_empty()),
                replies: self.replies,
                contexts,
                blocks: chosen.blocks,
            },
        }
    }

    /// The information of `INFO` and `GO`.
    fn info(&self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Result<Chosen<'a>, Refusal> {
        let request = InfoRequest::parse(data).map_err(invalid)?;
        let (index, export) = self.find(request.name)?;
        let geometry = export.geometry();
        let contexts =
            matches!(&self.contexts, Some((of, list)) if *of == index && !list.is_empty());
        let flags = transmission_flags(&geometry, self.replies, contexts);
        let size = geometry.size;
        let told = ExportInfo { size, flags }.encode();
        reply(
            out,
            option,
            rep::INFO,
            &[&info::EXPORT.to_be_bytes(), &told],
        );
        if request.export_name {
            let name = export.name.as_bytes();
            reply(out, option, rep::INFO, &[&info::NAME.to_be_bytes(), name]);
        }
        if request.description && !export.description.is_empty() {
            let text = export.description.as_bytes();
            reply(
                out,
                option,
                rep::INFO,
                &[&info::DESCRIPTION.to_be_bytes(), text],
            );
        }
        // Told unasked too: some clients use the preferred size without a word. Then the minimum is 1.
        let blocks = block_sizes(&geometry, self.limits.max_request, request.block_size);
        let kind = info::BLOCK_SIZE.to_be_bytes();
        reply(out, option, rep::INFO, &[&kind, &blocks.encode()]);
        Ok(Chosen {
            index,
            export,
            geometry,
            blocks,
        })
    }

    fn list(&self, out: &mut Vec<u8>) {
        for export in self.exports.iter() {
            let name = export.name.as_bytes();
            let length = (name.len() as u32).to_be_bytes();
            let text = export.description.as_bytes();
            reply(out, opt::LIST, rep::SERVER, &[&length, name, text]);
        }
    }

    fn list_contexts(&self, data: &[u8], out: &mut Vec<u8>) -> Result<(), Refusal> {
        let request = MetaRequest::parse(data).map_err(invalid)?;
        let (_, export) = self.find(request.name)?;
        // "namespace:" is a wildcard.
        let matches = |name: &str, query: &str| {
            name == query || (query.ends_with(':') && name.starts_with(query))
        };
        for name in export.contexts() {
            let queries = &request.queries;
            if queries.is_empty() || queries.iter().any(|query| matches(&name, query)) {
                // "The metadata context ID in these replies is reserved and SHOULD be set to zero."
                let parts = [&0u32.to_be_bytes(), name.as_bytes()];
                reply(out, opt::LIST_META_CONTEXT, rep::META_CONTEXT, &parts);
            }
        }
        Ok(())
    }

    fn set_contexts(&mut self, data: &[u8], out: &mut Vec<u8>) -> Result<(), Refusal> {
        // "Replaces all previously-set metadata contexts (including when this command fails)."
        self.contexts = None;
        if self.replies == ReplyMode::Simple {
            let text = "STRUCTURED_REPLY or EXTENDED_HEADERS comes before SET_META_CONTEXT";
            return Err((rep::ERR_INVALID, text.into()));
        }
        let request = MetaRequest::parse(data).map_err(invalid)?;
        let (index, export) = self.find(request.name)?;
        let mut chosen = Vec::new();
        for (id, name) in (1..).zip(export.contexts()) {
            // Exactly, and once: here a wildcard selects nothing.
            if request.queries.contains(&name.as_str()) {
                let parts = [&u32::to_be_bytes(id), name.as_bytes()];
                reply(out, opt::SET_META_CONTEXT, rep::META_CONTEXT, &parts);
                let kind = match name == wire::BASE_ALLOCATION {
                    true => ContextKind::Allocation,
                    false => ContextKind::Engine(name),
                };
                chosen.push(MetaContext { id, kind });
            }
        }
        self.contexts = Some((index, chosen));
        Ok(())
    }

    fn find(&self, name: &str) -> Result<(usize, &'a Export), Refusal> {
        let index = self.exports.find(name);
        let found = index.and_then(|index| Some((index, self.exports.get(index)?)));
        found.ok_or_else(|| {
            let text = match name.is_empty() {
                true => "there is no default export: name one of the list".into(),
                false => format!("there is no export {}", shown(name)),
            };
            (rep::ERR_UNKNOWN, text)
        })
    }
}

fn no_data(data: &[u8]) -> Result<(), Refusal> {
    match data.is_empty() {
        true => Ok(()),
        false => Err((rep::ERR_INVALID, "this option takes no data".into())),
    }
}

fn invalid(why: fields::Malformed) -> Refusal {
    (rep::ERR_INVALID, why.into())
}

/// A client's string in a message: quoted, and short.
fn shown(name: &str) -> String {
    let short: String = name.chars().take(80).collect();
    format!("{short:?}")
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, parts: &[&[u8]]) {
    let length = parts.iter().map(|part| part.len()).sum::<usize>() as u32;
    let header = OptionReply {
        option,
        kind,
        length,
    };
    out.extend_from_slice(&header.encode());
    for part in parts {
        out.extend_from_slice(part);
    }
}
