//! Importing: tokens of another system are taken over by their digests.
//!
//! The rows of a batch go in one transaction. As long as all of them are accepted they are sent without waiting for
//! each other's answers; a batch with one that is refused is begun again, row by row, each under a savepoint. What is there
//! already is left as it is, so an interrupted import is run again with the same file. No message quotes a digest, nor what
//! stands in its place, which may be a token.

use std::collections::HashSet;

use futures_util::future::try_join_all;
use serde::Serialize;
use tokio_postgres::Statement;
use tokio_postgres::error::SqlState;
use tollgate_core::foreign::Format;

use crate::contract;
pub use crate::contract::Imported;
use crate::error::{Doing as _, Error, Result};
use crate::postgres::pool::hide_bind_values;
use crate::postgres::session::Session;

/// The unique index on the digests of tokens.
const DIGESTS: &str = "api_tokens_token_hash";

/// How many digests a dry run remembers, some 100 MB of them at most: a row that repeats one which came after these counts as
/// imported, as no later batch finds it.
const REMEMBERED: usize = 1_000_000;

/// A row that was not taken over, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refused {
    pub line: u64,
    pub why: String,
}

/// What came of a batch.
#[derive(Debug, Default, PartialEq)]
pub struct Outcome {
    pub imported: u64,
    /// Their digests were there before.
    pub present: u64,
    pub refused: Vec<Refused>,
}

/// An import under way.
#[derive(Debug)]
pub struct Import {
    session: Session,
    statement: Statement,
    format: Format,
    dry_run: bool,
    /// What a dry run has "imported" is not there when a later batch has it again.
    seen: Seen,
}

/// The first digests of a file, up to a number of them.
#[derive(Debug)]
struct Seen {
    digests: HashSet<Vec<u8>>,
    at_most: usize,
}

impl Seen {
    fn new(at_most: usize) -> Self {
        Self { digests: HashSet::new(), at_most }
    }

    /// False for one that is remembered already.
    fn is_new(&mut self, digest: &[u8]) -> bool {
        if self.digests.contains(digest) {
            return false;
        }
        if self.digests.len() < self.at_most {
            self.digests.insert(digest.to_vec());
        }
        true
    }
}

impl Import {
    /// With `dry_run` every row is checked, and none imported.
    pub async fn begin(session: Session, format: Format, dry_run: bool) -> Result<Self> {
        hide_bind_values(&session).await?;
        let statement = contract::prepare_import(&*session).await?;
        Ok(Self { session, statement, format, dry_run, seen: Seen::new(REMEMBERED) })
    }

    /// Imports rows, each with its line.
    pub async fn batch(&mut self, mut rows: Vec<(u64, Imported)>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        if self.dry_run {
            let before = rows.len();
            rows.retain(|(_, token)| self.seen.is_new(&token.token_hash));
            outcome.present += (before - rows.len()) as u64;
        }
        if rows.is_empty() {
            return Ok(outcome);
        }
        if self.all_at_once(&rows).await? {
            outcome.imported += rows.len() as u64;
        } else {
            self.one_by_one(&rows, &mut outcome).await?;
        }
        Ok(outcome)
    }

    /// False if a row was refused, and so none imported.
    async fn all_at_once(&mut self, rows: &[(u64, Imported)]) -> Result<bool> {
        const DOING: &str = "import a batch";
        let format = self.format.to_string();
        let transaction = self.session.transaction().await.doing(DOING)?;
        let answers = try_join_all(
            rows.iter()
                .map(|(_, token)| contract::import_api_token(&transaction, &self.statement, token, &format)),
        )
        .await;
        match answers {
            Ok(_) if self.dry_run => transaction.rollback().await.doing(DOING).map(|()| true),
            Ok(_) => transaction.commit().await.doing(DOING).map(|()| true),
            Err(error) if concerns_the_row(&error) => {
                transaction.rollback().await.doing(DOING).map(|()| false)
            }
            Err(error) => Err(error),
        }
    }

    async fn one_by_one(&mut self, rows: &[(u64, Imported)], outcome: &mut Outcome) -> Result<()> {
        const DOING: &str = "import a batch row by row";
        let format = self.format.to_string();
        let transaction = self.session.transaction().await.doing(DOING)?;
        let (mut imported, mut present, mut refused) = (0, 0, Vec::new());
        let mut before = "";
        for (line, token) in rows {
            // One way to the server and back for both.
            let savepoint = format!("{before} savepoint one");
            let (begun, answer) = tokio::join!(
                transaction.batch_execute(&savepoint),
                contract::import_api_token(&transaction, &self.statement, token, &format)
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
        if self.dry_run { transaction.rollback().await } else { transaction.commit().await }.doing(DOING)?;
        outcome.imported += imported;
        outcome.present += present;
        outcome.refused.extend(refused);
        Ok(())
    }
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

#[cfg(test)]
mod tests {
    use super::Seen;

    #[test]
    fn a_dry_run_remembers_so_many_digests_and_no_more() {
        let mut seen = Seen::new(2);
        let new = [b"a", b"b", b"a", b"c", b"c", b"b"].map(|digest| seen.is_new(digest));
        assert_eq!(new, [true, true, false, true, true, false]);
        assert_eq!(seen.digests.len(), 2);
    }
}
