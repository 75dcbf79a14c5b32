//! Deletes tokens that ended, hours of usage that lie, and webhooks that were given up, longer ago than their retention. A
//! million tokens may go at once, and nobody waits for that.

use tokio_util::sync::CancellationToken;

use super::pieces::{Round, purge};
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
    /// How far it has come with the tokens.
    round: Round,
}

impl Purge {
    pub fn new(
        database: Database,
        leadership: Leadership,
        retention: RetentionOptions,
        batch_size: i32,
    ) -> Self {
        Self { database, leadership, retention, batch_size, round: Round::default() }
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
        let (fence, batch_size) = (Some(&fence), self.batch_size);
        let tokens =
            purge(&mut session, fence, Ended::Tokens, retention, batch_size, &mut self.round).await?;
        let mut whole = Round::default();
        let hours =
            purge(&mut session, fence, Ended::UsageHours, usage_retention, batch_size, &mut whole).await?;
        let messages =
            purge(&mut session, fence, Ended::WebhookDeliveries, retention, batch_size, &mut whole).await?;
        let more = tokens.more || hours.more || messages.more;
        Ok(Report { items: tokens.items + hours.items, more, note: None })
    }
}
