//! Deletes tokens and sessions that ended, usage, and given-up messages to webhooks once they are older than their
//! retention, what was revoked of access tokens that are over, and uses of signed URLs that are over. A million tokens may be
//! due at once; they are deleted in steps, so that no verification waits.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::steps::Round;
use crate::background::driver::{Report, Task};
use crate::background::leader::Leadership;
use crate::config::RetentionOptions;
use crate::contract::Due;
use crate::error::Result;
use crate::postgres::pool::Database;

#[derive(Debug)]
pub struct Purge {
    database: Database,
    leadership: Leadership,
    retention: RetentionOptions,
    batch_size: i32,
    /// How far it is with each.
    tokens: Round,
    sessions: Round,
    hours: Round,
    users: Round,
    messages: Round,
    denials: Round,
    urls: Round,
    more: bool,
}

impl Purge {
    pub fn new(
        database: Database,
        leadership: Leadership,
        retention: RetentionOptions,
        batch_size: i32,
    ) -> Self {
        Self {
            database,
            leadership,
            retention,
            batch_size,
            tokens: Round::default(),
            sessions: Round::default(),
            hours: Round::default(),
            users: Round::default(),
            messages: Round::default(),
            denials: Round::default(),
            urls: Round::default(),
            more: false,
        }
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
        // Not while one of them has more: those that are done would begin again each time.
        if !std::mem::replace(&mut self.more, false) {
            let Self { tokens, sessions, hours, users, messages, denials, urls, .. } = self;
            for round in [tokens, sessions, hours, users, messages, denials, urls] {
                round.begin_again_after(Duration::ZERO);
            }
        }
        let tokens =
            self.tokens.advance(&mut session, fence, Due::EndedTokens, retention, batch_size).await?;
        let sessions =
            self.sessions.advance(&mut session, fence, Due::EndedSessions, retention, batch_size).await?;
        let hours =
            self.hours.advance(&mut session, fence, Due::UsageHours, usage_retention, batch_size).await?;
        let users =
            self.users.advance(&mut session, fence, Due::UserUsage, usage_retention, batch_size).await?;
        let messages =
            self.messages.advance(&mut session, fence, Due::WebhookDeliveries, retention, batch_size).await?;
        let denials =
            self.denials.advance(&mut session, fence, Due::Denials, Duration::ZERO, batch_size).await?;
        let urls = self.urls.advance(&mut session, fence, Due::UsedUrls, Duration::ZERO, batch_size).await?;
        self.more = [tokens, sessions, hours, users, messages, denials, urls].iter().any(|batch| batch.more);
        Ok(Report {
            items: tokens.items + sessions.items + hours.items + users.items,
            more: self.more,
            note: None,
        })
    }
}
