//! What commands print: tables for people, JSON for machines.
//!
//! What is printed is a [`Text`], or becomes one: whatever is in it that others wrote was made harmless on the way in, by
//! [`crate::process::printable`].
//!
//! Text is always coloured; the colours are removed when it is written, unless standard output is a terminal that
//! wants them (NO_COLOR, TERM=dumb).

use std::io::{self, IsTerminal as _, Write as _};

use anstyle::{AnsiColor, Style};
use comfy_table::{
    Cell, Color, ColumnConstraint, ContentArrangement, LineStyle, Table, TableStyle, Width, presets,
};
use serde::Serialize;
use serde_json::Value;

use crate::config::OutputOptions;
use crate::contract::document;
use crate::error::{Error, Result};
use crate::process::{exit, printable};

const UNDERLINED_HEADING: TableStyle =
    TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─'));

/// Text in a table is not cut to less, in characters.
const NARROWEST: u16 = 12;

/// On both sides of a cell together.
const PADDING: u16 = 2;

/// Between two cells.
const SEPARATOR: u16 = 1;

/// Of a terminal that does not say how wide it is.
const USUAL_WIDTH: u16 = 80;

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

/// Says that something was done: `defined posts:read`, `{"defined": "posts:read"}`.
pub fn done(output: &OutputOptions, what: &str, name: &str) -> Result<u8> {
    if output.json {
        json(&serde_json::json!({ what: name }))?;
    } else if !output.quiet {
        line(format!("{what} {name}"))?;
    }
    Ok(exit::OK)
}

