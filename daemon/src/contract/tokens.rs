//! API tokens: issue, import, list, verify, change, revoke.

use std::net::IpAddr;

use jiff::Timestamp;
use postgres_types::{Json, ToSql};
use serde_json::Value;
use tokio_postgres::GenericClient;
use uuid::Uuid;

use super::document::Document;
use super::query::{many, one, unsigned};
use crate::error::{Doing as _, Result};

/// When a token is to end; not both.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ending {
    pub expires_in: Option<std::time::Duration>,
    pub expires_at: Option<Timestamp>,
}

impl Ending {
    fn seconds(&self) -> Option<f64> {
        self.expires_in.map(|time| time.as_secs_f64())
    }
}

/// What a new token is to be.
#[derive(Debug)]
pub struct NewToken<'a> {
    pub user_id: &'a str,
    pub name: &'a str,
    pub scopes: &'a [String],
    pub ending: Ending,
    /// JSON.
    pub metadata: &'a str,
    pub allowed_ips: Option<&'a [String]>,
    pub rate_limit: Option<i32>,
    pub rate_window: std::time::Duration,
    pub prefix: Option<&'a str>,
}

/// `tollgate.issued_token`, with the plaintext in it.
pub async fn create_api_token(client: &impl GenericClient, new: &NewToken<'_>) -> Result<Value> {
    one(
        client,
        "create the token",
        "select to_jsonb(t) from tollgate.create_api_token(\
             user_id => $1, name => $2, scopes => $3, expires_in => make_interval(secs => $4), \
             metadata => $5::text::jsonb, allowed_ips => $6::text[]::cidr[], rate_limit => $7, \
             rate_window => make_interval(secs => $8), prefix => $9, expires_at => $10) t",
        &[
            &new.user_id,
            &new.name,
            &new.scopes,
            &new.ending.seconds(),
            &new.metadata,
            &new.allowed_ips,
            &new.rate_limit,
            &new.rate_window.as_secs_f64(),
            &new.prefix,
            &new.ending.expires_at,
        ],
    )
    .await
}

/// A token to be taken over by its digest.
#[derive(Clone, Debug, PartialEq)]
pub struct Imported {
    pub user_id: String,
    pub name: String,
    pub token_hash: Vec<u8>,
    pub scopes: Vec<String>,
    pub expires_at: Option<Timestamp>,
    pub created_at: Option<Timestamp>,
    pub last_used_at: Option<Timestamp>,
    pub disabled_at: Option<Timestamp>,
    pub revoked_at: Option<Timestamp>,
    /// JSON, as it was given.
    pub metadata: String,
    pub allowed_ips: Option<Vec<String>>,
    pub rate_limit: Option<i32>,
    pub rate_window: Option<std::time::Duration>,
}

/// What [`import_api_token`] takes, prepared once for many.
pub async fn prepare_import(client: &impl GenericClient) -> Result<tokio_postgres::Statement> {
    client
        .prepare(
            "select tollgate.import_api_token(\
                 user_id => $1, name => $2, token_hash => $3, scopes => $4, expires_at => $5, \
                 metadata => $6::text::jsonb, allowed_ips => $7::text[]::cidr[], rate_limit => $8, \
                 rate_window => make_interval(secs => $9), format => $10, created_at => $11, \
                 last_used_at => $12, disabled_at => $13, revoked_at => $14)",
        )
        .await
        .doing("prepare the import")
}

pub async fn import_api_token(
    client: &impl GenericClient,
    statement: &tokio_postgres::Statement,
    new: &Imported,
    format: &str,
) -> Result<()> {
    client
        .execute(
            statement,
            &[
                &new.user_id,
                &new.name,
                &new.token_hash,
                &new.scopes,
                &new.expires_at,
                &new.metadata,
                &new.allowed_ips,
                &new.rate_limit,
                &new.rate_window.unwrap_or(std::time::Duration::from_secs(60)).as_secs_f64(),
                &format,
                &new.created_at,
                &new.last_used_at,
                &new.disabled_at,
                &new.revoked_at,
            ],
        )
        .await
        .doing("import the token")
        .map(drop)
}

