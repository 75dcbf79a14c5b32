//! Deletes tokens that ended, hours of usage that lie, and webhooks that were given up, longer ago than their retention. A
//! million tokens may go at once, and nobody waits for that.

use tokio_util::sync::CancellationToken;

use super::expire_tokens::fills;
use super::pieces::purge;
use crate::config::RetentionOptions;
use crate::db::Database;
use crate::driver::{Report, Task};
use crate::error::Result;
use crate::leader::Leadership;
use crate::sql::Ended;

#[derive(Debug)]
pub struct Purge {
    database: Database,
    leadership: Leadership,
    retention: RetentionOptions,
    batch_size: i32,
}

impl Purge {
    pub fn new(
        database: Database,
        leadership: Leadership,
        retention: RetentionOptions,
        batch_size: i32,
    ) -> Self {
        Self { database, leadership, retention, batch_size }
    }
}

impl Task for Purge {
    fn name(&self) -> &'static str {
        "purge"
    }

    async fn run(&mut self, stop: &CancellationToken) -> Result<Report> {
        let RetentionOptions { retention, usage_retention, .. } = self.retention;
        let fence = self.leadership.own_fence(self.name())?;
        let mut session = self.database.session(stop).await?;
        let tokens = purge(&mut session, Some(&fence), Ended::Tokens, retention, self.batch_size).await?;
        let hours =
            purge(&mut session, Some(&fence), Ended::UsageHours, usage_retention, self.batch_size).await?;
        let messages =
            purge(&mut session, Some(&fence), Ended::WebhookDeliveries, retention, self.batch_size).await?;
        let more = [tokens, hours, messages].into_iter().any(|items| fills(items, self.batch_size));
        Ok(Report { items: tokens + hours, more, note: None })
    }
}
