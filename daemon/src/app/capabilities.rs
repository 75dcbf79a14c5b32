//! Who may do what: capabilities of database roles.

use futures_util::Stream;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::contract;
use crate::contract::document::Document;
use crate::error::{Error, Result};

/// Rows of `tollgate.capability_grants`.
pub async fn list(client: &Client) -> Result<impl Stream<Item = Result<Document>> + use<>> {
    contract::list_capability_grants(client).await
}

pub async fn grant(client: &Client, role: &str, capability: &str) -> Result<()> {
    contract::grant_capability(client, role, capability).await.map_err(no_such_role)
}

pub async fn revoke(client: &Client, role: &str, capability: &str) -> Result<()> {
    contract::revoke_capability(client, role, capability).await.map_err(no_such_role)
}

fn no_such_role(error: Error) -> Error {
    error.or_remedy(
        &SqlState::UNDEFINED_OBJECT,
        "name a role as the server has it, or have it made with CREATE ROLE",
    )
}
