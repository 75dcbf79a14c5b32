//! Quotas: setting and listing them, and the leases that servers spend.

use futures_util::Stream;
use tokio_postgres::GenericClient;
use uuid::Uuid;

use super::document::Document;
use super::leadership::{Fence, fenced};
use super::query::{documents, one, unsigned};
use crate::error::{Doing as _, Result};

/// Whose quota it is.
#[derive(Clone, Debug)]
pub enum QuotaSubject {
    Token(Uuid),
    User(String),
}

impl QuotaSubject {
    /// The arguments token_id and user_id.
    fn arguments(&self) -> (Option<Uuid>, Option<&str>) {
        match self {
            QuotaSubject::Token(id) => (Some(*id), None),
            QuotaSubject::User(user) => (None, Some(user)),
        }
    }
}

/// The other arguments of `tollgate.set_quota`.
#[derive(Clone, Debug)]
pub struct NewQuota {
    pub amount: i64,
    pub per: String,
    pub time_zone: String,
    pub lease: Option<i64>,
    pub without_daemon: String,
}

pub async fn set_quota(client: &impl GenericClient, subject: &QuotaSubject, new: &NewQuota) -> Result<()> {
    let (token, user) = subject.arguments();
    client
        .execute(
            "select tollgate.set_quota($1, $2, $3, $4, $5, $6, $7)",
            &[&token, &user, &new.amount, &new.per, &new.time_zone, &new.lease, &new.without_daemon],
        )
        .await
        .doing("set the quota")
        .map(drop)
}

/// How many uses there are in all.
pub async fn add_credits(client: &impl GenericClient, subject: &QuotaSubject, credits: i64) -> Result<i64> {
    let (token, user) = subject.arguments();
    one(client, "add credits", "select tollgate.add_credits($1, $2, $3)", &[&token, &user, &credits]).await
}

/// False if there was none.
pub async fn remove_quota(
    client: &impl GenericClient,
    subject: &QuotaSubject,
    reason: Option<&str>,
) -> Result<bool> {
    let (token, user) = subject.arguments();
    one(client, "remove the quota", "select tollgate.remove_quota($1, $2, $3)", &[&token, &user, &reason])
        .await
}

/// Rows of `tollgate.quota_state`: the quotas that a token spends, or that of a user.
pub async fn quotas_of<C: GenericClient>(
    client: &C,
    subject: &QuotaSubject,
) -> Result<impl Stream<Item = Result<Document>> + use<C>> {
    const DOING: &str = "look at the quota";
    match subject {
        QuotaSubject::Token(id) => {
            documents(client, DOING, "select to_jsonb(q) from tollgate.token_quota($1) q", &[id]).await
        }
        QuotaSubject::User(user) => {
            documents(client, DOING, "select to_jsonb(q) from tollgate.user_quota($1) q", &[user]).await
        }
    }
}

/// The same of all, or of a page of at most `limit` after one.
pub async fn list_quotas<C: GenericClient>(
    client: &C,
    limit: Option<i32>,
    after: Option<Uuid>,
) -> Result<impl Stream<Item = Result<Document>> + use<C>> {
    let statement = "select to_jsonb(q) from tollgate.list_quotas($1, $2) q";
    documents(client, "list the quotas", statement, &[&limit, &after]).await
}

/// What a standby asks to lease, as it stands in `tollgate.lease_request[]`: signed, and nothing that we look into.
#[derive(Clone, Debug, PartialEq)]
pub struct LeaseRequests(String);

/// `None` if it asks for nothing.
pub async fn drain_lease_requests(client: &impl GenericClient) -> Result<Option<LeaseRequests>> {
    let statement = "select array_agg(w)::text from tollgate.drain_lease_requests() w";
    let text: Option<String> = one(client, "drain the requests for quotas", statement, &[]).await?;
    Ok(text.map(LeaseRequests))
}

/// Has the primary lease what it and, with `requests`, a standby will soon have used up. How many leases were granted.
pub async fn lease_quotas(
    client: &impl GenericClient,
    fence: Option<&Fence>,
    requests: Option<&LeaseRequests>,
) -> Result<u64> {
    const DOING: &str = "lease quotas";
    let statement =
        fenced("select tollgate.lease_quotas(coalesce($1::text, '{}')::tollgate.lease_request[])", fence);
    let rows = client.query(&statement, &[&requests.map(|requests| &requests.0)]).await.doing(DOING)?;
    match rows.first() {
        Some(row) => unsigned("lease_quotas", row.try_get(0).doing(DOING)?),
        None => Ok(0),
    }
}

/// Has a server forget quotas that were removed. How many they were.
pub async fn forget_removed_quotas(client: &impl GenericClient) -> Result<u64> {
    let forgotten =
        one(client, "forget removed quotas", "select tollgate.forget_removed_quotas()", &[]).await?;
    unsigned("forget_removed_quotas", forgotten)
}
