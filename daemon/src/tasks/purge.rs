//! Deletes tokens that ended longer ago than the retention, and webhooks that were given up that long ago, a batch a transaction, so that no lock is held for long.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::expire_tokens::fills;
use crate::db::Database;
use crate::driver::{Report, Task};
use crate::error::Result;
use crate::sql;

#[derive(Debug)]
pub struct Purge {
    database: Database,
    retention: Duration,
    batch_size: i32,
}

impl Purge {
    pub fn new(database: Database, retention: Duration, batch_size: i32) -> Self {
        Self { database, retention, batch_size }
    }
}

impl Task for Purge {
    fn name(&self) -> &'static str {
        "purge"
    }

    async fn run(&mut self, stop: &CancellationToken) -> Result<Report> {
        let session = self.database.session(stop).await?;
        let items = sql::purge_tokens(&**session, self.retention, self.batch_size).await?;
        let messages = sql::purge_webhook_deliveries(&**session, self.retention, self.batch_size).await?;
        Ok(Report {
            items,
            more: fills(items, self.batch_size) || fills(messages, self.batch_size),
            note: None,
        })
    }
}
