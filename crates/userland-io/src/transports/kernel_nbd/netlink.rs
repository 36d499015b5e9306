//! Generic netlink, as much of it as talking to one family takes (linux/netlink.h, linux/genetlink.h).
//!
//! A message is a header, a command and attributes; all numbers are the machine's own, and everything is padded to
//! four bytes. A command is answered by messages of the family and then an acknowledgement, or by an error.

use std::io;

use rustix::fd::OwnedFd;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};

/// The headers of netlink and of generic netlink.
const HEADER: usize = 16;
const COMMAND: usize = 4;
/// An attribute's.
const ATTRIBUTE: usize = 4;
/// Marks an attribute that is made of others; beside it a mark that is not for us.
const NESTED: u16 = libc::NLA_F_NESTED as u16;
const KIND: u16 = !(NESTED | libc::NLA_F_NET_BYTEORDER as u16);
/// More than any answer that is asked for here.
const ANSWER: usize = 64 << 10;

/// A family of commands, and a socket to send them on.
#[derive(Debug)]
pub(super) struct Family {
    socket: OwnedFd,
    id: u16,
    sequence: u32,
}

impl Family {
    /// The family `name`. The kernel looks for a module that has it, too.
    ///
    /// # Errors
    /// `NotFound` if there is none.
    pub(super) fn find(name: &str) -> io::Result<Self> {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            Some(netlink::GENERIC),
        )?;
        let mut family = Family {
            socket,
            id: libc::GENL_ID_CTRL as u16,
            sequence: 0,
        };
        let mut asked = Attributes::default();
        asked.text(libc::CTRL_ATTR_FAMILY_NAME as u16, name);
        let answers = family.command(libc::CTRL_CMD_GETFAMILY as u8, 1, &asked)?;
        let mut found = answers.iter().flat_map(|answer| attributes(answer));
        let id = found.find(|(kind, _)| *kind == libc::CTRL_ATTR_FAMILY_ID as u16);
        let id = id.and_then(|(_, value)| value.try_into().ok());
        family.id = id.map(u16::from_ne_bytes).ok_or_else(broken)?;
        Ok(family)
    }

    /// Gives `command`, and waits until it is done. Answers what came back: the attributes of each message.
    ///
    /// # Errors
    /// The command's, as the kernel says.
    pub(super) fn command(
        &mut self,
        command: u8,
        version: u8,
        attributes: &Attributes,
    ) -> io::Result<Vec<Vec<u8>>> {
        self.sequence = self.sequence.wrapping_add(1);
        let message = message(self.id, self.sequence, command, version, attributes);
        send(&self.socket, &message, SendFlags::empty())?;
        let mut answers = Vec::new();
        let mut buffer = vec![0; ANSWER];
        loop {
            let (came, _) = match recv(&self.socket, &mut buffer[..], RecvFlags::empty()) {
                Err(rustix::io::Errno::INTR) => continue,
                came => came?,
            };
            for (kind, sequence, body) in messages(&buffer[..came]) {
                if sequence != self.sequence {
                    continue;
                }
                if kind != libc::NLMSG_ERROR as u16 {
                    answers.push(body.get(COMMAND..).ok_or_else(broken)?.to_vec());
                    continue;
                }
                let code = body.first_chunk().ok_or_else(broken)?;
                return match i32::from_ne_bytes(*code) {
                    0 => Ok(answers),
                    errno => Err(io::Error::from_raw_os_error(errno.saturating_neg())),
                };
            }
        }
    }
}

fn broken() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the kernel's answer is no netlink message",
    )
}

