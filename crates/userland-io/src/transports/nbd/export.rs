//! What a server offers: devices under names, and what clients are told of them.
//!
//! An export keeps its device's type to itself. A connection crosses that
//! border once, when its handshake is done; inside, a static engine stays static.

use std::future::Future;
use std::io;
use std::pin::Pin;

use super::limits::Environment;
use super::session::{ReplyMode, Session};
use super::socket::Stream;
use super::transmission::{self, Kits};
use super::wire::{self, BlockSizes, TransmissionFlags};
use crate::{Device, Discard, Engine, Features, Geometry, Result};

type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A named device whose engine's type is not told.
pub(crate) struct Export {
    pub(crate) name: String,
    pub(crate) description: String,
    device: Box<dyn AnyDevice>,
    kits: Kits,
}

impl std::fmt::Debug for Export {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Export").field("name", &self.name).finish()
    }
}

trait AnyDevice: Send + Sync {
    fn geometry(&self) -> Geometry;
    fn contexts(&self) -> Vec<String>;
    fn serve(
        &self,
        stream: Stream,
        input: Vec<u8>,
        session: Session,
        environment: Environment,
    ) -> Boxed<'static, io::Result<()>>;
    fn flush(&self) -> Boxed<'_, Result>;
    fn close(self: Box<Self>) -> Boxed<'static, Result>;
}

impl<E: Engine> AnyDevice for Device<E> {
    fn geometry(&self) -> Geometry {
        Device::geometry(self)
    }
    fn contexts(&self) -> Vec<String> {
        Device::contexts(self)
    }
    fn serve(
        &self,
        stream: Stream,
        input: Vec<u8>,
        session: Session,
        environment: Environment,
    ) -> Boxed<'static, io::Result<()>> {
        let device = self.clone();
        Box::pin(transmission::run(
            stream,
            input,
            session,
            device,
            environment,
        ))
    }
    fn flush(&self) -> Boxed<'_, Result> {
        Box::pin(Device::flush(self))
    }
    fn close(self: Box<Self>) -> Boxed<'static, Result> {
        Box::pin(Device::close(*self))
    }
}

impl Export {
    pub(crate) fn new<E: Engine>(name: String, device: Device<E>) -> Self {
        Export {
            name,
            description: String::new(),
            device: Box::new(device),
            kits: Kits::default(),
        }
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.device.geometry()
    }

    /// The metadata contexts that clients can ask for: `base:allocation`, then the engine's own.
    pub(crate) fn contexts(&self) -> Vec<String> {
        let mut names = vec![wire::BASE_ALLOCATION.to_owned()];
        for name in self.device.contexts() {
            if !valid_context(&name) {
                tracing::warn!(
                    export = self.name,
                    context = name,
                    "an engine's context is left out: a name is namespace:leaf, at most 255 bytes, and base is reserved"
                );
            } else if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }

    /// Runs the transmission phase of one connection.
    pub(crate) async fn serve(
        &self,
        stream: Stream,
        input: Vec<u8>,
        session: Session,
        mut environment: Environment,
    ) -> io::Result<()> {
        environment.budget = environment.budget.with_kits(self.kits.clone());
        self.device.serve(stream, input, session, environment).await
    }

    /// Makes durable what clients have written.
    pub(crate) async fn flush(&self) -> Result {
        self.device.flush().await
    }

    /// Gives the device's handle back; the last one closes the engine.
    pub(crate) async fn close(self) -> Result {
        self.device.close().await
    }
}

fn valid_context(name: &str) -> bool {
    let Some((namespace, leaf)) = name.split_once(':') else {
        return false;
    };
    let printable = |c: char| !c.is_whitespace() && !c.is_control();
    name.len() <= 255
        && !namespace.is_empty()
        && namespace != "base"
        && namespace.chars().all(printable)
        && !leaf.is_empty()
        && !leaf.contains('\0')
}

/// All that a server offers.
#[derive(Debug, Default)]
pub(crate) struct Exports {
    list: Vec<Export>,
    default: Option<usize>,
}

impl Exports {
    /// Checks names and the default. What is wrong is said in the error.
    pub(crate) fn new(list: Vec<Export>, default: Option<&str>) -> Result<Self, String> {
        if list.is_empty() {
            return Err(
                "an NBD server without an export serves nobody: add one with export(name, device)"
                    .into(),
            );
        }
        for (index, export) in list.iter().enumerate() {
            super::uri::check_export(&export.name)?;
            if export.description.len() > wire::MAX_STRING || export.description.contains('\0') {
                return Err(format!(
                    "the description of export {:?} is longer than {} bytes, or contains a NUL",
                    export.name,
                    wire::MAX_STRING
                ));
            }
            if list[..index].iter().any(|other| other.name == export.name) {
                return Err(format!("two exports are named {:?}", export.name));
            }
        }
        let position = |name: &str| list.iter().position(|export| export.name == name);
        let default = match default {
            Some(name) => match position(name) {
                Some(index) => Some(index),
                None => {
                    return Err(format!(
                        "the default export {name:?} is not among the exports"
                    ));
                }
            },
            // "The special, empty, name is reserved for a default export": one that has it, or the only one.
            None => position("").or((list.len() == 1).then_some(0)),
        };
        Ok(Exports { list, default })
    }

