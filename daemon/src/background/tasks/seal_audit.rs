//! Seals the audit log, range by range, so that a later change of an event shows.
//!
//! The server lets one session at a time extend the chain, so several daemons may run. Each seal is logged: a copy of
//! the log that is kept elsewhere reveals a chain that was forged from end to end.

use tokio_util::sync::CancellationToken;

use super::expire_tokens::fills;
use crate::background::driver::{Report, Task};
use crate::background::leader::Leadership;
use crate::contract;
use crate::error::Result;
use crate::hex;
use crate::postgres::pool::Database;

#[derive(Debug)]
pub struct SealAudit {
    database: Database,
    leadership: Leadership,
    batch_size: i32,
}

impl SealAudit {
    pub fn new(database: Database, leadership: Leadership, batch_size: i32) -> Self {
        Self { database, leadership, batch_size }
    }
}

impl Task for SealAudit {
    fn name(&self) -> &'static str {
        "seal_audit"
    }

    async fn run(&mut self, stop: &CancellationToken) -> Result<Report> {
        let fence = self.leadership.own_fence(self.name())?;
        let session = self.database.session(stop).await?;
        let sealed = contract::seal_audit_log(&**session, Some(&fence), self.batch_size).await?;
        if let Some((seal, hash)) = &sealed.seal {
            tracing::info!(seal, hash = hex::encode(hash), events = sealed.events, "sealed the audit log");
        }
        Ok(Report { items: sealed.events, more: fills(sealed.events, self.batch_size), note: None })
    }
}
