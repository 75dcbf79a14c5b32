//! Records that tokens have expired, so that subscribers receive the event. Expired tokens are refused without this.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::steps::{Batch, Round};
use crate::background::driver::{Report, Task};
use crate::background::leader::Leadership;
use crate::contract::Due;
use crate::error::Result;
use crate::postgres::pool::Database;

/// An expiry that a concurrent transaction hid from the walk is found by the next one; the record may be that late.
const LATE: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub struct ExpireTokens {
    database: Database,
    leadership: Leadership,
    batch_size: i32,
    round: Round,
}

impl ExpireTokens {
    pub fn new(database: Database, leadership: Leadership, batch_size: i32) -> Self {
        Self { database, leadership, batch_size, round: Round::default() }
    }
}

impl Task for ExpireTokens {
    fn name(&self) -> &'static str {
        "expire_tokens"
    }

    async fn run(&mut self, stop: &CancellationToken) -> Result<Report> {
        let fence = self.leadership.own_fence(self.name())?;
        let mut session = self.database.session(stop).await?;
        self.round.begin_again_after(LATE);
        let Batch { items, more } = self
            .round
            .advance(&mut session, Some(&fence), Due::Expiries, Duration::ZERO, self.batch_size)
            .await?;
        Ok(Report { items, more, note: None })
    }
}

/// A full batch means that there may be more.
pub fn fills(items: u64, batch_size: i32) -> bool {
    i64::try_from(items).is_ok_and(|items| items >= i64::from(batch_size))
}

#[cfg(test)]
mod tests {
    use super::fills;

    #[test]
    fn only_a_full_batch_asks_for_another() {
        assert!(fills(1000, 1000));
        assert!(!fills(999, 1000));
        assert!(!fills(0, 1));
    }
}
