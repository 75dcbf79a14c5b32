//! Sessions, which refresh tokens go on with.

use futures_util::Stream;
use jiff::Timestamp;
use tokio_postgres::GenericClient;
use uuid::Uuid;

use super::document::Document;
use super::query::{documents, one, unsigned};
use crate::error::Result;

/// Rows of `tollgate.list_sessions`.
pub async fn list_sessions<C: GenericClient>(
    client: &C,
    user_id: &str,
) -> Result<impl Stream<Item = Result<Document>> + use<C>> {
    documents(
        client,
        "list the sessions",
        "select to_jsonb(s) from tollgate.list_sessions($1) s order by s.id",
        &[&user_id],
    )
    .await
}

/// False if there is no such session of that user, or it has ended.
pub async fn revoke_session(
    client: &impl GenericClient,
    id: Uuid,
    user_id: Option<&str>,
    reason: Option<&str>,
) -> Result<bool> {
    one(client, "end the session", "select tollgate.revoke_session($1, $2, $3)", &[&id, &user_id, &reason])
        .await
}

/// How many there were.
pub async fn revoke_all_sessions(
    client: &impl GenericClient,
    user_id: &str,
    reason: Option<&str>,
) -> Result<u64> {
    let count = one(
        client,
        "end the user's sessions",
        "select tollgate.revoke_all_sessions($1, $2)",
        &[&user_id, &reason],
    )
    .await?;
    unsigned("revoke_all_sessions", count)
}

/// How many of those that were opened or last refreshed before that moment were ended: one batch, 0 when none is left.
pub async fn invalidate_sessions(client: &impl GenericClient, before: Timestamp) -> Result<u64> {
    let count =
        one(client, "end the sessions", "select tollgate.invalidate_sessions($1)", &[&before]).await?;
    unsigned("invalidate_sessions", count)
}
