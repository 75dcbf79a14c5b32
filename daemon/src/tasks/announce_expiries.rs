//! Tells of tokens some time before they expire, so that whoever uses one can replace it in time.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::pieces::{self, Batch};
use crate::db::Database;
use crate::driver::{Report, Task};
use crate::error::Result;
use crate::leader::Leadership;

/// Nobody needs to know to the second.
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
        let mut session = self.database.session(stop).await?;
        let Batch { items, more } =
            pieces::announce(&mut session, Some(&fence), self.notice, self.batch_size).await?;
        Ok(Report { items, more, note: None })
    }
}
