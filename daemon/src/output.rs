//! What commands print: tables for people, JSON for machines.

use std::io::{self, IsTerminal as _, Write as _};

use comfy_table::{ColumnConstraint, ContentArrangement, LineStyle, Table, TableStyle, Width, presets};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;

use crate::error::{Error, Result};

const UNDERLINED_HEADING: TableStyle =
    TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─'));

/// A last column of a table is not wrapped to less, in characters.
const NARROWEST: u16 = 12;

/// A JSON document on a line of its own.
pub fn json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string(value)
        .map_err(|error| Error::failed(format!("could not write JSON: {error}")))?;
    line(&text)
}

/// A line of text, at once.
pub fn line(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).map_err(Error::output)
}

/// A table with a heading. In a pipe it is plain columns. On a terminal its heading is underlined, and its last column is wrapped to
/// the width.
pub fn table<const N: usize>(heading: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    render(heading, rows, io::stdout().is_terminal())
}

fn render<const N: usize>(
    heading: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
    terminal: bool,
) -> String {
    let rows: Vec<[String; N]> = rows.into_iter().map(|row| row.map(|cell| printable(&cell))).collect();
    let mut table = Table::new();
    table.set_header(heading);
    table.add_rows(&rows);
    if terminal {
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
pub fn facts(facts: &[(&str, String)]) -> String {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    let lines: Vec<String> =
        facts.iter().map(|(name, value)| format!("{name:width$}  {}", printable(value))).collect();
    lines.join("\n")
}

/// Names and reasons are other people's text: without this they could send commands to the terminal.
pub fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let escaped = c.is_control();
            let plain = (!escaped).then_some(c);
            escaped.then(|| c.escape_default()).into_iter().flatten().chain(plain)
        })
        .collect()
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
    let text = field(object, name);
    match text.parse::<Timestamp>() {
        Ok(time) => time.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
        // "infinity", or nothing.
        Err(_) => text,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_table_in_a_pipe_is_plain_columns() {
        let text = render(["id", "name"], [["1".into(), "first".into()], ["22".into(), "b".into()]], false);
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines, [["id", "name"], ["1", "first"], ["22", "b"]]);
    }

    #[test]
    fn text_of_others_cannot_command_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\nc\u{9b}d é"), "a\\u{1b}[2Jb\\nc\\u{9b}d é");
        let text = render(["name"], [["\u{1b}]0;owned\u{7}".into()]], true);
        assert!(!text.contains('\u{7}') && !text.contains("\u{1b}]"), "{text:?}");
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
        assert_eq!(facts(&[("a", "1".into()), ("long", "2".into())]), "a     1\nlong  2");
    }
}
