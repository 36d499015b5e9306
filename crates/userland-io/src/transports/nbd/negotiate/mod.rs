//! The server's side of the handshake: from a new connection to a [`Session`].
//!
//! [`run`] moves bytes and keeps to the limits; what each option means is in
//! `options`, which does no I/O; what its data look like in `fields`. Whatever
//! bytes come, nothing panics, and memory is bounded by `max_option_data` and
//! by what the server itself offers.

mod fields;
mod options;

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use self::options::{Negotiation, Next};
use super::export::Exports;
use super::limits::{Limits, Shutdown};
use super::session::Session;
use super::wire::{ClientFlags, Greeting, HandshakeFlags, OptionHeader, opt};

/// How a handshake ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The transmission phase begins.
    Start {
        /// Which of the exports.
        export: usize,
        /// What was agreed on.
        session: Session,
        /// What the client has sent behind the handshake.
        input: Vec<u8>,
    },
    /// The connection is to be closed, for this reason.
    Close(String),
}

/// Shakes hands on a new connection. The caller sees to the time-out.
///
/// # Errors
/// If the stream fails, or ends in the middle.
pub(crate) async fn run<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    exports: &Exports,
    limits: &Limits,
    shutdown: &mut Shutdown,
) -> io::Result<Outcome> {
    let offered = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
    stream
        .write_all(&Greeting { flags: offered }.encode())
        .await?;
    stream.flush().await?;

    let mut input = Input::default();
    let Some(flags) = input.array(stream, shutdown).await? else {
        return Ok(Outcome::Close("the server shuts down".into()));
    };
    // "The server MUST close the TCP connection if it does not recognize the client's flags."
    let Some(flags) = ClientFlags::from_bits(u32::from_be_bytes(flags)) else {
        let flags = u32::from_be_bytes(flags);
        return Ok(Outcome::Close(format!("unknown client flags {flags:#x}")));
    };

    let mut negotiation = Negotiation::new(exports, limits, flags);
    let mut out = Vec::new();
    // A client that lists everything asks a few questions about each export.
    let most = limits
        .max_options
        .saturating_add(exports.len().saturating_mul(4));
    for _ in 0..most {
        let Some(header) = input.array(stream, shutdown).await? else {
            return Ok(Outcome::Close("the server shuts down".into()));
        };
        let header = match OptionHeader::decode(&header) {
            Ok(header) => header,
            // Where the next option begins cannot be known.
            Err(error) => return Ok(Outcome::Close(format!("option with {error}"))),
        };
        let length = header.length as usize;
        let next = if length > limits.max_option_data {
            let drained = length <= limits.max_option_drain
                && header.option != opt::EXPORT_NAME
                && input.skip(stream, shutdown, length).await?;
            match negotiation.too_big(header.option, length, &mut out) {
                Next::Continue if !drained => Next::Close("option data beyond any bound".into()),
                next => next,
            }
        } else {
            let Some(data) = input.take(stream, shutdown, length).await? else {
                return Ok(Outcome::Close("the server shuts down".into()));
            };
            match shutdown.is_set() {
                true => negotiation.shutting_down(header.option, &mut out),
                false => negotiation.option(header.option, data, &mut out),
            }
        };
        stream.write_all(&out).await?;
        stream.flush().await?;
        out.clear();
        // A long list is no reason to keep its memory.
        out.shrink_to(64 << 10);
        match next {
            Next::Continue => {}
            Next::Start { export, session } => {
                return Ok(Outcome::Start {
                    export,
                    session,
                    input: input.rest(),
                });
            }
            Next::Close(reason) => return Ok(Outcome::Close(reason)),
        }
    }
    Ok(Outcome::Close(format!("more than {most} options")))
}

/// Bytes received and not yet used. It grows with what arrives, not with what a header announces.
#[derive(Debug, Default)]
struct Input {
    bytes: Vec<u8>,
    used: usize,
}

impl Input {
    /// As much as one call receives: options are small.
    const PIECE: usize = 4096;

    /// Has `length` unused bytes in memory. False if the server shuts down instead.
    async fn fill<S: AsyncRead + Unpin>(
        &mut self,
        stream: &mut S,
        shutdown: &mut Shutdown,
        length: usize,
    ) -> io::Result<bool> {
        if self.used > 0 && self.bytes.len() - self.used < length {
            self.bytes.drain(..self.used);
            self.used = 0;
        }
        while self.bytes.len() - self.used < length {
            if !self.receive(stream, shutdown).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn receive<S: AsyncRead + Unpin>(
        &mut self,
        stream: &mut S,
        shutdown: &mut Shutdown,
    ) -> io::Result<bool> {
        let end = self.bytes.len();
        self.bytes.resize(end + Self::PIECE, 0);
        let received = tokio::select! {
            // What has arrived before the shutdown gets its answer.
            biased;
            received = stream.read(&mut self.bytes[end..]) => Some(received),
            () = shutdown.wait() => None,
        };
        let received = received.transpose();
        let count = *received
            .as_ref()
            .ok()
            .and_then(|r| r.as_ref())
            .unwrap_or(&0);
        self.bytes.truncate(end + count);
        match received? {
            None => Ok(false),
            Some(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Some(_) => Ok(true),
        }
    }

    async fn take<S: AsyncRead + Unpin>(
        &mut self,
        stream: &mut S,
        shutdown: &mut Shutdown,
        length: usize,
    ) -> io::Result<Option<&[u8]>> {
        if !self.fill(stream, shutdown, length).await? {
            return Ok(None);
        }
        let data = &self.bytes[self.used..self.used + length];
        self.used += length;
        Ok(Some(data))
    }

    async fn array<S: AsyncRead + Unpin, const N: usize>(
        &mut self,
        stream: &mut S,
        shutdown: &mut Shutdown,
    ) -> io::Result<Option<[u8; N]>> {
        let data = self.take(stream, shutdown, N).await?;
        Ok(data.and_then(|data| data.first_chunk().copied()))
    }

    /// Reads past `length` bytes, of which no more than one piece is in memory.
    async fn skip<S: AsyncRead + Unpin>(
        &mut self,
        stream: &mut S,
        shutdown: &mut Shutdown,
        mut length: usize,
    ) -> io::Result<bool> {
        loop {
            let here = length.min(self.bytes.len() - self.used);
            self.used += here;
            length -= here;
            if length == 0 {
                return Ok(true);
            }
            self.bytes.clear();
            self.used = 0;
            if !self.receive(stream, shutdown).await? {
                return Ok(false);
            }
        }
    }

    fn rest(mut self) -> Vec<u8> {
        self.bytes.drain(..self.used);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_used_takes_no_memory() {
        let (_stop, mut shutdown) = Shutdown::channel();
        let mut input = Input::default();
        let mut stream = tokio::io::repeat(7);
        for _ in 0..1_000 {
            let data = input
                .take(&mut stream, &mut shutdown, 10_000)
                .await
                .unwrap();
            assert_eq!(data, Some(&[7; 10_000][..]));
        }
        input
            .skip(&mut stream, &mut shutdown, 10_000_000)
            .await
            .unwrap();
        assert!(input.bytes.capacity() < 64 << 10);
    }
}
