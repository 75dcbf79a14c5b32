//! Keys with which other systems made the digests of their tokens.

use futures_util::Stream;
use tokio_postgres::Client;

use crate::contract;
use crate::contract::document::Document;
use crate::error::Result;

/// Rows of `tollgate.import_keys`.
pub async fn list(client: &Client) -> Result<impl Stream<Item = Result<Document>> + use<>> {
    contract::list_import_keys(client).await
}

/// Stores a key, or replaces the one of that name.
pub async fn store(client: &Client, name: &str, key: &[u8]) -> Result<()> {
    contract::store_import_key(client, name, key).await
}

/// Deletes a key that no token needs.
pub async fn drop(client: &Client, name: &str) -> Result<()> {
    contract::drop_import_key(client, name).await
}
