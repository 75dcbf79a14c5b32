//! Keys that sign URLs.

use std::time::Duration;

use futures_util::Stream;
use tokio_postgres::Client;

use crate::contract;
use crate::contract::document::Document;
use crate::error::Result;
use crate::secret::Secret;

/// Rows of `tollgate.url_keys`.
pub async fn list(client: &Client) -> Result<impl Stream<Item = Result<Document>> + use<>> {
    contract::list_url_keys(client).await
}

/// Creates the first key of a name, and returns its id.
pub async fn create(client: &Client, name: &str) -> Result<String> {
    contract::create_url_key(client, name).await
}

/// Creates the next key of a name, and returns its id.
pub async fn rotate(client: &Client, name: &str, signs_in: Option<Duration>) -> Result<String> {
    contract::rotate_url_key(client, name, signs_in).await
}

/// The key itself, for a server that verifies without the database, and could sign.
pub async fn export(client: &Client, key_id: &str) -> Result<Secret> {
    Ok(Secret::new(contract::export_url_key(client, key_id).await?))
}

/// False if there is no such key, or it was withdrawn before.
pub async fn withdraw(client: &Client, key_id: &str, reason: Option<&str>) -> Result<bool> {
    contract::withdraw_url_key(client, key_id, reason).await
}