fn message(id: u16, sequence: u32, command: u8, version: u8, attributes: &Attributes) -> Vec<u8> {
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
    let length = (HEADER + COMMAND + attributes.0.len()) as u32;
    let mut bytes = Vec::with_capacity(length as usize);
    bytes.extend(length.to_ne_bytes());
    bytes.extend(id.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    // From us, whose number the kernel knows.
    bytes.extend(0_u32.to_ne_bytes());
    bytes.extend([command, version, 0, 0]);
    bytes.extend(&attributes.0);
    bytes
}

/// The messages of a datagram: kind, sequence number and body. What is cut off ends it.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, u32, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
        let message = bytes.get(..length)?;
        let kind = u16::from_ne_bytes(message.get(4..6)?.try_into().ok()?);
        let sequence = u32::from_ne_bytes(message.get(8..12)?.try_into().ok()?);
        let body = message.get(HEADER..)?;
        bytes = bytes.get(padded(length)..).unwrap_or_default();
        Some((kind, sequence, body))
    })
}

/// Attributes: kind and value. What is cut off ends them.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u16::from_ne_bytes(*bytes.first_chunk()?) as usize;
        let attribute = bytes.get(..length)?;
        let kind = u16::from_ne_bytes(attribute.get(2..4)?.try_into().ok()?) & KIND;
        let value = attribute.get(ATTRIBUTE..)?;
        bytes = bytes.get(padded(length)..).unwrap_or_default();
        Some((kind, value))
    })
}

const fn padded(length: usize) -> usize {
    length.next_multiple_of(4)
}

/// Attributes to be sent.
#[derive(Debug, Default)]
pub(super) struct Attributes(Vec<u8>);

impl Attributes {
    fn put(&mut self, kind: u16, value: &[u8]) {
        let length = (ATTRIBUTE + value.len()) as u16;
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(padded(self.0.len()), 0);
    }

    pub(super) fn u32(&mut self, kind: u16, value: u32) {
        self.put(kind, &value.to_ne_bytes());
    }

    pub(super) fn u64(&mut self, kind: u16, value: u64) {
        self.put(kind, &value.to_ne_bytes());
    }

    /// A string, which ends with a zero there.
    pub(super) fn text(&mut self, kind: u16, value: &str) {
        self.put(kind, &[value.as_bytes(), &[0]].concat());
    }

    /// One that is made of others.
    pub(super) fn nest(&mut self, kind: u16, inner: &Attributes) {
        self.put(kind | NESTED, &inner.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_is_read_back() {
        let mut inner = Attributes::default();
        inner.u32(1, 7);
        let mut all = Attributes::default();
        all.text(3, "abcd");
        all.nest(7, &inner);
        all.u64(2, u64::MAX);
        let message = message(20, 5, 1, 1, &all);
        let (kind, sequence, body) = messages(&message).next().unwrap();
        assert_eq!(
            (kind, sequence, &body[..COMMAND]),
            (20, 5, &[1, 1, 0, 0][..])
        );
        let read: Vec<_> = attributes(&body[COMMAND..]).collect();
        assert_eq!(read[0], (3, &b"abcd\0"[..]));
        assert_eq!(read[1].0, 7);
        assert_eq!(
            attributes(read[1].1).collect::<Vec<_>>(),
            [(1, &7_u32.to_ne_bytes()[..])]
        );
        assert_eq!(read[2], (2, &[0xff; 8][..]));
    }

    #[test]
    fn what_is_cut_off_is_no_message_and_ends() {
        let mut all = Attributes::default();
        all.u64(2, 3);
        let whole = message(20, 5, 1, 1, &all);
        for length in 0..whole.len() {
            assert_eq!(messages(&whole[..length]).count(), 0, "{length}");
            let _ = attributes(&whole[length..]).count();
        }
        // Lengths that do not even hold their own header.
        assert_eq!(messages(&[0; 32]).count(), 0);
        assert_eq!(attributes(&[0; 32]).count(), 0);
        assert_eq!(attributes(&[3, 0, 1, 0]).count(), 0);
    }

    #[test]
    fn the_kernel_has_the_family_of_families_and_no_nonsense() {
        let family = Family::find("nlctrl").unwrap();
        assert_eq!(i32::from(family.id), libc::GENL_ID_CTRL);
        let error = Family::find("no-such-family").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