/// The row of `tollgate.tokens`; `None` if there is no such token.
pub async fn show_api_token(client: &impl GenericClient, token_id: Uuid) -> Result<Option<Document>> {
    let rows = many::<Json<Document>>(
        client,
        "look up the token",
        "select to_jsonb(t) from tollgate.tokens t where t.id = $1",
        &[&token_id],
    )
    .await?;
    Ok(rows.into_iter().next().map(|Json(row)| row))
}

/// `tollgate.issued_token`, with the plaintext in it.
pub async fn rotate_api_token(
    client: &impl GenericClient,
    token_id: Uuid,
    grace: std::time::Duration,
    ending: &Ending,
    revoke_on_reuse: bool,
) -> Result<Value> {
    one(
        client,
        "rotate the token",
        "select to_jsonb(t) from tollgate.rotate_api_token(\
             $1, make_interval(secs => $2), make_interval(secs => $3), $4, $5) t",
        &[&token_id, &grace.as_secs_f64(), &ending.seconds(), &ending.expires_at, &revoke_on_reuse],
    )
    .await
}

/// `tollgate.issued_token`, with the plaintext in it. The parent is a bind value: see [`crate::postgres::pool::hide_bind_values`].
pub async fn derive_api_token(
    client: &impl GenericClient,
    parent: &str,
    name: &str,
    scopes: &[String],
    ending: &Ending,
    allowed_ips: Option<&[String]>,
) -> Result<Value> {
    one(
        client,
        "derive the token",
        "select to_jsonb(t) from tollgate.derive_api_token(\
             $1, $2, $3, make_interval(secs => $4), $5::text[]::cidr[], expires_at => $6) t",
        &[&parent, &name, &scopes, &ending.seconds(), &allowed_ips, &ending.expires_at],
    )
    .await
}

/// False when unknown or so already.
pub async fn set_api_token_enabled(
    client: &impl GenericClient,
    token_id: Uuid,
    enabled: bool,
    reason: Option<&str>,
) -> Result<bool> {
    one(
        client,
        if enabled { "enable the token" } else { "disable the token" },
        "select tollgate.set_api_token_enabled($1, $2, $3)",
        &[&token_id, &enabled, &reason],
    )
    .await
}

/// Which rows of a list: so many, after the one with that id.
#[derive(Clone, Copy, Debug)]
pub struct Page {
    pub size: i32,
    pub after: Option<Uuid>,
}

/// Rows of `tollgate.tokens`.
pub async fn list_api_tokens(
    client: &impl GenericClient,
    user_id: &str,
    page: Page,
) -> Result<Vec<Document>> {
    let statement = "select to_jsonb(t) from tollgate.list_api_tokens($1, $2, $3) t";
    let rows = many::<Json<Document>>(client, "list tokens", statement, &[&user_id, &page.size, &page.after])
        .await?;
    Ok(rows.into_iter().map(|Json(row)| row).collect())
}

/// What a token is looked for by; without any, all are meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    pub hint: Option<String>,
    pub name: Option<String>,
    pub status: Option<&'static str>,
}

