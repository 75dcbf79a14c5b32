//! Work on many rows in short steps, so that no verification waits for it.
//!
//! A process that wakes on a processor which computes for us gets it when that computation waits, or when the scheduler's slice
//! is over, which takes milliseconds. So such work is done by statements that compute for less time than a
//! verification takes with its round trip, and waits between them, as VACUUM waits by `vacuum_cost_delay`.

use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::Client;

use crate::contract::Fence;
use crate::contract::{Due, Place, Walk};
use crate::error::{Doing as _, Result};

/// As short as the server's and our timers can wait.
const PAUSE: Duration = Duration::from_millis(1);

/// How many rows one statement looks at, and how many one transaction.
///
/// A statement computes for about 0.3 ms. Fewer transactions ask less of the disk; but while one is open, events of those that
/// began after it are not published.
#[derive(Clone, Copy)]
struct Sizes {
    statement: i32,
    transaction: i32,
}

fn sizes(what: Due) -> Sizes {
    match what {
        // One notification for all of a statement.
        Due::Expiries | Due::Announcements | Due::SessionAnnouncements => {
            Sizes { statement: 20, transaction: 20 }
        }
        // With its usage, and a look for descendants.
        Due::EndedTokens => Sizes { statement: 10, transaction: 50 },
        Due::EndedSessions
        | Due::UsageHours
        | Due::UserUsage
        | Due::WebhookDeliveries
        | Due::Denials
        | Due::UsedUrls => Sizes { statement: 50, transaction: 500 },
    }
}

/// How many were dealt with, and whether there may be more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    pub items: u64,
    pub more: bool,
}

/// How far a walk has come through what is due, from the front of its index on. Kept from batch to batch; otherwise
/// each would pass again over the rows of those before it, which stay in the index for as long as any snapshot is older.
#[derive(Debug, Default)]
pub struct Round {
    place: Place,
    dealt_with: u64,
    /// When it began, and whether it has come to the end.
    begun: Option<Instant>,
    at_end: bool,
}

impl Round {
    /// Goes on where it was, or from the front once it is at the end and that old: rows that were locked, that committed late or
    /// whose expiry changed are found there.
    pub fn begin_again_after(&mut self, age: Duration) {
        if self.at_end && self.begun.is_some_and(|begun| begun.elapsed() >= age) {
            *self = Self::default();
        }
    }

    /// Handles up to `batch_size` more. Work that was committed before a failure stays; the next round then begins at the front,
    /// because the rest may have been rolled back.
    pub async fn advance(
        &mut self,
        session: &mut Client,
        fence: Option<&Fence>,
        what: Due,
        time: Duration,
        batch_size: i32,
    ) -> Result<Batch> {
        let Self { mut place, dealt_with, begun, .. } = std::mem::take(self);
        let begun = begun.unwrap_or_else(Instant::now);
        let Sizes { statement, transaction } = sizes(what);
        const DOING: &str = "work through what is due";
        let walk = Walk::prepare(session, fence, what).await?;
        let mut left = batch_size;
        let mut batch = Batch { items: 0, more: true };
        while batch.more && left > 0 {
            let open = session.transaction().await.doing(DOING)?;
            let mut room = left.min(transaction);
            left -= room;
            while batch.more && room > 0 {
                let most = room.min(statement);
                room -= most;
                let step = walk.step(&open, time, most, &place).await?;
                place = step.place;
                batch.items += step.items;
                batch.more = step.looked_at >= u64::from(most.unsigned_abs());
                tokio::time::sleep(PAUSE).await;
            }
            open.commit().await.doing(DOING)?;
        }
        let dealt_with = dealt_with + batch.items;
        let at_end = !batch.more;
        if what == Due::EndedTokens && at_end && dealt_with > 0 {
            // It may have been the last descendant of a token that had to stay: another round.
            return Ok(Batch { more: true, ..batch });
        }
        *self = Self { place, dealt_with, begun: Some(begun), at_end };
        Ok(batch)
    }
}
