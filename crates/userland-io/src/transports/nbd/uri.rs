//! NBD URIs: where a server is, and which of its exports is meant.
//!
//! Parsed and printed as `doc/uri.md` of the NetworkBlockDevice project says,
//! for the server's addresses and for the client alike. Beside URIs the short
//! forms `host:port` and `unix:/path` are understood.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::wire;

/// Where a server is, and the name of an export.
///
/// ```
/// use userland_io::transports::nbd::Uri;
///
/// let uri: Uri = "nbd+unix:///my%20disk?socket=/run/disk.sock".parse()?;
/// assert_eq!(uri.export(), "my disk");
/// let uri: Uri = "[::1]:10810".parse()?;
/// assert_eq!(uri.to_string(), "nbd://[::1]:10810/");
/// # Ok::<(), userland_io::transports::nbd::UriError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Uri {
    address: Address,
    export: String,
}

/// Where a server is.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A TCP port.
    Tcp {
        /// A name or an IP address, without brackets. Empty: this machine's loopback addresses.
        host: String,
        /// The port; a server may listen on 0, any free one.
        port: u16,
    },
    /// A Unix domain socket. A path that begins with a NUL is a name in Linux's abstract namespace.
    Unix(PathBuf),
}

/// What is wrong with a text that should have been an NBD URI.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no NBD address: {reason}")]
pub struct UriError {
    text: String,
    reason: String,
}

impl From<UriError> for crate::Error {
    fn from(error: UriError) -> Self {
        crate::Error::new(crate::ErrorKind::Invalid, error)
    }
}

impl Uri {
    /// The export named `export` of the server at `address`.
    pub fn new(address: Address, export: impl Into<String>) -> Self {
        Uri {
            address,
            export: export.into(),
        }
    }

    /// Where the server is.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The name of the export, decoded; empty for the default export.
    pub fn export(&self) -> &str {
        &self.export
    }
}

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        parse(text).map_err(|reason| UriError {
            text: text.to_owned(),
            reason,
        })
    }
}

const FORMS: &str =
    "write nbd://host:port/export, nbd+unix:///export?socket=/path, host:port or unix:/path";
const TLS: &str =
    "TLS is not supported: use nbd:// or nbd+unix:// inside a network or tunnel that you trust";

/// Parses, or says what is wrong and what would be right.
fn parse(text: &str) -> Result<Uri, String> {
    let Some((scheme, rest)) = text.split_once("://") else {
        return parse_short(text);
    };
    let unix = match scheme.to_ascii_lowercase().as_str() {
        "nbd" => false,
        "nbd+unix" => true,
        "nbds" | "nbds+unix" => return Err(format!("{scheme}:// asks for TLS, and {TLS}")),
        _ => return Err(format!("the scheme {scheme:?} is not known; {FORMS}")),
    };
    if let Some((_, fragment)) = rest.split_once('#') {
        return Err(format!(
            "it has a fragment, \"#{fragment}\"; write a # that belongs to a name as %23"
        ));
    }
    let (rest, query) = match rest.split_once('?') {
        Some((rest, query)) => (rest, Some(query)),
        None => (rest, None),
    };
    let (authority, path) = match rest.split_once('/') {
        Some((authority, path)) => (authority, path),
        None => (rest, ""),
    };
    let socket = parse_query(query.unwrap_or(""))?;
    let export = decode_text(path, "the export name")?;
    check_export(&export)?;
    let address = match (unix, socket) {
        (true, None) => {
            return Err("an nbd+unix URI names its socket: add ?socket=/path".into());
        }
        (true, Some(socket)) => {
            if !authority.is_empty() {
                return Err(format!(
                    "{authority:?} stands where a host would, and a Unix socket has none: write three slashes, \
                     nbd+unix:///{authority}?socket=..."
                ));
            }
            Address::Unix(path_from_bytes(decode(socket, "the socket's path")?)?)
        }
        (false, Some(_)) => {
            return Err("\"socket\" belongs to nbd+unix://, not to nbd://".into());
        }
        (false, None) => parse_authority(authority)?,
    };
    if let Address::Unix(path) = &address {
        check_path(path)?;
    }
    Ok(Uri { address, export })
}

