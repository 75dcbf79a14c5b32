//! Keys that sign URLs.

use futures_util::Stream;
use tokio_postgres::GenericClient;

use super::document::Document;
use super::query::{documents, one};
use crate::error::Result;

/// Rows of `tollgate.url_keys`.
pub async fn list_url_keys<C: GenericClient>(
    client: &C,
) -> Result<impl Stream<Item = Result<Document>> + use<C>> {
    documents(client, "list the keys", "select to_jsonb(k) from tollgate.url_keys k", &[]).await
}

/// The id of the new key.
pub async fn create_url_key(client: &impl GenericClient, name: &str) -> Result<String> {
    one(client, "create the key", "select tollgate.create_url_key($1)", &[&name]).await
}

/// The id of the new key.
pub async fn rotate_url_key(
    client: &impl GenericClient,
    name: &str,
    signs_in: Option<std::time::Duration>,
) -> Result<String> {
    let seconds = signs_in.map(|time| time.as_secs_f64());
    one(
        client,
        "rotate the key",
        "select tollgate.rotate_url_key($1, make_interval(secs => $2))",
        &[&name, &seconds],
    )
    .await
}

/// The key itself.
pub async fn export_url_key(client: &impl GenericClient, key_id: &str) -> Result<String> {
    one(client, "export the key", "select tollgate.export_url_key($1)", &[&key_id]).await
}

/// False if there is no such key, or it was withdrawn before.
pub async fn withdraw_url_key(
    client: &impl GenericClient,
    key_id: &str,
    reason: Option<&str>,
) -> Result<bool> {
    one(client, "withdraw the key", "select tollgate.withdraw_url_key($1, $2)", &[&key_id, &reason]).await
}
