//! What commands print: tables for people, JSON for machines.
//!
//! What is printed is a [`Text`], or becomes one: whatever is in it that others wrote was made harmless on the way in, by
//! [`crate::process::printable`].
//!
//! Text is painted in any case; whoever writes it takes the colours out again unless standard output is a terminal that
//! wants them (NO_COLOR, TERM=dumb).

use std::io::{self, IsTerminal as _, Write as _};

use anstyle::{AnsiColor, Style};
use comfy_table::{
    Cell, Color, ColumnConstraint, ContentArrangement, LineStyle, Table, TableStyle, Width, presets,
};
use serde::Serialize;
use serde_json::Value;

use crate::contract::document;
use crate::error::{Error, Result};
use crate::process::printable;

const UNDERLINED_HEADING: TableStyle =
    TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─'));

/// A last column of a table is not wrapped to less, in characters.
const NARROWEST: u16 = 12;

/// A JSON document on a line of its own.
pub fn json(value: &impl Serialize) -> Result<()> {
    let mut out = anstream::stdout().lock();
    out.write_all(json_line(value)?.as_bytes()).and_then(|()| out.flush()).map_err(Error::output)
}

/// The same, with the line's end, for a caller who prints many at once.
pub fn json_line(value: &impl Serialize) -> Result<String> {
    let text = serde_json::to_string(value)
        .map_err(|error| Error::failed(format!("could not write JSON: {error}")))?;
    Ok(printable::escape_json(&text) + "\n")
}

/// A part of a document that is too long to be made as a whole: some punctuation, and a value.
pub fn json_piece(before: &str, value: &impl Serialize) -> Result<()> {
    let line = json_line(value)?;
    let mut out = anstream::stdout().lock();
    write!(out, "{before}{}", line.trim_end()).map_err(Error::output)
}

/// What ends such a document.
pub fn json_end(end: &str) -> Result<()> {
    let mut out = anstream::stdout().lock();
    writeln!(out, "{end}").and_then(|()| out.flush()).map_err(Error::output)
}

/// Text, and a line's end, at once.
pub fn line(text: impl Into<Text>) -> Result<()> {
    let mut out = anstream::stdout().lock();
    writeln!(out, "{}", text.into().0).and_then(|()| out.flush()).map_err(Error::output)
}

/// Text for people. All that comes into it is escaped but for its own line breaks and colours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Text(String);

impl Text {
    /// Adds text that belongs on the same line.
    #[must_use]
    pub fn and(mut self, text: impl Into<Text>) -> Self {
        self.0.push_str(&text.into().0);
        self
    }

    /// Adds a line.
    #[must_use]
    pub fn then(mut self, line: impl Into<Text>) -> Self {
        self.0.push('\n');
        self.0.push_str(&line.into().0);
        self
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self(printable::escape(text))
    }
}

impl From<String> for Text {
    fn from(text: String) -> Self {
        text.as_str().into()
    }
}

/// What a word means, for those who see it in colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    Plain,
    Good,
    Doubtful,
    Bad,
}

impl Tone {
    /// Of a status of a token, or a code of a verification.
    pub fn of(word: &str) -> Self {
        match word {
            "active" | "VALID" => Tone::Good,
            "disabled" | "expired" | "RATE_LIMITED" => Tone::Doubtful,
            "revoked" => Tone::Bad,
            word if word.chars().all(|c| c.is_ascii_uppercase() || c == '_') && !word.is_empty() => Tone::Bad,
            _ => Tone::Plain,
        }
    }

    fn colour(self) -> Option<AnsiColor> {
        match self {
            Tone::Plain => None,
            Tone::Good => Some(AnsiColor::Green),
            Tone::Doubtful => Some(AnsiColor::Yellow),
            Tone::Bad => Some(AnsiColor::Red),
        }
    }
}

pub fn painted(text: &str, tone: Tone) -> Text {
    let style = Style::new().fg_color(tone.colour().map(Into::into));
    Text(format!("{style}{}{style:#}", printable::escape(text)))
}

