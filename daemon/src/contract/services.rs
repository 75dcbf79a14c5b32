//! Service accounts.

use futures_util::Stream;
use jiff::Timestamp;
use postgres_types::{Json, ToSql};
use serde_json::Value;
use tokio_postgres::GenericClient;
use uuid::Uuid;

use super::document::Document;
use super::query::{documents, many, one};
use super::tokens::Ending;
use crate::error::{Doing as _, Result};

/// The fields of a service account; what is not given stays, or is as `tollgate.create_service_account` has it.
#[derive(Clone, Debug, Default)]
pub struct ServiceFields {
    pub name: Option<String>,
    pub scopes: Option<Vec<String>>,
    pub audience: Option<Vec<String>>,
    pub lifetime: Option<std::time::Duration>,
    pub description: Option<String>,
    pub owner: Option<String>,
}

pub async fn create_service_account(
    client: &impl GenericClient,
    id: &str,
    fields: &ServiceFields,
) -> Result<()> {
    let scopes = fields.scopes.as_deref().unwrap_or_default();
    call_with(client, "create the service account", "create_service_account", id, fields, Some(scopes)).await
}

pub async fn update_service_account(
    client: &impl GenericClient,
    id: &str,
    fields: &ServiceFields,
) -> Result<()> {
    let scopes = fields.scopes.as_deref();
    call_with(client, "change the service account", "update_service_account", id, fields, scopes).await
}

/// The two take the same arguments.
async fn call_with(
    client: &impl GenericClient,
    doing: &str,
    function: &str,
    id: &str,
    fields: &ServiceFields,
    scopes: Option<&[String]>,
) -> Result<()> {
    let call = format!("select tollgate.{function}($1, $2, $3, $4, make_interval(secs => $5), $6, $7)");
    let seconds = fields.lifetime.map(|time| time.as_secs_f64());
    let values: [&(dyn ToSql + Sync); 7] =
        [&id, &fields.name, &scopes, &fields.audience, &seconds, &fields.description, &fields.owner];
    client.execute(&call, &values).await.doing(doing).map(drop)
}

/// Rows of `tollgate.list_service_accounts`, at most so many after an id.
pub async fn list_service_accounts(
    client: &impl GenericClient,
    most: i32,
    after: Option<&str>,
) -> Result<Vec<Document>> {
    let statement =
        "select to_jsonb(s) from tollgate.list_service_accounts(max_accounts => $1, after => $2) s";
    let rows =
        many::<Json<Document>>(client, "list the service accounts", statement, &[&most, &after]).await?;
    Ok(rows.into_iter().map(|Json(row)| row).collect())
}

/// The same, of one; nothing if there is none.
pub async fn show_service_account<C: GenericClient>(
    client: &C,
    id: &str,
) -> Result<impl Stream<Item = Result<Document>> + use<C>> {
    let statement = "select to_jsonb(s) from tollgate.list_service_accounts($1) s";
    documents(client, "look up the service account", statement, &[&id]).await
}

/// False if there is none, or it is so already.
pub async fn set_service_account_enabled(
    client: &impl GenericClient,
    id: &str,
    enabled: bool,
    reason: Option<&str>,
) -> Result<bool> {
    let (doing, call) = match enabled {
        true => ("enable the service account", "select tollgate.enable_service_account($1, $2)"),
        false => ("disable the service account", "select tollgate.disable_service_account($1, $2)"),
    };
    one(client, doing, call, &[&id, &reason]).await
}

/// False if there is none.
pub async fn delete_service_account(
    client: &impl GenericClient,
    id: &str,
    reason: Option<&str>,
) -> Result<bool> {
    let call = "select tollgate.delete_service_account($1, $2)";
    one(client, "delete the service account", call, &[&id, &reason]).await
}

/// `tollgate.issued_token`, with the plaintext in it.
pub async fn create_service_account_secret(
    client: &impl GenericClient,
    id: &str,
    name: Option<&str>,
    ending: &Ending,
    allowed_ips: Option<&[String]>,
) -> Result<Value> {
    let seconds = ending.expires_in.map(|time| time.as_secs_f64());
    let moment: Option<Timestamp> = ending.expires_at;
    one(
        client,
        "create the secret",
        "select to_jsonb(t) from tollgate.create_service_account_secret(\
             $1, $2, make_interval(secs => $3), $4, $5::text[]::cidr[]) t",
        &[&id, &name, &seconds, &moment, &allowed_ips],
    )
    .await
}

/// With neither it has no keys.
pub async fn set_service_account_keys(
    client: &impl GenericClient,
    id: &str,
    jwks: Option<&str>,
    jwks_url: Option<&str>,
) -> Result<()> {
    let call = "select tollgate.set_service_account_keys($1, $2::text::jsonb, $3)";
    let values: [&(dyn ToSql + Sync); 3] = [&id, &jwks, &jwks_url];
    client.execute(call, &values).await.doing("change the keys of the service account").map(drop)
}

/// The id of the trust. The conditions are JSON.
pub async fn trust_workload(
    client: &impl GenericClient,
    id: &str,
    issuer: &str,
    conditions: &str,
    audience: Option<&str>,
) -> Result<Uuid> {
    let call = "select tollgate.trust_workload($1, $2, $3::text::jsonb, $4)";
    one(client, "trust the workload", call, &[&id, &issuer, &conditions, &audience]).await
}

/// False if there is none.
pub async fn distrust_workload(
    client: &impl GenericClient,
    workload: Uuid,
    reason: Option<&str>,
) -> Result<bool> {
    let call = "select tollgate.distrust_workload($1, $2)";
    one(client, "end the trust in the workload", call, &[&workload, &reason]).await
}
