//! Removes from the audit log what is older than its retention, if there is one: nobody's log is deleted unasked.
//!
//! The server removes whole sealed stretches, none that a subscription has yet to be told of, and none that is not as it was
//! sealed. A task of its own, because such a refusal should be seen by its name and keep nothing else from being deleted.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::expire_tokens::fills;
use super::rest;
use crate::background::driver::{Report, Task};
use crate::background::leader::Leadership;
use crate::contract;
use crate::error::Result;
use crate::postgres::pool::Database;

#[derive(Debug)]
pub struct PurgeAudit {
    database: Database,
    leadership: Leadership,
    retention: Duration,
    batch_size: i32,
}

impl PurgeAudit {
    pub fn new(database: Database, leadership: Leadership, retention: Duration, batch_size: i32) -> Self {
        Self { database, leadership, retention, batch_size }
    }
}

impl Task for PurgeAudit {
    fn name(&self) -> &'static str {
        "purge_audit"
    }

    async fn run(&mut self, stop: &CancellationToken) -> Result<Report> {
        let fence = self.leadership.own_fence(self.name())?;
        let session = self.database.session(stop).await?;
        let started = Instant::now();
        let items =
            contract::purge_audit_log(&**session, Some(&fence), self.retention, self.batch_size).await?;
        let more = fills(items, self.batch_size);
        drop(session);
        if more {
            tokio::select! {
                () = rest(started) => {}
                () = stop.cancelled() => {}
            }
        }
        Ok(Report { items, more, note: None })
    }
}