/// Says whether something was changed, which is the exit status too: `{"paused": true}`, or why nothing was.
pub fn changed(output: &OutputOptions, what: &str, changed: bool, otherwise: &str) -> Result<u8> {
    if output.json {
        json(&serde_json::json!({ what: changed }))?;
    } else if !output.quiet {
        line(if changed { what } else { otherwise })?;
    }
    Ok(if changed { exit::OK } else { exit::NO })
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

/// What the colour of a word says.
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
            "disabled" | "expired" | "RATE_LIMITED" | "QUOTA_EXCEEDED" => Tone::Doubtful,
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

/// A column of a table, and what becomes of it where the terminal is too narrow for all of them.
#[derive(Clone, Copy, Debug)]
pub struct Column {
    title: &'static str,
    fit: Fit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fit {
    /// Ids, times and numbers: cut, they can neither be read nor copied.
    Whole,
    /// Text: what does not fit is cut off, with an ellipsis in its place.
    Cut,
    /// The same as `Whole`, but left out where there is no room; the last one first.
    Spare,
}

impl Column {
    pub const fn whole(title: &'static str) -> Self {
        Self { title, fit: Fit::Whole }
    }

    pub const fn cut(title: &'static str) -> Self {
        Self { title, fit: Fit::Cut }
    }

    pub const fn spare(title: &'static str) -> Self {
        Self { title, fit: Fit::Spare }
    }
}

/// A table with a heading. In a pipe it is plain columns, all of them and whole. On a terminal its heading is underlined, and it is
/// as wide as the terminal at most, as far as its ids, times and numbers allow.
pub fn table<const N: usize>(
    columns: [Column; N],
    rows: impl IntoIterator<Item = [String; N]>,
    tone: fn(&str) -> Tone,
) -> Text {
    let width = io::stdout().is_terminal().then(|| {
        let probe = Table::new();
        probe.width().filter(|width| *width > 0).unwrap_or(USUAL_WIDTH)
    });
    Text(render(columns, rows, tone, width))
}

/// `width` is that of the terminal, if there is one.
fn render<const N: usize>(
    columns: [Column; N],
    rows: impl IntoIterator<Item = [String; N]>,
    tone: fn(&str) -> Tone,
    width: Option<u16>,
) -> String {
    let mut table = Table::new();
    table.set_header(columns.map(|column| column.title));
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
    let Some(width) = width else {
        table.load_style(presets::NOTHING);
        table.set_content_arrangement(ContentArrangement::Disabled);
        return table.trim_fmt();
    };
    table.enforce_styling();
    table.load_style(UNDERLINED_HEADING);
    table.set_content_arrangement(ContentArrangement::Dynamic);
    let widths = fitted(&columns, &table.column_max_content_widths(), width);
    for row in table.row_iter_mut() {
        row.max_height(1);
    }
    for (column, width) in table.column_iter_mut().zip(&widths) {
        column.set_constraint(match width {
            Some(width) => ColumnConstraint::Absolute(Width::Fixed(width + PADDING)),
            None => ColumnConstraint::Hidden,
        });
    }
    // What it cannot be cut to, it is wider by.
    let needed = widths.iter().flatten().map(|width| width + PADDING + SEPARATOR).sum::<u16>();
    table.set_width(width.max(needed));
    table.set_truncation_indicator("…");
    table.trim_fmt()
}

/// How wide each column is; `None` for one that is left out.
fn fitted(columns: &[Column], content: &[u16], room: u16) -> Vec<Option<u16>> {
    let mut widths: Vec<Option<u16>> = content.iter().copied().map(Some).collect();
    loop {
        let total: u32 = widths.iter().flatten().map(|width| u32::from(width + PADDING + SEPARATOR)).sum();
        let Some(excess @ 1..) = total.checked_sub(u32::from(room + SEPARATOR)) else { return widths };
        // The widest text first, down to what still says something.
        let widest = (0..columns.len())
            .filter(|&n| columns[n].fit == Fit::Cut)
            .filter_map(|n| Some((widths[n].filter(|width| *width > NARROWEST)?, n)))
            .max();
        if let Some((width, n)) = widest {
            let next = (0..columns.len())
                .filter(|&other| other != n && columns[other].fit == Fit::Cut)
                .filter_map(|other| widths[other].filter(|other| *other < width))
                .max();
            let floor = next.unwrap_or(NARROWEST).max(NARROWEST);
            let cut = u16::try_from(excess).unwrap_or(u16::MAX).min(width - floor).max(1);
            widths[n] = Some(width - cut);
            continue;
        }
        let Some(spare) =
            (0..columns.len()).rev().find(|&n| columns[n].fit == Fit::Spare && widths[n].is_some())
        else {
            return widths;
        };
        widths[spare] = None;
        // With that one gone, the text may be wider again.
        for n in (0..columns.len()).filter(|&n| columns[n].fit == Fit::Cut) {
            widths[n] = Some(content[n]);
        }
    }
}

/// Cuts a text to so many characters, the last of which is an ellipsis then.
pub fn cut(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        None => text.to_owned(),
        Some(_) => text.chars().take(most.saturating_sub(1)).chain(['…']).collect(),
    }
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
            [Column::whole("id"), Column::cut("name")],
            [["1".into(), "first".into()], ["22".into(), "b".into()]],
            |_| Tone::Good,
            None,
        );
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines, [["id", "name"], ["1", "first"], ["22", "b"]]);
    }

    #[test]
    fn colours_are_for_terminals() {
        let rows = || [["active".to_owned(), "7".to_owned()]];
        let columns = [Column::whole("STATUS"), Column::whole("N")];
        let painted = render(columns, rows(), Tone::of, Some(80));
        assert!(painted.contains("\u{1b}["), "{painted:?}");
        assert!(!render(columns, rows(), Tone::of, None).contains('\u{1b}'));
        assert_eq!(anstream::adapter::strip_str(super::painted("x", Tone::Bad).as_str()).to_string(), "x");
    }

    #[test]
    fn text_of_others_cannot_command_the_terminal() {
        const OTHERS: &str = "\u{1b}]0;owned\u{7}\u{202e}";
        let rows = render([Column::cut("name")], [[OTHERS.into()]], |_| Tone::Plain, Some(80));
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
    fn a_table_is_as_wide_as_the_terminal_and_cuts_text_alone() {
        let id = "018f4a6e-0000-7000-8000-000000000000";
        let columns = [
            Column::whole("ID"),
            Column::cut("NAME"),
            Column::spare("USES"),
            Column::spare("LAST USED"),
            Column::cut("SCOPES"),
        ];
        let row =
            || [id.to_owned(), "n".repeat(60), "12".into(), "2030-01-02 03:04:05Z".into(), "s".repeat(200)];
        for width in [70, 80, 120, 200, 400] {
            let text = render(columns, [row()], |_| Tone::Plain, Some(width));
            assert_eq!(text.lines().count(), 3, "{width}:\n{text}");
            let widest = text.lines().map(|line| line.chars().count()).max().unwrap();
            assert!(widest <= usize::from(width), "{widest} on {width}:\n{text}");
            assert!(text.contains(id), "{width}:\n{text}");
            assert_eq!(text.contains("LAST USED"), width >= 120, "{width}:\n{text}");
            assert_eq!(text.contains('…'), width < 400, "{width}:\n{text}");
        }
        // There is no table so narrow.
        assert!(render(columns, [row()], |_| Tone::Plain, Some(20)).contains(id));
    }

    #[test]
    fn a_text_that_is_cut_ends_with_an_ellipsis() {
        assert_eq!((cut("abc", 3), cut("abcd", 3)), ("abc".to_owned(), "ab…".to_owned()));
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
