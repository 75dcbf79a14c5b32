//! The catalogue of scopes.

use futures_util::Stream;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::contract;
use crate::contract::document::Document;
use crate::error::Result;

/// Rows of `tollgate.list_scopes`.
pub async fn list(client: &Client) -> Result<impl Stream<Item = Result<Document>> + use<>> {
    contract::list_scopes(client).await
}

pub async fn define(client: &Client, name: &str, description: &str) -> Result<()> {
    contract::define_scope(client, name, description).await
}

pub async fn drop(client: &Client, name: &str) -> Result<()> {
    contract::drop_scope(client, name).await.map_err(|error| {
        error.or_remedy(&SqlState::UNDEFINED_OBJECT, "give a name as `tollgated scope list` shows it")
    })
}
