//! Trusted issuers, and the keys that are fetched from them.

use futures_util::Stream;
use postgres_types::{Json, ToSql};
use serde::Deserialize;
use tokio_postgres::GenericClient;

use super::document::Document;
use super::leadership::{Fence, fenced};
use super::query::{documents, one};
use crate::error::{Doing as _, Result};

/// The arguments of `tollgate.trust_issuer`, which knows what holds where one is not given.
#[derive(Clone, Debug)]
pub struct NewIssuer {
    pub issuer: String,
    pub user_prefix: String,
    pub audience: Vec<String>,
    /// JSON.
    pub jwks: Option<String>,
    pub jwks_url: Option<String>,
    pub scopes: Option<Vec<String>>,
    pub user_claim: Option<String>,
    pub scope_claims: Option<Vec<String>>,
    pub algorithms: Option<Vec<String>>,
    pub types: Option<Vec<String>>,
    /// JSON.
    pub required_claims: Option<String>,
    pub max_lifetime: Option<std::time::Duration>,
}

pub async fn trust_issuer(client: &impl GenericClient, new: &NewIssuer) -> Result<()> {
    fn given<'a, T: ToSql + Sync>(
        argument: &'static str,
        value: Option<&'a T>,
    ) -> Option<(&'static str, &'a (dyn ToSql + Sync))> {
        value.map(|value| (argument, value as &(dyn ToSql + Sync)))
    }
    let seconds = new.max_lifetime.map(|time| time.as_secs_f64());
    let arguments = [
        given("issuer => $", Some(&new.issuer)),
        given("user_prefix => $", Some(&new.user_prefix)),
        given("audience => $", Some(&new.audience)),
        given("jwks => $::text::jsonb", new.jwks.as_ref()),
        given("jwks_url => $", new.jwks_url.as_ref()),
        given("scopes => $", new.scopes.as_ref()),
        given("user_claim => $", new.user_claim.as_ref()),
        given("scope_claims => $", new.scope_claims.as_ref()),
        given("algorithms => $", new.algorithms.as_ref()),
        given("types => $", new.types.as_ref()),
        given("required_claims => $::text::jsonb", new.required_claims.as_ref()),
        given("max_lifetime => make_interval(secs => $)", seconds.as_ref()),
    ];
    let (names, values): (Vec<_>, Vec<_>) = arguments.into_iter().flatten().unzip();
    let numbered = names.iter().zip(1..).map(|(name, number)| name.replace('$', &format!("${number}")));
    let call = format!("select tollgate.trust_issuer({})", numbered.collect::<Vec<_>>().join(", "));
    client.execute(&call, &values).await.doing("trust the issuer").map(drop)
}

/// False if it was not trusted.
pub async fn distrust_issuer(
    client: &impl GenericClient,
    issuer: &str,
    reason: Option<&str>,
) -> Result<bool> {
    one(client, "distrust the issuer", "select tollgate.distrust_issuer($1, $2)", &[&issuer, &reason]).await
}

/// Rows of `tollgate.trusted_issuers`.
pub async fn list_trusted_issuers<C: GenericClient>(
    client: &C,
) -> Result<impl Stream<Item = Result<Document>> + use<C>> {
    let statement = "select to_jsonb(i) from tollgate.trusted_issuers i order by i.issuer";
    documents(client, "list the issuers", statement, &[]).await
}

/// Whether our role has the capability `key_fetcher`, which the functions below need.
pub async fn may_fetch_keys(client: &impl GenericClient) -> Result<bool> {
    one(
        client,
        "look up our capabilities",
        "select has_function_privilege('tollgate.store_issuer_keys(text, text, interval, text)', 'execute')",
        &[],
    )
    .await
}

/// An issuer whose keys are to be fetched now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DueIssuer {
    pub issuer: String,
    /// `None`: its discovery document has the address.
    pub jwks_url: Option<String>,
    pub reason: String,
}

pub async fn issuers_due(client: &impl GenericClient) -> Result<Vec<DueIssuer>> {
    const DOING: &str = "look for issuers whose keys are to be fetched";
    let rows = client
        .query("select issuer, jwks_url, reason from tollgate.issuers_due()", &[])
        .await
        .doing(DOING)?;
    rows.iter()
        .map(|row| {
            Ok(DueIssuer {
                issuer: row.try_get(0).doing(DOING)?,
                jwks_url: row.try_get(1).doing(DOING)?,
                reason: row.try_get(2).doing(DOING)?,
            })
        })
        .collect()
}

/// What the database made of a key set.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct StoredKeys {
    /// How many keys the issuer has now; 0 if the set has none that can be used, and those that it had before stay.
    pub stored: i32,
    /// Why keys, or all of the set, were left out.
    pub detail: Option<String>,
}

pub async fn store_issuer_keys(
    client: &impl GenericClient,
    fence: Option<&Fence>,
    issuer: &str,
    fetched_from: Option<&str>,
    jwks: &str,
    max_age: Option<std::time::Duration>,
) -> Result<StoredKeys> {
    let call =
        fenced("select to_jsonb(tollgate.store_issuer_keys($1, $2, make_interval(secs => $3), $4))", fence);
    let seconds = max_age.map(|age| age.as_secs_f64());
    let stored: Json<StoredKeys> =
        one(client, "store the keys of the issuer", &call, &[&issuer, &jwks, &seconds, &fetched_from])
            .await?;
    Ok(stored.0)
}

/// Has the keys that it had stay, and be fetched again some time later.
pub async fn note_issuer_failure(
    client: &impl GenericClient,
    fence: Option<&Fence>,
    issuer: &str,
    problem: &str,
) -> Result<()> {
    let call = fenced("select tollgate.note_issuer_failure($1, $2)", fence);
    client.execute(&call, &[&issuer, &problem]).await.doing("note what is wrong with the issuer").map(drop)
}
