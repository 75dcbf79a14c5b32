//! Text of others, made harmless: what names, reasons and messages of a server hold must neither command a terminal nor
//! look like something that it is not.
//!
//! All that is printed or logged passes through here: what commands print ([`crate::cli::output`]), errors
//! ([`crate::error::Error::report`]) and log lines ([`crate::process::logging`]).

use std::fmt::Write as _;

/// Control characters, and those that are not seen but change how the rest is shown or compared: Unicode's format characters
/// (Cf), line and paragraph separators, and the rest of `Default_Ignorable_Code_Point`.
pub fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}'
            | '\u{34f}'
            | '\u{600}'..='\u{605}'
            | '\u{61c}'
            | '\u{6dd}'
            | '\u{70f}'
            | '\u{890}'..='\u{891}'
            | '\u{8e2}'
            | '\u{115f}'..='\u{1160}'
            | '\u{17b4}'..='\u{17b5}'
            | '\u{180b}'..='\u{180f}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{3164}'
            | '\u{fe00}'..='\u{fe0f}'
            | '\u{feff}'
            | '\u{ffa0}'
            | '\u{fff0}'..='\u{fffb}'
            | '\u{110bd}'
            | '\u{110cd}'
            | '\u{13430}'..='\u{1343f}'
            | '\u{1bca0}'..='\u{1bca3}'
            | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e0fff}')
}

/// On one line, hidden characters as Rust writes them: `\n`, `\u{202e}`.
pub fn escape(text: &str) -> String {
    escape_with(text, char::escape_default)
}

/// [`escape`], but line breaks stay, with what begins the next line.
pub fn escape_lines(text: &str, indent: &str) -> String {
    text.split('\n').map(escape).collect::<Vec<_>>().join(&format!("\n{indent}"))
}

/// Of a JSON document on one line: it stays the same document.
pub fn escape_json(json: &str) -> String {
    escape_with(json, |c| {
        let mut units = [0; 2];
        c.encode_utf16(&mut units).iter().fold(String::new(), |mut text, unit| {
            let _ = write!(text, "\\u{unit:04x}");
            text
        })
    })
}

/// Of a JSON document on several lines.
pub fn escape_json_lines(json: &str) -> String {
    json.split('\n').map(escape_json).collect::<Vec<_>>().join("\n")
}

/// Of a string of TOML in double quotes.
pub fn escape_toml(toml: &str) -> String {
    escape_with(toml, |c| format!("\\U{:08x}", u32::from(c)))
}

fn escape_with<E: std::fmt::Display>(text: &str, escaped: impl Fn(char) -> E) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    loop {
        // Most of it is plain, and an event may have a megabyte.
        let plain = rest.bytes().position(|byte| !matches!(byte, b' '..=b'~')).unwrap_or(rest.len());
        out.push_str(&rest[..plain]);
        let mut others = rest[plain..].chars();
        match others.next() {
            None => return out,
            Some(c) if is_hidden(c) => {
                let _ = write!(out, "{}", escaped(c));
            }
            Some(c) => out.push(c),
        }
        rest = others.as_str();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_hidden_is_shown_and_the_rest_left_as_it_is() {
        assert_eq!(escape("a\u{1b}[2Jb\nc\u{9b}d é ß 漢字 😀"), "a\\u{1b}[2Jb\\nc\\u{9b}d é ß 漢字 😀");
        assert_eq!(escape("user\u{202e}nimda\u{200b}\u{e0041}"), "user\\u{202e}nimda\\u{200b}\\u{e0041}");
        assert_eq!(escape_lines("one\ntwo\r\u{2028}", "  "), "one\n  two\\r\\u{2028}");
    }

    #[test]
    fn a_document_stays_the_same_document() {
        let value = serde_json::json!({"name\u{202e}": "a\u{1b}\u{9b}\u{7f}\u{2066}\u{e0041}😀\n"});
        let json = escape_json(&value.to_string());
        assert!(!json.chars().any(is_hidden), "{json}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&json).unwrap(), value);
    }
}
