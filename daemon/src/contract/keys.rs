//! Signing keys, and the master keys that seal them.

use futures_util::Stream;
use tokio_postgres::GenericClient;

use super::document::Document;
use super::leadership::{Fence, fenced};
use super::query::{documents, many, one, unsigned};
use crate::error::Result;

/// Rows of `tollgate.signing_keys`.
pub async fn list_signing_keys<C: GenericClient>(
    client: &C,
) -> Result<impl Stream<Item = Result<Document>> + use<C>> {
    documents(client, "list the keys", "select to_jsonb(k) from tollgate.signing_keys k", &[]).await
}

/// The kid of the new key.
pub async fn create_signing_key(
    client: &impl GenericClient,
    algorithm: &str,
    signs_in: Option<std::time::Duration>,
) -> Result<String> {
    let seconds = signs_in.map(|time| time.as_secs_f64());
    one(
        client,
        "create the key",
        "select tollgate.create_signing_key($1, make_interval(secs => $2))",
        &[&algorithm, &seconds],
    )
    .await
}

/// The kid of the new key.
pub async fn rotate_signing_key(
    client: &impl GenericClient,
    signs_in: Option<std::time::Duration>,
) -> Result<String> {
    let seconds = signs_in.map(|time| time.as_secs_f64());
    one(
        client,
        "rotate the key",
        "select tollgate.rotate_signing_key(make_interval(secs => $1))",
        &[&seconds],
    )
    .await
}

/// The kid of the next key, if one was created.
pub async fn rotate_due_signing_key(
    client: &impl GenericClient,
    fence: Option<&Fence>,
    every: std::time::Duration,
) -> Result<Option<String>> {
    let call = fenced("select tollgate.rotate_due_signing_key(make_interval(secs => $1))", fence);
    one(client, "rotate the key", &call, &[&every.as_secs_f64()]).await
}

/// The kid of the imported key.
pub async fn import_signing_key(
    client: &impl GenericClient,
    pem: &str,
    signs_in: Option<std::time::Duration>,
) -> Result<String> {
    let seconds = signs_in.map(|time| time.as_secs_f64());
    one(
        client,
        "import the key",
        "select tollgate.import_signing_key($1, make_interval(secs => $2))",
        &[&pem, &seconds],
    )
    .await
}

/// False if there is no such key, or it was withdrawn before.
pub async fn withdraw_signing_key(
    client: &impl GenericClient,
    kid: &str,
    reason: Option<&str>,
) -> Result<bool> {
    one(client, "withdraw the key", "select tollgate.withdraw_signing_key($1, $2)", &[&kid, &reason]).await
}

/// How many private keys were sealed with another master key than the first.
pub async fn reseal_signing_keys(client: &impl GenericClient) -> Result<u64> {
    let count = one(client, "reseal the keys", "select tollgate.reseal_signing_keys()", &[]).await?;
    unsigned("reseal_signing_keys", count)
}

/// The ids of the master keys that a server has loaded, the one that seals first.
pub async fn loaded_master_keys(client: &impl GenericClient) -> Result<Vec<String>> {
    many(client, "list the master keys", "select m.id from tollgate.list_master_keys() m where m.loaded", &[])
        .await
}
