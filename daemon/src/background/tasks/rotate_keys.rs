//! Makes the next signing key a day before the latest one has signed for long enough. The database decides whether it is time;
//! the states of keys follow from their times, so nothing has to run when a key begins or ends.

use std::time::Duration;

use tokio_postgres::error::SqlState;
use tokio_util::sync::CancellationToken;

use crate::background::driver::{Report, Task};
use crate::background::leader::Leadership;
use crate::contract;
use crate::error::Result;
use crate::postgres::pool::Database;

pub const PERIOD: Duration = Duration::from_secs(600);

#[derive(Debug)]
pub struct RotateKeys {
    database: Database,
    leadership: Leadership,
    every: Duration,
}

impl RotateKeys {
    pub fn new(database: Database, leadership: Leadership, every: Duration) -> Self {
        Self { database, leadership, every }
    }
}

impl Task for RotateKeys {
    fn name(&self) -> &'static str {
        "rotate_keys"
    }

    async fn run(&mut self, stop: &CancellationToken) -> Result<Report> {
        let fence = self.leadership.own_fence(self.name())?;
        let session = self.database.session(stop).await?;
        match contract::rotate_due_signing_key(&**session, Some(&fence), self.every).await {
            Ok(Some(kid)) => {
                tracing::info!(kid, "made the next signing key, which signs in a day");
                Ok(Report { items: 1, ..Report::default() })
            }
            Ok(None) => Ok(Report::default()),
            // No master key: the present key signs on.
            Err(error) if error.sqlstate() == Some(&SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE) => {
                Ok(Report { note: Some(error.message().to_owned()), ..Report::default() })
            }
            Err(error) => Err(error),
        }
    }
}
