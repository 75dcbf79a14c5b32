//! Deletes events of the audit log that are older than its retention, if there is one: by default nothing is deleted.
//!
//! The server deletes whole sealed ranges, none that a subscription has not received yet, and none that was changed since it was
//! sealed. A task of its own, so that such a refusal is visible under its name and blocks no other deletion.

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
