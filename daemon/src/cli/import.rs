//! `tollgated token import`: takes over the tokens of another system, by their digests, from a file.
//!
//! The rows of a batch go in one transaction. As long as all of them are accepted they are sent without waiting for
//! each other's answers; the batch with one that is not is begun again, row by row, each under a savepoint. What is there
//! already is left as it is, so whoever was interrupted runs the same command again. No message quotes a digest, nor what
//! stands in its place, which may be a token.

mod rows;

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use futures_util::future::try_join_all;
use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::json;
use tokio_postgres::Statement;
use tokio_postgres::error::SqlState;

use super::progress;
use crate::cli::output;
use crate::config::{ImportFormat, ImportOptions};
use crate::contract;
use crate::contract::Imported;
use crate::error::{Doing as _, Error, Result};
use crate::postgres::pool::{Session, hide_bind_values};
use crate::postgres::target::Target;
use crate::process::exit;
use rows::Row;

/// The unique index on the digests of tokens.
const DIGESTS: &str = "api_tokens_token_hash";

/// A row that was not taken over, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Refused {
    line: u64,
    why: String,
}

#[derive(Debug, Default, PartialEq)]
struct Report {
    imported: u64,
    /// Their digests were there before.
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
    let quiet = options.output.quiet || options.output.json;
    let (source, size) = open(&options.file)?;
    let progress = progress::bar("importing", size, quiet);
    // Its columns are looked at before the server is.
    let mut rows = rows::read(progress.wrap_read(source), format, options.token_format, &name)?;

    let mut session = target.connect().await?;
    hide_bind_values(&session).await?;
    let statement = contract::prepare_import(&*session).await?;
    let mut report = Report::default();
    // What a dry run has "imported" is not there when a later batch has it again.
    let mut seen = HashSet::new();
    loop {
        let mut batch = Vec::new();
        let mut bytes = 0;
        for row in rows.by_ref().take(options.batch.batch_size as usize) {
            let row = row?;
            bytes += row.bytes;
            match row {
                Row { line, token: Err(why), .. } => report.refused.push(Refused { line, why }),
                Row { token: Ok(token), .. } if options.dry_run && !seen.insert(token.token_hash.clone()) => {
                    report.present += 1;
                }
                Row { line, token: Ok(token), .. } => batch.push((line, token)),
            }
            if bytes >= BATCH_BYTES {
                break;
            }
        }
        if !batch.is_empty() {
            send(&mut session, &statement, &batch, &options, &mut report).await?;
        }
        progress.suspend(|| print_refused(&mut report, &options, &name))?;
        tell(&progress, &report);
        if batch.is_empty() && rows.is_done() {
            break;
        }
    }
    progress.finish_and_clear();
    print(&report, &options)?;
    Ok(if report.refused_before == 0 { exit::OK } else { exit::NO })
}

fn tell(progress: &ProgressBar, report: &Report) {
    let refused = report.refused_before;
    if refused > 0 {
        progress.set_message(format!("importing, {refused} refused"));
    }
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

/// Imports a batch, or has it checked.
async fn send(
    session: &mut Session,
    statement: &Statement,
    batch: &[(u64, Imported)],
    options: &ImportOptions,
    report: &mut Report,
) -> Result<()> {
    if all_at_once(session, statement, batch, options).await? {
        report.imported += batch.len() as u64;
        return Ok(());
    }
    one_by_one(session, statement, batch, options, report).await
}

/// False if a row was refused, and so none imported.
async fn all_at_once(
    session: &mut Session,
    statement: &Statement,
    batch: &[(u64, Imported)],
    options: &ImportOptions,
) -> Result<bool> {
    const DOING: &str = "import a batch";
    let transaction = session.transaction().await.doing(DOING)?;
    let answers = try_join_all(batch.iter().map(|(_, token)| {
        contract::import_api_token(&transaction, statement, token, options.token_format.as_str())
    }))
    .await;
    match answers {
        Ok(_) if options.dry_run => transaction.rollback().await.doing(DOING).map(|()| true),
        Ok(_) => transaction.commit().await.doing(DOING).map(|()| true),
        Err(error) if concerns_the_row(&error) => transaction.rollback().await.doing(DOING).map(|()| false),
        Err(error) => Err(error),
    }
}

async fn one_by_one(
    session: &mut Session,
    statement: &Statement,
    batch: &[(u64, Imported)],
    options: &ImportOptions,
    report: &mut Report,
) -> Result<()> {
    const DOING: &str = "import a batch row by row";
    let transaction = session.transaction().await.doing(DOING)?;
    let (mut imported, mut present, mut refused) = (0, 0, Vec::new());
    let mut before = "";
    for (line, token) in batch {
        // One way to the server and back for both.
        let savepoint = format!("{before} savepoint one");
        let (begun, answer) = tokio::join!(
            transaction.batch_execute(&savepoint),
            contract::import_api_token(&transaction, statement, token, options.token_format.as_str())
        );
        begun.doing(DOING)?;
        before = match answer {
            Ok(()) => {
                imported += 1;
                "release savepoint one;"
            }
            Err(error) if is_present(&error) => {
                present += 1;
                "rollback to savepoint one; release savepoint one;"
            }
            Err(error) if concerns_the_row(&error) => {
                refused.push(Refused { line: *line, why: refusal(&error) });
                "rollback to savepoint one; release savepoint one;"
            }
            Err(error) => return Err(error),
        };
    }
    if !before.is_empty() {
        transaction.batch_execute(before).await.doing(DOING)?;
    }
    if options.dry_run { transaction.rollback().await } else { transaction.commit().await }.doing(DOING)?;
    report.imported += imported;
    report.present += present;
    report.refused.extend(refused);
    Ok(())
}

/// Whether there is a token with this digest. Tollgate's own refusal names no constraint, PostgreSQL's always one.
fn is_present(error: &Error) -> bool {
    error.sqlstate() == Some(&SqlState::UNIQUE_VIOLATION)
        && error.constraint().is_none_or(|name| name == DIGESTS)
}

/// Whether the server refused what the row says, so that another row may be accepted: bad values, what is there already, what
/// this server does not have, and what is too much for it or its user. Another key that is taken is none that the row has.
fn concerns_the_row(error: &Error) -> bool {
    error.sqlstate().is_some_and(|state| match state {
        s if *s == SqlState::UNIQUE_VIOLATION => is_present(error),
        s if *s == SqlState::LOCK_NOT_AVAILABLE => false,
        s if *s == SqlState::CONFIGURATION_LIMIT_EXCEEDED => true,
        s => ["22", "23", "0A", "54", "55"].contains(&&s.code()[..2]),
    })
}

/// What the server says of the row, on a line.
fn refusal(error: &Error) -> String {
    let message = error.message();
    let message = message.split_once(": ").map_or(message, |(_, said)| said);
    error.detail().map_or_else(|| message.to_owned(), |detail| format!("{message} ({detail})"))
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
    fn the_format_is_told_by_the_name_or_asked_for() {
        assert_eq!(format_of(Path::new("a/b.CSV")).unwrap(), ImportFormat::Csv);
        for name in ["a.json", "a.jsonl", "a.ndjson"] {
            assert_eq!(format_of(Path::new(name)).unwrap(), ImportFormat::Jsonl);
        }
        assert!(format_of(Path::new("-")).unwrap_err().report().contains("--format"));
    }
}
