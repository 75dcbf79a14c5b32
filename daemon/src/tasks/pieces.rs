//! Large deletions, so that nobody waits for them.
//!
//! Who wakes up on a processor that computes a deletion gets it when the deletion has to wait for something, or when the
//! scheduler's slice is over, which is milliseconds. So a deletion is done by statements that compute for less time than a
//! verification takes with its round trip, and waits between them, as VACUUM waits by `vacuum_cost_delay`.

use std::time::Duration;

use tokio_postgres::Client;

use crate::error::{Doing as _, Result};
use crate::leader::Fence;
use crate::sql::{Ended, Purge};

/// As short as the server's and our timers can wait.
const PAUSE: Duration = Duration::from_millis(1);

/// How many rows go by one statement, and how many by one transaction.
///
/// A statement computes for some 0.3 ms. Few transactions ask less of the disk; but while one is open, nobody is told of
/// the events of those that began after it.
fn sizes(what: Ended) -> (i32, i32) {
    match what {
        // With its usage, and a look for descendants.
        Ended::Tokens => (10, 50),
        Ended::UsageHours | Ended::WebhookDeliveries => (50, 500),
    }
}

/// Deletes up to `batch_size` that were over longer ago than the retention, and says how many: fewer only if there are no more.
/// What was deleted before a failure stays deleted.
pub async fn purge(
    session: &mut Client,
    fence: Option<&Fence>,
    what: Ended,
    retention: Duration,
    batch_size: i32,
) -> Result<u64> {
    let (by_statement, by_transaction) = sizes(what);
    let statement = Purge::prepare(session, fence, what).await?;
    let mut left = batch_size;
    let mut deleted = 0;
    let mut more = true;
    while more && left > 0 {
        let transaction = session.transaction().await.doing("begin to delete what is over")?;
        let mut room = left.min(by_transaction);
        left -= room;
        while more && room > 0 {
            let most = room.min(by_statement);
            room -= most;
            let gone = statement.execute(&transaction, retention, most).await?;
            deleted += gone;
            more = gone >= u64::from(most.unsigned_abs());
            tokio::time::sleep(PAUSE).await;
        }
        transaction.commit().await.doing("delete what is over")?;
    }
    Ok(deleted)
}
