//! Flushing: what was counted in shared memory is added to the tables.

use crate::background::tasks::flush_usage::{Round, go_on};
use crate::background::tasks::{flush_standby, flush_usage};
use crate::error::Result;
use crate::postgres::session::Session;
use crate::postgres::target::Target;

/// Two carry all that was counted before the command began.
const MOST_ROUNDS: u32 = 16;

/// What was carried.
#[derive(Debug, Default, PartialEq)]
pub struct Totals {
    pub rounds: u64,
    pub tokens: u64,
    pub uses: i64,
    pub denials: i64,
    /// Why nothing is counted, if so.
    pub off: Option<String>,
    /// Standbys that are too far behind to forget what was carried.
    pub lagging: Vec<String>,
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

/// Carries all that was counted before: here, and on these standbys. `progress` is called with the number of tokens so far.
pub async fn flush(session: &Session, standbys: Vec<Target>, progress: impl Fn(u64)) -> Result<Totals> {
    let mut totals = Totals::default();
    go_on(
        MOST_ROUNDS,
        || flush_usage::flush(session, None),
        |round| {
            totals.add(round);
            progress(totals.tokens);
        },
    )
    .await?;
    for standby in standbys {
        let source = standby.connect().await?;
        flush_standby::carry_findings(&source, async || Ok(session)).await?;
        go_on(
            MOST_ROUNDS,
            || flush_standby::flush(&source, async || Ok(session)),
            |round| {
                if round == Round::NotReplayed {
                    totals.lagging.push(standby.describe());
                }
                totals.add(round);
                progress(totals.tokens);
            },
        )
        .await?;
    }
    Ok(totals)
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
