//! Flushes usage from the server's shared memory into its tables.
//!
//! Drain, apply, commit, acknowledge: a daemon that is killed between any two of these leaves the counters where the next flush
//! finds them, and a generation that is applied twice counts once. So counts are exact, whatever happens to the daemon.

use tokio_postgres::error::SqlState;
use tokio_util::sync::CancellationToken;

use crate::background::driver::{Report, Task};
use crate::background::leader::Leadership;
use crate::contract;
use crate::contract::Fence;
use crate::error::{Error, Result};
use crate::postgres::pool::{Database, OwnSession};
use crate::postgres::session::Session;

/// Enough for a generation that was left behind, for what was counted since, and for a rival that flushes too.
const LAST_ROUNDS: u32 = 4;
/// As many tokens as drain_usage hands out at a time.
const FULL: u64 = 16_384;

#[derive(Debug)]
pub struct FlushUsage {
    session: OwnSession,
    leadership: Leadership,
}

/// What one round of drain, apply and acknowledge did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Round {
    /// There was nothing to flush.
    Empty,
    /// The library is not preloaded, so nothing is counted; with the server's message.
    Off(String),
    Flushed {
        tokens: u64,
        uses: i64,
        denials: i64,
        /// False: these counters had been added before and were merely not acknowledged.
        applied: bool,
    },
    /// In the primary's tables, but not in the standby's copy of them yet, so that the standby keeps its counters.
    NotReplayed,
}

impl Round {
    /// Whether there may be more to flush at once.
    pub fn is_full(&self) -> bool {
        matches!(self, Round::Flushed { tokens: FULL.., .. })
    }
}

impl FlushUsage {
    pub fn new(database: Database, leadership: Leadership) -> Self {
        Self { session: OwnSession::new(database), leadership }
    }
}

impl Task for FlushUsage {
    fn name(&self) -> &'static str {
        "flush_usage"
    }

    async fn run(&mut self, stop: &CancellationToken) -> Result<Report> {
        let fence = self.leadership.own_fence(self.name())?;
        let session = self.session.take(stop).await?;
        let round = flush(&session, Some(&fence)).await?;
        self.session.give_back(session);
        let more = round.is_full();
        Ok(match round {
            Round::Empty | Round::NotReplayed => Report::default(),
            Round::Off(note) => Report { note: Some(note), ..Report::default() },
            // A generation that was left behind stood before the one in which counting went on.
            Round::Flushed { tokens, applied, .. } => {
                Report { items: tokens, more: more || !applied, note: None }
            }
        })
    }

    async fn finish(&mut self) -> Result<Option<Report>> {
        // The shutdown has begun already: its grace bounds this, not its token.
        let session = self.session.take(&CancellationToken::new()).await.map_err(still_counted)?;
        let fence = match self.leadership.fence(self.name()) {
            Some(fence) => fence,
            // This daemon has not led yet. If another leads, that one flushes.
            None => match contract::acquire_leadership(&*session, &[self.name().to_owned()])
                .await
                .map_err(still_counted)?
                .remove(self.name())
                .flatten()
            {
                Some(number) => Fence { task: self.name(), number },
                None => return Ok(None),
            },
        };
        finish(|| flush(&session, Some(&fence))).await
    }
}

/// Makes rounds while there is usage to flush, and reports each. There are at most `most` that are not full, since traffic
/// that goes on would make more for ever.
pub async fn go_on<R>(most: u32, mut round: impl FnMut() -> R, mut report: impl FnMut(Round)) -> Result<()>
where
    R: Future<Output = Result<Round>>,
{
    let mut rounds = 0;
    while rounds < most {
        let round = round().await?;
        rounds += u32::from(!round.is_full());
        let carried = matches!(round, Round::Flushed { .. });
        report(round);
        if !carried {
            break;
        }
    }
    Ok(())
}

