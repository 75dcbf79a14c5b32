//! Logs every event of the audit log, in commit order, at least once.
//!
//! The server keeps the cursor under the subscription's name and locks it while batches are logged, so several daemons share
//! the work. A batch is logged before the transaction that moves the cursor commits: a crash in between logs its batches again,
//! and never skips one. While a batch is logged, the server reads the next one.

use std::borrow::Cow;
use std::time::Duration;

use serde_json::value::RawValue;
use tokio::time::Instant;
use tokio_postgres::IsolationLevel;
use tokio_util::sync::CancellationToken;

use crate::background::driver::{Report, Task};
use crate::contract;
use crate::contract::{Cursor, Event};
use crate::error::{Doing as _, Result};
use crate::postgres::pool::Database;
use crate::postgres::session::Session;

/// How long the cursor in memory is trusted before the subscription itself is read. A server that was replaced by a restored one
/// is noticed after this time at the latest.
const TRUST_MEMORY_FOR: Duration = Duration::from_secs(60);

/// The most batches of one transaction.
const BATCHES: usize = 10;

#[derive(Debug)]
pub struct PublishEvents {
    database: Database,
    subscription: String,
    batch_size: i32,
    /// Where we left the subscription, and when. Only to see whether a look at it is worth a transaction that locks
    /// its row; events are read from the cursor that the server keeps.
    left: Option<(Cursor, Instant)>,
}

impl PublishEvents {
    pub fn new(database: Database, subscription: String, batch_size: i32) -> Self {
        Self { database, subscription, batch_size, left: None }
    }

    /// Whether there may be events that are not logged yet. Locks nothing, so that an idle daemon writes next
    /// to nothing to the server.
    async fn anything_new(&mut self, session: &Session) -> Result<bool> {
        let Some((cursor, at)) = self.left.take().filter(|(_, at)| at.elapsed() < TRUST_MEMORY_FOR) else {
            return Ok(true);
        };
        let anything = contract::has_events(&**session, &cursor).await?;
        self.left = Some((cursor, at));
        Ok(anything)
    }
}

impl Task for PublishEvents {
    fn name(&self) -> &'static str {
        "publish_events"
    }

    async fn run(&mut self, stop: &CancellationToken) -> Result<Report> {
        let mut session = self.database.session(stop).await?;
        if !self.anything_new(&session).await? {
            return Ok(Report::default());
        }
        // Unknown until this has succeeded.
        self.left = None;
        let transaction = session
            .build_transaction()
            .isolation_level(IsolationLevel::ReadCommitted)
            .start()
            .await
            .doing("begin a transaction")?;
        let Some(mut cursor) = contract::open_subscription(&transaction, &self.subscription).await? else {
            // Another daemon is logging the same events.
            return Ok(Report::default());
        };
        let mut batch = contract::read_events(&transaction, &cursor, self.batch_size).await?;
        let (mut items, mut batches) = (0, 1);
        let more = loop {
            let is_last = batch.caught_up || batches == BATCHES;
            let read_next = async {
                if is_last {
                    return Ok(None);
                }
                contract::read_events(&transaction, &batch.next, self.batch_size).await.map(Some)
            };
            let publish_this = async { batch.events.iter().for_each(publish) };
            let (next, ()) = tokio::join!(read_next, publish_this);
            items += batch.events.len();
            if batch.next != cursor {
                contract::advance_subscription(&transaction, &self.subscription, &batch).await?;
            }
            let is_caught_up = batch.caught_up;
            cursor = batch.next;
            match next? {
                Some(next) => batch = next,
                None => break !is_caught_up,
            }
            batches += 1;
        };
        transaction.commit().await.doing("commit the place in the event log")?;
        self.left = Some((cursor, Instant::now()));
        Ok(Report { items: u64::try_from(items).unwrap_or(u64::MAX), more, note: None })
    }
}

/// One line per event; absent fields are left out.
fn publish(event: &Event) {
    tracing::info!(
        target: crate::process::logging::EVENTS,
        id = event.id,
        epoch = event.epoch,
        at = event.at.as_deref(),
        event = event.event.as_deref(),
        token_id = event.token_id.as_deref(),
        user_id = event.user_id.as_deref(),
        actor = event.actor.as_deref(),
        client_addr = event.client_addr.as_deref(),
        reason = text(&event.reason).as_deref(),
        detail = text(&event.detail).as_deref(),
    );
}

/// A string as it is, any other value as JSON; None for null.
fn text(value: &RawValue) -> Option<Cow<'_, str>> {
    match value.get() {
        "null" => None,
        json => Some(serde_json::from_str(json).map_or(Cow::Borrowed(json), Cow::Owned)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::value::RawValue;

    use super::text;

    #[test]
    fn a_reason_is_logged_without_quotes_and_a_detail_as_json() {
        let logged = |json: &str| {
            let json = RawValue::from_string(json.to_owned()).unwrap();
            text(&json).map(std::borrow::Cow::into_owned)
        };
        assert_eq!(logged(r#""leaked""#).as_deref(), Some("leaked"));
        assert_eq!(
            logged(r#"{"by": "scanner", "n": 1e400}"#).as_deref(),
            Some(r#"{"by": "scanner", "n": 1e400}"#)
        );
        assert_eq!(logged("null"), None);
    }
}
