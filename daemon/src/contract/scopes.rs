//! The catalogue of scopes.

use futures_util::Stream;
use tokio_postgres::GenericClient;

use super::document::Document;
use super::query::documents;
use crate::error::{Doing as _, Result};

/// Rows of `tollgate.list_scopes`.
pub async fn list_scopes<C: GenericClient>(
    client: &C,
) -> Result<impl Stream<Item = Result<Document>> + use<C>> {
    documents(client, "list the scopes", "select to_jsonb(s) from tollgate.list_scopes() s", &[]).await
}

pub async fn define_scope(client: &impl GenericClient, name: &str, description: &str) -> Result<()> {
    client
        .execute("select tollgate.define_scope($1, $2)", &[&name, &description])
        .await
        .doing("define the scope")
        .map(drop)
}

pub async fn drop_scope(client: &impl GenericClient, name: &str) -> Result<()> {
    client.execute("select tollgate.drop_scope($1)", &[&name]).await.doing("drop the scope").map(drop)
}
