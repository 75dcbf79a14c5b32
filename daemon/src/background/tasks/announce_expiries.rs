//! Publishes an event some time before a token or a session ends, so that its owner can replace it in time.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::steps::Round;
use crate::background::driver::{Report, Task};
use crate::background::leader::Leadership;
use crate::contract::Due;
use crate::error::Result;
use crate::postgres::pool::Database;

/// The moment of the notice does not matter to the second.
pub const PERIOD: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub struct AnnounceExpiries {
    database: Database,
    leadership: Leadership,
    notice: Duration,
    batch_size: i32,
    tokens: Round,
    sessions: Round,
}

impl AnnounceExpiries {
    pub fn new(database: Database, leadership: Leadership, notice: Duration, batch_size: i32) -> Self {
        Self {
            database,
            leadership,
            notice,
            batch_size,
            tokens: Round::default(),
            sessions: Round::default(),
        }
    }
}

impl Task for AnnounceExpiries {
    fn name(&self) -> &'static str {
        "announce_expiries"
    }

    async fn run(&mut self, stop: &CancellationToken) -> Result<Report> {
        let fence = self.leadership.own_fence(self.name())?;
        let mut session = self.database.session(stop).await?;
        let mut report = Report::default();
        for (round, due) in
            [(&mut self.tokens, Due::Announcements), (&mut self.sessions, Due::SessionAnnouncements)]
        {
            // A token may be issued, or its expiry changed, at any time within the notice.
            round.begin_again_after(Duration::ZERO);
            let batch = round.advance(&mut session, Some(&fence), due, self.notice, self.batch_size).await?;
            report.items += batch.items;
            report.more |= batch.more;
        }
        Ok(report)
    }
}
