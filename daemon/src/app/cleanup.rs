//! Cleaning up: expiries are recorded and what ended long ago is deleted, batch by batch, until nothing is left. Most of the time
//! the server is left to others.

use std::time::Duration;

use tokio::time::Instant;

use crate::background::tasks::expire_tokens::fills;
use crate::background::tasks::rest;
use crate::background::tasks::steps::{Batch, Round};
use crate::contract;
use crate::contract::Due;
use crate::error::Result;
use crate::postgres::session::Session;

/// How long what is over is kept.
#[derive(Clone, Copy, Debug)]
pub struct Retention {
    /// Tokens and sessions.
    pub tokens: Duration,
    pub usage: Duration,
    /// For ever without one.
    pub audit: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Expiries,
    EndedTokens,
    EndedSessions,
    UsageHours,
    AuditEvents,
}

/// How many of each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cleaned {
    pub expired: u64,
    pub purged: u64,
    pub purged_sessions: u64,
    pub purged_hours: u64,
    pub purged_events: u64,
}

/// `progress` is called after each batch, with what is being done and the number so far.
pub async fn clean_up(
    session: &mut Session,
    retention: &Retention,
    batch_size: i32,
    mut progress: impl FnMut(Stage, u64),
) -> Result<Cleaned> {
    let mut cleaned = Cleaned::default();
    let mut purged_users = 0;
    for (stage, due, time, count) in [
        (Stage::Expiries, Due::Expiries, Duration::ZERO, &mut cleaned.expired),
        (Stage::EndedTokens, Due::EndedTokens, retention.tokens, &mut cleaned.purged),
        (Stage::EndedSessions, Due::EndedSessions, retention.tokens, &mut cleaned.purged_sessions),
        (Stage::UsageHours, Due::UsageHours, retention.usage, &mut cleaned.purged_hours),
        (Stage::UsageHours, Due::UserUsage, retention.usage, &mut purged_users),
    ] {
        let mut round = Round::default();
        *count = until_done(
            async || round.advance(session, None, due, time, batch_size).await,
            |count| progress(stage, count),
        )
        .await?;
    }
    cleaned.purged_hours += purged_users;
    if let Some(time) = retention.audit {
        cleaned.purged_events = until_done(
            async || rested(batch_size, contract::purge_audit_log(&**session, None, time, batch_size)).await,
            |count| progress(Stage::AuditEvents, count),
        )
        .await?;
    }
    Ok(cleaned)
}

async fn until_done(
    mut batch: impl AsyncFnMut() -> Result<Batch>,
    mut progress: impl FnMut(u64),
) -> Result<u64> {
    let mut total = 0;
    progress(total);
    loop {
        let Batch { items, more } = batch().await?;
        total += items;
        progress(total);
        if !more {
            return Ok(total);
        }
    }
}

/// Does a batch at one go, and rests after it if there may be another.
async fn rested(batch_size: i32, batch: impl Future<Output = Result<u64>>) -> Result<Batch> {
    let started = Instant::now();
    let items = batch.await?;
    let more = fills(items, batch_size);
    if more {
        rest(started).await;
    }
    Ok(Batch { items, more })
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::error::Error;

    #[tokio::test]
    async fn batches_go_on_until_there_are_no_more() {
        let batch = |items, more| Batch { items, more };
        let left = RefCell::new(vec![batch(10, true), batch(0, true), batch(3, false), batch(10, true)]);
        let total = until_done(async || Ok(left.borrow_mut().remove(0)), |_| ()).await;
        assert_eq!(total.unwrap(), 13);
        assert_eq!(*left.borrow(), [batch(10, true)]);
    }

    #[tokio::test]
    async fn a_failure_ends_it() {
        let total = until_done(async || Err(Error::failed("no")), |_| ()).await;
        assert!(total.is_err());
    }
}
