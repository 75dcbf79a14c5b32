//! Deletes tokens that ended, hours of usage that lie, and webhooks that were given up, longer ago than their retention. A
//! batch a transaction, so that no lock is held for long, and with rests in between: a million tokens may go at once, and
//! nobody waits for that.

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::expire_tokens::fills;
use super::rest;
use crate::config::RetentionOptions;
use crate::db::Database;
use crate::driver::{Report, Task};
use crate::error::Result;
use crate::sql;

#[derive(Debug)]
pub struct Purge {
    database: Database,
    retention: RetentionOptions,
    batch_size: i32,
}

impl Purge {
    pub fn new(database: Database, retention: RetentionOptions, batch_size: i32) -> Self {
        Self { database, retention, batch_size }
    }
}

impl Task for Purge {
    fn name(&self) -> &'static str {
        "purge"
    }

    async fn run(&mut self, stop: &CancellationToken) -> Result<Report> {
        let session = self.database.session(stop).await?;
        let started = Instant::now();
        let tokens = sql::purge_tokens(&**session, self.retention.retention, self.batch_size).await?;
        let hours = sql::purge_usage(&**session, self.retention.usage_retention, self.batch_size).await?;
        let messages =
            sql::purge_webhook_deliveries(&**session, self.retention.retention, self.batch_size).await?;
        let more = [tokens, hours, messages].into_iter().any(|items| fills(items, self.batch_size));
        drop(session);
        if more {
            tokio::select! {
                () = rest(started) => {}
                () = stop.cancelled() => {}
            }
        }
        Ok(Report { items: tokens + hours, more, note: None })
    }
}