/// The forms without a scheme. No percent-encoding, no export.
fn parse_short(text: &str) -> Result<Uri, String> {
    if text.is_empty() {
        return Err(format!("it is empty; {FORMS}"));
    }
    if let Some(path) = text.strip_prefix("unix:") {
        let path = PathBuf::from(path);
        check_path(&path)?;
        return Ok(Uri::new(Address::Unix(path), ""));
    }
    if let Ok(ip) = text.parse::<IpAddr>() {
        let host = ip.to_string();
        let port = wire::PORT;
        return Ok(Uri::new(Address::Tcp { host, port }, ""));
    }
    if text.starts_with('/') || text.starts_with('.') {
        return Err(format!("a Unix socket is written unix:{text}"));
    }
    let colon = text.rfind(':').filter(|&at| !text[at..].contains(']'));
    if text.starts_with("nbd") && text.contains(':') && !text.starts_with("nbd.") {
        let scheme = text.split(':').next().unwrap_or(text);
        if scheme.starts_with("nbds") {
            return Err(TLS.into());
        }
        if matches!(scheme, "nbd" | "nbd+unix") {
            return Err(format!("\"{scheme}:\" is followed by two slashes; {FORMS}"));
        }
    }
    if colon.is_none() && !text.starts_with('[') {
        return Err(format!("the port is missing; {FORMS}"));
    }
    if text.contains(['/', '?', '#', '@', '%']) && !text.starts_with('[') {
        return Err(FORMS.into());
    }
    Ok(Uri::new(parse_authority(text)?, ""))
}

/// `host`, `host:port`, `[v6]`, `[v6]:port`, or nothing (RFC 3986, section 3.2).
fn parse_authority(authority: &str) -> Result<Address, String> {
    if let Some((user, _)) = authority.split_once('@') {
        return Err(format!(
            "it names a user, {user:?}, and users need TLS. {TLS}"
        ));
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (inside, after) = rest
                .split_once(']')
                .ok_or("the bracket of the IPv6 address is not closed")?;
            let host = decode_text(inside, "the host")?;
            // A zone, as in fe80::1%eth0, is for the resolver to judge.
            let ip = host.split('%').next().unwrap_or(&host);
            if ip.parse::<std::net::Ipv6Addr>().is_err() {
                return Err(format!("{inside:?} in brackets is no IPv6 address"));
            }
            match (after.is_empty(), after.strip_prefix(':')) {
                (true, _) => (host, None),
                (_, Some(port)) => (host, Some(port)),
                (_, None) => {
                    return Err(format!("{after:?} follows the bracket where :port would"));
                }
            }
        }
        None => {
            let (host, port) = match authority.rsplit_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (authority, None),
            };
            if host.contains(':') {
                return Err(format!("an IPv6 address goes in brackets: [{host}]"));
            }
            (decode_text(host, "the host")?, port)
        }
    };
    if host.contains(['\0', '/', ' ']) {
        return Err(format!("{host:?} is no host name"));
    }
    let port = match port {
        // "host:" is allowed, and means the default (RFC 3986, section 3.2.3).
        None | Some("") => wire::PORT,
        Some(port) => match port.parse() {
            Ok(number) if port.bytes().all(|b| b.is_ascii_digit()) => number,
            _ => {
                return Err(format!("the port {port:?} is no number from 0 to 65535"));
            }
        },
    };
    Ok(Address::Tcp { host, port })
}

/// The value of `socket`, still encoded. Nothing else is understood.
fn parse_query(query: &str) -> Result<Option<&str>, String> {
    let mut socket = None;
    for parameter in query.split('&').filter(|p| !p.is_empty()) {
        let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        match key {
            "socket" if value.is_empty() => {
                return Err("\"socket\" has no path: write socket=/path".into());
            }
            "socket" if socket.is_some() => return Err("\"socket\" is given twice".into()),
            "socket" => socket = Some(value),
            _ if key.starts_with("tls-") => {
                return Err(format!("{key:?} asks for TLS, and {TLS}"));
            }
            _ => {
                return Err(format!(
                    "the parameter {key:?} is not known; there is only \"socket\""
                ));
            }
        }
    }
    Ok(socket)
}

/// What the protocol allows as the name of an export ("Conventions").
pub(crate) fn check_export(name: &str) -> Result<(), String> {
    if name.contains('\0') {
        return Err(format!("the export name {name:?} contains a NUL"));
    }
    match name.len() {
        0..=wire::MAX_STRING => Ok(()),
        length => Err(format!(
            "the export name is {length} bytes long, and at most {} are allowed",
            wire::MAX_STRING
        )),
    }
}