impl Filter {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Rows of `tollgate.tokens`, of all users unless one is named, and after which token the next page continues, if there may be
/// more. A page may have fewer rows than were asked for, even none, and not be the last one.
pub async fn find_api_tokens(
    client: &impl GenericClient,
    user_id: Option<&str>,
    filter: &Filter,
    page: Page,
) -> Result<(Vec<Document>, Option<Uuid>)> {
    const DOING: &str = "search tokens";
    let statement = "select array(select to_jsonb(t) from unnest(f.tokens) t), f.continue_after \
                     from tollgate.find_api_tokens($1, $2, $3, $4, $5, $6) f";
    let row = client
        .query_one(
            statement,
            &[&user_id, &filter.hint, &filter.name, &filter.status, &page.size, &page.after],
        )
        .await
        .doing(DOING)?;
    let rows: Vec<Json<Document>> = row.try_get(0).doing(DOING)?;
    let continue_after = row.try_get(1).doing(DOING)?;
    Ok((rows.into_iter().map(|Json(row)| row).collect(), continue_after))
}

/// What is changed in a token: keys and values as `tollgate.update_api_token` takes them, and when it is to end.
#[derive(Clone, Debug, Default)]
pub struct Changes {
    /// A JSON object.
    pub fields: String,
    /// Counted by the server's clock.
    pub expires_in: Option<std::time::Duration>,
}

/// The row of `tollgate.tokens` after the change.
pub async fn update_api_token(
    client: &impl GenericClient,
    token_id: Uuid,
    changes: &Changes,
) -> Result<Document> {
    let Json(row) = one(
        client,
        "change the token",
        "select to_jsonb(t) from tollgate.update_api_token($1, $2::text::jsonb || \
             case when $3::float8 is null then '{}' \
                  else jsonb_build_object('expires_at', clock_timestamp() + make_interval(secs => $3)) end) t",
        &[&token_id, &changes.fields, &changes.expires_in.map(|time| time.as_secs_f64())],
    )
    .await?;
    Ok(row)
}

/// `tollgate.verification`.
pub async fn verify_api_token_hash(
    client: &impl GenericClient,
    token_hash: &[u8],
    required_scopes: Option<&[String]>,
    client_ip: Option<IpAddr>,
) -> Result<Document> {
    verify(client, "verify_api_token_hash", &token_hash, required_scopes, client_ip).await
}

/// [`verify_api_token_hash`] of a token that may be stored in the form of another system. The token is a
/// bind value: see [`crate::postgres::pool::hide_bind_values`].
pub async fn verify_api_token(
    client: &impl GenericClient,
    token: &str,
    required_scopes: Option<&[String]>,
    client_ip: Option<IpAddr>,
) -> Result<Document> {
    verify(client, "verify_api_token", &token, required_scopes, client_ip).await
}

async fn verify(
    client: &impl GenericClient,
    function: &str,
    presented: &(dyn ToSql + Sync),
    required_scopes: Option<&[String]>,
    client_ip: Option<IpAddr>,
) -> Result<Document> {
    let statement = format!("select to_jsonb(v) from tollgate.{function}($1, $2, $3) v");
    let Json(verification) =
        one(client, "verify the token", &statement, &[presented, &required_scopes, &client_ip]).await?;
    Ok(verification)
}

/// False when unknown, not that user's, or revoked already.
pub async fn revoke_api_token(
    client: &impl GenericClient,
    token_id: Uuid,
    user_id: Option<&str>,
    reason: Option<&str>,
) -> Result<bool> {
    one(
        client,
        "revoke the token",
        "select tollgate.revoke_api_token($1, $2, $3)",
        &[&token_id, &user_id, &reason],
    )
    .await
}

/// False when unknown or revoked already. The token is a bind value: see [`crate::postgres::pool::hide_bind_values`].
pub async fn revoke_presented_token(
    client: &impl GenericClient,
    token: &str,
    reason: Option<&str>,
) -> Result<bool> {
    one(client, "revoke the token", "select tollgate.revoke_presented_token($1, $2)", &[&token, &reason])
        .await
}

/// How many were revoked.
pub async fn revoke_all_api_tokens(
    client: &impl GenericClient,
    user_id: &str,
    reason: Option<&str>,
) -> Result<u64> {
    let count = one(
        client,
        "revoke the user's tokens",
        "select tollgate.revoke_all_api_tokens($1, $2)",
        &[&user_id, &reason],
    )
    .await?;
    unsigned("revoke_all_api_tokens", count)
}

/// How many API tokens were revoked; sessions and access tokens end too.
pub async fn revoke_user(client: &impl GenericClient, user_id: &str, reason: Option<&str>) -> Result<u64> {
    let count =
        one(client, "revoke the user", "select tollgate.revoke_user($1, $2)", &[&user_id, &reason]).await?;
    unsigned("revoke_user", count)
}
