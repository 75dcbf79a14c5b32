//! Tells of tokens some time before they expire, so that whoever uses one can replace it in time.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::expire_tokens::fills;
use crate::db::Database;
use crate::driver::{Report, Task};
use crate::error::Result;
use crate::leader::Leadership;
use crate::sql;

/// Nobody needs to know to the second, and each look goes through all tokens that expire soon.
pub const PERIOD: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub struct AnnounceExpiries {
    database: Database,
    leadership: Leadership,
    notice: Duration,
    batch_size: i32,
}

impl AnnounceExpiries {
    pub fn new(database: Database, leadership: Leadership, notice: Duration, batch_size: i32) -> Self {
        Self { database, leadership, notice, batch_size }
    }
}

impl Task for AnnounceExpiries {
    fn name(&self) -> &'static str {
        "announce_expiries"
    }

    async fn run(&mut self, stop: &CancellationToken) -> Result<Report> {
        let fence = self.leadership.own_fence(self.name())?;
        let session = self.database.session(stop).await?;
        let items = sql::announce_expiries(&**session, Some(&fence), self.notice, self.batch_size).await?;
        Ok(Report { items, more: fills(items, self.batch_size), note: None })
    }
}