    /// The export that a client means by `name`.
    pub(crate) fn find(&self, name: &str) -> Option<usize> {
        match name {
            "" => self.default,
            _ => self.list.iter().position(|export| export.name == name),
        }
    }

    pub(crate) fn get(&self, index: usize) -> Option<&Export> {
        self.list.get(index)
    }

    pub(crate) fn iter(&self) -> std::slice::Iter<'_, Export> {
        self.list.iter()
    }

    pub(crate) fn len(&self) -> usize {
        self.list.len()
    }

    pub(crate) fn into_list(self) -> Vec<Export> {
        self.list
    }
}

/// The transmission flags of a disk ("Transmission flags"): its claims, and nothing else.
///
/// `contexts` says whether the client has negotiated metadata contexts of this export.
pub(crate) fn transmission_flags(
    geometry: &Geometry,
    replies: ReplyMode,
    contexts: bool,
) -> TransmissionFlags {
    // A flush covers all connections by contract, and prefetch is a hint that each engine takes.
    let mut flags = TransmissionFlags::HAS_FLAGS
        | TransmissionFlags::CAN_MULTI_CONN
        | TransmissionFlags::SEND_CACHE;
    let mut set = |flag, on| flags.set(flag, on);
    set(
        TransmissionFlags::ROTATIONAL,
        geometry.features.contains(Features::ROTATIONAL),
    );
    if geometry.is_read_only() {
        set(TransmissionFlags::READ_ONLY, true);
    } else {
        // The edge emulates FUA and zeroes where the engine lacks them, and may refuse FAST_ZERO.
        let always = TransmissionFlags::SEND_FLUSH
            | TransmissionFlags::SEND_FUA
            | TransmissionFlags::SEND_WRITE_ZEROES
            | TransmissionFlags::SEND_FAST_ZERO;
        set(always, true);
        set(
            TransmissionFlags::SEND_TRIM,
            geometry.discard != Discard::None,
        );
    }
    set(TransmissionFlags::SEND_DF, replies != ReplyMode::Simple);
    set(
        TransmissionFlags::BLOCK_STATUS_PAYLOAD,
        replies == ReplyMode::Extended && contexts,
    );
    flags
}

