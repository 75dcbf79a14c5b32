//! `tollgated flush`: carries everything counted so far into the tables.

use serde_json::json;

use super::progress;
use crate::background::tasks::flush_usage::{Round, go_on};
use crate::background::tasks::{flush_standby, flush_usage};
use crate::cli::output;
use crate::config::OutputOptions;
use crate::error::Result;
use crate::postgres::target::Target;
use crate::process::exit;

/// Two carry all that was counted before the command began.
const MOST_ROUNDS: u32 = 16;

#[derive(Debug, Default, PartialEq)]
struct Totals {
    rounds: u64,
    tokens: u64,
    uses: i64,
    denials: i64,
    off: Option<String>,
    /// Standbys that are too far behind to be told that theirs was carried.
    lagging: Vec<String>,
}

impl Totals {
    fn add(&mut self, round: Round) {
        match round {
            Round::Empty | Round::NotReplayed => {}
            Round::Off(note) => self.off = Some(note),
            Round::Flushed { tokens, uses, denials, applied } => {
                self.rounds += 1;
                if applied {
                    self.tokens += tokens;
                    self.uses += uses;
                    self.denials += denials;
                }
            }
        }
    }
}

pub(super) async fn flush(target: Target, standbys: Vec<Target>, output: &OutputOptions) -> Result<u8> {
    let session = target.connect().await?;
    let mut totals = Totals::default();
    let progress = progress::bar("flushing usage of tokens", None, output.quiet || output.json);
    go_on(
        MOST_ROUNDS,
        || {
            progress.tick();
            flush_usage::flush(&session, None)
        },
        |round| {
            totals.add(round);
            progress.set_position(totals.tokens);
        },
    )
    .await?;
    for standby in standbys {
        let source = standby.connect().await?;
        flush_standby::carry_findings(&source, async || Ok(&session)).await?;
        go_on(
            MOST_ROUNDS,
            || flush_standby::flush(&source, async || Ok(&session)),
            |round| {
                if round == Round::NotReplayed {
                    totals.lagging.push(standby.describe());
                }
                totals.add(round);
            },
        )
        .await?;
    }
    progress.finish_and_clear();
    if output.json {
        output::json(&json!({
            "metering": totals.off.is_none(),
            "metering_detail": totals.off,
            "generations": totals.rounds,
            "tokens": totals.tokens,
            "uses": totals.uses,
            "denials": totals.denials,
            "lagging_standbys": totals.lagging,
        }))?;
    } else if !output.quiet || totals.off.is_some() {
        output::line(match &totals.off {
            Some(note) => note.clone(),
            None => format!(
                "flushed {} uses and {} denials of {} tokens in {} generations",
                totals.uses, totals.denials, totals.tokens, totals.rounds
            ),
        })?;
        for standby in &totals.lagging {
            output::line(format!(
                "{standby} is behind: its uses are in the tables, but it has not replayed that yet; flush it again to go on"
            ))?;
        }
    }
    Ok(if totals.off.is_none() { exit::OK } else { exit::NO })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_had_been_applied_before_is_not_counted_again() {
        let mut totals = Totals::default();
        totals.add(Round::Flushed { tokens: 2, uses: 10, denials: 1, applied: false });
        totals.add(Round::Flushed { tokens: 3, uses: 20, denials: 4, applied: true });
        totals.add(Round::Empty);
        assert_eq!(totals, Totals { rounds: 2, tokens: 3, uses: 20, denials: 4, ..Totals::default() });
    }
}
