//! `tollgated token import`: takes over the tokens of another system, by their digests, from a file.

mod rows;

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use indicatif::{HumanCount, ProgressBar};
use serde_json::json;

use super::progress;
use crate::app::import::{Import, Outcome, Refused};
use crate::cli::output;
use crate::config::{ImportFormat, ImportOptions};
use crate::error::{Error, Result};
use crate::postgres::target::Target;
use crate::process::exit;
use rows::Row;

#[derive(Debug, Default, PartialEq)]
struct Report {
    imported: u64,
    present: u64,
    /// Of the batch; the earlier ones are printed.
    refused: Vec<Refused>,
    refused_before: usize,
}

/// So many bytes of the file are sent at a time, however many rows they are; one row always.
const BATCH_BYTES: usize = 4_000_000;

pub(super) async fn import(target: Target, options: ImportOptions) -> Result<u8> {
    let name = options.file.display().to_string();
    let format = match options.format {
        Some(format) => format,
        None => format_of(&options.file)?,
    };
    let (source, size) = open(&options.file)?;
    let progress = progress::bar("importing", size, "bytes", !options.output.is_for_people());
    // Its columns are looked at before the server is.
    let mut rows = rows::read(progress.wrap_read(source), format, options.token_format.clone(), &name)?;

    let mut import =
        Import::begin(target.connect().await?, options.token_format.clone(), options.dry_run).await?;
    let mut report = Report::default();
    loop {
        let mut batch = Vec::new();
        let (mut bytes, mut any) = (0, false);
        for row in rows.by_ref().take(options.batch.batch_size as usize) {
            let row = row?;
            bytes += row.bytes;
            any = true;
            match row {
                Row { line, token: Err(why), .. } => report.refused.push(Refused { line, why }),
                Row { line, token: Ok(token), .. } => batch.push((line, token)),
            }
            if bytes >= BATCH_BYTES {
                break;
            }
        }
        let Outcome { imported, present, refused } = import.batch(batch).await?;
        report.imported += imported;
        report.present += present;
        report.refused.extend(refused);
        progress.suspend(|| print_refused(&mut report, &options, &name))?;
        show(&progress, &report);
        if !any && rows.is_done() {
            break;
        }
    }
    progress.finish_and_clear();
    print(&report, &options)?;
    Ok(if report.refused_before == 0 { exit::OK } else { exit::NO })
}

/// How far it is, in rows: the bar counts the bytes of the file.
fn show(progress: &ProgressBar, report: &Report) {
    let refused = report.refused_before as u64;
    let rows = report.imported + report.present + refused;
    let rate = progress::rate(rows, progress.elapsed());
    let of_them = if refused > 0 { format!(", {} refused", HumanCount(refused)) } else { String::new() };
    progress.set_message(format!("importing: {} rows{of_them}, {rate} rows/s", HumanCount(rows)));
}

fn format_of(file: &Path) -> Result<ImportFormat> {
    let extension = file.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    match extension.to_ascii_lowercase().as_str() {
        "csv" => Ok(ImportFormat::Csv),
        "json" | "jsonl" | "ndjson" => Ok(ImportFormat::Jsonl),
        _ => Err(Error::usage(format!("the name of {} does not say what format it has", file.display()))
            .with_remedy("give --format csv or --format jsonl")),
    }
}

/// What is read, and how long it is if that is known.
fn open(path: &Path) -> Result<(Box<dyn Read>, Option<u64>)> {
    if path == Path::new("-") {
        return Ok((Box::new(io::stdin().lock()), None));
    }
    let unreadable = |error| Error::usage(format!("could not read {}: {error}", path.display()));
    let file = File::open(path).map_err(unreadable)?;
    let size = file.metadata().map_err(unreadable)?.len();
    Ok((Box::new(file), Some(size)))
}

/// What was refused of a batch is printed before the next one is read: there may be any number of them.
fn print_refused(report: &mut Report, options: &ImportOptions, name: &str) -> Result<()> {
    report.refused.sort_by_key(|refused| refused.line);
    for Refused { line, why } in report.refused.drain(..) {
        if options.output.json {
            let first = format!("{{\"dry_run\":{},\"refused\":[", options.dry_run);
            let before = if report.refused_before == 0 { &first } else { "," };
            output::json_piece(before, &json!({ "file": name, "line": line, "why": why }))?;
        } else {
            output::line(format!("{name}:{line}: {why}"))?;
        }
        report.refused_before += 1;
    }
    Ok(())
}

fn print(report: &Report, options: &ImportOptions) -> Result<()> {
    let Report { imported, present, refused_before, .. } = report;
    if options.output.json {
        return match refused_before {
            0 => output::json(&json!({
                "dry_run": options.dry_run, "refused": [], "imported": imported, "present": present
            })),
            _ => output::json_end(&format!("],\"imported\":{imported},\"present\":{present}}}")),
        };
    }
    if options.output.quiet {
        return Ok(());
    }
    let verb = if options.dry_run { "would import" } else { "imported" };
    output::line(format!("{verb} {imported} tokens, {present} were there already, {refused_before} refused"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format_follows_from_the_name_or_is_asked_for() {
        assert_eq!(format_of(Path::new("a/b.CSV")).unwrap(), ImportFormat::Csv);
        for name in ["a.json", "a.jsonl", "a.ndjson"] {
            assert_eq!(format_of(Path::new(name)).unwrap(), ImportFormat::Jsonl);
        }
        assert!(format_of(Path::new("-")).unwrap_err().report().contains("--format"));
    }
}
