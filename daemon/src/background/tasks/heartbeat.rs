//! Reports to the server that this daemon is alive, with the status of its tasks, for `tollgated status` and
//! `tollgate.daemons`; and finds tasks without a leader in the reports of all daemons.

use std::time::Duration;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::background::driver::{Report, Task, TaskStatuses};
use crate::background::leaderless::{LeaderlessTasks, leaderless};
use crate::contract;
use crate::contract::Identity;
use crate::error::{Error, Result};
use crate::postgres::pool::Database;

/// A daemon counts as gone after several of these.
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
        let tasks = serde_json::to_value(self.statuses.snapshot()).map_err(|error| {
            Error::failed(format!("could not write the status of the tasks as JSON: {error}"))
        })?;
        contract::report_daemon(&**session, &self.identity, &tasks).await?;
        self.leaderless.put(leaderless(&contract::daemons(&**session).await?, Timestamp::now()));
        Ok(Report { items: 1, ..Report::default() })
    }
}