fn check_path(path: &Path) -> Result<(), String> {
    let bytes = path.as_os_str().as_encoded_bytes();
    match bytes {
        [] => Err("the socket's path is missing: write unix:/path".into()),
        // A NUL in front is the abstract namespace, in which any byte goes.
        [0] => Err("the name in the abstract namespace is missing".into()),
        [0, ..] => Ok(()),
        _ if bytes.contains(&0) => Err("the socket's path contains a NUL".into()),
        _ => Ok(()),
    }
}

fn decode(text: &str, what: &str) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits = match rest {
            [a, b, ..] => hex(*a).zip(hex(*b)),
            _ => None,
        };
        let Some((high, low)) = digits else {
            return Err(format!(
                "in {what}, {text:?}, a % is not followed by two hexadecimal digits; write a plain % as %25"
            ));
        };
        bytes.push(high << 4 | low);
        rest = &rest[2..];
    }
    Ok(bytes)
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).map(|value| value as u8)
}

fn decode_text(text: &str, what: &str) -> Result<String, String> {
    String::from_utf8(decode(text, what)?).map_err(|_| format!("{what}, {text:?}, is not UTF-8"))
}

#[cfg(unix)]
fn path_from_bytes(bytes: Vec<u8>) -> Result<PathBuf, String> {
    use std::os::unix::ffi::OsStringExt;
    Ok(std::ffi::OsString::from_vec(bytes).into())
}

#[cfg(not(unix))]
fn path_from_bytes(bytes: Vec<u8>) -> Result<PathBuf, String> {
    match String::from_utf8(bytes) {
        Ok(path) => Ok(path.into()),
        Err(_) => Err("the socket's path is not UTF-8".into()),
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Address::Tcp { .. } => {
                write!(f, "nbd://{}/", self.address)?;
                encode(f, self.export.as_bytes())
            }
            Address::Unix(path) => {
                f.write_str("nbd+unix:///")?;
                encode(f, self.export.as_bytes())?;
                f.write_str("?socket=")?;
                encode(f, path.as_os_str().as_encoded_bytes())
            }
        }
    }
}

/// As in a URI's authority for TCP, and `unix:/path`.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp { host, port } => {
                if host.contains(':') {
                    // The one character of a zone that a URI cannot hold is its separator.
                    write!(f, "[{}]", host.replace('%', "%25"))?;
                } else {
                    encode(f, host.as_bytes())?;
                }
                match *port == wire::PORT {
                    true => Ok(()),
                    false => write!(f, ":{port}"),
                }
            }
        }
    }
}

