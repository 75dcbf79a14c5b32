//! The results in docs/performance.md, made from a run between two markers. No number in them is from anywhere else.

use std::fmt::Write as _;

use anyhow::{Context as _, Result, ensure};

use super::results::{Figure, Report};
use super::table::{bound, show};

const BEGIN: &str = "<!-- Written by make bench-report; what is changed by hand here is lost. -->";
const END: &str = "<!-- End of what make bench-report writes. -->";

/// `text` with the section between the markers replaced.
pub(crate) fn rewrite(text: &str, section: &str) -> Result<String> {
    let (before, rest) = text.split_once(BEGIN).with_context(|| format!("there is no line {BEGIN}"))?;
    let (_, after) = rest.split_once(END).with_context(|| format!("there is no line {END} after {BEGIN}"))?;
    ensure!(!after.contains(BEGIN), "{BEGIN} is there twice");
    Ok(format!("{before}{BEGIN}\n{section}{END}{after}"))
}

/// The section itself.
pub(crate) fn section(report: &Report) -> Result<String> {
    ensure!(!report.quick, "a quick run measures nothing that a document could say");
    let (machine, day) = (&report.machine, report.began_at.strftime("%Y-%m-%d"));
    let versions: Vec<&str> = report.versions.iter().map(|version| version.postgres.as_str()).collect();
    let mut text = format!(
        "\nMeasured on {day} by `{}` on {}: {} processors ({}), {:.0} GB of memory, {}, a disk that takes {:.0} µs for an \
         fdatasync. Medians, and in brackets the least and the most of all rounds. A ratio is of turns that alternate in one \
         run.\n\n",
        report.command,
        versions.join(" and "),
        machine.processors,
        machine.processor,
        machine.memory as f64 / 1e9,
        machine.system,
        machine.fdatasync,
    );
    write!(text, "| what | target |")?;
    for version in &report.versions {
        write!(text, " PostgreSQL {} |", version.major)?;
    }
    text.push_str("\n|---|---|");
    text.push_str(&"---|".repeat(report.versions.len()));
    text.push('\n');
    let mut missed = false;
    for (what, target, figures) in rows(report) {
        write!(text, "| {what} | {target} |")?;
        for figure in &figures {
            match figure {
                Some(figure) => write!(text, " {} |", cell(figure))?,
                None => text.push_str(" |"),
            }
        }
        text.push('\n');
        missed |= figures.iter().flatten().any(|figure| figure.met() == Some(false));
    }
    text.push_str(if missed {
        "\nFigures in bold miss their target. The parts below say why, and what it would take.\n\n"
    } else {
        "\nAll targets are met. The parts below say what each figure is, and where the time goes.\n\n"
    });
    Ok(text)
}

/// The figures with a target, in the order of the first version that has them, with the figure of each version.
fn rows(report: &Report) -> Vec<(&str, String, Vec<Option<&Figure>>)> {
    let figures = |version: usize| report.versions[version].parts.iter().flat_map(|part| &part.figures);
    let mut rows: Vec<(&str, String, Vec<Option<&Figure>>)> = Vec::new();
    for figure in (0..report.versions.len()).flat_map(figures) {
        let Some(target) = figure.target else { continue };
        if rows.iter().any(|(what, ..)| *what == figure.what) {
            continue;
        }
        let of_each = (0..report.versions.len())
            .map(|version| figures(version).find(|other| other.what == figure.what))
            .collect();
        rows.push((&figure.what, bound(target, figure.unit), of_each));
    }
    rows
}

fn cell(figure: &Figure) -> String {
    let [median, min, max] = [figure.median, figure.min, figure.max].map(|value| show(value, figure.unit));
    let bold = if figure.met() == Some(false) { "**" } else { "" };
    if figure.values.len() == 1 {
        format!("{bold}{median}{bold}")
    } else {
        format!("{bold}{median}{bold} ({min} to {max})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::Series;
    use crate::report::{Machine, Measured, Unit, Version};

    fn report(quick: bool) -> Report {
        let version = |major: u32, ratio: f64| Version {
            postgres: format!("PostgreSQL {major}.1"),
            major,
            parts: vec![Measured {
                part: "verify".into(),
                seconds: 1.0,
                conditions: vec![],
                figures: vec![
                    Figure::new("fast ÷ slow", Unit::Ratio, &Series(vec![ratio - 0.1, ratio, ratio + 0.1]))
                        .at_least(1.15),
                    Figure::new("for information", Unit::PerSecond, &Series(vec![77_777.0])),
                ],
            }],
        };
        Report {
            command: "make bench".into(),
            began_at: jiff::Timestamp::UNIX_EPOCH,
            quick,
            machine: Machine {
                processor: "Some Processor".into(),
                processors: 2,
                memory: 16_000_000_000,
                system: "linux 6.1".into(),
                fdatasync: 512.0,
            },
            versions: vec![version(18, 1.25), version(15, 1.1)],
        }
    }

    #[test]
    fn the_section_says_the_machine_the_command_and_what_is_missed() {
        let text = section(&report(false)).expect("a section");
        for part in [
            "on 1970-01-01 by `make bench` on PostgreSQL 18.1 and PostgreSQL 15.1",
            "2 processors (Some Processor), 16 GB of memory, linux 6.1, a disk that takes 512 µs",
            "| what | target | PostgreSQL 18 | PostgreSQL 15 |\n|---|---|---|---|\n",
            "| fast ÷ slow | ≥ 1.15 | 1.250 (1.150 to 1.350) | **1.100** (1.000 to 1.200) |",
            "miss their target",
        ] {
            assert!(text.contains(part), "no {part:?} in:\n{text}");
        }
        assert!(!text.contains("77"), "what has no target is left to the run's own output:\n{text}");
    }

    #[test]
    fn parts_that_were_measured_again_replace_the_first_ones() {
        let mut both = report(false);
        let mut again = report(false);
        again.command = "make bench ARGS='--only verify'".into();
        again.versions[1].major = 16;
        again.versions[0].parts[0].figures[0].median = 1.5;
        both.add(again);
        let text = section(&both).expect("a section");
        for part in [
            "by `make bench` and `make bench ARGS='--only verify'` on",
            "| what | target | PostgreSQL 18 | PostgreSQL 15 | PostgreSQL 16 |",
            "| fast ÷ slow | ≥ 1.15 | 1.500 (1.150 to 1.350) | **1.100** (1.000 to 1.200) | **1.100** (1.000 to 1.200) |",
        ] {
            assert!(text.contains(part), "no {part:?} in:\n{text}");
        }
    }

    #[test]
    fn a_quick_run_writes_nothing() {
        section(&report(true)).expect_err("refused");
    }

    #[test]
    fn the_document_has_a_place_for_it() {
        let document = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/performance.md");
        let text = std::fs::read_to_string(document).expect("a document");
        rewrite(&text, "new\n").expect("rewritten");
    }

    #[test]
    fn only_what_is_between_the_markers_is_replaced() {
        let old = format!("before\n{BEGIN}\nold\n{END}\nafter\n");
        let new = rewrite(&old, "new\n").expect("rewritten");
        assert_eq!(new, format!("before\n{BEGIN}\nnew\n{END}\nafter\n"));
        assert_eq!(rewrite(&new, "new\n").expect("rewritten"), new);
        for broken in ["", BEGIN, END, &format!("{END}{BEGIN}"), &format!("{old}{old}")] {
            rewrite(broken, "new\n").expect_err("refused");
        }
    }
}
