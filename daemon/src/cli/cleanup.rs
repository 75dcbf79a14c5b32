//! `tollgated cleanup`: records expiries and deletes what ended long ago, batch by batch, until nothing is left. Most of the
//! time it leaves the server to others.

use std::time::Duration;

use indicatif::ProgressBar;
use serde_json::json;
use tokio::time::Instant;

use super::progress;
use crate::background::tasks::expire_tokens::fills;
use crate::background::tasks::rest;
use crate::background::tasks::steps::{Batch, Round};
use crate::cli::output;
use crate::config::{CleanupOptions, RetentionOptions};
use crate::contract;
use crate::contract::Due;
use crate::error::Result;
use crate::postgres::target::Target;
use crate::process::exit;

pub(super) async fn cleanup(target: Target, options: CleanupOptions) -> Result<u8> {
    let mut session = target.connect().await?;
    let batch_size = options.batch.batch_size;
    let RetentionOptions { retention, usage_retention, audit_retention } = options.retention;
    let progress = progress::bar("recording expiries", None, options.output.quiet || options.output.json);
    let mut round = Round::default();
    let expired = until_done(&progress, async || {
        round.advance(&mut session, None, Due::Expiries, Duration::ZERO, batch_size).await
    })
    .await?;
    progress.set_position(0);
    progress.set_message("deleting ended tokens");
    let mut round = Round::default();
    let purged = until_done(&progress, async || {
        round.advance(&mut session, None, Due::EndedTokens, retention, batch_size).await
    })
    .await?;
    progress.set_position(0);
    progress.set_message("deleting old hours of usage");
    let mut round = Round::default();
    let hours = until_done(&progress, async || {
        round.advance(&mut session, None, Due::UsageHours, usage_retention, batch_size).await
    })
    .await?;
    let mut events = 0;
    if let Some(retention) = audit_retention.0 {
        progress.set_position(0);
        progress.set_message("deleting old events of the audit log");
        events = until_done(&progress, async || {
            rested(batch_size, contract::purge_audit_log(&*session, None, retention, batch_size)).await
        })
        .await?;
    }
    progress.finish_and_clear();

    if options.output.json {
        output::json(
            &json!({ "expired": expired, "purged": purged, "purged_hours": hours, "purged_events": events }),
        )?;
    } else if !options.output.quiet {
        output::line(format!(
            "recorded {expired} expiries, deleted {purged} ended tokens, {hours} old hours of usage and {events} old \
             events of the audit log"
        ))?;
    }
    Ok(exit::OK)
}

async fn until_done(progress: &ProgressBar, mut batch: impl AsyncFnMut() -> Result<Batch>) -> Result<u64> {
    let mut total = 0;
    loop {
        let Batch { items, more } = batch().await?;
        total += items;
        progress.set_position(total);
        progress.tick();
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
        let total = until_done(&ProgressBar::hidden(), async || Ok(left.borrow_mut().remove(0))).await;
        assert_eq!(total.unwrap(), 13);
        assert_eq!(*left.borrow(), [batch(10, true)]);
    }

    #[tokio::test]
    async fn a_failure_ends_it() {
        let total = until_done(&ProgressBar::hidden(), async || Err(Error::failed("no"))).await;
        assert!(total.is_err());
    }
}
