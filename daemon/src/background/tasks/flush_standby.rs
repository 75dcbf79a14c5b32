//! Flushes usage from a hot standby's shared memory into the tables of the primary.
//!
//! As for the primary, with one step more: the standby forgets its counters only once its own copy of the database has
//! them. So it may be promoted at any time: what the new primary lacks it still counts, and what it has is not added
//! again. One task per standby, so that one that is down delays no other.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::flush_usage::{self, Drained, Round, acknowledge, drain};
use crate::background::driver::{Report, Task};
use crate::contract;
use crate::error::Result;
use crate::postgres::pool::Database;
use crate::postgres::session::Session;

/// A standby that is further behind is looked at again in the next run.
const REPLAY_PATIENCE: Duration = Duration::from_secs(2);
const REPLAY_POLL: Duration = Duration::from_millis(20);

#[derive(Debug)]
pub struct FlushStandby {
    name: &'static str,
    primary: Database,
    standby: Database,
    lags: bool,
}

impl FlushStandby {
    /// `server` names the standby.
    pub fn new(primary: Database, standby: Database, server: &str) -> Self {
        Self { name: super::name_at("flush_standby", server), primary, standby, lags: false }
    }

    async fn round(&self, stop: &CancellationToken) -> Result<Round> {
        let standby = self.standby.session(stop).await?;
        carry_findings(&standby, async || self.primary.session(stop).await).await?;
        flush(&standby, async || self.primary.session(stop).await).await
    }
}

impl Task for FlushStandby {
    fn name(&self) -> &'static str {
        self.name
    }

    async fn run(&mut self, stop: &CancellationToken) -> Result<Report> {
        let mut report = Report::default();
        let round = self.round(stop).await?;
        let more = round.is_full();
        match round {
            Round::Empty => self.lags = false,
            Round::Off(note) => report.note = Some(note),
            Round::NotReplayed => self.lags = true,
            Round::Flushed { tokens, applied, .. } => {
                (report.items, report.more) = (tokens, more || !applied);
                // One that was applied in an earlier run was waited for until now.
                self.lags &= !applied;
            }
        }
        if self.lags {
            report.note = Some(format!(
                "the standby is more than {} behind the primary: it keeps what it counted until it has replayed the flush of it",
                crate::process::duration::text(REPLAY_PATIENCE)
            ));
        }
        Ok(report)
    }

    async fn finish(&mut self) -> Result<Option<Report>> {
        // The shutdown has begun already: its grace bounds this, not its token.
        let stop = CancellationToken::new();
        flush_usage::finish(|| self.round(&stop)).await
    }
}

/// Has recorded what verifications found on the standby. There too it stays until the standby's copy of the database has it.
pub async fn carry_findings<P>(standby: &Session, primary: impl AsyncFnOnce() -> Result<P>) -> Result<()>
where
    P: std::ops::Deref<Target = Session>,
{
    if let Some(findings) = contract::drain_findings(&**standby).await? {
        contract::apply_findings(&**primary().await?, None, Some(&findings)).await?;
    }
    Ok(())
}

/// One round. The primary is asked for only if there is something to bring to it.
pub async fn flush<P>(standby: &Session, primary: impl AsyncFnOnce() -> Result<P>) -> Result<Round>
where
    P: std::ops::Deref<Target = Session>,
{
    let generation = match drain(standby).await? {
        Drained::Some(generation) => generation,
        Drained::Nothing(round) => return Ok(round),
    };
    // Asked first, since a standby that lags hands out the same again and again.
    let mut applied = false;
    if !contract::usage_applied(&**standby, &generation).await? {
        let primary = primary().await?;
        applied = !contract::usage_applied(&**primary, &generation).await?
            && contract::apply_usage(&**primary, None, &generation).await?;
    }
    if !replayed(standby, &generation).await? {
        return Ok(Round::NotReplayed);
    }
    acknowledge(standby, &generation, applied).await
}

async fn replayed(standby: &Session, generation: &contract::Generation) -> Result<bool> {
    let deadline = Instant::now() + REPLAY_PATIENCE;
    loop {
        if contract::usage_applied(&**standby, generation).await? {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        tokio::time::sleep(REPLAY_POLL).await;
    }
}
