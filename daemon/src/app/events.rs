//! Following the event log: page by page, from a place that the reader keeps.
//!
//! A page is read at the cursor, and the cursor moves only once its events were handed on. So a reader that loses its connection
//! goes on with another one, and neither loses nor repeats an event.

use tokio_postgres::GenericClient;

use crate::contract;
use crate::contract::{Batch, Cursor};
use crate::error::Result;

/// A reader of the event log.
#[derive(Clone, Debug)]
pub struct Follower {
    cursor: Cursor,
    page_size: i32,
}

impl Follower {
    /// From now on (`None`), from the first event that the log has (0), after the event with that id, or at the last events of
    /// so many (-10).
    pub async fn begin(client: &impl GenericClient, since: Option<i64>, page_size: i32) -> Result<Self> {
        Ok(Self::at(contract::event_position(client, since).await?, page_size))
    }

    /// From where another reader stopped.
    pub fn at(cursor: Cursor, page_size: i32) -> Self {
        Self { cursor, page_size }
    }

    /// The next page; the same one again until [`Follower::pass`].
    pub async fn read(&self, client: &impl GenericClient) -> Result<Batch> {
        contract::read_events(client, &self.cursor, self.page_size).await
    }

    /// Moves on behind a page that was handed on; true once there is nothing more.
    pub fn pass(&mut self, page: Batch) -> bool {
        self.cursor = page.next;
        page.caught_up
    }
}

/// Whether the log has grown since the last look, at a cost that does not depend on how much. The first look says that it has.
#[derive(Debug, Default)]
pub struct Watch {
    seen: Option<Cursor>,
}

impl Watch {
    /// After an error the next look is a first one.
    pub async fn has_grown(&mut self, client: &impl GenericClient) -> Result<bool> {
        if let Some(seen) = self.seen.take()
            && !contract::has_events(client, &seen).await?
        {
            self.seen = Some(seen);
            return Ok(false);
        }
        self.seen = Some(contract::event_position(client, None).await?);
        Ok(true)
    }

    /// Forgets what was seen.
    pub fn reset(&mut self) {
        self.seen = None;
    }
}
