//! Tells the server that this daemon lives and how its tasks fare, for `tollgated status` and `tollgate.daemons`; and sees by
//! the reports of all whether each task has a leader.

use std::time::Duration;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::background::driver::{Report, Task, TaskStatuses};
use crate::background::leaderless::{LeaderlessTasks, leaderless};
use crate::contract;
use crate::contract::Identity;
use crate::error::{Error, Result};
use crate::postgres::pool::Database;

/// Several fit into the time after which a daemon counts as gone.
pub const PERIOD: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub struct Heartbeat {
    database: Database,
    identity: Identity,
    statuses: TaskStatuses,
    leaderless: LeaderlessTasks,
}

impl Heartbeat {
    pub fn new(
        database: Database,
        identity: Identity,
        statuses: TaskStatuses,
        leaderless: LeaderlessTasks,
    ) -> Self {
        Self { database, identity, statuses, leaderless }
    }
}

impl Task for Heartbeat {
    fn name(&self) -> &'static str {
        "heartbeat"
    }

    async fn run(&mut self, stop: &CancellationToken) -> Result<Report> {
        let session = self.database.session(stop).await?;
        let tasks = serde_json::to_value(self.statuses.snapshot())
            .map_err(|error| Error::failed(format!("could not write down how the tasks fare: {error}")))?;
        contract::report_daemon(&**session, &self.identity, &tasks).await?;
        self.leaderless.put(leaderless(&contract::daemons(&**session).await?, Timestamp::now()));
        Ok(Report { items: 1, ..Report::default() })
    }
}
