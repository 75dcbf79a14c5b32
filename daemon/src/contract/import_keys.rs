//! Keys with which other systems made the digests of their tokens.

use futures_util::Stream;
use tokio_postgres::GenericClient;

use super::document::Document;
use super::query::documents;
use crate::error::{Doing as _, Result};

/// Rows of `tollgate.import_keys`.
pub async fn list_import_keys<C: GenericClient>(
    client: &C,
) -> Result<impl Stream<Item = Result<Document>> + use<C>> {
    documents(client, "list the keys", "select to_jsonb(k) from tollgate.import_keys k", &[]).await
}

/// Stores a key, or replaces the one of that name.
pub async fn store_import_key(client: &impl GenericClient, name: &str, key: &[u8]) -> Result<()> {
    let call = "select tollgate.store_import_key($1, $2)";
    client.execute(call, &[&name, &key]).await.doing("store the key").map(drop)
}

/// Fails while tokens need it.
pub async fn drop_import_key(client: &impl GenericClient, name: &str) -> Result<()> {
    client.execute("select tollgate.drop_import_key($1)", &[&name]).await.doing("drop the key").map(drop)
}