/// The last rounds before the process ends.
pub(super) async fn finish<R>(round: impl FnMut() -> R) -> Result<Option<Report>>
where
    R: Future<Output = Result<Round>>,
{
    let (mut items, mut counts) = (0, true);
    let report = |round| match round {
        Round::Flushed { tokens, .. } => items += tokens,
        Round::Off(_) => counts = false,
        Round::Empty | Round::NotReplayed => {}
    };
    go_on(LAST_ROUNDS, round, report).await.map_err(still_counted)?;
    Ok(counts.then(|| Report { items, ..Report::default() }))
}

fn still_counted(error: Error) -> Error {
    error.with_detail("Nothing is lost: the server keeps counting, and the next flush carries it all.")
}

/// One round. What verifications found and could not write goes the same way.
pub async fn flush(session: &Session, fence: Option<&Fence>) -> Result<Round> {
    contract::apply_findings(&**session, fence, None).await?;
    let generation = match drain(session).await? {
        Drained::Some(generation) => generation,
        Drained::Nothing(round) => return Ok(round),
    };
    // Outside a transaction block: it has committed when it returns.
    let applied = contract::apply_usage(&**session, fence, &generation).await?;
    acknowledge(session, &generation, applied).await
}

/// What a server had to drain.
pub enum Drained {
    Some(contract::Generation),
    /// The round is over.
    Nothing(Round),
}

pub async fn drain(session: &Session) -> Result<Drained> {
    match contract::drain_usage(&**session).await {
        Ok(Some(generation)) => Ok(Drained::Some(generation)),
        Ok(None) => Ok(Drained::Nothing(Round::Empty)),
        Err(error) if error.sqlstate() == Some(&SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE) => {
            Ok(Drained::Nothing(Round::Off(metering_off(&error))))
        }
        Err(error) => Err(error),
    }
}

/// To be called with the session that drained it: generations are numbered anew when a server starts, which ends all of
/// its sessions.
pub async fn acknowledge(
    session: &Session,
    generation: &contract::Generation,
    applied: bool,
) -> Result<Round> {
    // False if a rival did the same and was faster. Then they are acknowledged, which is all that is wanted.
    let acknowledged = contract::ack_usage(&**session, generation.number).await?;
    let (uses, denials) = generation.rows.iter().fold((0_i64, 0_i64), |(uses, denials), row| {
        (uses.saturating_add(row.uses), denials.saturating_add(row.denials))
    });
    let tokens = u64::try_from(generation.rows.len()).unwrap_or(u64::MAX);
    tracing::debug!(generation = generation.number, tokens, uses, denials, applied, acknowledged, "flushed");
    Ok(Round::Flushed { tokens, uses, denials, applied })
}

fn metering_off(error: &Error) -> String {
    let text = error.to_string();
    format!("metering off: {}", text.strip_prefix("could not drain usage: ").unwrap_or(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn rounds_of(most: u32, rounds: Vec<Round>) -> usize {
        let (mut rounds, mut reported) = (rounds.into_iter(), 0);
        let next = || std::future::ready(Ok(rounds.next().unwrap_or(Round::Empty)));
        go_on(most, next, |_| reported += 1).await.expect("no round fails");
        reported
    }

    fn flushed(tokens: u64) -> Round {
        Round::Flushed { tokens, uses: 1, denials: 0, applied: true }
    }

    #[tokio::test]
    async fn it_goes_on_until_nothing_is_left_or_nothing_is_counted() {
        assert_eq!(rounds_of(4, vec![flushed(1), Round::Empty, flushed(1)]).await, 2);
        assert_eq!(rounds_of(4, vec![Round::Off("metering off".into()), flushed(1)]).await, 1);
        assert_eq!(rounds_of(4, vec![flushed(1), Round::NotReplayed, flushed(1)]).await, 2);
    }

    #[tokio::test]
    async fn only_rounds_that_are_not_full_are_numbered() {
        let mut rounds = vec![flushed(FULL); 9];
        rounds.extend(vec![flushed(1); 9]);
        assert_eq!(rounds_of(4, rounds).await, 9 + 4);
    }
}
