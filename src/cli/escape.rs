//! Text of guests, files and other processes made harmless: what commands a terminal,
//! reorders or hides other text, becomes visible.
//!
//! Invariants: what comes out has none of it; all else is as it was, backslashes too: this
//! is for reading, not for reading back. JSON keeps its value: there the characters are
//! JSON's own escapes.
//!
//! Source: Unicode 15, general categories Cc, Cf, Zl and Zp, and the property
//! Default_Ignorable_Code_Point; Unicode Technical Report 36, section 2.

use std::fmt::Write as _;

use crate::walls::Wall;

/// Ranges of characters, beside control characters, that are not shown as they are: format
/// characters that reorder what is around them or are not seen. Not those format characters
/// that are seen, such as Arabic number signs, nor spaces.
const HIDDEN: [(u32, u32); 20] = [
    (0xad, 0xad),       // Soft hyphen.
    (0x34f, 0x34f),     // Combining grapheme joiner.
    (0x61c, 0x61c),     // Arabic letter mark.
    (0x115f, 0x1160),   // Hangul fillers.
    (0x17b4, 0x17b5),   // Khmer inherent vowels.
    (0x180b, 0x180f),   // Mongolian selectors and separator.
    (0x200b, 0x200f),   // Zero width; left-to-right and right-to-left marks.
    (0x2028, 0x202e),   // Line and paragraph separators, embeddings, overrides.
    (0x2060, 0x206f),   // Word joiner, isolates, invisible operators, old format characters.
    (0x3164, 0x3164),   // Hangul filler.
    (0xfe00, 0xfe0f),   // Variation selectors.
    (0xfeff, 0xfeff),   // Zero width no-break space.
    (0xffa0, 0xffa0),   // Halfwidth Hangul filler.
    (0xfff0, 0xfffb),   // Reserved; interlinear annotation.
    (0x13430, 0x13455), // Egyptian format controls.
    (0x1bca0, 0x1bca3), // Shorthand format controls.
    (0x1d173, 0x1d17a), // Musical format controls.
    (0xe0000, 0xe0fff), // Tags, variation selectors and what is reserved for such.
    (0xfdd0, 0xfdef),   // Never characters.
    (0xffff, 0xffff),
];

/// Whether a character must not be shown as it is.
fn harmful(c: char) -> bool {
    let n = u32::from(c);
    c.is_control() || HIDDEN.iter().any(|(first, last)| (*first..=*last).contains(&n))
}

fn escape(text: &str, kept: impl Fn(char) -> bool) -> String {
    if !Wall::Texts.stands() {
        return text.to_string();
    }
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if !harmful(c) || kept(c) {
            out.push(c);
            continue;
        }
        // Writing into memory does not fail.
        let _ = match c {
            '\n' => write!(out, "\\n"),
            '\r' => write!(out, "\\r"),
            '\t' => write!(out, "\\t"),
            c if u32::from(c) < 0x100 => write!(out, "\\x{:02x}", u32::from(c)),
            c => write!(out, "\\u{{{:x}}}", u32::from(c)),
        };
    }
    out
}

/// Text that stays one line, in whatever it is put.
pub fn line(text: &str) -> String {
    escape(text, |_| false)
}

/// Text of several lines, with tabs.
pub fn block(text: &str) -> String {
    escape(text, |c| c == '\n' || c == '\t')
}

/// JSON's text, whose value stays.
pub fn json(text: &str) -> String {
    if !Wall::Texts.stands() {
        return text.to_string();
    }
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        // White space between values stands for itself; in strings it is escaped already.
        if !harmful(c) || matches!(c, '\n' | '\t' | '\r') {
            out.push(c);
            continue;
        }
        for unit in c.encode_utf16(&mut [0; 2]) {
            let _ = write!(out, "\\u{unit:04x}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_commands_reorders_or_hides_is_made_visible() {
        for (text, one_line, lines) in [
            ("plain é ü 漢 🚀", "plain é ü 漢 🚀", "plain é ü 漢 🚀"),
            ("\x1b[2J\x07", "\\x1b[2J\\x07", "\\x1b[2J\\x07"),
            ("a\nb\tc\rd", "a\\nb\\tc\\rd", "a\nb\tc\\rd"),
            ("\u{9b}31m\x7f\0", "\\x9b31m\\x7f\\x00", "\\x9b31m\\x7f\\x00"),
            ("a\u{202e}b\u{2066}c", "a\\u{202e}b\\u{2066}c", "a\\u{202e}b\\u{2066}c"),
            ("\u{61c}\u{200e}\u{200f}", "\\u{61c}\\u{200e}\\u{200f}", "\\u{61c}\\u{200e}\\u{200f}"),
            ("x\u{200b}\u{feff}\u{ad}", "x\\u{200b}\\u{feff}\\xad", "x\\u{200b}\\u{feff}\\xad"),
            ("\u{2028}\u{2029}", "\\u{2028}\\u{2029}", "\\u{2028}\\u{2029}"),
            ("\u{e0041}\u{fe0f}", "\\u{e0041}\\u{fe0f}", "\\u{e0041}\\u{fe0f}"),
            ("C:\\x1b", "C:\\x1b", "C:\\x1b"),
        ] {
            assert_eq!(line(text), one_line, "{text:?}");
            assert_eq!(block(text), lines, "{text:?}");
        }
    }

    #[test]
    fn nothing_that_is_harmful_comes_out() {
        let all: String = (0..=0x10ffff).filter_map(char::from_u32).collect();
        assert!(!line(&all).chars().any(harmful));
        assert!(!block(&all).chars().any(|c| harmful(c) && c != '\n' && c != '\t'));
        // All that is a control by Unicode, or a bidi control, is.
        for c in ['\x00', '\x1f', '\x7f', '\u{80}', '\u{9f}', '\u{202a}', '\u{2069}', '\u{061c}'] {
            assert!(harmful(c), "{c:?}");
        }
        for c in ['a', ' ', '~', 'é', 'ß', '→', '…', '─', '中', 'א', 'ع'] {
            assert!(!harmful(c), "{c:?}");
        }
    }

    #[test]
    fn json_keeps_its_value() {
        let value = serde_json::json!({
            "a\u{202e}": "x\x7f\u{9b}\u{e0041}\x1b\n", "n": [1, null], "é": "é",
        });
        let text = json(&value.to_string());
        assert!(text.contains("a\\u202e") && text.contains("\\udb40\\udc41"), "{text}");
        assert!(!text.chars().any(harmful), "{text}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }
}
