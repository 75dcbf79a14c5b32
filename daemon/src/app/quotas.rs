//! Quotas.

use futures_util::Stream;
use tokio_postgres::Client;
use uuid::Uuid;

use crate::contract;
use crate::contract::document::Document;
use crate::contract::{NewQuota, QuotaSubject};
use crate::error::Result;

/// Sets a quota, or changes one.
pub async fn set(client: &Client, subject: &QuotaSubject, new: &NewQuota) -> Result<()> {
    contract::set_quota(client, subject, new).await
}

/// How many uses there are in all then.
pub async fn add_credits(client: &Client, subject: &QuotaSubject, credits: i64) -> Result<i64> {
    contract::add_credits(client, subject, credits).await
}

/// False if there was none.
pub async fn remove(client: &Client, subject: &QuotaSubject, reason: Option<&str>) -> Result<bool> {
    contract::remove_quota(client, subject, reason).await
}

/// The quotas that a token spends, or that of a user.
pub async fn show(
    client: &Client,
    subject: &QuotaSubject,
) -> Result<impl Stream<Item = Result<Document>> + use<>> {
    contract::quotas_of(client, subject).await
}

/// All, or a page of at most `limit` after one.
pub async fn list(
    client: &Client,
    limit: Option<i32>,
    after: Option<Uuid>,
) -> Result<impl Stream<Item = Result<Document>> + use<>> {
    contract::list_quotas(client, limit, after).await
}
