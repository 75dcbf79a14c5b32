//! Work on many rows, so that nobody waits for it.
//!
//! Who wakes up on a processor that computes for us gets it when that has to wait for something, or when the scheduler's
//! slice is over, which is milliseconds. So such work is done by statements that compute for less time than a
//! verification takes with its round trip, and waits between them, as VACUUM waits by `vacuum_cost_delay`.

use std::time::Duration;

use tokio_postgres::{Client, Transaction};

use crate::error::{Doing as _, Result};
use crate::leader::Fence;
use crate::sql::{self, Ended, Place, Purge};

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

/// What is done, with what a statement of it needs.
enum Work<'a> {
    Expire,
    Announce(Duration),
    Purge { what: Ended, statement: Purge, retention: Duration, place: &'a mut Place },
}

impl Work<'_> {
    fn sizes(&self) -> Sizes {
        match self {
            // One notification tells of a statement's.
            Self::Expire | Self::Announce(_) => Sizes { statement: 20, transaction: 20 },
            // With its usage, and a look for descendants.
            Self::Purge { what: Ended::Tokens, .. } => Sizes { statement: 10, transaction: 50 },
            Self::Purge { .. } => Sizes { statement: 50, transaction: 500 },
        }
    }

    fn doing(&self) -> &'static str {
        match self {
            Self::Expire => "record expiries",
            Self::Announce(_) => "announce expiries",
            Self::Purge { .. } => "delete what is over",
        }
    }

    /// Looks at up to `most` rows; says how many it looked at, and how many it dealt with.
    async fn piece(
        &mut self,
        transaction: &Transaction<'_>,
        fence: Option<&Fence>,
        most: i32,
    ) -> Result<(u64, u64)> {
        match self {
            Self::Expire => sql::expire_tokens(transaction, fence, most).await.map(|items| (items, items)),
            Self::Announce(notice) => {
                sql::announce_expiries(transaction, fence, *notice, most).await.map(|items| (items, items))
            }
            Self::Purge { statement, retention, place, .. } => {
                let purged = statement.execute(transaction, *retention, most, place).await?;
                **place = purged.place;
                Ok((purged.looked_at, purged.deleted))
            }
        }
    }

    /// Has up to `batch_size` rows looked at. What was done before a failure stays done.
    async fn run(mut self, session: &mut Client, fence: Option<&Fence>, batch_size: i32) -> Result<Batch> {
        let (sizes, doing) = (self.sizes(), self.doing());
        let mut left = batch_size;
        let mut batch = Batch { items: 0, more: true };
        while batch.more && left > 0 {
            let transaction = session.transaction().await.doing(doing)?;
            let mut room = left.min(sizes.transaction);
            left -= room;
            while batch.more && room > 0 {
                let most = room.min(sizes.statement);
                room -= most;
                let (looked_at, items) = self.piece(&transaction, fence, most).await?;
                batch.items += items;
                batch.more = looked_at >= u64::from(most.unsigned_abs());
                tokio::time::sleep(PAUSE).await;
            }
            transaction.commit().await.doing(doing)?;
        }
        Ok(batch)
    }
}

/// How many were dealt with, and whether there may be more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    pub items: u64,
    pub more: bool,
}

/// Records up to `batch_size` expiries.
pub async fn expire(session: &mut Client, fence: Option<&Fence>, batch_size: i32) -> Result<Batch> {
    Work::Expire.run(session, fence, batch_size).await
}

/// Announces up to `batch_size` expiries.
pub async fn announce(
    session: &mut Client,
    fence: Option<&Fence>,
    notice: Duration,
    batch_size: i32,
) -> Result<Batch> {
    Work::Announce(notice).run(session, fence, batch_size).await
}

/// How far a round through what has ended has come. A round that deleted something is followed by another: that may have been
/// the last descendant of a token that had to stay.
#[derive(Debug, Default)]
pub struct Round {
    place: Place,
    deleted: u64,
}

/// Looks at up to `batch_size` more of the round, and deletes those that were over longer ago than the retention.
pub async fn purge(
    session: &mut Client,
    fence: Option<&Fence>,
    what: Ended,
    retention: Duration,
    batch_size: i32,
    round: &mut Round,
) -> Result<Batch> {
    let statement = Purge::prepare(session, fence, what).await?;
    // After a failure, what was passed may not have been deleted.
    let Round { mut place, deleted } = std::mem::take(round);
    let work = Work::Purge { what, statement, retention, place: &mut place };
    let mut batch = work.run(session, fence, batch_size).await?;
    let deleted = deleted + batch.items;
    if batch.more {
        *round = Round { place, deleted };
    } else {
        batch.more = what == Ended::Tokens && deleted > 0;
    }
    Ok(batch)
}