/// Keeps what is literal in every part of a URI, and encodes the rest.
fn encode(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    for &byte in bytes {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' | b':' => {
                write!(f, "{}", char::from(byte))?;
            }
            _ => write!(f, "%{byte:02X}")?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16, export: &str) -> Uri {
        let host = host.to_owned();
        Uri::new(Address::Tcp { host, port }, export)
    }

    fn unix(path: &str, export: &str) -> Uri {
        Uri::new(Address::Unix(path.into()), export)
    }

    #[test]
    fn the_examples_of_the_specification_parse() {
        for (text, uri) in [
            (
                "nbd://example.com:10809/export",
                tcp("example.com", 10809, "export"),
            ),
            ("nbd://example.com/disk", tcp("example.com", 10809, "disk")),
            ("nbd+unix:///disk?socket=sock", unix("sock", "disk")),
            ("nbd://example.com/", tcp("example.com", 10809, "")),
            ("nbd://example.com", tcp("example.com", 10809, "")),
            (
                "nbd://example.com//disk",
                tcp("example.com", 10809, "/disk"),
            ),
            (
                "nbd://example.com/hello%20world",
                tcp("example.com", 10809, "hello world"),
            ),
            ("nbd+unix:///?socket=%00/abstract", unix("\0/abstract", "")),
        ] {
            assert_eq!(text.parse(), Ok(uri), "{text}");
        }
    }

    #[test]
    fn addresses_parse_in_every_form() {
        for (text, uri) in [
            ("nbd://", tcp("", 10809, "")),
            ("NBD://:7/x", tcp("", 7, "x")),
            ("nbd://[::1]:7/x", tcp("::1", 7, "x")),
            ("nbd://[fe80::1%25eth0]/", tcp("fe80::1%eth0", 10809, "")),
            ("nbd://host:/", tcp("host", 10809, "")),
            ("127.0.0.1:0", tcp("127.0.0.1", 0, "")),
            ("127.0.0.1", tcp("127.0.0.1", 10809, "")),
            ("::1", tcp("::1", 10809, "")),
            ("[::]:5", tcp("::", 5, "")),
            ("localhost:10810", tcp("localhost", 10810, "")),
            ("nbd.example.com:5", tcp("nbd.example.com", 5, "")),
            ("nbdhost:5", tcp("nbdhost", 5, "")),
            (":5", tcp("", 5, "")),
            ("unix:/run/a b%20?x", unix("/run/a b%20?x", "")),
            (
                "nbd+unix:///a/b?socket=/run/%C3%A9",
                unix("/run/\u{e9}", "a/b"),
            ),
        ] {
            assert_eq!(text.parse(), Ok(uri), "{text}");
        }
    }

    #[test]
    fn what_is_printed_parses_to_the_same() {
        let odd = "a b/c?d#e%f&g=h+\u{e9}:@[]";
        for uri in [
            tcp("::1", 10809, odd),
            tcp("fe80::1%eth0", 1, ""),
            tcp("", 10809, "x"),
            tcp("example.com", 65535, "//x"),
            unix("/run/x", odd),
            unix(odd, ""),
            unix("\0abstract", "/"),
        ] {
            let text = uri.to_string();
            assert!(text.is_ascii(), "{text}");
            assert_eq!(text.parse(), Ok(uri), "{text}");
        }
        assert_eq!(tcp("::1", 10809, "a b").to_string(), "nbd://[::1]/a%20b");
    }

    #[test]
    fn what_is_wrong_is_said_with_what_is_right() {
        for (text, expected) in [
            ("nbds://host/", "TLS is not supported"),
            ("nbds+unix:///?socket=/x", "TLS is not supported"),
            ("nbds:host:1", "TLS is not supported"),
            ("nbd://host/?tls-type=psk", "TLS is not supported"),
            ("nbd://user@host/", "users need TLS"),
            ("nbd+unix:///disk", "add ?socket=/path"),
            ("nbd+unix:///?socket=", "socket=/path"),
            (
                "nbd+unix://disk?socket=/x",
                "three slashes, nbd+unix:///disk",
            ),
            ("nbd+unix:///?socket=/a&socket=/b", "twice"),
            ("nbd+unix:///?socket=/a%00b", "contains a NUL"),
            ("nbd+unix:///?socket=%00", "abstract namespace is missing"),
            ("nbd://host/?socket=/x", "belongs to nbd+unix://"),
            ("nbd://host/?sokcet=/x", "\"sokcet\" is not known"),
            ("nbd://host/x%2", "two hexadecimal digits"),
            ("nbd://host/x%+1", "two hexadecimal digits"),
            ("nbd://host/x%ff", "not UTF-8"),
            ("nbd://host/x%00", "contains a NUL"),
            ("nbd://host/x#y", "write a # that belongs to a name as %23"),
            ("nbd://::1/", "brackets: [:"),
            ("nbd://[::1/", "not closed"),
            ("nbd://[host]/", "no IPv6 address"),
            ("nbd://[::1]x/", "follows the bracket"),
            ("nbd://host:65536/", "0 to 65535"),
            ("nbd://host:+1/", "0 to 65535"),
            ("nbd:localhost:10809", "two slashes"),
            ("http://host/", "\"http\" is not known"),
            ("/run/x", "written unix:/run/x"),
            ("unix:", "unix:/path"),
            ("localhost", "the port is missing"),
            ("", "it is empty"),
        ] {
            let error = text.parse::<Uri>().unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn no_text_panics() {
        let alphabet = [
            'n', 'b', 'd', ':', '/', '[', ']', '%', '?', '=', '#', '@', '1', '\u{e9}',
        ];
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..20_000 {
            let prefix = ["", "nbd://", "nbd+unix:///", "unix:"][random.usize(..4)];
            let tail: String = (0..random.usize(..12))
                .map(|_| alphabet[random.usize(..alphabet.len())])
                .collect();
            if let Ok(uri) = format!("{prefix}{tail}").parse::<Uri>() {
                assert_eq!(uri.to_string().parse::<Uri>(), Ok(uri));
            }
        }
    }
}
