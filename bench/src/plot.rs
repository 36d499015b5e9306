//! Bars as a picture (SVG): groups of them, each with a scale of its own.

use std::fmt::Write;

/// A group of bars.
#[derive(Clone, Debug)]
pub struct Group {
    /// What they have in common.
    pub title: String,
    /// From the top down.
    pub bars: Vec<Bar>,
}

/// A bar.
#[derive(Clone, Debug)]
pub struct Bar {
    /// Whose.
    pub label: String,
    /// How long, in the group's scale.
    pub value: f64,
    /// What stands behind it.
    pub note: String,
    /// In which colour.
    pub colour: Colour,
}

/// What a bar's colour says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colour {
    /// Ours.
    Ours,
    /// The limit.
    Limit,
    /// Somebody else's.
    Peer,
}

impl Colour {
    fn name(self) -> &'static str {
        match self {
            Colour::Ours => "#c2410c",
            Colour::Limit => "#a8a29e",
            Colour::Peer => "#64748b",
        }
    }
}

const WIDTH: usize = 720;
/// Where bars begin: labels stand in front of it.
const LEFT: usize = 190;
/// How long the longest bar of a group is. Its note stands behind.
const LONGEST: f64 = 350.0;
const BAR: usize = 18;
const TITLE: usize = 30;

/// The picture.
pub fn svg(title: &str, groups: &[Group]) -> String {
    let bars: usize = groups.iter().map(|group| group.bars.len()).sum();
    let height = 44 + groups.len() * TITLE + bars * BAR;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"10\" y=\"22\" font-size=\"15\" font-weight=\"bold\">{}</text>\n",
        escaped(title)
    );
    let mut y = 34;
    for group in groups {
        let title = escaped(&group.title);
        let base = y + 20;
        let _ = writeln!(
            text,
            "<text x=\"10\" y=\"{base}\" font-weight=\"bold\">{title}</text>"
        );
        y += TITLE;
        let values = group.bars.iter().map(|bar| bar.value);
        let most = values.fold(f64::MIN_POSITIVE, f64::max);
        for bar in &group.bars {
            let long = bar.value / most * LONGEST;
            let (base, end) = (y + 12, LEFT as f64 + long + 6.0);
            let (label, note) = (escaped(&bar.label), escaped(&bar.note));
            let (left, thick, colour) = (LEFT - 8, BAR - 4, bar.colour.name());
            let _ = writeln!(
                text,
                "<text x=\"{left}\" y=\"{base}\" text-anchor=\"end\">{label}</text>\
                 <rect x=\"{LEFT}\" y=\"{y}\" width=\"{long:.1}\" height=\"{thick}\" fill=\"{colour}\"/>\
                 <text x=\"{end:.1}\" y=\"{base}\" fill=\"#44403c\">{note}</text>"
            );
            y += BAR;
        }
    }
    text + "</svg>\n"
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_bar_fills_the_room_and_text_is_escaped() {
        let bar = |value| Bar {
            label: "a < b & c".into(),
            value,
            note: "n".into(),
            colour: Colour::Ours,
        };
        let group = Group {
            title: "t".into(),
            bars: vec![bar(5.0), bar(10.0)],
        };
        let text = svg("title", &[group]);
        assert!(text.contains("width=\"350.0\"") && text.contains("width=\"175.0\""));
        assert!(text.contains("a &lt; b &amp; c"));
    }
}