/// The size constraints of a disk ("Size constraints").
///
/// `asked` says whether the client has asked for them; one that has not need not keep to them, so
/// for it the minimum is 1, and the edge reads, modifies and writes.
pub(crate) fn block_sizes(geometry: &Geometry, max_request: u32, asked: bool) -> BlockSizes {
    let mut minimum = match asked {
        true => geometry
            .logical_block_size
            .clamp(1, wire::MAX_MINIMUM_BLOCK),
        false => 1,
    };
    // A tail shorter than a block would be out of reach; offsets in it are multiples of this.
    if geometry.size > 0 {
        minimum = minimum.min(1 << geometry.size.trailing_zeros().min(31));
    }
    let wish = geometry
        .physical_block_size
        .max(geometry.io_min)
        .max(geometry.io_opt)
        .max(geometry.logical_block_size)
        .max(wire::DEFAULT_PREFERRED_BLOCK);
    // A power of two, and no larger than the largest request.
    let largest = 1 << max_request.max(wire::LEAST_PREFERRED_BLOCK).ilog2();
    let preferred = wish
        .checked_next_power_of_two()
        .unwrap_or(largest)
        .min(largest);
    BlockSizes {
        minimum,
        preferred,
        maximum: max_request,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CrashLevel;

    #[test]
    fn flags_follow_the_claims() {
        type F = TransmissionFlags;
        let all = F::HAS_FLAGS | F::CAN_MULTI_CONN | F::SEND_CACHE;
        let writable = all | F::SEND_FLUSH | F::SEND_FUA | F::SEND_WRITE_ZEROES | F::SEND_FAST_ZERO;
        let disk = |crash| Geometry::writable(1 << 20, crash);
        let with = |features, discard| {
            let mut geometry = disk(CrashLevel::Flush);
            geometry.features |= features;
            geometry.discard = discard;
            geometry
        };
        let none = Features::empty();
        for (geometry, replies, contexts, expected) in [
            (
                Geometry::read_only(1),
                ReplyMode::Simple,
                false,
                all | F::READ_ONLY,
            ),
            // Whatever survives a crash, a writable export takes flushes.
            (disk(CrashLevel::None), ReplyMode::Simple, false, writable),
            (disk(CrashLevel::Flush), ReplyMode::Simple, false, writable),
            (disk(CrashLevel::Prefix), ReplyMode::Simple, false, writable),
            (disk(CrashLevel::Sync), ReplyMode::Simple, false, writable),
            // What the engine leaves out is emulated, so its having it changes nothing.
            (
                with(Features::FUA | Features::WRITE_ZEROES, Discard::None),
                ReplyMode::Simple,
                false,
                writable,
            ),
            (
                with(Features::ROTATIONAL, Discard::None),
                ReplyMode::Simple,
                false,
                writable | F::ROTATIONAL,
            ),
            (
                with(none, Discard::Unspecified),
                ReplyMode::Simple,
                false,
                writable | F::SEND_TRIM,
            ),
            (
                with(none, Discard::OldOrZero),
                ReplyMode::Simple,
                false,
                writable | F::SEND_TRIM,
            ),
            (
                with(none, Discard::Zeroes),
                ReplyMode::Simple,
                false,
                writable | F::SEND_TRIM,
            ),
            (
                with(Features::ROTATIONAL, Discard::Zeroes).into_read_only(),
                ReplyMode::Simple,
                false,
                all | F::READ_ONLY | F::ROTATIONAL,
            ),
            (
                disk(CrashLevel::None),
                ReplyMode::Structured,
                true,
                writable | F::SEND_DF,
            ),
            (
                disk(CrashLevel::None),
                ReplyMode::Extended,
                false,
                writable | F::SEND_DF,
            ),
            (
                disk(CrashLevel::None),
                ReplyMode::Extended,
                true,
                writable | F::SEND_DF | F::BLOCK_STATUS_PAYLOAD,
            ),
        ] {
            let flags = transmission_flags(&geometry, replies, contexts);
            assert_eq!(flags, expected, "{geometry:?} {replies:?} {contexts}");
        }
    }

    #[test]
    fn block_sizes_keep_to_the_rules() {
        const MAX: u32 = 64 << 20;
        let sizes = |size, logical, physical, io_min, io_opt, asked| {
            let mut geometry = Geometry::read_only(size);
            geometry.logical_block_size = logical;
            geometry.physical_block_size = physical;
            geometry.io_min = io_min;
            geometry.io_opt = io_opt;
            let sizes = block_sizes(&geometry, MAX, asked);
            assert!(sizes.preferred.is_power_of_two() && sizes.minimum.is_power_of_two());
            assert!(sizes.minimum <= sizes.preferred && sizes.preferred <= sizes.maximum);
            assert_eq!(sizes.maximum, MAX);
            (sizes.minimum, sizes.preferred)
        };
        for (given, expected) in [
            (sizes(1 << 30, 1, 0, 0, 0, true), (1, 4096)),
            (sizes(1 << 30, 512, 4096, 0, 0, true), (512, 4096)),
            (sizes(1 << 30, 512, 4096, 0, 0, false), (1, 4096)),
            (sizes(1 << 30, 4096, 8192, 16384, 0, true), (4096, 16384)),
            (
                sizes(1 << 30, 512, 512, 512, 192 << 10, true),
                (512, 256 << 10),
            ),
            (sizes(1 << 30, 1, 0, 0, u32::MAX, true), (1, MAX)),
            // Larger than a minimum may be: the edge does the rest.
            (sizes(1 << 30, 1 << 20, 0, 0, 0, true), (1 << 16, 1 << 20)),
            // The last bytes of an odd size stay in reach.
            (sizes(1_000, 512, 0, 0, 0, true), (8, 4096)),
            (sizes(1_001, 512, 0, 0, 0, true), (1, 4096)),
            (sizes(0, 512, 0, 0, 0, true), (512, 4096)),
        ] {
            assert_eq!(given, expected);
        }
        assert_eq!(
            block_sizes(&Geometry::read_only(1), (64 << 20) - 1, true).preferred,
            4096
        );
    }

    #[tokio::test]
    async fn the_default_is_the_named_the_nameless_or_the_only_one() {
        struct Empty;
        impl Engine for Empty {
            fn geometry(&self) -> Geometry {
                Geometry::read_only(0)
            }
            async fn read(&self, _: &mut crate::ReadBuf<'_>, _: u64) -> Result {
                Ok(())
            }
        }
        let disk = Device::open(Empty).await.unwrap();
        let found = |names: &[&str], default: Option<&str>| {
            let export = |name: &&str| Export::new((*name).to_owned(), disk.clone());
            let exports = Exports::new(names.iter().map(export).collect(), default).unwrap();
            exports.find("").map(|index| names[index].to_owned())
        };
        for (names, default, expected) in [
            (&["a"][..], None, Some("a")),
            (&["a", "b"], None, None),
            (&["a", "b"], Some("b"), Some("b")),
            (&["a", ""], None, Some("")),
            (&["a", ""], Some("a"), Some("a")),
        ] {
            let expected = expected.map(str::to_owned);
            assert_eq!(found(names, default), expected, "{names:?} {default:?}");
        }
    }

    #[test]
    fn a_context_is_namespace_and_leaf() {
        for (name, valid) in [
            ("ulio:dirty", true),
            ("ulio:a:b", true),
            ("base:dirty", false),
            ("dirty", false),
            (":dirty", false),
            ("ulio:", false),
            ("ul io:x", false),
        ] {
            assert_eq!(valid_context(name), valid, "{name}");
        }
        assert!(!valid_context(&format!("x:{}", "y".repeat(254))));
    }
}
