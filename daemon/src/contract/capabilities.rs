//! Capabilities of roles. What belongs to one is decided in the database alone, which is asked for it.

use futures_util::Stream;
use tokio_postgres::GenericClient;

use super::document::Document;
use super::query::documents;
use crate::error::{Doing as _, Result};

/// Rows of `tollgate.capability_grants`.
pub async fn list_capability_grants<C: GenericClient>(
    client: &C,
) -> Result<impl Stream<Item = Result<Document>> + use<C>> {
    documents(
        client,
        "list the capabilities",
        "select to_jsonb(g) from tollgate.capability_grants g order by g.role, g.capability",
        &[],
    )
    .await
}

pub async fn grant_capability(client: &impl GenericClient, role: &str, capability: &str) -> Result<()> {
    client
        .execute(
            "select tollgate.grant_capability(quote_ident($1::text)::regrole, $2)",
            &[&role, &capability],
        )
        .await
        .doing("grant the capability")
        .map(drop)
}

pub async fn revoke_capability(client: &impl GenericClient, role: &str, capability: &str) -> Result<()> {
    client
        .execute(
            "select tollgate.revoke_capability(quote_ident($1::text)::regrole, $2)",
            &[&role, &capability],
        )
        .await
        .doing("revoke the capability")
        .map(drop)
}

/// The least capability that gives what the role that asks lacks to call one of these functions, or to read one of these views;
/// `None` if it lacks nothing.
pub async fn needed_capability(
    client: &impl GenericClient,
    object: &str,
) -> Result<Option<(String, String)>> {
    const DOING: &str = "look up privileges";
    let row = client
        .query_opt(
            "select c.capability, quote_ident(current_user) \
             from tollgate.list_own_capabilities() c \
             where exists (select from unnest(c.missing) m (object) \
                           where split_part(m.object, '(', 1) = 'tollgate.' || quote_ident($1::text)) \
             order by array_position('{verifier,issuer,key_fetcher,gateway,operator,admin}', c.capability) limit 1",
            &[&object],
        )
        .await
        .doing(DOING)?;
    row.map(|row| Ok((row.try_get(0).doing(DOING)?, row.try_get(1).doing(DOING)?))).transpose()
}
