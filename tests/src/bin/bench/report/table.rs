//! Output for a terminal.

use comfy_table::{CellAlignment, ContentArrangement, LineStyle, Table, TableStyle};

use super::results::{Figure, Target, Unit, Version};

const UNDERLINED_HEADING: TableStyle =
    TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─'));

pub(crate) fn print(version: &Version) {
    println!("\n{}", version.postgres);
    let mut table = Table::new();
    table.load_style(UNDERLINED_HEADING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(["what", "median", "min to max", "target", ""]);
    for figure in version.parts.iter().flat_map(|part| &part.figures) {
        table.add_row(row(figure));
    }
    for column in 1..4 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    println!("{table}");
    for part in &version.parts {
        println!("{} ({:.0} s): {}", part.part, part.seconds, part.conditions.join("; "));
    }
}

fn row(figure: &Figure) -> [String; 5] {
    [
        figure.what.clone(),
        show(figure.median, figure.unit),
        if figure.values.len() > 1 {
            format!("{} to {}", show(figure.min, figure.unit), show(figure.max, figure.unit))
        } else {
            String::new()
        },
        figure.target.map(|target| bound(target, figure.unit)).unwrap_or_default(),
        match figure.met() {
            Some(true) => "met",
            Some(false) => "NOT MET",
            None => "",
        }
        .to_owned(),
    ]
}

pub(crate) fn bound(target: Target, unit: Unit) -> String {
    match target {
        Target::AtLeast(value) => format!("≥ {}", plain(value, unit)),
        Target::AtMost(value) => format!("≤ {}", plain(value, unit)),
    }
}

/// A measured number, with its significant digits.
pub(crate) fn show(value: f64, unit: Unit) -> String {
    if !value.is_finite() {
        return "unknown".to_owned();
    }
    let decimals = match (unit, value.abs()) {
        (Unit::Bytes | Unit::Rows, _) => 0,
        (_, size) if size >= 100.0 => 0,
        (_, size) if size >= 10.0 => 1,
        (Unit::Ratio, _) => 3,
        _ => 2,
    };
    with_unit(&grouped(value, decimals), unit)
}

/// A configured number.
fn plain(value: f64, unit: Unit) -> String {
    with_unit(&if value >= 1000.0 { grouped(value, 0) } else { value.to_string() }, unit)
}

fn with_unit(number: &str, unit: Unit) -> String {
    let symbol = match unit {
        Unit::Ratio => return number.to_owned(),
        Unit::PerSecond => "/s",
        Unit::Milliseconds => " ms",
        Unit::Microseconds => " µs",
        Unit::Nanoseconds => " ns",
        Unit::Bytes => " bytes",
        Unit::Rows => " rows",
        Unit::Percent => " %",
    };
    format!("{number}{symbol}")
}

/// A count, for a sentence.
pub(crate) fn count(value: u32) -> String {
    grouped(value.into(), 0)
}

/// With a comma every three digits.
fn grouped(value: f64, decimals: usize) -> String {
    let text = format!("{:.decimals$}", value.abs());
    let (whole, rest) = text.split_once('.').unwrap_or((&text, ""));
    let mut number = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index).is_multiple_of(3) {
            number.push(',');
        }
        number.push(digit);
    }
    let sign = if value < 0.0 && text.chars().any(|c| c.is_ascii_digit() && c != '0') { "-" } else { "" };
    let point = if rest.is_empty() { "" } else { "." };
    format!("{sign}{number}{point}{rest}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_has_the_digits_that_mean_something() {
        assert_eq!(show(1.0204, Unit::Ratio), "1.020");
        assert_eq!(show(23.456, Unit::Ratio), "23.5");
        assert_eq!(show(1_234_567.8, Unit::PerSecond), "1,234,568/s");
        assert_eq!(show(999.4, Unit::PerSecond), "999/s");
        assert_eq!(show(-0.001, Unit::Nanoseconds), "0.00 ns");
        assert_eq!(show(-1234.0, Unit::Bytes), "-1,234 bytes");
        assert_eq!(show(f64::NAN, Unit::Ratio), "unknown");
    }

    #[test]
    fn a_target_is_shown_as_it_was_set() {
        assert_eq!(bound(Target::AtLeast(1.15), Unit::Ratio), "≥ 1.15");
        assert_eq!(bound(Target::AtMost(60.0), Unit::Nanoseconds), "≤ 60 ns");
        assert_eq!(bound(Target::AtLeast(150_000.0), Unit::PerSecond), "≥ 150,000/s");
    }
}
