//! Flushes usage before the server runs out of room for counters, and logs when it did.
//!
//! A verification cannot send a notification, so the server is asked, often. It is asked on a connection of its own: the
//! room fills just when the others are busy.

use std::time::Duration;

use tokio_postgres::error::SqlState;
use tokio_util::sync::CancellationToken;

use crate::background::driver::{Report, Task};
use crate::background::signal::Signal;
use crate::contract;
use crate::error::Result;
use crate::postgres::pool::{Database, OwnSession};
use crate::process::failure_log::FailureLog;

pub const PERIOD: Duration = Duration::from_millis(250);

/// There is room for one and a half times the keys that `tollgate.max_tracked_keys` asks for, so this is half of those.
/// The other half is for what comes until the flush is done.
const FLUSH_AT: f64 = 1.0 / 3.0;

#[derive(Debug)]
pub struct WatchUsage {
    name: &'static str,
    /// Whose memory it is, where it is not the primary's.
    server: Option<String>,
    session: OwnSession,
    flush_now: Signal,
    overflow: Overflow,
}

impl WatchUsage {
    /// `flush_now` wakes the flush of this database.
    pub fn new(database: Database, flush_now: Signal) -> Self {
        let overflow = Overflow::default();
        Self { name: "watch_usage", server: None, session: OwnSession::new(database), flush_now, overflow }
    }

    /// The same of a standby, which counts in a memory of its own.
    pub fn of_standby(standby: Database, server: String, flush_now: Signal) -> Self {
        let name = super::name_at("watch_usage", &server);
        Self { name, server: Some(server), ..Self::new(standby, flush_now) }
    }

    async fn look(&mut self, stop: &CancellationToken) -> Result<contract::Pressure> {
        let session = self.session.take(stop).await?;
        let pressure = contract::usage_pressure(&*session).await?;
        self.session.give_back(session);
        Ok(pressure)
    }
}

impl Task for WatchUsage {
    fn name(&self) -> &'static str {
        self.name
    }

    async fn run(&mut self, stop: &CancellationToken) -> Result<Report> {
        let now = match self.look(stop).await {
            Ok(now) => now,
            // Nothing is counted, which the flush says.
            Err(error) if error.sqlstate() == Some(&SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE) => {
                return Ok(Report::default());
            }
            Err(error) => return Err(error),
        };
        let flush = now.pressure >= FLUSH_AT;
        if flush {
            tracing::debug!(pressure = now.pressure, "flushing usage early");
            self.flush_now.wake();
        }
        if let Some(lost) = self.overflow.news(now.overflowed) {
            tracing::warn!(
                lost,
                since_server_start = now.overflowed,
                server = self.server,
                "{lost} uses were not counted, for lack of room in the server's memory; raise tollgate.max_tracked_keys \
                 in postgresql.conf and restart the server"
            );
        }
        Ok(Report { items: u64::from(flush), ..Report::default() })
    }
}

/// Uses that the server could not count, and how many of them were logged.
#[derive(Debug, Default)]
struct Overflow {
    logged: u64,
    failure_log: FailureLog,
}

impl Overflow {
    /// How many have been lost since the last message, if it is time for one: at once when it begins, then once a minute.
    fn news(&mut self, overflowed: u64) -> Option<u64> {
        if overflowed < self.logged {
            // The server was restarted.
            self.logged = 0;
        }
        if overflowed == self.logged {
            return None;
        }
        self.failure_log.failed("overflow")?;
        let lost = overflowed - self.logged;
        self.logged = overflowed;
        Some(lost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_was_lost_is_said_at_once_and_then_once_a_minute_and_all_of_it() {
        let mut overflow = Overflow::default();
        assert_eq!(overflow.news(0), None);
        assert_eq!(overflow.news(7), Some(7));
        assert_eq!(overflow.news(7), None);
        assert_eq!(overflow.news(10), None);
        tokio::time::advance(Duration::from_secs(61)).await;
        assert_eq!(overflow.news(12), Some(5));
        tokio::time::advance(Duration::from_secs(61)).await;
        assert_eq!(overflow.news(12), None, "nothing new");
        assert_eq!(overflow.news(3), Some(3), "of a server that was restarted");
    }
}
