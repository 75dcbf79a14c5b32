//! Tells the server that this daemon lives and how its tasks fare, for `tollgated status` and `tollgate.daemons`; and sees by
//! the reports of all whether each task has a leader.

use std::time::Duration;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::db::Database;
use crate::driver::{Board, Report, Task};
use crate::error::{Error, Result};
use crate::sql::{self, Identity};
use crate::unled::{Unled, unled};

/// Several fit into the time after which a daemon counts as gone.
pub const PERIOD: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub struct Heartbeat {
    database: Database,
    identity: Identity,
    board: Board,
    unled: Unled,
}

impl Heartbeat {
    pub fn new(database: Database, identity: Identity, board: Board, unled: Unled) -> Self {
        Self { database, identity, board, unled }
    }
}

impl Task for Heartbeat {
    fn name(&self) -> &'static str {
        "heartbeat"
    }

    async fn run(&mut self, stop: &CancellationToken) -> Result<Report> {
        let session = self.database.session(stop).await?;
        let tasks = serde_json::to_value(self.board.snapshot())
            .map_err(|error| Error::failed(format!("could not write down how the tasks fare: {error}")))?;
        sql::report_daemon(&**session, &self.identity, &tasks).await?;
        self.unled.put(unled(&sql::daemons(&**session).await?, Timestamp::now()));
        Ok(Report { items: 1, ..Report::default() })
    }
}