/// A table with a heading. In a pipe it is plain columns. On a terminal its heading is underlined, and its last column is wrapped to
/// the width.
pub fn table<const N: usize>(heading: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> Text {
    toned_table(heading, rows, |_| Tone::Plain)
}

/// [`table`], each of its cells in the tone that its text has.
pub fn toned_table<const N: usize>(
    heading: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
    tone: fn(&str) -> Tone,
) -> Text {
    Text(render(heading, rows, tone, io::stdout().is_terminal()))
}

fn render<const N: usize>(
    heading: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
    tone: fn(&str) -> Tone,
    terminal: bool,
) -> String {
    let mut table = Table::new();
    table.set_header(heading);
    for row in rows {
        table.add_row(row.map(|text| {
            let cell = Cell::new(printable::escape(&text));
            match tone(&text).colour() {
                Some(AnsiColor::Green) => cell.fg(Color::DarkGreen),
                Some(AnsiColor::Yellow) => cell.fg(Color::DarkYellow),
                Some(_) => cell.fg(Color::DarkRed),
                None => cell,
            }
        }));
    }
    if terminal {
        table.enforce_styling();
        table.load_style(UNDERLINED_HEADING);
        table.set_content_arrangement(ContentArrangement::Dynamic);
        // Ids, times and numbers broken over lines can neither be read nor copied.
        for (number, column) in table.column_iter_mut().enumerate() {
            column.set_constraint(if number + 1 == N {
                ColumnConstraint::LowerBoundary(Width::Fixed(NARROWEST))
            } else {
                ColumnConstraint::ContentWidth
            });
        }
    } else {
        table.load_style(presets::NOTHING);
        table.set_content_arrangement(ContentArrangement::Disabled);
    }
    table.trim_fmt()
}

/// Facts, one a line, the values beneath each other.
pub fn facts(facts: &[(&str, String)]) -> Text {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    let lines: Vec<String> =
        facts.iter().map(|(name, value)| format!("{name:width$}  {}", printable::escape(value))).collect();
    Text(lines.join("\n"))
}

/// A field of a JSON object as text for a person; what is absent or null is a dash.
pub fn field(object: &Value, name: &str) -> String {
    cell(object.get(name).unwrap_or(&Value::Null))
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) if items.is_empty() => "-".to_owned(),
        Value::Array(items) => items.iter().map(cell).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

/// A field that holds a time, to the second, in UTC.
pub fn moment(object: &Value, name: &str) -> String {
    document::moment(field(object, name))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_table_in_a_pipe_is_plain_columns() {
        let text = render(
            ["id", "name"],
            [["1".into(), "first".into()], ["22".into(), "b".into()]],
            |_| Tone::Good,
            false,
        );
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines, [["id", "name"], ["1", "first"], ["22", "b"]]);
    }

    #[test]
    fn colours_are_for_terminals() {
        let rows = || [["active".to_owned(), "7".to_owned()]];
        let painted = render(["STATUS", "N"], rows(), Tone::of, true);
        assert!(painted.contains("\u{1b}["), "{painted:?}");
        assert!(!render(["STATUS", "N"], rows(), Tone::of, false).contains('\u{1b}'));
        assert_eq!(anstream::adapter::strip_str(super::painted("x", Tone::Bad).as_str()).to_string(), "x");
    }

    #[test]
    fn text_of_others_cannot_command_the_terminal() {
        const OTHERS: &str = "\u{1b}]0;owned\u{7}\u{202e}";
        let rows = render(["name"], [[OTHERS.into()]], |_| Tone::Plain, true);
        let texts = [
            facts(&[("name", OTHERS.into())]),
            super::painted(OTHERS, Tone::Plain),
            Text::from(OTHERS).and(OTHERS).then(OTHERS),
        ];
        for text in texts.iter().map(Text::as_str).chain([rows.as_str()]) {
            assert!(!text.contains(['\u{7}', '\u{202e}']) && !text.contains("\u{1b}]"), "{text:?}");
        }
    }

    #[test]
    fn fields_are_readable() {
        let object = json!({"a": null, "b": ["x", "y"], "c": [], "d": 7, "e": "infinity",
                            "f": "2030-01-02T03:04:05.678901+00:00"});
        assert_eq!(field(&object, "a"), "-");
        assert_eq!(field(&object, "missing"), "-");
        assert_eq!(field(&object, "b"), "x, y");
        assert_eq!(field(&object, "c"), "-");
        assert_eq!(field(&object, "d"), "7");
        assert_eq!(moment(&object, "e"), "infinity");
        assert_eq!(moment(&object, "f"), "2030-01-02 03:04:05Z");
    }

    #[test]
    fn facts_stand_beneath_each_other() {
        assert_eq!(facts(&[("a", "1".into()), ("long", "2".into())]).as_str(), "a     1\nlong  2");
    }
}
