//! Any text is a stack or a clear error.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| {
    let _ = text;
});
