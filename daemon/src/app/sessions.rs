//! Sessions: who is logged in, and the end of it.

use futures_util::Stream;
use jiff::Timestamp;
use tokio_postgres::Client;
use uuid::Uuid;

use crate::contract;
use crate::contract::document::Document;
use crate::error::Result;

/// Rows of `tollgate.list_sessions`.
pub async fn list(client: &Client, user: &str) -> Result<impl Stream<Item = Result<Document>> + use<>> {
    contract::list_sessions(client, user).await
}

/// What is ended.
#[derive(Clone, Copy, Debug)]
pub enum End<'a> {
    /// One session, if it is that user's, where one is named.
    Session { id: Uuid, user: Option<&'a str> },
    /// All sessions of a user.
    User(&'a str),
}

/// How many sessions were ended.
pub async fn revoke(client: &Client, what: End<'_>, reason: Option<&str>) -> Result<u64> {
    match what {
        End::Session { id, user } => contract::revoke_session(client, id, user, reason).await.map(u64::from),
        End::User(user) => contract::revoke_all_sessions(client, user, reason).await,
    }
}

/// Ends all sessions that were opened or last refreshed before a moment, in short transactions, and calls `progress` after
/// each with the number so far.
pub async fn invalidate(client: &Client, before: Timestamp, mut progress: impl FnMut(u64)) -> Result<u64> {
    let mut total = 0;
    loop {
        let ended = contract::invalidate_sessions(client, before).await?;
        if ended == 0 {
            return Ok(total);
        }
        total += ended;
        progress(total);
    }
}
