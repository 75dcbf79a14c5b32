//! Service accounts: create, find, change, end; and what they prove themselves by.

use futures_util::{Stream, StreamExt as _, TryStreamExt as _, stream};
use serde_json::Value;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use uuid::Uuid;

use crate::contract;
use crate::contract::Ending;
pub use crate::contract::ServiceFields;
use crate::contract::document::Document;
use crate::error::{Error, Result};

/// So many rows are asked for at a time.
const PAGE: i32 = 1000;

pub async fn create(client: &Client, id: &str, fields: &ServiceFields) -> Result<()> {
    contract::create_service_account(client, id, fields).await
}

pub async fn update(client: &Client, id: &str, fields: &ServiceFields) -> Result<()> {
    contract::update_service_account(client, id, fields).await.map_err(no_such_account)
}

/// Rows of `tollgate.service_accounts` in the order of their ids, page by page, so that any number of them can be listed.
pub fn list(client: &Client) -> impl Stream<Item = Result<Document>> {
    stream::try_unfold(Some(String::new()), move |after| async move {
        let Some(after) = after else { return Ok(None) };
        let rows = contract::list_service_accounts(client, PAGE, Some(&after)).await?;
        // A page that is not whole is the last one.
        let next = rows.last().filter(|_| rows.len() == PAGE as usize).map(|last| last.field("id"));
        Ok::<_, Error>(Some((stream::iter(rows).map(Ok), next)))
    })
    .try_flatten()
}

/// `None` if there is none.
pub async fn show(client: &Client, id: &str) -> Result<Option<Document>> {
    let rows: Vec<Document> = contract::show_service_account(client, id).await?.try_collect().await?;
    Ok(rows.into_iter().next())
}

/// False if there is none, or it is so already.
pub async fn set_enabled(client: &Client, id: &str, enabled: bool, reason: Option<&str>) -> Result<bool> {
    contract::set_service_account_enabled(client, id, enabled, reason).await
}

/// False if there is none.
pub async fn delete(client: &Client, id: &str, reason: Option<&str>) -> Result<bool> {
    contract::delete_service_account(client, id, reason).await
}

/// The issued token, with the plaintext in it: the only time that it is there.
pub async fn create_secret(
    client: &Client,
    id: &str,
    name: Option<&str>,
    ending: &Ending,
    allowed_ips: Option<&[String]>,
) -> Result<Value> {
    contract::create_service_account_secret(client, id, name, ending, allowed_ips)
        .await
        .map_err(no_such_account)
}

/// With neither it has no keys.
pub async fn set_keys(client: &Client, id: &str, jwks: Option<&str>, jwks_url: Option<&str>) -> Result<()> {
    contract::set_service_account_keys(client, id, jwks, jwks_url).await.map_err(no_such_account)
}

/// The id of the trust.
pub async fn trust_workload(
    client: &Client,
    id: &str,
    issuer: &str,
    conditions: &str,
    audience: Option<&str>,
) -> Result<Uuid> {
    contract::trust_workload(client, id, issuer, conditions, audience).await
}

/// False if there is none.
pub async fn distrust_workload(client: &Client, workload: Uuid, reason: Option<&str>) -> Result<bool> {
    contract::distrust_workload(client, workload, reason).await
}

fn no_such_account(error: Error) -> Error {
    error.or_remedy(
        &SqlState::UNDEFINED_OBJECT,
        "give the id of a service account as `tollgated service list` shows it",
    )
}
