//! Puts what was measured into a page of the documentation, between two markers.

use std::fs;
use std::io;
use std::path::Path;

/// Replaces what stands between `<!-- NAME -->` and `<!-- end NAME -->` in the file at `path`.
///
/// # Errors
/// If the file cannot be changed, or has no such markers.
pub fn replace(path: &Path, name: &str, text: &str) -> io::Result<()> {
    let page = fs::read_to_string(path)?;
    let page = replaced(&page, name, text).ok_or_else(|| {
        let why = format!(
            "{}: no lines <!-- {name} --> and <!-- end {name} -->",
            path.display()
        );
        io::Error::new(io::ErrorKind::InvalidData, why)
    })?;
    fs::write(path, page)
}

fn replaced(page: &str, name: &str, text: &str) -> Option<String> {
    let (begin, end) = (
        format!("<!-- {name} -->\n"),
        format!("<!-- end {name} -->\n"),
    );
    let (before, rest) = page.split_once(&begin)?;
    let (_, after) = rest.split_once(&end)?;
    Some(format!("{before}{begin}{text}{end}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_markers_changes() {
        let page = "a\n<!-- x -->\nold\n<!-- end x -->\nb\n";
        let new = replaced(page, "x", "new\n").unwrap();
        assert_eq!(new, page.replace("old", "new"));
        assert_eq!(replaced(page, "y", "new\n"), None);
    }
}
