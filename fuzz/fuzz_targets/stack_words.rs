//! Any text is a stack or an error that points into the text; what is printed reads back as the same.
//! Likewise NBD URIs.
#![no_main]

use libfuzzer_sys::fuzz_target;
use userland_io::stack::{Registry, StackError, Words};
use userland_io::transports::nbd::Uri;

fuzz_target!(|text: &str| {
    match Words::parse(text) {
        Ok(words) => {
            let printed = words.to_string();
            let again = Words::parse(&printed).expect("printed words parse");
            assert_eq!(again.to_string(), printed);
        }
        Err(error) => points_into(text, &error),
    }
    // Names, keys and values; opens nothing.
    if let Err(error) = Registry::builtin().parse(text) {
        points_into(text, &error);
    }
    if let Ok(uri) = text.parse::<Uri>() {
        assert_eq!(uri.to_string().parse(), Ok(uri));
    }
});

fn points_into(text: &str, error: &StackError) {
    assert!(text.get(error.span()).is_some(), "{error:?}");
    // Where there is nothing there is nothing to underline.
    assert!(
        error.render().to_string().contains('^') || text.trim().is_empty(),
        "{error:?}"
    );
}
