//! Seals the audit log, range by range, so that a later change of an event shows.
//!
//! The server lets one session at a time extend the chain, so several daemons may run. Each seal is logged: a copy of
//! the log that is kept elsewhere reveals a chain that was forged from end to end.

use std::fmt::Write as _;

use tokio_util::sync::CancellationToken;

use super::expire_tokens::fills;
use crate::background::driver::{Report, Task};
use crate::background::leader::Leadership;
use crate::contract;
use crate::error::Result;
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
            tracing::info!(seal, hash = hex(hash), events = sealed.events, "sealed the audit log");
        }
        Ok(Report { items: sealed.events, more: fills(sealed.events, self.batch_size), note: None })
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::hex;

    #[test]
    fn a_hash_is_logged_as_sql_prints_it() {
        assert_eq!(hex(&[0x00, 0x0a, 0xff]), "000aff");
    }
}
