//! Work on many rows, so that nobody waits for it.
//!
//! Who wakes up on a processor that computes for us gets it when that has to wait for something, or when the scheduler's
//! slice is over, which is milliseconds. So such work is done by statements that compute for less time than a
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
/// A statement computes for some 0.3 ms. Few transactions ask less of the disk; but while one is open, nobody is told of
/// the events of those that began after it.
#[derive(Clone, Copy)]
struct Sizes {
    statement: i32,
    transaction: i32,
}

fn sizes(what: Due) -> Sizes {
    match what {
        // One notification tells of a statement's.
        Due::Expiries | Due::Announcements => Sizes { statement: 20, transaction: 20 },
        // With its usage, and a look for descendants.
        Due::EndedTokens => Sizes { statement: 10, transaction: 50 },
        Due::UsageHours | Due::WebhookDeliveries => Sizes { statement: 50, transaction: 500 },
    }
}

/// How many were dealt with, and whether there may be more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    pub items: u64,
    pub more: bool,
}

/// How far a walk has come through what is due, from the front of its index on. Kept from batch to batch, because each would
/// else pass again over what those before it dealt with, which stays in the index for as long as any snapshot is older.
#[derive(Debug, Default)]
pub struct Round {
    place: Place,
    dealt_with: u64,
    /// When it began, and whether it has come to the end.
    begun: Option<Instant>,
    at_end: bool,
}

impl Round {
    /// Goes on after the place, but from the front if it is at the end and that old: what was locked, what committed late and
    /// what was given another end is found there.
    pub fn begin_again_after(&mut self, age: Duration) {
        if self.at_end && self.begun.is_some_and(|begun| begun.elapsed() >= age) {
            *self = Self::default();
        }
    }

    /// Looks at up to `batch_size` more. What was done before a failure stays done; the next round begins at the front then,
    /// because what was passed may have been rolled back.
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
