//! Whatever a client says before a disk is chosen, the server answers in whole, well-formed replies.
#![no_main]

use libfuzzer_sys::fuzz_target;
use userland_io::transports::nbd::fuzz::handshake;
use userland_io::transports::nbd::wire::{EXPORT_NAME_ZEROES, ExportInfo, Greeting, OptionReply};

fuzz_target!(|input: &[u8]| {
    let outcome = handshake(input);
    let Some((greeting, mut rest)) = outcome.output.split_first_chunk() else {
        panic!("no greeting: {:?}", outcome.output);
    };
    Greeting::decode(greeting).expect("a greeting");
    while let Some((head, tail)) = rest.split_first_chunk()
        && let Ok(reply) = OptionReply::decode(head)
    {
        rest = tail.get(reply.length as usize..).expect("a whole reply");
    }
    // EXPORT_NAME alone is answered without a header, and then the handshake is over.
    let export_name = [0, EXPORT_NAME_ZEROES].map(|zeroes| ExportInfo::LEN + zeroes);
    let ends_so = outcome.session.is_some() && export_name.contains(&rest.len());
    assert!(
        rest.is_empty() || ends_so,
        "{} bytes that are no reply",
        rest.len()
    );
    if let Some((_, behind)) = outcome.session {
        assert!(
            input.ends_with(&behind),
            "the session begins with something else than what follows"
        );
    }
});
