//! The word for an export of an NBD server: `nbd://host/export`, or `nbd:` and a URI.

use crate::stack::{Entry, Key, Kind, Registry};

pub(super) fn add(registry: Registry) -> Registry {
    let entry = Entry::new("nbd", "an export of an NBD server; its URI alone will do")
        .positional(
            Key::new(
                "uri",
                Kind::Text,
                "where it is: nbd://host:port/export, or nbd+unix:///export?socket=/path",
            )
            .required()
            .example("nbd://127.0.0.1/disk"),
        )
        .key(
            Key::new(
                "connections",
                Kind::Number,
                "how many to spread requests over, 1 to 64, where the server can",
            )
            .default("1")
            .example("4"),
        )
        .key(Key::new(
            "contexts",
            Kind::Flag,
            "offer every metadata context of the server, not just what is allocated",
        ))
        .key(
            Key::new(
                "timeout",
                Kind::Duration,
                "how long connecting and the handshake may take",
            )
            .default("10s")
            .example("2s"),
        )
        .key(
            Key::new(
                "reconnect",
                Kind::Duration,
                "how long requests wait for a lost server before they fail",
            )
            .default("30s")
            .example("5m"),
        )
        .key(
            Key::new(
                "journal",
                Kind::Size,
                "how much unflushed data is kept, to tell a server again that was lost",
            )
            .default("64M")
            .example("256M"),
        )
        .key(Key::new(
            "shared",
            Kind::Flag,
            "others write to the export, too: tell nothing twice, and end with a lost server or a failed flush",
        ))
        .example("nbd://127.0.0.1/disk")
        .example("'nbd+unix:///?socket=/run/disk.sock',connections=4")
        // With TLS it cannot be had, and the client says so better than "no such scheme".
        .schemes(&["nbd", "nbd+unix", "nbds", "nbds+unix"]);
    #[cfg(feature = "nbd")]
    return registry.engine(entry, open);
    #[cfg(not(feature = "nbd"))]
    registry.missing(entry, "nbd")
}

#[cfg(feature = "nbd")]
async fn open(options: crate::stack::Options) -> Result<crate::AnyEngine, crate::stack::Refusal> {
    use crate::stack::Refusal;
    use crate::transports::nbd::{Client, ConnectError};
    use crate::{EngineExt, Error};
    use std::io::ErrorKind::{ConnectionRefused, NotFound};

    let connections: u64 = options.need("connections")?;
    let client = Client::builder(&options.need::<String>("uri")?)
        .connections(usize::try_from(connections).unwrap_or(usize::MAX))
        .all_contexts(options.flag("contexts"))
        .timeout(options.need("timeout")?)
        .reconnect(options.need("reconnect")?)
        .journal(options.need("journal")?)
        .shared(options.flag("shared"))
        .connect()
        .await
        .map_err(|error| match error {
            ConnectError::Uri(_) => Refusal::key_error("uri", error),
            ConnectError::Option(_) => Refusal::key_error("connections", error),
            ConnectError::Unreachable { ref source, .. }
                if matches!(source.kind(), NotFound | ConnectionRefused) =>
            {
                let text = format!("{error}; is the server running?");
                Error::new(Error::from(error).kind(), text).into()
            }
            error => Error::from(error).into(),
        })?;
    Ok(client.erase())
}
